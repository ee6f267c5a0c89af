"""The initial scale for each activation: gain, kaiming_normal, kaiming_uniform."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import Initializer, variance_scaling
from jax.typing import DTypeLike
from scipy import integrate

from jaxrelu.functions import relu

__all__ = ["gain", "kaiming_normal", "kaiming_uniform"]

_quad: Callable[..., tuple[float, float]] = integrate.quad
Mode = Literal["fan_in", "fan_out", "fan_avg"]


def gain(activation: Callable[[Array], Array], *, backward: bool = False) -> float:
    """Returns the factor on the weights that keeps the second moment of a layer's outputs equal to that of its inputs.

    `gain = 1 / sqrt(E[f(z)^2])` for the activation f and z ~ N(0, 1) (He et al. 2015, arXiv:1502.01852). With `backward`,
    the derivative f' takes the place of f, which keeps the second moment of the gradients. The integral is computed in
    float64, by adaptive quadrature split at 0 and 6, where slopes jump. The result is a float, inside `jax.jit` too.

    Args:
        activation: any elementwise function of a JAX scalar, differentiable if `backward`. Set its parameters by
            `functools.partial`.
        backward: take the second moment of the derivative in place of that of the value.

    Raises:
        TypeError: `activation` is not callable, or maps a scalar to something else.
        ValueError: the second moment is zero or not finite.

    Examples:
        >>> import functools, jaxrelu
        >>> from jaxrelu import initializers
        >>> round(initializers.gain(jaxrelu.relu), 10)
        1.4142135624
        >>> round(initializers.gain(functools.partial(jaxrelu.leaky_relu, negative_slope=0.2)), 10)
        1.3867504906
    """
    if not callable(activation):
        raise TypeError(f"gain: activation must be a function, e.g. jaxrelu.relu, got {activation!r}")
    # initializers may run under jit and eval_shape, and mostly run with 64-bit types disabled
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        scalar: Any = jax.eval_shape(activation, jnp.float64(0.0))
        if getattr(scalar, "shape", None) != ():
            raise TypeError(f"gain: activation must be elementwise: it maps a scalar to {scalar}; wrap it in a function")
        function: Callable[[Array], Array] = jax.jit(jax.grad(activation) if backward else activation)

        def integrand(z: float) -> float:
            # f times the root of the density, then squared: f^2 alone might overflow where the product does not
            return (float(function(jnp.float64(z))) * math.exp(-z * z / 4)) ** 2 / math.sqrt(2 * math.pi)

        # beyond 40 standard deviations the density is below 1e-347
        moment = _quad(integrand, -40.0, 40.0, points=[0.0, 6.0], limit=500, epsabs=0.0, epsrel=1e-12)[0]
    if not 0.0 < moment < math.inf:
        raise ValueError(f"gain: the second moment must be positive and finite, got {moment}; no scale keeps the variance")
    return 1.0 / math.sqrt(moment)


def kaiming_normal(
    activation: Callable[[Array], Array] = relu,
    *,
    mode: Mode = "fan_in",
    in_axis: int | Sequence[int] = -2,
    out_axis: int | Sequence[int] = -1,
    batch_axis: int | Sequence[int] = (),
    dtype: DTypeLike | None = None,
) -> Initializer:
    """Returns a JAX initializer (of key, shape, dtype) of normal weights that keep the variance from layer to layer.

    The weights have mean 0 and variance `gain(activation)^2 / fan`, and are not truncated (He et al. 2015,
    arXiv:1502.01852). The mode "fan_out" keeps the variance of the gradients instead, and so takes the backward gain.

    Args:
        activation: the elementwise function that follows, or precedes, the layer.
        mode: which fan: "fan_in", the number of inputs; "fan_out", that of outputs; or "fan_avg", the mean of both.
        in_axis: the axis or axes of the inputs in the shape of the weights.
        out_axis: the axis or axes of the outputs.
        batch_axis: the axis or axes that belong to neither.
        dtype: the dtype of the weights if the initializer is not given one; None means the default float dtype.

    Raises:
        TypeError: `activation` is not an elementwise function.
        ValueError: `mode` is unknown, or no scale keeps the variance.

    Examples:
        >>> import jax
        >>> from jaxrelu import initializers
        >>> initializers.kaiming_normal()(jax.random.key(0), (64, 128)).shape
        (64, 128)
    """
    scale = _scale("kaiming_normal", activation, mode)
    return variance_scaling(scale, mode, "normal", in_axis, out_axis, batch_axis, dtype)


def kaiming_uniform(
    activation: Callable[[Array], Array] = relu,
    *,
    mode: Mode = "fan_in",
    in_axis: int | Sequence[int] = -2,
    out_axis: int | Sequence[int] = -1,
    batch_axis: int | Sequence[int] = (),
    dtype: DTypeLike | None = None,
) -> Initializer:
    """Returns a JAX initializer of uniform weights, with the variance of `kaiming_normal`.

    They lie between `-b` and `b = gain(activation) * sqrt(3 / fan)`. Arguments and errors are those of `kaiming_normal`.

    Examples:
        >>> import jax, jaxrelu
        >>> from jaxrelu import initializers
        >>> initializers.kaiming_uniform(jaxrelu.elu)(jax.random.key(0), (3, 3, 8, 16)).shape
        (3, 3, 8, 16)
    """
    scale = _scale("kaiming_uniform", activation, mode)
    return variance_scaling(scale, mode, "uniform", in_axis, out_axis, batch_axis, dtype)


def _scale(function: str, activation: Callable[[Array], Array], mode: Mode) -> float:
    if mode not in ("fan_in", "fan_out", "fan_avg"):
        raise ValueError(f'{function}: mode must be "fan_in", "fan_out" or "fan_avg", got {mode!r}')
    return gain(activation, backward=mode == "fan_out") ** 2
