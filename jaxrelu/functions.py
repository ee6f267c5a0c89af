"""relu, leaky_relu, prelu, elu and relu6 with a stated derivative at the kink.

A kink is a point where the slope jumps. One rule for the family: at a kink the unit counts as inactive, so the derivative is
that of the flat or damped side. `kink` moves it: derivative = inactive + kink * (active - inactive). Every rule is linear in
the incoming gradient, at the kink too.

Each function stands in three parts: the public function, its private core, the core's derivative rule. A core returns the
value; those of relu, leaky_relu and relu6 return with it what the rule reads in place of x.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from jaxrelu import _checked as checked
from jaxrelu import _lowering as lowering
from jaxrelu._numerics import align, cast, exp_below_zero, expm1_below_zero, widen

__all__ = ["elu", "leaky_relu", "prelu", "relu", "relu6"]

_Pairs = tuple[tuple[Array, Array], tuple[Array, Array]]


def relu(x: ArrayLike, *, kink: float = 0.0) -> Array:
    """Rectified linear unit.

    Returns `max(x, 0)` in the dtype of `x`. The derivative is 0 for x < 0, `kink` at 0 and 1 for x > 0; at NaN it is 0.

    Args:
        x: real numbers of any shape and any float or integer dtype.
        kink: the derivative at 0, a finite Python number.

    Raises:
        TypeError: `x` is not a real number or array, or `kink` is not a Python number.
        ValueError: `kink` is not finite.

    References:
        Nair and Hinton 2010, Rectified linear units improve restricted Boltzmann machines; Bertoin et al. 2021,
        Numerical influence of ReLU'(0) on backpropagation (arXiv:2106.12915).

    Examples:
        >>> import jax, jaxrelu
        >>> jaxrelu.relu(jax.numpy.array([-5.0, 2.5, -1.75, 1.6]))
        Array([0. , 2.5, 0. , 1.6], dtype=float32)
        >>> jax.grad(jaxrelu.relu)(0.0)
        Array(0., dtype=float32, weak_type=True)
    """
    return _relu_jit(checked.real("relu", "x", x), checked.kink("relu", kink))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _relu(x: Array, kink: float) -> tuple[Array, Array]:
    y = lowering.separate(jnp.maximum, x, 0)
    if jnp.issubdtype(x.dtype, jnp.integer):  # no derivative, and some narrow ones no abs
        return y, y
    # CPU: XLA goes back to x from maximum(x, 0), and without abs in a transformer too, as it merges the two uses of x into
    # one: 520 MiB for 432 (jax 0.12). GPU: the matrix product takes in bias and relu if relu is a maximum; XLA turns
    # maximum(x, 0) > 0 into x > 0, but leaves the sign
    opaque = jnp.where(x > 0, jnp.abs(x), jnp.maximum(x, 0))
    return lowering.readable(x, y, opaque, on_gpu=(y, jnp.sign(y)))


@_relu.defjvp
def _relu_jvp(kink: float, primals: Any, tangents: Any) -> _Pairs:
    (x,), (g,) = primals, tangents
    y, read = _relu(x, kink)
    # selected, never multiplied by a mask: an infinite gradient through an inactive unit gives 0
    t = lax.select(read > 0, g, _only_at_kink(x == 0, kink, g))
    return (y, read), (t, jnp.zeros_like(read))


_relu_jit = lowering.core(_relu, "relu", 1)


def leaky_relu(x: ArrayLike, negative_slope: ArrayLike = 0.01, *, kink: float = 0.0) -> Array:
    """Leaky rectified linear unit.

    Returns `x` for x > 0, else `negative_slope * x`, in the float dtype of `x`. The derivative is 1 for x > 0,
    `negative_slope` for x < 0 and at NaN, and `negative_slope + kink * (1 - negative_slope)` at 0. It is differentiable in a
    slope that is an array too.

    Args:
        x: real numbers of any shape; integers are promoted to the default float.
        negative_slope: slope for x < 0: a Python number, or an array that broadcasts to the shape of `x`.
        kink: places the derivative at 0 between that for x < 0 (kink 0) and that for x > 0 (kink 1); a finite number.

    Raises:
        TypeError: `x` or `negative_slope` is not a real number or array, or `kink` is not a Python number.
        ValueError: `negative_slope` does not broadcast to `x`, or `kink` is not finite.

    References:
        Maas et al. 2013, Rectifier nonlinearities improve neural network acoustic models.

    Examples:
        >>> import jax, jaxrelu
        >>> jaxrelu.leaky_relu(jax.numpy.array([-2.0, 0.0, 3.0]), 0.1)
        Array([-0.2,  0. ,  3. ], dtype=float32)
    """
    x, kink = checked.floating("leaky_relu", "x", x), checked.kink("leaky_relu", kink)
    if checked.is_number(negative_slope):
        return _leaky_relu_jit(x, checked.number("leaky_relu", "negative_slope", negative_slope), kink)
    slope = checked.fitting("leaky_relu", "negative_slope", negative_slope, x)
    return _leaky_relu_array_jit(x, slope, None, kink)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _leaky_relu(x: Array, slope: float, kink: float) -> tuple[Array, Array]:
    wide = widen(x)
    y = cast(jnp.where(wide > 0, wide, slope * wide), x)
    # the sign of y is that of x only for a positive slope
    return lowering.readable(x, y, y, on_gpu=(y, y)) if slope > 0 else (y, x)


@_leaky_relu.defjvp
def _leaky_relu_jvp(slope: float, kink: float, primals: Any, tangents: Any) -> _Pairs:
    (x,), (g,) = primals, tangents
    y, read = _leaky_relu(x, slope, kink)
    t = jnp.where(read > 0, g, cast(_at_kink(x, kink, slope) * widen(g), g))
    return (y, read), (t, jnp.zeros_like(read))


_leaky_relu_jit = lowering.core(_leaky_relu, "leaky_relu", (1, 2))


def prelu(x: ArrayLike, negative_slope: ArrayLike, *, axis: int | None = None, kink: float = 0.0) -> Array:
    """Parametric rectified linear unit: a leaky_relu whose slope is learned.

    Returns `x` for x > 0, else `a * x`, in the float dtype of `x`. The derivative in x is 1 for x > 0, `a` for x < 0 and at
    NaN, and `a + kink * (1 - a)` at 0; in a it is x for x < 0, else 0, whatever `kink` is. The slope's gradient is summed in
    float32 or wider, then cast to the slope's dtype.

    Args:
        x: real numbers of any shape; integers are promoted to the default float.
        negative_slope: the slope a: a scalar, a vector along `axis`, or an array that broadcasts to the shape of `x`; finite
            in its dtype.
        axis: the axis of `x` along which a vector of slopes lies, e.g. 1 for channels in NCHW, -1 in NHWC; None
            broadcasts by NumPy's rules.
        kink: places the derivative at 0 between that for x < 0 (kink 0) and that for x > 0 (kink 1); a finite number.

    Raises:
        TypeError: `x` or `negative_slope` is not a real number or array, `axis` no int, or `kink` no Python number.
        ValueError: `negative_slope` does not broadcast to `x`, `axis` does not fit, or `kink` is not finite.

    References:
        He et al. 2015, Delving deep into rectifiers (arXiv:1502.01852).

    Examples:
        >>> import jax, jaxrelu
        >>> x = jax.numpy.array([[-4.0, -4.0], [2.0, 2.0]])
        >>> jaxrelu.prelu(x, jax.numpy.array([0.25, 0.5]), axis=0)
        Array([[-1., -1.],
               [ 2.,  2.]], dtype=float32)
    """
    x, kink = checked.floating("prelu", "x", x), checked.kink("prelu", kink)
    return _prelu_jit(x, checked.fitting("prelu", "negative_slope", negative_slope, x, axis), axis, kink)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _prelu(x: Array, slope: Array, axis: int | None, kink: float) -> Array:
    # the slope is rounded to x's dtype first, then the product; 8-bit floats have no product of their own
    wide = widen(x)
    return cast(jnp.where(wide > 0, wide, cast(cast(align(slope, x, axis), x), wide) * wide), x)


@functools.partial(_prelu.defjvp, symbolic_zeros=True)
def _prelu_jvp(axis: int | None, kink: float, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, slope), (g, h) = primals, tangents
    y = _prelu(x, slope, axis, kink)
    # a tangent that is known to be zero is left out: its product with an infinite x or slope would be NaN
    seen = {name: t for name, t in (("x", g), ("slope", h)) if type(t) is not SymbolicZero}

    def tangent(x: Array, slope: Array, seen: dict[str, Array]) -> Array:
        on, wide = x > 0, widen(x)
        active = off = jnp.zeros_like(wide)
        if "x" in seen:
            active = widen(seen["x"])
            off = _at_kink(x, kink, cast(cast(align(slope, x, axis), x), wide)) * active
        if "slope" in seen:
            # the tangent is set to 0 where x > 0 before it is multiplied by x, as inf * 0 would be NaN; the product is in
            # float32 or wider, so that the backward pass sums the slope's gradient there
            t = align(seen["slope"], x, axis)
            off += wide * cast(jnp.where(on, jnp.zeros_like(t), t), wide)
        return cast(jnp.where(on, active, off), x)

    return y, lowering.recomputed(tangent, x, slope, seen)


_prelu_jit = lowering.core(_prelu, "prelu", (2, 3))
_leaky_relu_array_jit = lowering.core(_prelu, "leaky_relu", (2, 3))


def elu(x: ArrayLike, alpha: ArrayLike = 1.0, *, kink: float = 0.0, save: Literal["input", "output"] = "input") -> Array:
    """Exponential linear unit.

    Returns `x` for x > 0, else `alpha * expm1(x)`, in the float dtype of `x`. The derivative is 1 for x > 0,
    `alpha * exp(x)` for x < 0, NaN at NaN and `alpha + kink * (1 - alpha)` at 0. It is differentiable in an alpha that is an
    array too.

    Args:
        x: real numbers of any shape; integers are promoted to the default float.
        alpha: the function tends to -alpha at -inf: a Python number, or an array that broadcasts to the shape of `x`.
        kink: places the derivative at 0 between that for x < 0 (kink 0) and that for x > 0 (kink 1); a finite number.
        save: what the backward pass keeps. "input" gives an accurate derivative everywhere. "output" lets `x` be freed: for
            x < 0 the derivative is taken from the output y, as `y + alpha`, which is off by at most alpha times the
            dtype's epsilon. For alpha 1 it is 0 below x = -6.25 in bfloat16, -8.32 in float16, -17 in float32.

    Raises:
        TypeError: `x` or `alpha` is not a real number or array, or `kink` is not a Python number.
        ValueError: `alpha` does not broadcast to `x`, `kink` is not finite, `save` is neither "input" nor "output", or
            `save="output"` comes with an alpha that is not a positive Python number or with a kink that is not 0.

    References:
        Clevert et al. 2016, Fast and accurate deep network learning by exponential linear units (arXiv:1511.07289).

    Examples:
        >>> import jax, jaxrelu
        >>> jaxrelu.elu(jax.numpy.array([-1.0, 0.0, 2.0]))
        Array([-0.63212055,  0.        ,  2.        ], dtype=float32)
    """
    x, kink = checked.floating("elu", "x", x), checked.kink("elu", kink)
    if save not in ("input", "output"):
        raise ValueError(f'elu: save must be "input" or "output", got {save!r}')
    number = checked.is_number(alpha)
    if save == "output" and not (number and alpha > 0 and kink == 0.0):
        raise ValueError(
            'elu: save="output" needs a positive Python number as alpha and kink 0, as the sign of the output decides, got '
            f'alpha={alpha!r} and kink={kink}; use save="input"'
        )
    if number:
        return _elu_jit(x, checked.number("elu", "alpha", alpha), kink, save)
    return _elu_array_jit(x, checked.fitting("elu", "alpha", alpha, x), kink, save)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _elu(x: Array, alpha: Array, kink: float, save: str) -> Array:
    wide = widen(x)
    return cast(jnp.where(wide > 0, wide, cast(align(alpha, x), wide) * expm1_below_zero(wide)), x)


@functools.partial(_elu.defjvp, symbolic_zeros=True)
def _elu_jvp(kink: float, save: str, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, alpha), (g, h) = primals, tangents
    y, wide = _elu(x, alpha, kink, save), widen(x)
    t = jnp.zeros_like(x)
    if type(g) is not SymbolicZero:
        # where, not minimum: its derivative at 0 is 0, and so is the second derivative of elu there
        if save == "output":
            on, slope = y > 0, jnp.where(y >= 0, jnp.zeros_like(y), y) + alpha
        else:
            # exp(x), as expm1(x) + 1 loses digits: below x = -4 most of them in bfloat16
            on, slope = x > 0, _at_kink(x, kink, cast(align(alpha, x), wide) * exp_below_zero(wide))
        # the slope is rounded before the product, so that a scan over layers keeps it in 16 bits
        t = lax.select(on, g, cast(slope, x) * g)
    if type(h) is not SymbolicZero:
        # expm1(min(x, 0)) by elu itself, whose derivative is stated; the tangent is set to 0 for x > 0 as in prelu's rule
        e = _elu(jnp.where(wide > 0, jnp.zeros_like(wide), wide), jnp.ones_like(alpha), 0.0, "input")
        h = align(h, x)
        t += cast(e * cast(jnp.where(wide > 0, jnp.zeros_like(h), h), wide), x)
    return y, t


_elu_jit = lowering.core(_elu, "elu", (1, 2, 3))
_elu_array_jit = lowering.core(_elu, "elu", (2, 3))


def relu6(x: ArrayLike, *, kink: float = 0.0) -> Array:
    """Rectified linear unit, bounded at 6.

    Returns `min(max(x, 0), 6)` in the dtype of `x`. The derivative is 1 for 0 < x < 6, `kink` at 0 and at 6, else 0; at NaN
    it is 0.

    Args:
        x: real numbers of any shape and any float or integer dtype.
        kink: the derivative at 0 and at 6, a finite Python number.

    Raises:
        TypeError: `x` is not a real number or array, or `kink` is not a Python number.
        ValueError: `kink` is not finite.

    References:
        Krizhevsky 2010, Convolutional deep belief networks on CIFAR-10; Sandler et al. 2018, MobileNetV2
        (arXiv:1801.04381).

    Examples:
        >>> import jax, jaxrelu
        >>> jaxrelu.relu6(jax.numpy.array([-1.0, 5.0, 7.0]))
        Array([0., 5., 6.], dtype=float32)
    """
    return _relu6_jit(checked.real("relu6", "x", x), checked.kink("relu6", kink))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _relu6(x: Array, kink: float) -> tuple[Array, Array]:
    integer = jnp.issubdtype(x.dtype, jnp.integer)
    top = min(6, int(jnp.iinfo(x.dtype).max)) if integer else 6  # int2 ends at 1
    y = lowering.separate(lambda x: jnp.minimum(jnp.maximum(x, 0), top), x)
    # CPU and GPU: XLA goes back to x from minimum(maximum(x, 0), 6)
    opaque = jnp.where(x > 0, jnp.minimum(x, top), jnp.maximum(x, 0))
    return (y, y) if integer else lowering.readable(x, y, opaque, on_gpu=(opaque, opaque))


@_relu6.defjvp
def _relu6_jvp(kink: float, primals: Any, tangents: Any) -> _Pairs:
    (x,), (g,) = primals, tangents
    y, read = _relu6(x, kink)
    t = lax.select((read > 0) & (read < 6), g, _only_at_kink((x == 0) | (x == 6), kink, g))
    return (y, read), (t, jnp.zeros_like(read))


_relu6_jit = lowering.core(_relu6, "relu6", 1)


def _at_kink(x: Array, kink: float, slope: Any) -> Any:
    """Returns the slope of the inactive side, moved towards 1, the active side's, where x is 0."""
    return slope if kink == 0.0 else jnp.where(x == 0, kink + (1.0 - kink) * slope, slope)


def _only_at_kink(at_kink: Array, kink: float, g: Array) -> Array:
    """Returns the tangent of a flat side: kink * g at the kink, else 0."""
    return jnp.zeros_like(g) if kink == 0.0 else jnp.where(at_kink, kink * g, jnp.zeros_like(g))
