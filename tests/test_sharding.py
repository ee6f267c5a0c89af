"""Elementwise means that any sharding is taken as it comes: no device asks another one, and the numbers are the same."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxrelu
from cases import each_case

COLLECTIVE = re.compile(r"\b(all-\w+|reduce-scatter|collective-\w+)")
# 8 devices: of 24 x 5, three rows to each, whose 15 elements are no multiple of 8; of 5 x 24, three columns
LAYOUTS = {
    "rows": ((24, 5), PartitionSpec("i", None)),
    "columns": ((5, 24), PartitionSpec(None, "i")),
    "last": ((3, 5, 16), PartitionSpec(None, None, "i")),
    "neither": ((7, 11), PartitionSpec(None, None)),
}


def value_and_gradient(f):
    def both(x, g):
        y, pull = jax.vjp(f, x)
        return y, pull(g)[0]

    return both


def operands(shape):
    x = np.random.default_rng(0).normal(0, 4, shape).astype(np.float32)
    x.ravel()[:3] = 0.0, -0.0, 6.0
    return jnp.asarray(x), jnp.asarray(np.linspace(-2, 3, x.size, dtype=np.float32).reshape(shape))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("layout", LAYOUTS)
@each_case
def test_takes_any_sharding_without_a_collective(case, layout, kind):
    shape, spec = LAYOUTS[layout]
    mesh = jax.make_mesh((8,), ("i",), axis_types=(kind,))
    sharding = NamedSharding(mesh, spec)
    x, g = operands(shape)
    function = jax.jit(value_and_gradient(case.function))
    compiled = function.lower(*jax.device_put((x, g), sharding)).compile()
    assert COLLECTIVE.findall(compiled.as_text()) == []
    results = compiled(*jax.device_put((x, g), sharding))
    for result, wanted in zip(results, function(x, g), strict=True):
        assert result.sharding.is_equivalent_to(sharding, x.ndim)
        np.testing.assert_array_equal(result, wanted)


@each_case
def test_uneven_shards(case):
    # 13 rows over 8 devices: allowed inside jit, under automatic sharding
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
    x, g = operands((13, 5))
    function = value_and_gradient(case.function)

    @jax.jit
    def sharded(x, g):
        x, g = jax.lax.with_sharding_constraint((x, g), NamedSharding(mesh, PartitionSpec("i", None)))
        return function(x, g)

    jax.tree.map(np.testing.assert_array_equal, sharded(x, g), jax.jit(function)(x, g))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_prelu_of_a_sharded_axis(axis_type):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
    x, slope = np.random.default_rng(0).normal(size=(3, 24, 5)).astype(np.float32), np.linspace(0, 1, 24, dtype=np.float32)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "d")))
        slopes = jax.device_put(slope, NamedSharding(mesh, PartitionSpec("d")))
        y = jax.jit(functools.partial(jaxrelu.prelu, axis=1))(sharded, slopes)
        replicated = jax.jit(functools.partial(jaxrelu.prelu, axis=1))(sharded, slope)
    chex.assert_trees_all_equal(np.asarray(y), np.asarray(replicated), np.where(x > 0, x, slope[:, None] * x))


def test_the_check_can_fail():
    sharding = NamedSharding(jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,)), PartitionSpec("i"))
    x = jax.device_put(jnp.arange(24.0), sharding)
    assert COLLECTIVE.findall(jax.jit(jnp.sum).lower(x).compile().as_text()) != []
