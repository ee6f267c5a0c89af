"""The five activations in place: each donates `x`, which means that the output takes over the memory (the buffer) of `x`.

A later use of `x` raises JAX's "Array has been deleted" error, also after `jax.grad` of such a function outside jit, whose
forward pass donates `x`. Inside `jax.jit` nothing is donated: only the function that is jitted can donate its arguments.
Arguments, values and derivatives are those of `jaxrelu.functions`. `x` must be a JAX array, as nothing else has a buffer to
give, and of a float dtype, as integers need a new one; relu and relu6 also take integers.

Examples:
    >>> import jax.numpy as jnp
    >>> from jaxrelu import inplace
    >>> x = jnp.array([-5.0, 2.5])
    >>> inplace.relu(x)
    Array([0. , 2.5], dtype=float32)
    >>> x.is_deleted()
    True
"""

from typing import Literal

from jax import Array
from jax.typing import ArrayLike

from jaxrelu import _lowering, functions

__all__ = ["elu", "leaky_relu", "prelu", "relu", "relu6"]


def relu(x: Array, *, kink: float = 0.0) -> Array:
    """`jaxrelu.relu` in the buffer of `x`. Raises TypeError for an `x` that is not a JAX array."""
    with _lowering.donating("relu", x):
        return functions.relu(x, kink=kink)


def leaky_relu(x: Array, negative_slope: ArrayLike = 0.01, *, kink: float = 0.0) -> Array:
    """`jaxrelu.leaky_relu` in the buffer of `x`. Raises TypeError for an `x` that is not a JAX array of floats."""
    with _lowering.donating("leaky_relu", x):
        return functions.leaky_relu(x, negative_slope, kink=kink)


def prelu(x: Array, negative_slope: ArrayLike, *, axis: int | None = None, kink: float = 0.0) -> Array:
    """`jaxrelu.prelu` in the buffer of `x`. Raises TypeError for an `x` that is not a JAX array of floats."""
    with _lowering.donating("prelu", x):
        return functions.prelu(x, negative_slope, axis=axis, kink=kink)


def elu(x: Array, alpha: ArrayLike = 1.0, *, kink: float = 0.0, save: Literal["input", "output"] = "input") -> Array:
    """`jaxrelu.elu` in the buffer of `x`. Raises TypeError for an `x` that is not a JAX array of floats."""
    with _lowering.donating("elu", x):
        return functions.elu(x, alpha, kink=kink, save=save)


def relu6(x: Array, *, kink: float = 0.0) -> Array:
    """`jaxrelu.relu6` in the buffer of `x`. Raises TypeError for an `x` that is not a JAX array."""
    with _lowering.donating("relu6", x):
        return functions.relu6(x, kink=kink)
