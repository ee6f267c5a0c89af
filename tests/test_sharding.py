"""Elementwise means that any sharding is taken as it comes: no device asks another one, and the numbers are the same."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cases import CASES

COLLECTIVE = re.compile(r"\b(all-\w+|reduce-scatter|collective-\w+)")
# 8 devices: of 24 x 5, three rows to each, whose 15 elements are no multiple of 8; of 5 x 24, three columns
LAYOUTS = {
    "rows": ((24, 5), PartitionSpec("i", None)),
    "columns": ((5, 24), PartitionSpec(None, "i")),
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
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
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
        assert result.sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_array_equal(result, wanted)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
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


def test_the_check_can_fail():
    sharding = NamedSharding(jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,)), PartitionSpec("i"))
    x = jax.device_put(jnp.arange(24.0), sharding)
    assert COLLECTIVE.findall(jax.jit(jnp.sum).lower(x).compile().as_text()) != []
