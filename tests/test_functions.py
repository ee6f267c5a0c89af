import contextlib
import copy
import functools
import inspect
import pickle

import chex
import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import jet
from jax.experimental import pallas as pl
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxrelu

from cases import CASES, Case, assert_ulps, each_case, each_dtype, exp, expm1

POINTS = [-np.inf, -5.0, -1.75, -0.0, 0.0, 1.6, 2.5, 6.0, 7.0, np.inf, np.nan]


def derivative(function, x):
    """Returns the derivative at each number, after checking that forward and reverse mode agree bitwise."""
    ones = jnp.ones_like(x)
    _, forward = jax.jvp(function, (x,), (ones,))
    (reverse,) = jax.vjp(function, x)[1](ones)
    assert np.asarray(forward).tobytes() == np.asarray(reverse).tobytes()
    return forward


def with_exact(x):
    """Returns numbers as they are and in float64."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return x, x.astype(np.float64)


def every_number(dtype):
    """Returns all 65,536 numbers, in the dtype and in float64."""
    return with_exact(np.arange(2**16, dtype=np.uint16).view(dtype))


def float32_points():
    """Returns 100,000 numbers, every exponent and a dense range where elu bends, in float32 and in float64."""
    rng = np.random.default_rng(0)
    with np.errstate(over="ignore"):
        anywhere = rng.integers(0, 2**32, 50_000, dtype=np.uint32).view(np.float32)
    bend = -rng.uniform(0, 90, 50_000).astype(np.float32)
    tiny = np.finfo(np.float32).tiny
    border = [tiny, np.nextafter(tiny, 1, dtype=np.float32), np.nextafter(tiny, 0, dtype=np.float32), 1e-45]
    around = [np.nextafter(v, d, dtype=np.float32) for v in np.float32([0, 6, -87.33655]) for d in (-np.inf, np.inf)]
    return with_exact(np.concatenate([anywhere, bend, np.float32([*border, *(-b for b in border), *around, *POINTS])]))


# values and derivatives


@each_case
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["float16", "bfloat16"])
def test_every_16_bit_number(case: Case, dtype):
    x, exact = every_number(dtype)
    assert_ulps(case.function(x), case.value(exact), case.ulps)
    normal = (exact == 0) | ~(np.abs(exact) < float(jnp.finfo(dtype).tiny))
    slope = derivative(case.function, jnp.asarray(x))
    assert slope.dtype == dtype
    # a subnormal may be flushed to zero, and then lies on the kink
    assert_ulps(slope[normal], case.slope(exact[normal]), min(case.slope_ulps, 1.0))


@each_case
def test_float32(case: Case):
    x, exact = float32_points()
    assert x.size >= 100_000
    assert_ulps(case.function(x), case.value(exact), case.ulps)
    normal = (x == 0) | ~(np.abs(x) < np.finfo(np.float32).tiny)
    assert_ulps(derivative(case.function, jnp.asarray(x))[normal], case.slope(exact[normal]), case.slope_ulps)


@each_case
def test_float64(case: Case):
    x = float32_points()[1][::10]
    normal = (x == 0) | ~(np.abs(x) < np.finfo(np.float32).tiny)
    with jax.enable_x64(True):
        # jnp's own expm1 and exp, which jax 0.10 has within 4 ulp
        assert_ulps(case.function(x), case.value(x), 4.0 if case.ulps else 0.0)
        assert_ulps(
            derivative(case.function, jnp.asarray(x))[normal], case.slope(x[normal]), 4.0 if case.slope_ulps else 0.0
        )


def test_assert_ulps_fails_one_ulp_off():
    exact = np.array([0.5, -3.0, 1e-3])
    with pytest.raises(AssertionError, match="1 of 3 are off"):
        assert_ulps(jnp.float32([0.5, np.nextafter(np.float32(-3), np.float32(0)), 1e-3]), exact, 0.9)


@pytest.mark.parametrize("alpha", [0.3, 2.0])
@pytest.mark.parametrize("array", [False, True])
def test_elu_alpha(alpha, array):
    x, exact = (points[::10] for points in float32_points())
    function = functools.partial(jaxrelu.elu, alpha=jnp.float32(alpha) if array else alpha)
    rounded = float(np.float32(alpha))
    normal = (x == 0) | ~(np.abs(x) < np.finfo(np.float32).tiny)
    x, exact = x[normal], exact[normal]
    assert_ulps(function(x), np.where(exact > 0, exact, rounded * expm1(np.minimum(exact, 0))), 2.0)
    slope = np.where(exact > 0, 1.0, rounded * exp(np.minimum(exact, 0)))
    slope[np.isnan(x)] = np.nan
    kept = ~(np.abs(slope) < 2 * alpha * np.finfo(np.float32).tiny)  # exp(x) may be flushed before alpha scales it up
    assert_ulps(derivative(function, jnp.asarray(x))[kept], slope[kept], 2.5)
    assert (derivative(function, jnp.asarray(x))[~kept] < 1e-37).all()


@pytest.mark.parametrize(("dtype", "zero_below"), [(jnp.bfloat16, -6.25), (jnp.float16, -8.32), (jnp.float32, -17.5)])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_elu_save_output(dtype, zero_below, alpha):
    x = jnp.asarray(np.linspace(-30, 3, 40_001), dtype)
    function = functools.partial(jaxrelu.elu, alpha=alpha, save="output")
    chex.assert_trees_all_equal(function(x), jaxrelu.elu(x, alpha))
    exact = np.asarray(x).astype(np.float64)
    slope = np.asarray(derivative(function, x)).astype(np.float64)
    expected = np.where(exact > 0, 1.0, alpha * exp(np.minimum(exact, 0)))
    assert np.abs(slope - expected).max() <= alpha * float(jnp.finfo(dtype).eps)
    assert (slope[exact < zero_below] == 0).all()


@pytest.mark.parametrize("length", [*range(1, 41), 1000])
def test_elu_gives_the_same_bits_at_every_length(length):
    x = jnp.float32(-np.random.default_rng(1).exponential(2, 1000))
    whole, slopes = jaxrelu.elu(x), derivative(jaxrelu.elu, x)
    chex.assert_trees_all_equal(jaxrelu.elu(x[:length]), whole[:length])
    chex.assert_trees_all_equal(derivative(jaxrelu.elu, x[:length]), slopes[:length])


# the kinks


@each_case
@each_dtype
@pytest.mark.parametrize("kink", [0.0, 0.5, 1.0, 10.0, 100.0])
def test_kinks(case: Case, dtype, kink):
    with jax.enable_x64(True):
        for at, (inactive, active) in case.kinks.items():
            for x in (at, -at):  # -0.0 is a zero
                if x not in case.kinks:
                    continue
                expected = np.array(inactive + kink * (active - inactive))
                actual = derivative(functools.partial(case.function, kink=kink), jnp.asarray(x, dtype))
                assert actual.dtype == dtype
                if kink in (0.0, 1.0):
                    assert float(actual) == float(jnp.asarray(expected, dtype))
                assert_ulps(actual, expected, 1.0)


@each_case
def test_kink_moves_nothing_else(case: Case):
    x = jnp.float32([v for v in POINTS if v not in case.kinks])
    chex.assert_trees_all_equal(derivative(functools.partial(case.function, kink=0.5), x), derivative(case.function, x))
    chex.assert_trees_all_equal(case.function(x, kink=0.5), case.function(x))


def test_elu_kink_lies_between_alpha_and_1():
    slope = derivative(functools.partial(jaxrelu.elu, alpha=0.5, kink=0.25), jnp.float32([-0.0, 0.0]))
    assert slope.tolist() == [0.625, 0.625]


def is_linear_at_the_kink(function, at):
    """Whether vjp(g) is g times vjp(1) at the kink, for gradients of both signs and zero."""
    vjp = jax.vjp(function, jnp.float32(at))[1]
    (unit,) = vjp(jnp.float32(1))
    return all(vjp(jnp.float32(g))[0] == g * unit for g in (-2.0, 0.0, 0.25, 3.0))


@each_case
@pytest.mark.parametrize("kink", [0.0, 0.5, 1.0, 10.0])
def test_rule_is_linear_in_the_gradient_at_the_kink(case: Case, kink):
    for at in case.kinks:
        assert is_linear_at_the_kink(functools.partial(case.function, kink=kink), at)


def test_the_published_rule_is_not_linear_at_the_kink():
    # the code published with Bertoin et al. 2021 writes the constant where it should scale the gradient by it
    @jax.custom_vjp
    def published(x):
        return jnp.maximum(x, 0)

    published.defvjp(lambda x: (published(x), x), lambda x, g: (jnp.where(x == 0, 0.5, jnp.where(x > 0, g, 0.0)),))
    assert not is_linear_at_the_kink(published, 0.0)


@each_case
def test_second_derivative(case: Case):
    for at in case.kinks:
        assert jax.hessian(case.function)(jnp.float32(at)) == 0
        assert jax.hessian(functools.partial(case.function, kink=0.5))(jnp.float32(at)) == 0
    x = jnp.float32([-3.0, -0.5, 0.5, 7.0])
    curvature = jax.vmap(jax.hessian(case.function))(x)
    expected = np.exp(np.float64(x)) * (np.asarray(x) < 0) if case.name == "elu" else np.zeros(4)
    np.testing.assert_allclose(curvature, expected, rtol=1e-6)


def test_elu_save_output_second_derivative():
    x = jnp.float32([-3.0, -0.5, 0.0, 0.5])
    curvature = jax.vmap(jax.hessian(functools.partial(jaxrelu.elu, save="output")))(x)
    np.testing.assert_allclose(curvature, [np.exp(-3.0), np.exp(-0.5), 0, 0], rtol=1e-6)


@each_case
@pytest.mark.parametrize("kink", [0.0, 0.5, 10.0])
def test_forward_and_reverse_mode_agree_bitwise_for_any_gradient(case: Case, kink):
    x = jnp.float32([-3.0, *case.kinks, 2.0, 9.0, np.nan])
    function = functools.partial(case.function, kink=kink)
    vjp = jax.vjp(function, x)[1]
    for g in (-0.001, 0.1, 3.7, 1e30, np.inf):
        g = jnp.full_like(x, g)
        _, forward = jax.jvp(function, (x,), (g,))
        assert np.asarray(forward).tobytes() == np.asarray(vjp(g)[0]).tobytes()


@pytest.mark.parametrize("function", [jaxrelu.relu, jaxrelu.relu6])
@pytest.mark.parametrize("kink", [0.0, 0.5])
def test_infinite_gradient_through_an_inactive_unit_is_0(function, kink):
    gradient = jax.vjp(functools.partial(function, kink=kink), jnp.float32([-1.0, 1.0]))[1](jnp.float32([np.inf, np.inf]))
    assert gradient[0].tolist() == [0.0, np.inf]


# prelu's slope


def test_prelu_is_torchs_on_nchw_and_nhwc():
    # torch.nn.functional.prelu(x, torch.tensor([0.25, 0.5, 2.0])) for x of shape (1, 3, 1, 3), written out
    x = np.float32([[-4, 0, 4], [-2, -0.5, 1], [3, -1, -8]]).reshape(1, 3, 1, 3)
    y = np.float32([[-1, 0, 4], [-1, -0.25, 1], [3, -2, -16]]).reshape(1, 3, 1, 3)
    dx = np.float32([[0.25, 0.25, 1], [0.5, 0.5, 1], [1, 2, 2]]).reshape(1, 3, 1, 3)
    da = np.float32([-4, -2.5, -9])
    slope = jnp.float32([0.25, 0.5, 2.0])
    for axis, move in ((1, lambda v: v), (-1, lambda v: np.moveaxis(v, 1, -1)), (3, lambda v: np.moveaxis(v, 1, -1))):
        out, vjp = jax.vjp(functools.partial(jaxrelu.prelu, axis=axis), jnp.asarray(move(x)), slope)
        chex.assert_trees_all_equal(np.asarray(out), move(y))
        got = vjp(jnp.ones_like(out))
        chex.assert_trees_all_equal(np.asarray(got[0]), move(dx))
        chex.assert_trees_all_equal(np.asarray(got[1]), da)


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(
    shapes=hypothesis.extra.numpy.mutually_broadcastable_shapes(num_shapes=1, base_shape=(2, 3, 4), max_dims=3),
    which=st.sampled_from(["prelu", "leaky_relu", "elu"]),
)
def test_a_parameter_broadcasts_to_x(shapes, which):
    (shape,) = shapes.input_shapes
    hypothesis.assume(shapes.result_shape == (2, 3, 4))
    rng = np.random.default_rng(0)
    x, parameter = np.float32(rng.normal(size=(2, 3, 4))), np.float32(rng.uniform(0.1, 2, size=shape))
    inactive = np.expm1(np.minimum(x, 0)) if which == "elu" else np.minimum(x, 0)
    function = getattr(jaxrelu, which)
    np.testing.assert_allclose(function(x, parameter), np.maximum(x, 0) + parameter * inactive, rtol=1e-6)
    gradient = jax.grad(lambda a: function(jnp.asarray(x), a).sum())(jnp.asarray(parameter))
    lead = tuple(range(3 - len(shape)))
    kept = tuple(i for i, n in enumerate(shape) if n == 1)
    expected = np.float64(inactive).sum(lead).sum(kept, keepdims=True) if shape else np.float64(inactive).sum()
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("slope_dtype", [jnp.float32, jnp.float16, jnp.bfloat16], ids=["float32", "float16", "bfloat16"])
def test_slope_gradient_of_a_million_16_bit_numbers(dtype, slope_dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=10**6) / 50, dtype)  # / 50: the sum stays in float16's range
    g = jnp.asarray(rng.uniform(size=10**6), dtype)
    gradient = jax.vjp(lambda a: jaxrelu.prelu(x, a), jnp.asarray(0.25, slope_dtype))[1](g)[0]
    assert gradient.dtype == slope_dtype
    exact = np.sum(np.minimum(np.asarray(x, np.float64), 0) * np.asarray(g, np.float64))
    if slope_dtype == jnp.float32:
        assert abs(float(gradient) / exact - 1) < 1e-5
    else:
        assert_ulps(gradient, np.array(exact), 0.51)


def test_slope_gradient_does_not_overflow_float16():
    x = jnp.full(10**6, -1.0, jnp.float16)
    assert jax.grad(lambda a: jaxrelu.prelu(x, a).astype(jnp.float32).sum())(jnp.float32(0.25)) == -1e6


def test_infinite_input_leaves_the_slope_gradient_finite():
    x = jnp.float32([np.inf, -2.0, 3.0])
    assert jax.grad(lambda a: jaxrelu.prelu(x, a).sum())(jnp.float32(0.25)) == -2
    assert jax.jvp(lambda a: jaxrelu.prelu(x, a), (jnp.float32(0.25),), (jnp.float32(1),))[1].tolist() == [0, -2, 0]


def test_derivative_in_x_takes_no_nan_from_the_slope():
    _, tangent = jax.jvp(lambda x: jaxrelu.prelu(x, 0.25), (jnp.float32(-np.inf),), (jnp.float32(1),))
    assert tangent == 0.25


def test_elu_alpha_gradient():
    x = jnp.float32(np.random.default_rng(0).normal(size=(5, 7)))
    gradient = jax.grad(lambda a: jaxrelu.elu(x, a).sum())(jnp.float32(0.5))
    np.testing.assert_allclose(gradient, np.expm1(np.minimum(np.float64(x), 0)).sum(), rtol=1e-6)
    mixed = jax.jacfwd(jax.grad(lambda a, x: jaxrelu.elu(x, a)), 1)(jnp.float32(0.5), jnp.float32(-0.5))
    np.testing.assert_allclose(mixed, np.exp(-0.5), rtol=1e-6)


# transformations


@each_case
@pytest.mark.parametrize("kink", [0.0, 0.5])
def test_transformations_agree_bitwise(case: Case, kink):
    function = functools.partial(case.function, kink=kink)
    x = jnp.float32(np.concatenate([POINTS, np.random.default_rng(0).normal(size=45) * 4])).reshape(7, 8)
    y, slope = function(x), derivative(function, x)
    linear = jax.linearize(function, x)
    forms = {
        "jit": (jax.jit(function)(x), derivative(jax.jit(function), x)),
        "vmap": (jax.vmap(function)(x), derivative(jax.vmap(function), x)),
        "vmap over columns": (jax.vmap(function, 1, 1)(x), derivative(jax.vmap(function, 1, 1), x)),
        "scan": (
            jax.lax.scan(lambda _, row: (None, function(row)), None, x)[1],
            derivative(lambda x: jax.lax.scan(lambda _, row: (None, function(row)), None, x)[1], x),
        ),
        "remat": (jax.checkpoint(function)(x), derivative(jax.checkpoint(function), x)),
        "linearize": (linear[0], linear[1](jnp.ones_like(x))),
        "vmap of grad": (y, jax.vmap(jax.vmap(jax.grad(function)))(x)),
    }
    for name, form in forms.items():
        assert np.asarray(form[0]).tobytes() == np.asarray(y).tobytes(), name
        assert np.asarray(form[1]).tobytes() == np.asarray(slope).tobytes(), name


def test_a_batched_slope():
    x, slopes = jnp.float32(np.random.default_rng(0).normal(size=(4, 3, 5))), jnp.float32([0.1, 0.2, 0.3])
    batched = jax.vmap(lambda x, a: jaxrelu.prelu(x, a), in_axes=(1, 0), out_axes=1)(x, slopes)
    chex.assert_trees_all_equal(batched, jaxrelu.prelu(x, slopes, axis=1))


@each_case
def test_inside_a_pallas_kernel(case: Case):
    x = jnp.float32(np.linspace(-8, 8, 128)).reshape(8, 16)

    def kernel(x_ref, y_ref, slope_ref):
        y_ref[...], slope_ref[...] = jax.jvp(case.function, (x_ref[...],), (jnp.ones_like(x_ref[...]),))

    y, slope = pl.pallas_call(kernel, out_shape=(x, x), interpret=True)(x)
    chex.assert_trees_all_equal((y, slope), (case.function(x), derivative(case.function, x)))


@pytest.mark.xfail(reason="jax.experimental.jet has no rule for custom_jvp functions", strict=True)
@each_case
def test_jet(case: Case):
    jet.jet(case.function, (jnp.float32(1.5),), ((jnp.float32(1.0), jnp.float32(0.0)),))


@each_case
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", [P("d"), P(None, "d"), P(None, None, "d")], ids=["rows", "columns", "last"])
def test_sharding_needs_no_collective(case: Case, axis_type, spec):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.float32(np.random.default_rng(0).normal(size=(16, 8, 24))), NamedSharding(mesh, spec))
        step = jax.jit(lambda x, g: jax.vjp(case.function, x)[1](g)[0])
        text = step.lower(x, x).compile().as_text()
        assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
        assert step(x, x).sharding.is_equivalent_to(x.sharding, x.ndim)
    slope = derivative(case.function, jnp.asarray(np.asarray(x)))
    np.testing.assert_allclose(np.asarray(step(x, x)), np.asarray(x) * np.asarray(slope), rtol=1e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_prelu_of_a_sharded_axis(axis_type):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
    x, slope = np.random.default_rng(0).normal(size=(3, 24, 5)).astype(np.float32), np.linspace(0, 1, 24, dtype=np.float32)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, P(None, "d")))
        slopes = jax.device_put(slope, NamedSharding(mesh, P("d")))
        y = jax.jit(functools.partial(jaxrelu.prelu, axis=1))(sharded, slopes)
        replicated = jax.jit(functools.partial(jaxrelu.prelu, axis=1))(sharded, slope)
    chex.assert_trees_all_equal(np.asarray(y), np.asarray(replicated), np.where(x > 0, x, slope[:, None] * x))


# dtypes and refusals


@each_case
@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2], ids=["e4m3fn", "e5m2"])
def test_8_bit_floats(case: Case, dtype):
    x = np.arange(256, dtype=np.uint8).view(dtype)
    finite = np.isfinite(x.astype(np.float32))
    exact = x.astype(np.float64)[finite]
    y = case.function(jnp.asarray(x))
    assert y.dtype == dtype
    assert_ulps(y[finite], case.value(exact), case.ulps)
    slope = derivative(case.function, jnp.asarray(x))
    assert slope.dtype == dtype
    assert_ulps(slope[finite], case.slope(exact), case.slope_ulps)


@each_case
@each_dtype
def test_result_has_the_dtype_of_x(case: Case, dtype):
    with jax.enable_x64(True):
        x = jnp.ones((2, 3), dtype)
        assert case.function(x).dtype == dtype
        if case.name in ("leaky_relu", "prelu", "elu"):
            function = getattr(jaxrelu, case.name)
            for other in (jnp.float16, jnp.float32, jnp.float64, jnp.int32):
                assert function(x, jnp.ones(3, other)).dtype == dtype
                assert jax.jit(function)(x, jnp.ones((), other)).dtype == dtype


@each_case
@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32, jnp.int4])
def test_integers(case: Case, dtype, x64):
    with jax.enable_x64(x64):
        x = np.array([0, 3, 7], dtype)
        y = case.function(x)
        assert y.dtype == (dtype if case.name in ("relu", "relu6") else jnp.result_type(float))
        assert not y.weak_type
        assert y.tolist() == [0, 3, min(7, case.top)]
        if np.issubdtype(dtype, np.signedinteger):
            low = case.function(np.array([-100], dtype)).tolist()
            np.testing.assert_allclose(low, case.inactive(np.array([-100.0])))


@each_case
def test_python_numbers_are_weakly_typed(case: Case):
    for x in (2.5, 2, -1.5):
        y = case.function(x)
        assert y.weak_type
        assert jax.jit(case.function)(x).weak_type
        np.testing.assert_allclose(y, case.value(np.array([float(x)]))[0], rtol=1e-6)
    assert case.function(2).dtype == (jnp.int32 if case.name in ("relu", "relu6") else jnp.float32)
    assert case.function(np.float32(2.5)).weak_type is False
    assert case.function(np.array([1.5])).tolist() == [1.5]


@each_case
def test_empty_arrays(case: Case):
    assert case.function(jnp.zeros((0, 3))).shape == (0, 3)


@each_case
def test_integer_tangents(case: Case):
    x = jnp.array([-2, 0, 3])
    _, tangent = jax.jvp(case.function, (x,), (np.zeros(3, jax.dtypes.float0),))
    assert tangent.dtype == (jax.dtypes.float0 if case.name in ("relu", "relu6") else jnp.float32)


@each_case
@pytest.mark.parametrize(
    "x",
    [True, 1j, None, "1", [1.0], (1.0,), {}, np.array([True]), np.array([1j]), np.array(["a"]), jax.random.key(0), object()],
    ids=lambda x: type(x).__name__,
)
def test_x_that_is_no_real_array_is_refused(case: Case, x):
    with pytest.raises(
        TypeError, match=rf"{case.name}: x must be a real number or an array of floats or integers, got .+; "
    ):
        case.function(x)


@each_case
@pytest.mark.parametrize("kink", [None, "0", True, 1j, jnp.float32(0), [0.0]], ids=lambda kink: type(kink).__name__)
def test_kink_of_a_wrong_type_is_refused(case: Case, kink):
    with pytest.raises(TypeError, match=f"{case.name}: kink must be a Python number"):
        case.function(1.0, kink=kink)


@each_case
@pytest.mark.parametrize("kink", [np.nan, np.inf, -np.inf])
def test_kink_that_is_not_finite_is_refused(case: Case, kink):
    with pytest.raises(ValueError, match=f"{case.name}: kink must be finite, got "):
        case.function(1.0, kink=kink)


@pytest.mark.parametrize(
    ("name", "argument"), [("leaky_relu", "negative_slope"), ("prelu", "negative_slope"), ("elu", "alpha")]
)
def test_parameter_is_refused(name, argument):
    function, x = getattr(jaxrelu, name), jnp.ones((2, 3))
    for bad in (None, "a", True, 1j, [0.1], np.array([True])):
        with pytest.raises(TypeError, match=f"{name}: {argument} must be a real number"):
            function(x, bad)
    for bad in (np.ones(2), np.ones((2, 1, 3)), np.ones((3, 3)), np.ones((0,))):
        with pytest.raises(ValueError, match=rf"{name}: {argument} of shape \(.*\) must broadcast to x of shape \(2, 3\); "):
            function(x, bad)
        with pytest.raises(ValueError, match="must broadcast"):  # at trace time
            jax.eval_shape(function, x, bad)


def test_prelu_axis_is_refused():
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"prelu: axis 2 is out of range for x of shape \(2, 3\)"):
        jaxrelu.prelu(x, np.ones(3), axis=2)
    with pytest.raises(ValueError, match=r"prelu: with axis=0, negative_slope must be a scalar or have shape \(2,\)"):
        jaxrelu.prelu(x, np.ones(3), axis=0)
    with pytest.raises(ValueError, match=r"prelu: with axis=1"):
        jaxrelu.prelu(x, np.ones((2, 3)), axis=1)
    for bad in ("0", 1.0, True, (0,)):
        with pytest.raises(TypeError, match="prelu: axis must be an int or None"):
            jaxrelu.prelu(x, np.ones(3), axis=bad)


def test_elu_save_is_refused():
    with pytest.raises(ValueError, match="elu: save must be"):
        jaxrelu.elu(1.0, save="both")
    for bad in ({"alpha": -1.0}, {"alpha": 0}, {"alpha": jnp.float32(1)}, {"kink": 0.5}, {"alpha": np.nan}):
        with pytest.raises(ValueError, match='elu: save="output" needs a positive Python number as alpha and kink 0'):
            jaxrelu.elu(1.0, save="output", **bad)


@contextlib.contextmanager
def count_traces():
    """Counts the functions that JAX traces or compiles."""
    events = []

    def listener(event, duration, **_):
        if event.startswith("/jax/core/compile"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


@each_case
def test_second_call_traces_nothing(case: Case):
    x, other = jnp.float32(np.linspace(-1, 1, 13)), jnp.float32(np.linspace(-2, 3, 13))
    function = functools.partial(case.function, kink=0.125)
    for call in (lambda x: function(x), lambda x: jax.vjp(function, x)[1](x)):
        with count_traces() as first:
            call(x)
        with count_traces() as second:
            call(other)
        assert first
        assert not second


@each_case
def test_public_functions_are_plain(case: Case):
    function = getattr(jaxrelu, case.name)
    assert inspect.isfunction(function)
    assert pickle.loads(pickle.dumps(function)) is copy.deepcopy(function) is function
    assert hash(function) == hash(getattr(jaxrelu, case.name))
    assert next(iter(inspect.signature(function).parameters)) == "x"
    assert function.__annotations__["return"] is jax.Array


def test_every_function_has_a_row():
    public = {name for name, value in vars(jaxrelu).items() if inspect.isfunction(value)}
    assert public == {case.name for case in CASES}
