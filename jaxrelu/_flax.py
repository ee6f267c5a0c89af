"""What the two Flax PReLU modules share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike, DTypeLike

from jaxrelu import _checked as checked
from jaxrelu import functions

__all__ = ["apply", "initializer", "parameter_shape"]


def parameter_shape(num_parameters: object, **dtypes: DTypeLike | None) -> tuple[int, ...]:
    """Returns the slope's shape, a scalar's for one parameter as in Flax.

    Raises:
        TypeError: `num_parameters` is no positive int, or one of the dtypes is no float dtype.
    """
    if isinstance(num_parameters, bool) or not isinstance(num_parameters, int) or num_parameters < 1:
        raise TypeError(
            f"PReLU: num_parameters must be a positive int, got {num_parameters!r}; the initial slope is the argument "
            "negative_slope_init"
        )
    for name, dtype in dtypes.items():
        try:
            fits = dtype is None or jnp.issubdtype(dtype, jnp.floating)
        except TypeError:  # no dtype at all
            fits = False
        if not fits:
            raise TypeError(f"PReLU: {name} must be a float dtype, got {dtype!r}; an integer slope would be rounded")
    return () if num_parameters == 1 else (num_parameters,)


def initializer(init: Any) -> Initializer:
    """Returns an initializer as it is, and of a number the constant one.

    Raises:
        TypeError: `init` is neither.
    """
    if callable(init):
        function: Any = init
        return function
    return jax.nn.initializers.constant(checked.real("PReLU", "negative_slope_init", init))


def apply(x: ArrayLike, slope: Array, axis: int, dtype: DTypeLike | None, kink: float) -> Array:
    """Returns prelu(x, slope) with a vector of slopes along axis, both cast to dtype if that is given.

    Raises:
        TypeError: `x` is not a real number or array, or `axis` no int.
        ValueError: the size of x along axis is not the number of slopes.
    """
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
