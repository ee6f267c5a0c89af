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
from jax.experimental import checkify, jet
from jax.experimental import pallas as pl

import jaxrelu
from cases import CASES, Case, assert_ulps, derivative, each_case, each_dtype, exp, expm1

POINTS = [-np.inf, -5.0, -1.75, -0.0, 0.0, 1.6, 2.5, 6.0, 7.0, np.inf, np.nan]


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
    assert_ulps(derivative(function, jnp.asarray(x))[kept], slope[kept], 2.0)
    assert (derivative(function, jnp.asarray(x))[~kept] < 1e-37).all()


@pytest.mark.parametrize(("dtype", "zero_below"), [(jnp.bfloat16, -6.25), (jnp.float16, -8.32), (jnp.float32, -17.0)])
@pytest.mark.parametrize("alpha", [1.0, 0.5, 1.7])
def test_elu_save_output(dtype, zero_below, alpha):
    x = jnp.asarray(np.linspace(-30, 3, 40_001), dtype)
    function = functools.partial(jaxrelu.elu, alpha=alpha, save="output")
    chex.assert_trees_all_equal(function(x), jaxrelu.elu(x, alpha))
    exact = np.asarray(x).astype(np.float64)
    slope = np.asarray(derivative(function, x)).astype(np.float64)
    expected = np.where(exact > 0, 1.0, alpha * exp(np.minimum(exact, 0)))
    assert np.abs(slope - expected).max() <= alpha * float(jnp.finfo(dtype).eps)
    if alpha != 1.7:  # alpha * expm1(x) rounds to -alpha there
        assert (slope[exact < zero_below] == 0).all()


@pytest.mark.parametrize("length", [*range(1, 41), 1000])
def test_elu_gives_the_same_bits_at_every_length(length):
    x = jnp.float32(-np.random.default_rng(1).exponential(2, 4099))
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
    value, series = jet.jet(case.function, (jnp.float32(1.5),), ((jnp.float32(1.0), jnp.float32(0.0)),))
    assert (value, *series) == (1.5, 1.0, 0.0)


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


@each_case
def test_without_jit(case: Case):
    with jax.disable_jit():
        assert case.function(2.0) == 2.0
        value, slope = jax.value_and_grad(case.function)(jnp.float32(-1.5))
    np.testing.assert_allclose((value, slope), (case.function(-1.5), jax.grad(case.function)(-1.5)), rtol=1e-6)


@each_case
def test_unselected_sides_stay_finite(case: Case):
    x = jnp.float32([-3e38, -89.0, -1.0, 0.0, 1.0, 88.9, 129.0, 3e38])
    checked = checkify.checkify(lambda x: jax.vjp(case.function, x)[1](jnp.ones_like(x)), errors=checkify.float_checks)
    error, _ = checked(x)
    error.throw()


def test_every_function_has_a_row():
    public = {name for name, value in vars(jaxrelu).items() if inspect.isfunction(value)}
    assert public == {case.name for case in CASES}
