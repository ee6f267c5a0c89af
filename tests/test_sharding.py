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
from cases import CASES

COLLECTIVE = re.compile(r"\b(all-\w+|reduce-scatter|collective-\w+)")
# 8 devices: of 24 x 5, three rows to each, whose 15 elements are no multiple of 8; of 5 x 24, three columns
LAYOUTS = {
    "rows": ((24, 5), PartitionSpec("i", None)),
    "columns": ((5, 24), PartitionSpec(None, "i")),
    "last": ((3, 5, 16), PartitionSpec(None, None, "i")),
    "neither": ((7, 11), PartitionSpec(None, None)),
}


@jax.jit
def values_and_gradients(x, g):
    """Returns value and gradient of each activation."""

    def both(function):
        y, pull = jax.vjp(function, x)
        return y, pull(g)[0]

    return {case.name: both(case.function) for case in CASES}


def operands(shape):
    x = np.random.default_rng(0).normal(0, 4, shape).astype(np.float32)
    x.ravel()[:3] = 0.0, -0.0, 6.0
    return x, np.linspace(-2, 3, x.size, dtype=np.float32).reshape(shape)


@functools.cache
def on_one_device(shape):
    return jax.device_get(values_and_gradients(*operands(shape)))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_takes_any_sharding_without_a_collective(layout, kind):
    shape, spec = LAYOUTS[layout]
    sharding = NamedSharding(jax.make_mesh((8,), ("i",), axis_types=(kind,)), spec)
    arguments = jax.device_put(operands(shape), sharding)
    compiled = values_and_gradients.lower(*arguments).compile()
    assert COLLECTIVE.findall(compiled.as_text()) == []
    for name, results in compiled(*arguments).items():
        for result, wanted in zip(results, on_one_device(shape)[name], strict=True):
            assert result.sharding.is_equivalent_to(sharding, len(shape)), name
            np.testing.assert_array_equal(result, wanted, err_msg=name)


def test_uneven_shards():
    # 13 rows over 8 devices: allowed inside jit, under automatic sharding
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
    arguments = operands((13, 5))

    @jax.jit
    def sharded(*arguments):
        return values_and_gradients(
            *jax.lax.with_sharding_constraint(arguments, NamedSharding(mesh, PartitionSpec("i", None)))
        )

    jax.tree.map(np.testing.assert_array_equal, sharded(*arguments), on_one_device((13, 5)))


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
    x = jax.device_put(np.arange(24, dtype=np.float32), sharding)
    assert COLLECTIVE.findall(jax.jit(jnp.sum).lower(x).compile().as_text()) != []
