"""What is known of JAX's primitives: which are alike, what they do with axes, and what their derivatives read.

`interpreter.py` knows those that call programs, such as scan.
"""

import math
from collections.abc import Container, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from jaxrelu._programs.interpreter import bodies, opened

__all__ = [
    "LAYOUT",
    "LEFT_ALONE",
    "PRODUCTS",
    "READ_THEIR_RESULT",
    "Axes",
    "is_cheap",
    "is_complex",
    "is_float",
    "moved",
    "read_by_derivative",
    "size_of",
]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


PRODUCTS = _names("conv_general_dilated dot_general ragged_dot_general")
# these change how an array is kept, and none of its numbers
_UNCHANGED = _names("copy copy_p name pcast pvary reshard sharding_constraint")
# these change how one array is laid out or stored
LAYOUT = _UNCHANGED | _names("broadcast_in_dim convert_element_type iota reduce_precision reshape rev squeeze transpose")
# the derivative of these reads none of those inputs that have a derivative themselves
_LINEAR = LAYOUT | _names(
    """add add_any all_gather all_to_all concatenate cumsum dynamic_slice dynamic_update_slice gather neg pad ppermute psum
    psum_invariant reduce_scatter reduce_sum select_n slice split stop_gradient sub"""
)
# the derivative of these reads their result alone
READ_THEIR_RESULT = _names("exp logistic tanh")
# cheap to compute again
_CHEAP = (
    LAYOUT
    | READ_THEIR_RESULT
    | _names(
        """abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type cbrt ceil clamp concatenate cos
        cosh custom_jvp_call div dynamic_slice dynamic_update_slice eq erf erf_inv erfc exp2 expm1 floor gather ge gt imag
        integer_pow is_finite jit le log log1p lt max min mul ne neg nextafter not or pad pow real rem round rsqrt select_n
        shift_left shift_right_arithmetic shift_right_logical sign sin sinh slice split sqrt square stop_gradient sub
        tan xor"""
    )
)
# neither cheap nor understood, though they call no jaxpr that is seen
LEFT_ALONE = _names("custom_vjp_call ffi_call pure_callback")

Axes = tuple[int | None, ...]  # for each axis of a value, which axis of a part of it that is; None where the part has none


def moved(eqn: Any) -> Axes | None:
    """Returns which axis of its input each axis of an equation's output is, None for a new one; None if it computes."""
    name, params, out = eqn.primitive.name, eqn.params, eqn.outvars[0].aval
    shape: Any = eqn.invars[0].aval.shape if eqn.invars else ()
    if name == "transpose":
        return params["permutation"]
    if name == "squeeze":
        return tuple(axis for axis in range(len(shape)) if axis not in params["dimensions"])
    if name == "broadcast_in_dim":
        back = {axis: i for i, axis in enumerate(params["broadcast_dimensions"]) if shape[i] == out.shape[axis]}
        return tuple(back.get(axis) for axis in range(len(out.shape)))
    if name == "reshape":  # an axis is the same one if its size is, and the size of all before it
        before = [(math.prod(shape[:i]), n) for i, n in enumerate(shape)]
        after = [(math.prod(out.shape[:i]), n) for i, n in enumerate(out.shape)]
        return tuple(before.index(x) if x in before else None for x in after)
    floats = jnp.issubdtype(out.dtype, jnp.floating)
    casts = name == "convert_element_type" and (floats or out.dtype == eqn.invars[0].aval.dtype)
    marked = name == "split" and len(eqn.outvars) == 1
    return tuple(range(len(shape))) if name in _UNCHANGED or casts or marked else None


def read_by_derivative(eqn: core.JaxprEqn, active: Container[core.Var]) -> Sequence[core.Var]:
    """Returns the inputs and results that the derivative of an equation reads; active are the variables that have one."""
    name, variables = eqn.primitive.name, [v for v in eqn.invars if isinstance(v, core.Var)]
    if name in READ_THEIR_RESULT:
        return eqn.outvars
    if name in _LINEAR:
        return [v for v in variables if v not in active]
    if name in ("mul", "dot_general", "conv_general_dilated"):  # of two inputs, each is read for the other
        pairs = zip(eqn.invars, eqn.invars[::-1], strict=True)
        return [v for v, other in pairs if isinstance(v, core.Var) and isinstance(other, core.Var) and other in active]
    if name == "div" and not (isinstance(eqn.invars[1], core.Var) and eqn.invars[1] in active):
        return [v for v in eqn.invars[1:] if isinstance(v, core.Var)]
    return variables


def is_cheap(eqn: core.JaxprEqn) -> bool:
    """Returns whether an equation is cheap to compute again, with all that it calls."""
    inside = (inner for body in bodies(eqn) for inner in opened(body).eqns)
    return not eqn.effects and eqn.primitive.name in _CHEAP and all(map(is_cheap, inside))


def is_float(v: Any) -> bool:
    """Returns whether a variable has real or complex numbers that are no integers."""
    return jnp.issubdtype(getattr(v.aval, "dtype", None) or jnp.bool, jnp.inexact)


def is_complex(v: Any) -> bool:
    """Returns whether a variable has complex numbers."""
    return jnp.issubdtype(getattr(v.aval, "dtype", None) or jnp.bool, jnp.complexfloating)


def size_of(v: Any) -> int:
    """Returns the size of a variable in bytes; an axis whose size is not known yet counts as 1."""
    sizes = (n for n in getattr(v.aval, "shape", ()) if isinstance(n, int))
    return math.prod(sizes) * getattr(getattr(v.aval, "dtype", None), "itemsize", 0)
