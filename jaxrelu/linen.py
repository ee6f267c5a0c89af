"""The five activations as Flax linen modules."""

from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike, DTypeLike

from jaxrelu import _flax, functions

__all__ = ["ELU", "LeakyReLU", "PReLU", "ReLU", "ReLU6"]


class _Module(nn.Module):
    """A module whose numbers are checked."""

    def __post_init__(self) -> None:
        for name in ("kink", "negative_slope", "alpha"):
            if hasattr(self, name):
                object.__setattr__(self, name, _flax.static(self, name, getattr(self, name)))
        super().__post_init__()


class ReLU(_Module):
    """`jaxrelu.relu` as a module, with the options of the function."""

    kink: float = 0.0

    def __call__(self, x: ArrayLike) -> Array:
        return functions.relu(x, kink=self.kink)


class LeakyReLU(_Module):
    """`jaxrelu.leaky_relu` as a module, with the options of the function."""

    negative_slope: float = 0.01
    kink: float = 0.0

    def __call__(self, x: ArrayLike) -> Array:
        return functions.leaky_relu(x, self.negative_slope, kink=self.kink)


class PReLU(_Module):
    """`jaxrelu.prelu` with its slope as the parameter `negative_slope`.

    Attributes:
        num_parameters: the number of slopes: 1 (a parameter of shape `()`), or one per channel (of shape `(channels,)`).
        axis: the axis of the channels in the input, if there is more than one slope.
        negative_slope_init: a number, or a JAX initializer. `nn.with_partitioning` adds sharding metadata to an initializer.
        dtype: the dtype to which input and slope are cast; None leaves them as they are.
        param_dtype: the dtype of the parameter.
        kink: moves the derivative at 0 from its value for x < 0 (kink 0) to 1 (kink 1).

    Raises:
        TypeError: `num_parameters` is not a positive int, or `dtype` or `param_dtype` is not a float dtype; or, when the
            module is called, `negative_slope_init` is neither a number nor an initializer.
        ValueError: the input's size along `axis` is not `num_parameters`. It is raised when the module is called.

    Examples:
        >>> import jax, jaxrelu.linen
        >>> prelu = jaxrelu.linen.PReLU(num_parameters=3)
        >>> variables = prelu.init(jax.random.key(0), jax.numpy.ones((2, 3)))
        >>> prelu.apply(variables, jax.numpy.array([[-4.0, 0.0, 4.0]]))
        Array([[-1.,  0.,  4.]], dtype=float32)
    """

    num_parameters: int = 1
    axis: int = -1
    negative_slope_init: float | Initializer = 0.25
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kink: float = 0.0

    def __post_init__(self) -> None:
        _flax.parameter_shape(self.num_parameters, dtype=self.dtype, param_dtype=self.param_dtype)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: ArrayLike) -> Array:
        init = _flax.initializer(self.negative_slope_init)
        slope = self.param("negative_slope", init, _flax.parameter_shape(self.num_parameters), self.param_dtype)
        return _flax.apply(x, slope, self.axis, self.dtype, self.kink)


class ELU(_Module):
    """`jaxrelu.elu` as a module, with the options of the function."""

    alpha: float = 1.0
    kink: float = 0.0
    save: Literal["input", "output"] = "input"

    def __call__(self, x: ArrayLike) -> Array:
        return functions.elu(x, self.alpha, kink=self.kink, save=self.save)


class ReLU6(_Module):
    """`jaxrelu.relu6` as a module, with the options of the function."""

    kink: float = 0.0

    def __call__(self, x: ArrayLike) -> Array:
        return functions.relu6(x, kink=self.kink)
