"""Numbers: conversions between dtypes, and exp and expm1 of negative numbers."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jaxrelu._lowering import choose

__all__ = ["align", "cast", "exp_below_zero", "expm1_below_zero", "polynomial_exp", "polynomial_expm1", "widen"]

# coefficients of a polynomial in r that approximates (expm1(r) - r) / r^2, the constant one first
_EXPM1 = (0.5, 0.1666666716337204, 0.041666366159915924, 0.008333289064466953, 0.001394022023305297, 0.00019904672808479518)


def widen(x: Array) -> Array:
    """Returns x in float32 if its dtype has fewer bits, else x."""
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x


def cast(x: Array, like: Array) -> Array:
    """Returns x in the dtype of like. An x that has this dtype is returned as it is: it stays weakly typed if it is so."""
    return x if x.dtype == like.dtype else x.astype(like.dtype)


def align(parameter: ArrayLike, x: Array, axis: int | None = None) -> Array:
    """Returns parameter in float32 or wider, with as many axes as x."""
    array = jnp.asarray(parameter)
    wide = widen(array) if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(jnp.float32)
    shape = [1] * x.ndim
    if axis is None or wide.ndim == 0:
        shape[x.ndim - wide.ndim :] = wide.shape
    else:
        shape[axis] = wide.size
    return wide.reshape(shape)


@jax.custom_jvp
def expm1_below_zero(x: Array) -> Array:
    """Returns expm1(min(x, 0)), with derivative exp(min(x, 0)), which expm1(x) + 1 is not to the last digit."""
    return _for_platform(jnp.expm1(jnp.minimum(x, 0)), polynomial_expm1, x)


@expm1_below_zero.defjvp
def _expm1_below_zero_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x,), (g,) = primals, tangents
    return expm1_below_zero(x), exp_below_zero(x) * g


@jax.custom_jvp
def exp_below_zero(x: Array) -> Array:
    """Returns exp(min(x, 0)), with derivative 0 at 0."""
    return _for_platform(jnp.exp(jnp.minimum(x, 0)), polynomial_exp, x)


@exp_below_zero.defjvp
def _exp_below_zero_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x,), (g,) = primals, tangents
    y = exp_below_zero(x)
    return y, jnp.where(x < 0, y, jnp.zeros_like(y)) * g


def _for_platform(plain: Array, polynomial: Callable[[Array], Array], x: Array) -> Array:
    """Returns polynomial(x) on a CPU if x is float32, else plain, which is computed by jnp's function.

    jnp.expm1 serves positive numbers too, which takes twice the time on a CPU, and is up to 5.7 ulp (units in the last
    place) off on jax 0.10; the polynomials are within 1 ulp (`test_float32`). They take more memory on a TPU, and were never
    timed on a GPU.
    """
    if x.dtype != jnp.float32:
        return plain
    # the result of a weakly typed x is to be weakly typed. No public function converts to that, but an update of x keeps it
    return choose(plain, cpu=x.at[...].set(polynomial(x)) if x.weak_type else polynomial(x))


def polynomial_expm1(x: Array) -> Array:
    """Returns expm1(min(x, 0)) of float32 numbers."""
    power, rest = _powers(x)
    return power * rest + (power - 1)


def polynomial_exp(x: Array) -> Array:
    """Returns exp(min(x, 0)) of float32 numbers."""
    power, rest = _powers(x)
    return power * rest + power


def _powers(x: Array) -> tuple[Array, Array]:
    """Returns 2^n and expm1(r) for min(x, 0) = n ln 2 + r, with an integer n and |r| <= ln 2 / 2."""
    z = jnp.clip(x, -88.0, 0.0)  # at -88 n is -127, for which the bits of 2^n below make 0; NaN stays NaN
    # adding 1.5 * 2^23 rounds to an integer, which the last bits of the sum hold: XLA may simplify (z + c) - c to z
    shifted = z * np.float32(1 / math.log(2)) + np.float32(1.5 * 2**23)
    n = lax.bitcast_convert_type(shifted, jnp.int32) - np.float32(1.5 * 2**23).view(np.int32)
    # ln 2 = 355 / 512 - 2.12e-4; the first part has so few bits that its product with n is exact
    r = (z - n.astype(jnp.float32) * np.float32(355 / 512)) - n.astype(jnp.float32) * np.float32(math.log(2) - 355 / 512)
    # in pairs of terms, as every step of Horner's scheme waits for the last: a sixth faster on a core of an AMD EPYC (jax
    # 0.12), no slower on one of an Intel Xeon
    a, b, c, d, e, f = map(np.float32, _EXPM1)
    square = r * r
    q = (a + b * r) + square * ((c + d * r) + square * (e + f * r))
    return lax.bitcast_convert_type((n + 127) << 23, jnp.float32), r + square * q
