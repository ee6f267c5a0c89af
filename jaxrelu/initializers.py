"""The initial scale for each activation: gain, kaiming_normal, kaiming_uniform."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn.initializers import Initializer, variance_scaling
from jax.typing import DTypeLike
from scipy import integrate

from jaxrelu import _checked as checked
from jaxrelu import functions
from jaxrelu.functions import relu

__all__ = ["gain", "kaiming_normal", "kaiming_uniform"]

Mode = Literal["fan_in", "fan_out", "fan_avg"]
_END = 40.0  # beyond 40 standard deviations the normal density is below 1e-347
_BREAKS = (0.0, 6.0)  # where slopes mostly jump. Of more than three parts, scipy 1.18's cubature may not refine the worst
_OWN: list[Any] = [getattr(functions, name) for name in functions.__all__]
_moments: dict[tuple[Any, ...], float] = {}  # of functions of this package and of partials of them


def gain(activation: Callable[[Array], Array], *, backward: bool = False) -> float:
    """Returns the factor on the weights that keeps the second moment of a layer's outputs equal to that of its inputs.

    `gain = 1 / sqrt(E[f(z)^2])` for the activation f and z ~ N(0, 1) (He et al. 2015, arXiv:1502.01852). With `backward`,
    the derivative f' takes the place of f, which keeps the second moment of the gradients. The integral is computed in
    float64, by adaptive quadrature: to 1e-9 if f is smooth but for a few kinks or steps, to 1e-3 if it rounds to 16 bits
    inside or is quantised. A spike narrower than about 0.3 may be missed. The result is a float, inside `jax.jit` too. It is
    remembered for functions of this package, and for `functools.partial` of them with Python numbers.

    Args:
        activation: any elementwise function of a JAX scalar, differentiable if `backward`. Set its parameters by
            `functools.partial`.
        backward: take the second moment of the derivative in place of that of the value.

    Raises:
        TypeError: `activation` is not callable, is no function of JAX, or does not map a scalar to a real scalar.
        ValueError: the second moment is zero or not finite.

    Examples:
        >>> import functools, jaxrelu
        >>> from jaxrelu import initializers
        >>> round(initializers.gain(jaxrelu.relu), 10)
        1.4142135624
        >>> round(initializers.gain(functools.partial(jaxrelu.leaky_relu, negative_slope=0.2)), 10)
        1.3867504906
    """
    return 1.0 / math.sqrt(_second_moment("gain", activation, backward))


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
    arXiv:1502.01852). Weights of less than 32 bits are drawn in float32 and rounded. The mode "fan_out" keeps the variance
    of the gradients instead, and so takes the backward gain.

    Args:
        activation: the elementwise function that follows, or precedes, the layer.
        mode: which fan: "fan_in", the number of inputs; "fan_out", that of outputs; or "fan_avg", the mean of both.
        in_axis: the axis or axes of the inputs in the shape of the weights.
        out_axis: the axis or axes of the outputs.
        batch_axis: the axis or axes that belong to neither.
        dtype: the dtype of the weights if the initializer is not given one; None means the default float dtype.

    Raises:
        TypeError: `activation` is not an elementwise function of JAX.
        ValueError: `mode` is unknown, or no scale keeps the variance.

    Examples:
        >>> import jax
        >>> from jaxrelu import initializers
        >>> initializers.kaiming_normal()(jax.random.key(0), (64, 128)).shape
        (64, 128)
    """
    return _scaled("kaiming_normal", activation, mode, "normal", (in_axis, out_axis, batch_axis), dtype)


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
    return _scaled("kaiming_uniform", activation, mode, "uniform", (in_axis, out_axis, batch_axis), dtype)


def _scaled(
    function: str, activation: Any, mode: Mode, distribution: Literal["normal", "uniform"], axes: Any, dtype: Any
) -> Initializer:
    if mode not in ("fan_in", "fan_out", "fan_avg"):
        raise ValueError(f'{function}: mode must be "fan_in", "fan_out" or "fan_avg", got {mode!r}')
    scale = 1 / _second_moment(function, activation, backward=mode == "fan_out")
    given = dtype

    def init(key: Array, shape: Any, dtype: Any = given, out_sharding: Any = None) -> Array:
        dtype = jnp.result_type(float if dtype is None else dtype)
        if not checked.is_float(dtype) and not jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(f"{function}: dtype must be one of floats with a sign, got {dtype}; take float32, for one")
        # in fewer bits, jax.random draws from fewer numbers, none far out: with 8 bits, weights of .78 of the variance
        drawn = jnp.float32 if dtype.itemsize < 4 else dtype
        return variance_scaling(scale, mode, distribution, *axes)(key, shape, drawn, out_sharding).astype(dtype)

    return init


def _second_moment(caller: str, activation: Any, backward: bool) -> float:
    """Returns E[f(z)^2], or that of f's derivative; `caller` is the function that the user called, for errors."""
    if not callable(activation):
        raise TypeError(f"{caller}: activation must be a function, e.g. jaxrelu.relu, got {activation!r}")
    partial: Any = activation if isinstance(activation, functools.partial) else functools.partial(activation)
    arguments: list[tuple[Any, Any]] = [*enumerate(partial.args), *sorted(partial.keywords.items())]
    own = any(partial.func is function for function in _OWN)
    if not own or any(type(value) not in (int, float, str) for _, value in arguments):
        return _integral(caller, activation, backward)
    key = (partial.func, repr(arguments), backward)
    if key not in _moments:
        if len(_moments) >= 1024:
            _moments.clear()
        _moments[key] = _integral(caller, activation, backward)
    return _moments[key]


def _integral(caller: str, activation: Any, backward: bool) -> float:
    def scalar(z: Array) -> Array:  # a function of Python's own: jax.jit of a NumPy ufunc ends the process (jaxlib 0.10)
        return activation(z)

    # initializers may run under jit and eval_shape, and mostly run with 64-bit types disabled
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        try:
            out: Any = jax.eval_shape(scalar, jnp.float64(0.0))
        except (TypeError, IndexError) as error:  # JAX's errors for what it cannot trace are of these types
            raise TypeError(
                f"{caller}: activation must be a function of JAX, which jax.jit can trace, got {activation!r}: "
                f"{str(error).splitlines()[0]} Use jnp's functions, jnp.where in place of if, and partial for parameters"
            ) from error
        kinds = (jnp.floating,) if backward else (jnp.floating, jnp.integer, jnp.bool)
        if getattr(out, "shape", None) != () or not any(jnp.issubdtype(out.dtype, kind) for kind in kinds):
            raise TypeError(f"{caller}: activation must map a scalar to a real scalar, got {out}; wrap it in a function")
        function = jax.jit(jax.vmap(jax.grad(scalar) if backward else scalar))

        def integrand(points: np.ndarray) -> np.ndarray:
            # z = sinh(u) puts more of the points near 0. f times the root of the density, then squared: f^2 alone might
            # overflow where the product does not
            u = points[:, 0]
            z = np.sinh(u)
            root = np.asarray(function(z), np.float64) * np.exp(-z * z / 4)
            return root**2 * np.cosh(u) / math.sqrt(2 * math.pi)

        end = math.asinh(_END)
        with np.errstate(all="ignore"):  # infinite and NaN moments are refused below
            result = integrate.cubature(
                integrand,
                [-end],
                [end],
                points=[[math.asinh(x)] for x in _BREAKS],
                rtol=1e-11,
                max_subdivisions=300,  # a function that rounds is a step function, of which no number of parts is enough
            )
            ends = integrand(np.array([[-end], [end]]))
    moment = float(result.estimate)
    # an integral that is infinite does not converge, or has not come to its end at 40 standard deviations
    finite = math.isfinite(moment) and result.error <= 1e-3 * moment and ends.max() <= 1e-9 * moment
    if not finite or moment == 0.0:
        raise ValueError(
            f"{caller}: the second moment must be positive and finite, got "
            f"{moment if finite else 'inf or no limit'}; no scale keeps the variance of this activation"
        )
    return moment
