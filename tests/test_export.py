"""The activations lower for every platform, and what was exported computes the same when it is read back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from cases import CASES

X = np.array([[-7.0, -1.5, -0.0, 0.0, 0.25], [3.0, 6.0, 6.5, 20.0, -20.0], [-0.3, 5.9, 1.0, -3.0, 2.0]], np.float32)
V = np.linspace(-2.0, 3.0, X.size, dtype=np.float32).reshape(X.shape)


def value(f):
    return lambda x, v: f(x)


def gradient(f):
    return lambda x, v: jax.grad(lambda x: jnp.vdot(v, f(x)))(x)


def jvp(f):
    return lambda x, v: jax.jvp(f, (x,), (v,))


def hvp(f):
    return lambda x, v: jax.jvp(jax.grad(lambda x: f(x).sum()), (x,), (v,))


def vmap(f):
    return lambda x, v: jax.vmap(f)(x)


@pytest.mark.parametrize("transform", [value, gradient, jvp, hvp, vmap], ids=lambda t: t.__name__)
def test_exports_for_every_platform(transform):
    functions = {case.name: transform(case.function) for case in CASES}
    function = jax.jit(lambda x, v: {name: f(x, v) for name, f in functions.items()})
    exported = export.export(function, platforms=("cpu", "cuda", "rocm", "tpu"))(X, V)
    read = export.deserialize(exported.serialize())
    assert set(read.platforms) == {"cpu", "cuda", "rocm", "tpu"}
    jax.tree.map(np.testing.assert_array_equal, jax.jit(read.call)(X, V), function(X, V))
