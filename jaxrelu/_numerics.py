"""Numbers: dtypes in which to compute, and exp and expm1 of negative numbers."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxrelu._lowering import choose

__all__ = ["align", "cast", "exp_below_zero", "expm1_below_zero", "widen"]

# of (expm1(r) - r) / r^2, by rising powers of r
_EXPM1 = (0.5, 0.1666666716337204, 0.041666366159915924, 0.008333289064466953, 0.001394022023305297, 0.00019904672808479518)


def widen(x: Array) -> Array:
    """Returns x in float32 if it is narrower."""
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x


def cast(x: Array, like: Array) -> Array:
    """Returns x in the dtype of like; weakly typed, as a Python number is, if x has that dtype and is."""
    return x if x.dtype == like.dtype else x.astype(like.dtype)


def align(parameter: Array, x: Array, axis: int | None = None) -> Array:
    """Returns parameter in float32 or wider, with as many axes as x."""
    parameter = jnp.asarray(parameter)  # a Python number while jit is disabled
    wide = widen(parameter) if jnp.issubdtype(parameter.dtype, jnp.floating) else parameter.astype(jnp.float32)
    shape = [1] * x.ndim
    if axis is None or wide.ndim == 0:
        shape[x.ndim - wide.ndim :] = wide.shape
    else:
        shape[axis] = wide.size
    return wide.reshape(shape)


def expm1_below_zero(x: Array) -> Array:
    """Returns expm1(min(x, 0))."""
    return _below_zero(jnp.expm1, lambda power, rest: power * rest + (power - 1), x)


@jax.custom_jvp
def exp_below_zero(x: Array) -> Array:
    """Returns exp(min(x, 0)), with derivative 0 at 0."""
    return _below_zero(jnp.exp, lambda power, rest: power * rest + power, x)


@exp_below_zero.defjvp
def _exp_below_zero_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x,), (g,) = primals, tangents
    y = exp_below_zero(x)
    return y, jnp.where(x < 0, y, jnp.zeros_like(y)) * g


def _below_zero(function: Callable[[Array], Array], combine: Callable[[Array, Array], Array], x: Array) -> Array:
    """Returns function(min(x, 0)) for exp or expm1, which is combine(2^n, expm1(r)) for x = n ln 2 + r.

    CPU, float32: jnp.expm1 serves both sides of 0, which costs twice the time, and is up to 5.7 ulp off on jax 0.10. Here
    expm1(r) is a polynomial fitted on [-ln 2 / 2, ln 2 / 2], and both results are within 1 ulp (`test_float32`). Elsewhere
    jnp's function: the polynomial takes more memory on a TPU, and was never timed on a GPU.
    """
    plain = function(jnp.minimum(x, 0))
    if x.dtype != jnp.float32:
        return plain
    z = jnp.clip(x, -88.0, 0.0)  # there n = -127 and 2^n, written as bits, is 0; NaN passes
    # adding 1.5 * 2^23 rounds to an integer; it is read from the sum's bits, as XLA may fold (z + c) - c to z
    shifted = z * np.float32(1 / math.log(2)) + np.float32(1.5 * 2**23)
    n = lax.bitcast_convert_type(shifted, jnp.int32) - np.float32(1.5 * 2**23).view(np.int32)
    # ln 2 = 355 / 512 - 2.12e-4, the first part short enough for an exact product with n
    r = (z - n.astype(jnp.float32) * np.float32(355 / 512)) - n.astype(jnp.float32) * np.float32(math.log(2) - 355 / 512)
    # in pairs, which wait less for each other than Horner's scheme does: a sixth faster on one core
    a, b, c, d, e, f = map(np.float32, _EXPM1)
    square = r * r
    q = (a + b * r) + square * ((c + d * r) + square * (e + f * r))
    own = combine(lax.bitcast_convert_type((n + 127) << 23, jnp.float32), r + square * q)
    # a Python number's result is weakly typed; no public conversion makes that of an array, but an update keeps it
    return choose(plain, cpu=x.at[...].set(own) if x.weak_type else own)
