"""What the two Flax PReLU modules share."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxrelu import functions


def parameter_shape(num_parameters: object) -> tuple[int, ...]:
    """Returns the slope's shape, a scalar's for one parameter as in Flax.

    Raises:
        TypeError: `num_parameters` is no positive int.
    """
    if isinstance(num_parameters, bool) or not isinstance(num_parameters, int) or num_parameters < 1:
        raise TypeError(
            f"PReLU: num_parameters must be a positive int, got {num_parameters!r}; the initial slope is the argument "
            "negative_slope_init"
        )
    return () if num_parameters == 1 else (num_parameters,)


def apply(x: ArrayLike, slope: Array, axis: int, dtype: DTypeLike | None, kink: float) -> Array:
    """Returns prelu(x, slope) with a vector of slopes along axis, both cast to dtype if that is given.

    Raises:
        ValueError: the size of x along axis is not the number of slopes.
    """
    if slope.ndim and not (-np.ndim(x) <= axis < np.ndim(x) and np.shape(x)[axis] == slope.size):
        raise ValueError(
            f"PReLU: num_parameters={slope.size} must be the size of the input's axis {axis}, got an input of shape "
            f"{np.shape(x)}; set num_parameters to the number of channels and axis to where they lie"
        )
    if dtype is not None:
        x, slope = jnp.asarray(x, dtype), slope.astype(dtype)
    return functions.prelu(x, slope, axis=axis if slope.ndim else None, kink=kink)
