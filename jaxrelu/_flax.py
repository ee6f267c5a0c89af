"""What the PReLU modules of Flax linen and of Flax nnx share."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn.initializers import Initializer, constant
from jax.typing import ArrayLike, DTypeLike

from jaxrelu import _checked as checked
from jaxrelu import functions

__all__ = ["apply", "initializer", "parameter_shape", "static"]


def static(module: object, argument: str, x: Any) -> Any:
    """Returns an attribute of a module. Numbers are such that Flax's caches, which compare modules, tell 0.0 from -0.0.

    A bool is refused here, as it equals a number for which a module may be compiled already.
    """
    name = type(module).__name__
    if not isinstance(x, (bool, int, float)) or argument not in ("kink", "negative_slope", "alpha"):
        return x
    return checked.kink(name, x) if argument == "kink" else checked.number(name, argument, checked.real(name, argument, x))


def parameter_shape(num_parameters: object, **dtypes: DTypeLike | None) -> tuple[int, ...]:
    """Returns the shape of the slopes: as in Flax, that of a scalar for one parameter. The dtypes must be float dtypes."""
    if not checked.is_int(num_parameters) or num_parameters < 1:
        raise TypeError(
            f"PReLU: num_parameters must be a positive int, got {num_parameters!r}; the initial slope is the argument "
            "negative_slope_init"
        )
    for name, dtype in dtypes.items():
        try:
            fits = dtype is None or checked.is_float(dtype)
        except TypeError:  # this is no dtype
            fits = False
        if not fits:
            raise TypeError(f"PReLU: {name} must be a float dtype, got {dtype!r}; one with a sign, as float32")
    return () if num_parameters == 1 else (num_parameters,)


def initializer(init: Any) -> Initializer:
    """Returns an initializer: `init` if it is one already, or one that gives the number `init` everywhere."""
    function: Any = init if callable(init) else constant(checked.real("PReLU", "negative_slope_init", init))
    return function


def apply(x: ArrayLike, slope: Array, axis: int, dtype: DTypeLike | None, kink: float) -> Array:
    """Returns prelu(x, slope), with a vector of slopes along axis; x and the slopes are cast to dtype if there is one."""
    x = checked.real("PReLU", "x", x)
    fits = not isinstance(axis, int) or (-np.ndim(x) <= axis < np.ndim(x) and np.shape(x)[axis] == slope.size)
    if slope.ndim and not fits:
        raise ValueError(
            f"PReLU: num_parameters={slope.size} must be the size of the input's axis {axis}, got an input of shape "
            f"{np.shape(x)}; set num_parameters to the number of channels and axis to where they lie"
        )
    if dtype is not None:
        x, slope = jnp.asarray(x, dtype), slope.astype(dtype)
    return functions.prelu(x, slope, axis=axis if slope.ndim else None, kink=kink)
