"""The five activations as Flax nnx modules."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike, DTypeLike

from jaxrelu import _flax, functions

__all__ = ["ELU", "LeakyReLU", "PReLU", "ReLU", "ReLU6"]


class _Module(nnx.Module):
    """A module whose numbers are checked, also when they are set later."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, _flax.static(self, name, value))


class ReLU(_Module):
    """`jaxrelu.relu` as a module, with the options of the function."""

    def __init__(self, *, kink: float = 0.0) -> None:
        self.kink = kink

    def __call__(self, x: ArrayLike) -> Array:
        return functions.relu(x, kink=self.kink)


class LeakyReLU(_Module):
    """`jaxrelu.leaky_relu` as a module, with the options of the function."""

    def __init__(self, negative_slope: float = 0.01, *, kink: float = 0.0) -> None:
        self.negative_slope, self.kink = negative_slope, kink

    def __call__(self, x: ArrayLike) -> Array:
        return functions.leaky_relu(x, self.negative_slope, kink=self.kink)


class PReLU(_Module):
    """`jaxrelu.prelu` with its slope as the parameter `negative_slope`.

    Args:
        num_parameters, axis, negative_slope_init, dtype, param_dtype, kink: as in `jaxrelu.linen.PReLU`.
        negative_slope_metadata: metadata of the parameter, such as `{"out_sharding": ("model",)}`.
        rngs: needed only by a random `negative_slope_init`, which takes a key from the stream "params".

    Raises:
        TypeError, ValueError: as in `jaxrelu.linen.PReLU`; also TypeError if a random `negative_slope_init` has no `rngs`.

    Examples:
        >>> import jax, jaxrelu.nnx
        >>> prelu = jaxrelu.nnx.PReLU(num_parameters=3)
        >>> prelu(jax.numpy.array([[-4.0, 0.0, 4.0]]))
        Array([[-1.,  0.,  4.]], dtype=float32)
    """

    def __init__(
        self,
        num_parameters: int = 1,
        axis: int = -1,
        *,
        negative_slope_init: float | Initializer = 0.25,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kink: float = 0.0,
        negative_slope_metadata: Mapping[str, Any] = MappingProxyType({}),
        rngs: nnx.Rngs | None = None,
    ) -> None:
        shape = _flax.parameter_shape(num_parameters, dtype=dtype, param_dtype=param_dtype)
        init = _flax.initializer(negative_slope_init)
        key: Any = None if rngs is None else rngs.params()
        try:
            slope = init(key, shape, param_dtype)
        except TypeError as error:
            if rngs is not None:
                raise
            raise TypeError(
                f"PReLU: rngs must be given for a random negative_slope_init, got None ({error}); pass rngs=nnx.Rngs(0)"
            ) from error
        self.negative_slope = nnx.Param(slope, **negative_slope_metadata)
        self.axis, self.dtype, self.kink = axis, dtype, kink

    def __call__(self, x: ArrayLike) -> Array:
        return _flax.apply(x, self.negative_slope[...], self.axis, self.dtype, self.kink)


class ELU(_Module):
    """`jaxrelu.elu` as a module, with the options of the function."""

    def __init__(self, alpha: float = 1.0, *, kink: float = 0.0, save: Literal["input", "output"] = "input") -> None:
        self.alpha, self.kink = alpha, kink
        self.save: Literal["input", "output"] = save

    def __call__(self, x: ArrayLike) -> Array:
        return functions.elu(x, self.alpha, kink=self.kink, save=self.save)


class ReLU6(_Module):
    """`jaxrelu.relu6` as a module, with the options of the function."""

    def __init__(self, *, kink: float = 0.0) -> None:
        self.kink = kink

    def __call__(self, x: ArrayLike) -> Array:
        return functions.relu6(x, kink=self.kink)
