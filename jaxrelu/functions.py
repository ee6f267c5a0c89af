"""relu, leaky_relu, prelu, elu and relu6, each with a stated derivative at its kinks.

A kink is a point where the slope of a function jumps: 0 for all five, and also 6 for relu6. On one side of it the unit is
active and the slope is 1; on the other it is inactive and the slope is another. At the kink itself the unit counts as
inactive, but the argument `kink` moves the derivative there, by which the backward pass multiplies the incoming gradient:

    derivative at the kink = inactive slope + kink * (active slope - inactive slope)

Each function has three parts, one below the other: the public function (`relu`), which checks its arguments; a private core
(`_relu`), which computes the value; and the core's derivative rule (`_relu_jvp`). The cores of relu, leaky_relu and relu6
also return the array that their rule reads to tell which units are active; `_lowering.py` says why that is not always x.
The cores of leaky_relu, prelu and elu compute a formula (`_elu_formula`) whose derivative by JAX is right too, with `kink`
as its last argument: `jaxrelu.portable` takes it in place of the core.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from jaxrelu import _checked as checked
from jaxrelu import _lowering as lowering
from jaxrelu._numerics import align, cast, exp_below_zero, expm1_below_zero, widen

__all__ = ["elu", "leaky_relu", "prelu", "relu", "relu6"]

_Pairs = tuple[tuple[Array, Array], tuple[Array, Array]]


def relu(x: ArrayLike, *, kink: float = 0.0) -> Array:
    """Rectified linear unit (Nair and Hinton 2010; for `kink`, Bertoin et al. 2021, arXiv:2106.12915).

    Returns `max(x, 0)` in the shape and dtype of `x`. The derivative is 0 for x < 0 and 1 for x > 0. At x = 0, where the
    slope jumps, it is the number `kink`. At NaN the value is NaN and the derivative 0.

    Args:
        x: a real number, or an array of any shape and of any float or integer dtype.
        kink: the derivative at 0, a finite Python number: 0 is the slope for x < 0, 1 that for x > 0.

    Raises:
        TypeError: `x` is not a real number or array, or `kink` is not a Python number.
        ValueError: `kink` is not finite.

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
    y = lowering.separate(jnp.maximum, x, jnp.zeros_like(x))
    if jnp.issubdtype(x.dtype, jnp.integer):  # integers have no derivative, and jnp.abs refuses int2 and int4
        return y, y
    # CPU: if the rule read maximum(x, 0), XLA would keep x and compute the maximum again. Without abs it does so too where
    # it merges the two expressions of x below: a transformer in float32 takes 432 MiB with abs, 520 without (jax 0.12;
    # test_memory_beside_the_reference).
    # GPU: as a plain maximum, relu is computed by the kernel of the matrix product. The rule reads the sign of y, because
    # XLA turns maximum(x, 0) > 0 into x > 0 and then keeps x (test_relu_on_a_gpu_is_maximum_and_its_rule_reads_the_sign).
    opaque = jnp.where(x > 0, jnp.abs(x), jnp.maximum(x, 0))
    return lowering.readable(x, y, opaque, on_gpu=(y, jnp.sign(y)))


@_relu.defjvp
def _relu_jvp(kink: float, primals: Any, tangents: Any) -> _Pairs:
    (x,), (g,) = primals, tangents
    y, read = lowering.outputs(_relu, x, kink)
    # not a product with a mask, as an infinite gradient times 0 is NaN; not jnp.where for the reason in `lowering.separate`
    t = lax.select(read > 0, g, _only_at_kink(x == 0, kink, g))
    return (y, read), (t, jnp.zeros_like(read))


_relu_jit = lowering.core(_relu, "relu", (1,))


def leaky_relu(x: ArrayLike, negative_slope: ArrayLike = 0.01, *, kink: float = 0.0) -> Array:
    """Leaky rectified linear unit (Maas et al. 2013, Rectifier nonlinearities improve neural network acoustic models).

    Returns `x` for x > 0, else `negative_slope * x`, in the shape and float dtype of `x`. The derivative is 1 for x > 0 and
    `negative_slope` for x < 0 and at NaN. At 0, where the slope jumps, it is `negative_slope + kink * (1 - negative_slope)`.
    If `negative_slope` is an array, the function can be differentiated in it too.

    Args:
        x: a real number or array of any shape; integers are converted to JAX's default float dtype.
        negative_slope: the slope for x < 0: a Python number, or an array that broadcasts to the shape of `x`. Outside
            `jax.jit` each new Python number compiles once more; the values of an array do not.
        kink: a finite Python number that moves the derivative at 0 from its value for x < 0 (kink 0) to 1 (kink 1).

    Raises:
        TypeError: `x` or `negative_slope` is not a real number or array, or `kink` is not a Python number.
        ValueError: `negative_slope` does not broadcast to `x`, or `kink` is not finite.

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


def leaky_relu_formula(x: Array, slope: float, kink: float = 0.0) -> Array:
    wide = widen(x)
    return cast(jnp.where(wide > 0, wide, _at_kink(x, kink, slope) * wide), x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _leaky_relu(x: Array, slope: float, kink: float) -> tuple[Array, Array]:
    y = leaky_relu_formula(x, slope)
    # the rule may read y in place of x only if both have the same sign, which takes a positive slope
    return lowering.readable(x, y, y, on_gpu=(y, y)) if slope > 0 else (y, x)


@_leaky_relu.defjvp
def _leaky_relu_jvp(slope: float, kink: float, primals: Any, tangents: Any) -> _Pairs:
    (x,), (g,) = primals, tangents
    y, read = _leaky_relu(x, slope, kink)
    t = jnp.where(read > 0, g, cast(_at_kink(x, kink, slope) * widen(g), g))
    return (y, read), (t, jnp.zeros_like(read))


_leaky_relu_jit = lowering.core(_leaky_relu, "leaky_relu", (1, 2), formula=leaky_relu_formula)


def prelu(x: ArrayLike, negative_slope: ArrayLike, *, axis: int | None = None, kink: float = 0.0) -> Array:
    """Parametric rectified linear unit: a leaky_relu whose slope is learned (He et al. 2015, arXiv:1502.01852).

    Returns `x` for x > 0, else `a * x`, in the shape and float dtype of `x`; a is `negative_slope`. The derivative in x is 1
    for x > 0, `a` for x < 0 and at NaN, and `a + kink * (1 - a)` at 0, where the slope jumps. The derivative in a is x for
    x < 0, NaN at NaN, else 0, for every `kink`. The gradient of the slopes is summed in float32 or wider, then cast.

    Args:
        x: a real number or array of any shape; integers are converted to JAX's default float dtype.
        negative_slope: the finite slope a: a scalar, a vector along `axis`, or an array that broadcasts to the shape of `x`.
        axis: the axis of `x` along which a vector of slopes lies: 1 for the channels of an NCHW image, -1 for those of an
            NHWC image. With None the slopes broadcast by NumPy's rules.
        kink: a finite Python number that moves the derivative at 0 from its value for x < 0 (kink 0) to 1 (kink 1).

    Raises:
        TypeError: `x` or `negative_slope` is not a real number or array, `axis` not an int, or `kink` not a Python number.
        ValueError: `negative_slope` does not broadcast to `x`, `axis` does not fit, or `kink` is not finite.

    Examples:
        >>> import jax, jaxrelu
        >>> x = jax.numpy.array([[-4.0, -4.0], [2.0, 2.0]])
        >>> jaxrelu.prelu(x, jax.numpy.array([0.25, 0.5]), axis=0)
        Array([[-1., -1.],
               [ 2.,  2.]], dtype=float32)
    """
    x, kink = checked.floating("prelu", "x", x), checked.kink("prelu", kink)
    if isinstance(negative_slope, np.generic):  # as an array, it makes the result's type strong
        negative_slope = np.asarray(negative_slope)
    if number := checked.is_number(negative_slope):
        negative_slope = float(checked.number("prelu", "negative_slope", negative_slope))
    slope = checked.fitting("prelu", "negative_slope", negative_slope, x, axis)
    return (_prelu_number_jit if number else _prelu_jit)(x, slope, axis, kink)


def _prelu_formula(x: Array, slope: Array, axis: int | None, kink: float = 0.0) -> Array:
    # the slope is rounded to the dtype of x; the product is computed in float32 or wider, and rounded once
    wide = widen(x)
    slope = _at_kink(x, kink, cast(cast(align(slope, x, axis), x), wide))
    # where x > 0, 0 is multiplied: in `portable`, JAX's own derivative in the slope would multiply 0 by an infinite x
    return cast(jnp.where(wide > 0, wide, slope * jnp.where(wide > 0, jnp.zeros_like(wide), wide)), x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _prelu(x: Array, slope: Array, axis: int | None, kink: float) -> Array:
    return _prelu_formula(x, slope, axis)


@functools.partial(_prelu.defjvp, symbolic_zeros=True)
def _prelu_jvp(axis: int | None, kink: float, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, slope), (g, h) = primals, tangents
    y = _prelu(x, slope, axis, kink)
    # a tangent that JAX knows to be zero is left out: multiplied by an infinite x or slope it would give NaN
    seen = {name: t for name, t in (("x", g), ("slope", h)) if type(t) is not SymbolicZero}

    def tangent(x: Array, slope: Array, seen: dict[str, Array]) -> Array:
        on, wide = x > 0, widen(x)
        active = off = jnp.zeros_like(wide)
        if "x" in seen:
            active = widen(seen["x"])
            off = _at_kink(x, kink, cast(cast(align(slope, x, axis), x), wide)) * active
        if "slope" in seen:
            # where x > 0 the tangent, not the product, is set to 0: the backward pass would otherwise multiply 0 by an
            # infinite x, which is NaN. The product is in float32 or wider, so that the slope's gradient is summed there
            t = align(seen["slope"], x, axis)
            off += wide * cast(jnp.where(on, jnp.zeros_like(t), t), wide)
        return cast(jnp.where(on, active, off), x)

    return y, lowering.recomputed(tangent, x, slope, seen)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _prelu_number(x: Array, slope: Array, axis: int | None, kink: float) -> Array:
    return _prelu_formula(x, slope, axis)


@_prelu_number.defjvp  # a slope that is a Python number is not learned
def _prelu_number_jvp(axis: int | None, kink: float, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, slope), (g, _) = primals, tangents
    off = _at_kink(x, kink, cast(cast(align(slope, x, axis), x), widen(x))) * widen(g)
    return _prelu_number(x, slope, axis, kink), jnp.where(x > 0, g, cast(off, g))


# a call, as inlined on the CPU in bfloat16 it takes 1.18 of Flax's memory under dots_saveable (jax 0.12; test_memory.py)
_prelu_jit = lowering.core(_prelu, "prelu", (2, 3), inline=False, formula=_prelu_formula)
_leaky_relu_array_jit = lowering.core(_prelu, "leaky_relu", (2, 3), inline=False, formula=_prelu_formula)
_prelu_number_jit = lowering.core(_prelu_number, "prelu", (2, 3), formula=_prelu_formula)


def elu(x: ArrayLike, alpha: ArrayLike = 1.0, *, kink: float = 0.0, save: Literal["input", "output"] = "input") -> Array:
    """Exponential linear unit (Clevert et al. 2016, arXiv:1511.07289).

    Returns `x` for x > 0, else `alpha * expm1(x)`, in the shape and float dtype of `x`. The derivative is 1 for x > 0,
    `alpha * exp(x)` for x < 0 and NaN at NaN. At 0, where the slope jumps unless alpha is 1, it is `alpha + kink * (1 -
    alpha)`. If `alpha` is an array, the function can be differentiated in it too.

    Args:
        x: a real number or array of any shape; integers are converted to JAX's default float dtype.
        alpha: minus the limit of the function at -inf: a Python number, or an array that broadcasts to the shape of `x`.
            Outside `jax.jit` each new Python number compiles once more; the values of an array do not.
        kink: a finite Python number that moves the derivative at 0 from its value for x < 0 (kink 0) to 1 (kink 1).
        save: what the backward pass keeps. "input" gives an accurate derivative everywhere. "output" lets the memory of `x`
            be freed: for x < 0 the derivative is computed from the output y, as `y + alpha`, with an error of at most alpha
            times the dtype's epsilon. For alpha 1 it is 0 below x = -6.25 in bfloat16, -8.32 in float16, -17 in float32.

    Raises:
        TypeError: `x` or `alpha` is not a real number or array, or `kink` is not a Python number.
        ValueError: `alpha` does not broadcast to `x`, `kink` is not finite, `save` is neither "input" nor "output", or
            `save="output"` comes with an alpha that is not a positive Python number or with a kink that is not 0.

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
    return _elu_array_jit(x, checked.fitting("elu", "alpha", alpha, x), kink)


def _elu_formula(x: Array, alpha: ArrayLike, kink: float = 0.0) -> Array:
    wide = widen(x)
    alpha = _at_kink(x, kink, cast(align(alpha, x), wide))
    return cast(jnp.where(wide > 0, wide, alpha * expm1_below_zero(wide)), x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _elu(x: Array, alpha: ArrayLike, kink: float, save: str) -> Array:
    return _elu_formula(x, alpha)


@_elu.defjvp
def _elu_jvp(alpha: ArrayLike, kink: float, save: str, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x,), (g,) = primals, tangents
    y = _elu(x, alpha, kink, save)
    if save == "output":
        # jnp.where has derivative 0 at y = 0, and jnp.minimum has not: elu's second derivative at 0 is to be 0
        slope = jnp.where(y >= 0, jnp.zeros_like(y), y) + alpha
        return y, lax.select(y > 0, g, cast(slope, x) * g)
    return y, _elu_tangent(x, alpha, kink, g)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _elu_array(x: Array, alpha: Array, kink: float) -> Array:
    return _elu_formula(x, alpha)


@functools.partial(_elu_array.defjvp, symbolic_zeros=True)
def _elu_array_jvp(kink: float, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, alpha), (g, h) = primals, tangents
    t = jnp.zeros_like(x) if type(g) is SymbolicZero else _elu_tangent(x, alpha, kink, g)
    if type(h) is not SymbolicZero:
        # as in prelu's rule, the tangent is set to 0 for x > 0 before the product
        on, h = x > 0, align(h, x)
        e = expm1_below_zero(widen(x))
        t += cast(e * cast(jnp.where(on, jnp.zeros_like(h), h), e), x)
    return _elu_array(x, alpha, kink), t


def _elu_tangent(x: Array, alpha: ArrayLike, kink: float, g: Array) -> Array:
    wide = widen(x)
    # exp(x) itself, because expm1(x) + 1 loses digits: in bfloat16 most of them below x = -4
    slope = _at_kink(x, kink, cast(align(alpha, x), wide) * exp_below_zero(wide))
    # The slope of a 16-bit x is rounded to 16 bits before the product, so that a scan over layers keeps 16-bit slopes.
    # CPU, float32, a ResNet-18: for x > 0 the gradient is selected; multiplied by a slope of 1, it would take 1.03 times
    # the memory of jax.nn's elu (test_memory_beside_the_reference)
    return lax.select(x > 0, g, cast(slope, x) * g)


_elu_jit = lowering.core(_elu, "elu", (1, 2, 3))
_elu_array_jit = lowering.core(_elu_array, "elu", (2,), formula=_elu_formula)


def relu6(x: ArrayLike, *, kink: float = 0.0) -> Array:
    """Rectified linear unit, bounded at 6 (Krizhevsky 2010; Sandler et al. 2018, arXiv:1801.04381).

    Returns `min(max(x, 0), 6)` in the shape and dtype of `x`. The derivative is 1 for 0 < x < 6, and 0 for x < 0 and x > 6.
    At 0 and at 6, where the slope jumps, it is the number `kink`. At NaN the value is NaN and the derivative 0.

    Args:
        x: a real number, or an array of any shape and of any float or integer dtype.
        kink: the derivative at 0 and at 6, a finite Python number: 0 is the slope of the flat sides, 1 that between.

    Raises:
        TypeError: `x` is not a real number or array, or `kink` is not a Python number.
        ValueError: `kink` is not finite.

    Examples:
        >>> import jax, jaxrelu
        >>> jaxrelu.relu6(jax.numpy.array([-1.0, 5.0, 7.0]))
        Array([0., 5., 6.], dtype=float32)
    """
    return _relu6_jit(checked.real("relu6", "x", x), checked.kink("relu6", kink))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _relu6(x: Array, kink: float) -> tuple[Array, Array]:
    integer = jnp.issubdtype(x.dtype, jnp.integer)
    top = min(6, int(jnp.iinfo(x.dtype).max)) if integer else 6  # the largest int2 is 1
    y = lowering.separate(_clipped, x, jnp.zeros_like(x), jnp.full_like(x, top))
    # CPU and GPU: if the rule reads minimum(maximum(x, 0), 6), XLA keeps x and computes that from it again; this form it
    # keeps (test_memory_of_a_gradient, test_the_gradient_reads_the_output_but_on_a_tpu)
    opaque = jnp.where(x > 0, jnp.minimum(x, top), jnp.maximum(x, 0))
    return (y, y) if integer else lowering.readable(x, y, opaque, on_gpu=(opaque, opaque))


@_relu6.defjvp
def _relu6_jvp(kink: float, primals: Any, tangents: Any) -> _Pairs:
    (x,), (g,) = primals, tangents
    y, read = lowering.outputs(_relu6, x, kink)
    t = lax.select((read > 0) & (read < 6), g, _only_at_kink((x == 0) | (x == 6), kink, g))
    return (y, read), (t, jnp.zeros_like(read))


_relu6_jit = lowering.core(_relu6, "relu6", (1,))


def _clipped(x: Array, low: Array, high: Array) -> Array:
    return jnp.minimum(jnp.maximum(x, low), high)


def _at_kink(x: Array, kink: float, slope: Any) -> Any:
    """Returns the inactive side's slope; where x is 0, `kink` moves it towards 1, the active side's."""
    return slope if kink == 0.0 else jnp.where(x == 0, kink + (1.0 - kink) * slope, slope)


def _only_at_kink(at_kink: Array, kink: float, g: Array) -> Array:
    """Returns the tangent (the derivative times g) of a flat side: kink * g at the kink, else 0."""
    return jnp.zeros_like(g) if kink == 0.0 else jnp.where(at_kink, kink * g, jnp.zeros_like(g))
