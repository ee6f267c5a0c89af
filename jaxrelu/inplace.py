"""The five activations in place: each donates `x`, so that the output takes over its buffer and no memory is allocated.

A later use of `x` raises JAX's "Array has been deleted" error; so does a later use after an eager `jax.grad` of one of
these, as the forward pass donates it. Inside `jax.jit` the outer function decides on donation, and these are the plain
functions. The arguments, values and derivatives are those of `jaxrelu.functions`; `x` must be a JAX array, of a float dtype
except for relu and relu6, as nothing else has a buffer of the output's size to give.

Examples:
    >>> import jax.numpy as jnp
    >>> from jaxrelu import inplace
    >>> x = jnp.array([-5.0, 2.5])
    >>> inplace.relu(x)
    Array([0. , 2.5], dtype=float32)
    >>> x.is_deleted()
    True
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxrelu import _arguments as checked
from jaxrelu import functions


def relu(x: Array, *, kink: float = 0.0) -> Array:
    """`jaxrelu.relu` in the buffer of `x`. Raises TypeError for an `x` that is not a JAX array."""
    return _run(functions.relu, x, kink=kink)


def leaky_relu(x: Array, negative_slope: ArrayLike = 0.01, *, kink: float = 0.0) -> Array:
    """`jaxrelu.leaky_relu` in the buffer of `x`. Raises TypeError for an `x` that is not a JAX array of floats."""
    return _run(functions.leaky_relu, x, negative_slope, kink=kink)


def prelu(x: Array, negative_slope: ArrayLike, *, axis: int | None = None, kink: float = 0.0) -> Array:
    """`jaxrelu.prelu` in the buffer of `x`. Raises TypeError for an `x` that is not a JAX array of floats."""
    if checked.is_number(negative_slope):
        negative_slope = jnp.asarray(negative_slope)  # traced as in jaxrelu.prelu: a new slope compiles nothing
    return _run(functions.prelu, x, negative_slope, axis=axis, kink=kink)


def elu(x: Array, alpha: ArrayLike = 1.0, *, kink: float = 0.0, save: Literal["input", "output"] = "input") -> Array:
    """`jaxrelu.elu` in the buffer of `x`. Raises TypeError for an `x` that is not a JAX array of floats."""
    return _run(functions.elu, x, alpha, kink=kink, save=save)


def relu6(x: Array, *, kink: float = 0.0) -> Array:
    """`jaxrelu.relu6` in the buffer of `x`. Raises TypeError for an `x` that is not a JAX array."""
    return _run(functions.relu6, x, kink=kink)


def _run(function: Callable[..., Array], x: Any, *parameter: Any, **options: Any) -> Array:
    """Returns function(x, *parameter, **options) in the buffer of x, if x is a JAX array of the output's size."""
    name, floats = function.__name__, function not in (functions.relu, functions.relu6)
    if not isinstance(x, Array) or (floats and jnp.issubdtype(x.dtype, jnp.integer)):
        got = f"{x.dtype} array" if isinstance(x, Array) else type(x).__name__
        raise TypeError(
            f"inplace.{name}: x must be a JAX array{' of floats' if floats else ''}, as the output takes over its buffer, "
            f"got {got}; use jaxrelu.{name}"
        )
    # all but arrays is static, so that the function sees numbers as numbers and refuses what it does not take; the type is
    # static too, as True equals 1
    numbers = [value for value in parameter if not hasattr(value, "shape") or isinstance(value, np.generic)]
    static = tuple((type(value), value) for value in numbers)
    items = tuple((name, type(value), value) for name, value in options.items())
    try:
        hash((static, items))
    except TypeError:
        return function(x, *parameter, **options)  # refuses it with a message of its own
    return _donating(x, parameter[len(static) :], function, static, items)


def _apply(
    x: Array, arrays: tuple[Any, ...], function: Callable[..., Array], static: tuple[Any, ...], items: tuple[Any, ...]
) -> Array:
    return function(x, *(value for _, value in static), *arrays, **{name: value for name, _, value in items})


_donating: Callable[..., Array] = jax.jit(_apply, static_argnums=(2, 3, 4), donate_argnums=0)
