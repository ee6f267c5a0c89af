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
from jax import Array
from jax.typing import ArrayLike

from jaxrelu import functions


def relu(x: Array, *, kink: float = 0.0) -> Array:
    """`jaxrelu.relu` in the buffer of `x`. Raises TypeError for an `x` that is not a JAX array."""
    return _run(_buffer("relu", x), (), functions.relu, {"kink": kink})


def leaky_relu(x: Array, negative_slope: ArrayLike = 0.01, *, kink: float = 0.0) -> Array:
    """`jaxrelu.leaky_relu` in the buffer of `x`. Raises TypeError for an `x` that is not a JAX array of floats."""
    x = _buffer("leaky_relu", x, floating=True)
    if isinstance(negative_slope, (int, float)):
        return _run(x, (), functions.leaky_relu, {"negative_slope": negative_slope, "kink": kink})
    return _run(
        x,
        (negative_slope,),
        functions.leaky_relu,
        {"kink": kink},
    )


def prelu(x: Array, negative_slope: ArrayLike, *, axis: int | None = None, kink: float = 0.0) -> Array:
    """`jaxrelu.prelu` in the buffer of `x`. Raises TypeError for an `x` that is not a JAX array of floats."""
    x = _buffer("prelu", x, floating=True)
    return _run(x, (negative_slope,), functions.prelu, {"axis": axis, "kink": kink})


def elu(x: Array, alpha: ArrayLike = 1.0, *, kink: float = 0.0, save: Literal["input", "output"] = "input") -> Array:
    """`jaxrelu.elu` in the buffer of `x`. Raises TypeError for an `x` that is not a JAX array of floats."""
    x = _buffer("elu", x, floating=True)
    if isinstance(alpha, (int, float)):
        return _run(x, (), functions.elu, {"alpha": alpha, "kink": kink, "save": save})
    return _run(x, (alpha,), functions.elu, {"kink": kink, "save": save})


def relu6(x: Array, *, kink: float = 0.0) -> Array:
    """`jaxrelu.relu6` in the buffer of `x`. Raises TypeError for an `x` that is not a JAX array."""
    return _run(_buffer("relu6", x), (), functions.relu6, {"kink": kink})


def _run(x: Array, arrays: tuple[ArrayLike, ...], function: Callable[..., Array], options: dict[str, Any]) -> Array:
    """Returns function(x, *arrays, **options) in the buffer of x."""
    if any(type(value).__hash__ is None for value in options.values()):
        return function(x, *arrays, **options)  # refuses the value with a message of its own
    return _donating(x, arrays, function, tuple(options.items()))


def _apply(
    x: Array, arrays: tuple[ArrayLike, ...], function: Callable[..., Array], options: tuple[tuple[str, Any], ...]
) -> Array:
    return function(x, *arrays, **dict(options))


_donating: Callable[..., Array] = jax.jit(_apply, static_argnums=(2, 3), donate_argnums=0)


def _buffer(function: str, x: Any, *, floating: bool = False) -> Array:
    """Returns x if it is a JAX array whose buffer the output can take over."""
    if isinstance(x, Array) and not (floating and jnp.issubdtype(x.dtype, jnp.integer)):
        return x
    got = f"{x.dtype} array" if isinstance(x, Array) else type(x).__name__
    kind = "a JAX array of floats" if floating else "a JAX array"
    raise TypeError(
        f"inplace.{function}: x must be {kind}, as the output takes over its buffer, got {got}; use jaxrelu.{function}"
    )
