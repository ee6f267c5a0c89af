"""elu by jaxrelu's polynomial and by jnp's functions, so that both can be timed on every platform.

`jaxrelu.elu` takes one of them, as its platform wants. The polynomial is written out again here, for float32 alone, so that
it can be timed where `jaxrelu.elu` does not take it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

__all__ = ["FORMS"]

LN2 = math.log(2)
# of (expm1(r) - r) / r^2 for |r| <= ln 2 / 2, the highest power first
COEFFICIENTS = (
    0.00019904672808479518,
    0.001394022023305297,
    0.008333289064466953,
    0.041666366159915924,
    0.1666666716337204,
    0.5,
)


def _split(x: Array) -> tuple[Array, Array]:
    """Returns 2^n and expm1(r) for x = n ln 2 + r, of float32 numbers up to 0."""
    x = jnp.maximum(x, -88.0)  # there n = -127 and 2^n, written as bits, is 0
    # adding 1.5 * 2^23 rounds to an integer; it is read from the sum's bits, as XLA may fold (x + c) - c to x
    shifted = x * np.float32(1 / LN2) + np.float32(1.5 * 2**23)
    n = lax.bitcast_convert_type(shifted, jnp.int32) - np.float32(1.5 * 2**23).view(np.int32)
    # the first part of ln 2 is short enough for an exact product with n
    r = (x - n.astype(jnp.float32) * np.float32(355 / 512)) - n.astype(jnp.float32) * np.float32(LN2 - 355 / 512)
    q = jnp.full_like(r, COEFFICIENTS[0])
    for c in COEFFICIENTS[1:]:
        q = q * r + np.float32(c)
    return lax.bitcast_convert_type((n + 127) << 23, jnp.float32), r + r * r * q


def _expm1(x: Array) -> Array:
    power, rest = _split(x)
    return power * rest + (power - 1)


def _exp(x: Array) -> Array:
    power, rest = _split(x)
    return power * rest + power


def _value(expm1: Callable[[Array], Array], x: Array) -> Array:
    wide = x.astype(jnp.float32)
    return jnp.where(wide > 0, wide, expm1(jnp.minimum(wide, 0))).astype(x.dtype)


def _gradient(exp: Callable[[Array], Array], x: Array, g: Array) -> Array:
    wide = x.astype(jnp.float32)
    return jnp.where(wide > 0, jnp.ones_like(wide), exp(jnp.minimum(wide, 0))).astype(x.dtype) * g


def _form(expm1: Callable[[Array], Array], exp: Callable[[Array], Array]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return functools.partial(_value, expm1), functools.partial(_gradient, exp)


# elu of x, and its derivative at x times g
FORMS = {"polynomial": _form(_expm1, _exp), "jnp": _form(jnp.expm1, jnp.exp)}
