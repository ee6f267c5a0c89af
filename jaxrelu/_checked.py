"""Checks of the arguments that callers pass: by type, shape and dtype, so that a mistake under jit is seen at trace time."""

import functools
import math
import numbers
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Number", "fitting", "floating", "is_float", "is_int", "is_number", "kink", "number", "real"]


class Number(float):
    """A static float: it equals another number only if both have the same bits; a zero's sign counts, and NaN equals NaN.

    `jax.jit` and Flax compare static numbers by `==`, and would run for -0.0 what they compiled for 0.0.
    """

    def __eq__(self, other: object) -> bool:
        same = float.__eq__(self, other)
        if same is True and self:  # first, as jit asks it at each call; what follows is for zeros and NaN
            return True
        if isinstance(other, float):
            return float.hex(self) == float.hex(other)
        return float.hex(self) != float.hex(-0.0) and same

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        if self > 0 or self < 0:
            return float.__hash__(self)
        return hash(float.hex(self)) if float.hex(self) != float.hex(0.0) else 0  # flax.linen.jit compares hashes alone


def kink(function: str, kink: object) -> float:
    """Returns kink as a float if it is a finite Python number."""
    if not is_number(kink):
        raise TypeError(f"{function}: kink must be a Python number, as it is static, got {_describe(kink)}; pass a float")
    value = float(number(function, "kink", kink))
    if not math.isfinite(value):
        raise ValueError(f"{function}: kink must be finite, got {kink}")
    return value + 0.0  # -0.0 means 0.0


def number(function: str, argument: str, x: float) -> Number:
    """Returns a Python number as a static float."""
    try:
        return Number(x)
    except OverflowError:
        raise ValueError(f"{function}: {argument} must be less than 2^1024, got {type(x).__name__}; pass a float") from None


def is_int(x: object) -> TypeGuard[int]:
    return isinstance(x, int) and not isinstance(x, bool)


def is_number(x: object) -> TypeGuard[float]:
    # float and int first: the check of the abstract class takes a microsecond, a quarter of all checks of a call
    return isinstance(x, (float, int, numbers.Real)) and not isinstance(x, bool)


@functools.cache
def _is_a(dtype: Any, kind: Any) -> bool:
    # JAX has no longdouble; NumPy counts a timedelta ("m") as an integer; float8_e8m0fnu has neither a sign nor a zero
    is_one = jnp.issubdtype(dtype, kind) and dtype.itemsize <= 8 and dtype.kind != "m"
    return is_one and (kind is jnp.integer or bool(jnp.finfo(dtype).min < 0))


def is_float(dtype: Any) -> bool:
    """Returns whether a dtype is one of floats that the functions take; raises TypeError if it is no dtype."""
    return _is_a(jnp.dtype(dtype), jnp.floating)


def real(function: str, argument: str, x: Any) -> Any:
    """Returns x if it is a real number or an array of them."""
    if not isinstance(x, jax.Array) and hasattr(x, "__jax_array__"):  # a Flax variable, say
        x = x.__jax_array__()
    if isinstance(x, (jax.Array, np.ndarray, np.generic)):
        if _is_a(x.dtype, jnp.floating) or _is_a(x.dtype, jnp.integer):
            return x
    elif isinstance(x, float):
        return x
    elif is_int(x):
        limits = jnp.iinfo(jnp.result_type(int))
        if limits.min <= x <= limits.max:
            return x
        raise ValueError(f"{function}: {argument} must fit {limits.dtype}, got {x.bit_length()} bits; pass a float")
    raise TypeError(
        f"{function}: {argument} must be a real number or an array of floats or integers, got {_describe(x)}; "
        f"convert it first, e.g. with jnp.asarray({argument}, jnp.float32)"
    )


def floating(function: str, argument: str, x: Any) -> Any:
    """Returns x as `real` does, with integers converted to the default float dtype."""
    if is_int(x):
        return float(number(function, argument, x))
    x = real(function, argument, x)
    if isinstance(x, float) or _is_a(x.dtype, jnp.floating):
        return x
    if getattr(x, "weak_type", False):  # a Python int that an outer jit traces
        return x * 1.0
    return jnp.asarray(x, jnp.result_type(float))


def fitting(function: str, argument: str, parameter: Any, x: Any, axis: int | None = None) -> Any:
    """Returns parameter as `real` does, if it broadcasts to x or, with an axis, is a scalar or a vector along that axis."""
    parameter = real(function, argument, parameter)
    shape, wanted = np.shape(parameter), np.shape(x)
    if axis is not None:
        if not is_int(axis):
            raise TypeError(f"{function}: axis must be an int or None, got {_describe(axis)}")
        if not -len(wanted) <= axis < len(wanted):
            raise ValueError(f"{function}: axis {axis} is out of range for x of shape {wanted}")
        if shape not in ((), (1,), (wanted[axis],)):
            raise ValueError(
                f"{function}: with axis={axis}, {argument} must be a scalar or have shape {(wanted[axis],)} for x of shape "
                f"{wanted}, got shape {shape}; give one {argument} for each index of that axis, or axis=None"
            )
    elif len(shape) > len(wanted) or any(s not in (1, w) for s, w in zip(shape[::-1], wanted[::-1], strict=False)):
        raise ValueError(
            f"{function}: {argument} of shape {shape} must broadcast to x of shape {wanted}; reshape it, or for prelu pass "
            "the axis of x along which it lies"
        )
    return parameter


def _describe(x: Any) -> str:
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return f"{type(x).__name__} of dtype {x.dtype} and shape {x.shape}"
    return f"{type(x).__name__} {x!r}" if x is not None else "None"
