"""elu by jaxrelu's polynomial and by jnp's functions, so that both can be timed on every platform."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxrelu._numerics import polynomial_exp, polynomial_expm1

__all__ = ["FORMS"]


def _value(expm1: Callable[[Array], Array], x: Array) -> Array:
    wide = x.astype(jnp.float32)
    return jnp.where(wide > 0, wide, expm1(jnp.minimum(wide, 0))).astype(x.dtype)


def _gradient(exp: Callable[[Array], Array], x: Array, g: Array) -> Array:
    wide = x.astype(jnp.float32)
    return jnp.where(wide > 0, jnp.ones_like(wide), exp(jnp.minimum(wide, 0))).astype(x.dtype) * g


def _form(expm1: Callable[[Array], Array], exp: Callable[[Array], Array]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return functools.partial(_value, expm1), functools.partial(_gradient, exp)


# elu of x, and its derivative at x times g
FORMS = {"polynomial": _form(polynomial_expm1, polynomial_exp), "jnp": _form(jnp.expm1, jnp.exp)}
