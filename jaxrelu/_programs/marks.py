"""How to tell an activation in a traced program: by the name and the marks that `jaxrelu._lowering` gave it."""

import functools
from collections.abc import Callable
from typing import Any

from jax import Array, lax
from jax.extend import core
from jax.extend.core import primitives

from jaxrelu._lowering import TAG
from jaxrelu._programs.interpreter import opened

__all__ = ["activation", "core_of", "is_differentiated", "unit_axes"]


def activation(eqn: core.JaxprEqn) -> str | None:
    """Returns the name of the activation, or of its derivative, that an equation calls; None for all other equations."""
    if eqn.primitive is not primitives.jit_p or not eqn.params["name"].startswith(TAG):
        return None
    return eqn.params["name"].removeprefix(TAG)


def is_differentiated(eqn: core.JaxprEqn) -> bool:
    """Returns whether an activation's equation computes a derivative or a part of one: it does not end with the core."""
    if len(eqn.outvars) != 1:
        return True
    body = opened(eqn.params["jaxpr"])
    made_by = {v: e for e in body.eqns for v in e.outvars}
    last = made_by.get(body.outvars[0])
    while last and last.primitive in (lax.split_p, lax.transpose_p):
        last = made_by.get(last.invars[0])
    return last is None or last.primitive is not primitives.custom_jvp_call_p


def unit_axes(eqn: core.JaxprEqn) -> tuple[int, int] | None:
    """Returns the axes of input and output along which an activation's units lie; None if it was given a scalar."""
    steps = opened(eqn.params["jaxpr"]).eqns
    if steps[0].primitive is not lax.split_p:
        return None
    before, after = steps[0], steps[-1] if steps[-1].primitive is lax.split_p else steps[0]
    return before.params["axis"], after.params["axis"]


@functools.lru_cache(maxsize=512)
def core_of(program: Any) -> Callable[..., Array]:
    """Returns an activation's program as a function. The same program gives the same function object."""

    def function(*args: Array) -> Array:
        return core.jaxpr_as_fun(program)(*args)[0]

    return function
