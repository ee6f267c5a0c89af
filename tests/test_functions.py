import copy
import functools
import inspect
import itertools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify, jet
from jax.experimental import pallas as pl

import jaxrelu
from cases import (
    CASES,
    DTYPES,
    Case,
    Exact,
    agreed,
    assert_ulps,
    count_traces,
    each_case,
    each_parameter,
    value_and_derivative,
    value_and_derivatives,
)
from jaxrelu import inplace

# of tests that ask what is done, not how it is rounded
quick = pytest.mark.usefixtures("quick_compilation")

POINTS = [-np.inf, -5.0, -1.75, -0.0, 0.0, 1.6, 2.5, 6.0, 7.0, np.inf, np.nan]


@functools.cache
def at_every_point(dtype):
    """Returns numbers of a dtype, in float64 too, and each case's value and derivative at them, computed by one program."""
    x, exact = float32_points() if dtype == jnp.float32 else every_number(dtype)
    results = jax.jit(lambda x: {case.name: value_and_derivatives(case.function)(x) for case in CASES})(x)
    return x, exact, {name: agreed(result) for name, result in results.items()}


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


def test_numpys_references_are_within_1_ulp_of_mpmaths():
    x = -np.geomspace(1e-30, 700, 1009)
    for own, exact in ((np.exp(x), Exact.exp(x)), (np.expm1(x), Exact.expm1(x))):
        assert (np.abs(own - exact) <= np.spacing(np.abs(exact))).all()


@each_case
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["float16", "bfloat16"])
def test_every_16_bit_number(case: Case, dtype):
    x, exact, results = at_every_point(dtype)
    assert x.size == 65_536
    value, slope = results[case.name]
    assert value.dtype == slope.dtype == dtype
    assert_ulps(value, case.value(exact), case.ulps)
    normal = (exact == 0) | ~(np.abs(exact) < float(jnp.finfo(dtype).tiny))
    # a subnormal may be flushed to zero, and then lies on the kink
    assert_ulps(slope[normal], case.slope(exact[normal]), min(case.slope_ulps, 1.0))


@each_case
def test_float32(case: Case):
    x, exact, results = at_every_point(jnp.float32)
    assert x.size >= 100_000
    value, slope = results[case.name]
    assert value.dtype == slope.dtype == jnp.float32
    assert_ulps(value, case.value(exact), case.ulps)
    normal = (x == 0) | ~(np.abs(x) < np.finfo(np.float32).tiny)
    assert_ulps(slope[normal], case.slope(exact[normal]), case.slope_ulps)


@each_case
def test_float64(case: Case):
    x = float32_points()[1][::10]
    normal = (x == 0) | ~(np.abs(x) < np.finfo(np.float32).tiny)
    with jax.enable_x64(True):
        value, slope = value_and_derivative(case.function, x)
    # jnp's own expm1 and exp, which jax 0.10 has within 4 ulp
    assert_ulps(value, case.value(x, Exact), 4.0 if case.ulps else 0.0)
    assert_ulps(slope[normal], case.slope(x[normal], Exact), 4.0 if case.slope_ulps else 0.0)


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
    value, derivative = value_and_derivative(function, x)
    assert_ulps(value, np.where(exact > 0, exact, rounded * np.expm1(np.minimum(exact, 0))), 2.0)
    slope = np.where(exact > 0, 1.0, rounded * np.exp(np.minimum(exact, 0)))
    slope[np.isnan(x)] = np.nan
    kept = ~(np.abs(slope) < 2 * alpha * np.finfo(np.float32).tiny)  # exp(x) may be flushed before alpha scales it up
    assert_ulps(derivative[kept], slope[kept], 2.0)
    assert (derivative[~kept] < 1e-37).all()


@pytest.mark.parametrize(("dtype", "zero_below"), [(jnp.bfloat16, -6.25), (jnp.float16, -8.32), (jnp.float32, -17.0)])
def test_elu_save_output(dtype, zero_below):
    x = np.linspace(-30, 3, 40_001).astype(dtype)
    exact = x.astype(np.float64)

    alphas = (1.0, 0.5, 1.7)

    @jax.jit
    def run(x):
        functions = [functools.partial(jaxrelu.elu, alpha=alpha, save="output") for alpha in alphas]
        return [(value_and_derivatives(f)(x), jaxrelu.elu(x, alpha)) for f, alpha in zip(functions, alphas, strict=True)]

    for alpha, (results, expected) in zip(alphas, run(x), strict=True):
        value, slope = agreed(results)
        chex.assert_trees_all_equal(value, np.asarray(expected))
        slope = slope.astype(np.float64)
        expected = np.where(exact > 0, 1.0, alpha * np.exp(np.minimum(exact, 0)))
        assert np.abs(slope - expected).max() <= alpha * float(jnp.finfo(dtype).eps)
        if alpha != 1.7:  # alpha * expm1(x) rounds to -alpha there
            assert (slope[exact < zero_below] == 0).all()


def test_elu_gives_the_same_bits_at_every_length():
    x = -np.random.default_rng(1).exponential(2, 4099).astype(np.float32)
    lengths = [*range(1, 41), 1000]

    def value_and_slope(x):
        y, pull = jax.vjp(jaxrelu.elu, x)
        return y, pull(jnp.ones_like(x))[0]

    whole, *parts = jax.device_get(jax.jit(lambda xs: [value_and_slope(x) for x in xs])([x, *(x[:n] for n in lengths)]))
    for n, part in zip(lengths, parts, strict=True):
        chex.assert_trees_all_equal(part, tuple(result[:n] for result in whole))


# the kinks


KINKS = (0.0, 0.5, 1.0, 10.0, 100.0)


def with_kink(case: Case, kink):
    return functools.partial(case.function, kink=kink)


@quick
@each_case
def test_kinks(case: Case):
    at = np.array([*case.kinks, -0.0])  # -0.0 is a zero
    sides = np.array([case.kinks[x] for x in at.tolist()]).T
    with jax.enable_x64(True):
        run = jax.jit(lambda xs: [[value_and_derivatives(with_kink(case, kink))(x) for kink in KINKS] for x in xs])
        for dtype, results in zip(DTYPES, run([at.astype(dtype) for dtype in DTYPES]), strict=True):
            for kink, result in zip(KINKS, results, strict=True):
                _, actual = agreed(result)
                assert actual.dtype == dtype
                expected = sides[0] + kink * (sides[1] - sides[0])
                if kink in (0.0, 1.0):
                    assert actual.tolist() == expected.astype(dtype).tolist()
                assert_ulps(actual, expected, 1.0)


@quick
@each_case
def test_kink_of_a_scalar(case: Case):
    for at, (inactive, active) in case.kinks.items():
        assert jax.grad(with_kink(case, 1.0))(at) == np.float32(active)
        assert jax.grad(case.function)(jnp.float32(at)) == np.float32(inactive)


@each_case
def test_kink_moves_nothing_else(case: Case):
    x = np.float32([v for v in POINTS if v not in case.kinks])
    chex.assert_trees_all_equal(value_and_derivative(with_kink(case, 0.5), x), value_and_derivative(case.function, x))


def test_elu_kink_lies_between_alpha_and_1():
    _, slope = value_and_derivative(functools.partial(jaxrelu.elu, alpha=0.5, kink=0.25), np.float32([-0.0, 0.0]))
    assert slope.tolist() == [0.625, 0.625]


def are_linear_at_the_kink(functions, at):
    """Whether vjp(g) of each function is g times vjp(1) at a kink, for gradients of both signs and zero."""
    g = np.float32([1.0, -2.0, 0.0, 0.25, 3.0])
    pulled = jax.jit(lambda x, g: [jax.vjp(f, x)[1](g)[0] for f in functions])(np.full_like(g, at), g)
    return [np.array_equal(slopes, g * slopes[0]) for slopes in map(np.asarray, pulled)]


@quick
@each_case
def test_rule_is_linear_in_the_gradient_at_the_kink(case: Case):
    for at in case.kinks:
        assert are_linear_at_the_kink([with_kink(case, kink) for kink in KINKS], at) == [True] * len(KINKS)


def test_the_published_rule_is_not_linear_at_the_kink():
    # the code published with Bertoin et al. 2021 writes the constant where it should scale the gradient by it
    @jax.custom_vjp
    def published(x):
        return jnp.maximum(x, 0)

    published.defvjp(lambda x: (published(x), x), lambda x, g: (jnp.where(x == 0, 0.5, jnp.where(x > 0, g, 0.0)),))
    assert are_linear_at_the_kink([published], 0.0) == [False]


@quick
@each_case
def test_second_derivative(case: Case):
    kinks, x = np.float32([*case.kinks]), np.float32([-3.0, -0.5, 0.5, 7.0])

    @jax.jit
    def curvatures(kinks, x):
        of, of_moved = (jax.vmap(jax.hessian(with_kink(case, kink))) for kink in (0.0, 0.5))
        return of(kinks), of_moved(kinks), of(x)

    at_kinks, at_moved_kinks, elsewhere = curvatures(kinks, x)
    assert not at_kinks.any()
    assert not at_moved_kinks.any()
    expected = np.array([*case.curvature(np.float64(x[:2]), np), 0.0, 0.0])
    np.testing.assert_allclose(elsewhere, expected, rtol=1e-6)
    # linear in the tangent
    _, doubled = jax.jit(lambda x: jax.jvp(jax.vmap(jax.grad(case.function)), (x,), (2 * jnp.ones_like(x),)))(x)
    np.testing.assert_allclose(doubled, 2 * expected, rtol=1e-6)


def test_elu_save_output_second_derivative():
    x = np.float32([-3.0, -0.5, 0.0, 0.5])
    curvature = jax.jit(jax.vmap(jax.hessian(functools.partial(jaxrelu.elu, save="output"))))(x)
    np.testing.assert_allclose(curvature, [np.exp(-3.0), np.exp(-0.5), 0, 0], rtol=1e-6)


@each_case
def test_forward_and_reverse_mode_agree_bitwise_for_any_gradient(case: Case):
    points, gradients = np.float32([-3.0, *case.kinks, 2.0, 9.0, np.nan]), np.float32([-0.001, 0.1, 3.7, 1e30, np.inf])
    x, g = (grid.ravel() for grid in np.meshgrid(points, gradients))
    functions = [with_kink(case, kink) for kink in (0.0, 0.5, 10.0)]
    # two programs, so that XLA cannot take the one for the other
    forward = jax.jit(lambda x, g: [jax.jvp(f, (x,), (g,))[1] for f in functions])(x, g)
    reverse = jax.jit(lambda x, g: [jax.vjp(f, x)[1](g)[0] for f in functions])(x, g)
    assert [np.asarray(t).tobytes() for t in forward] == [np.asarray(t).tobytes() for t in reverse]


@quick
@each_case
def test_infinite_gradient_through_a_flat_side_is_0(case: Case):
    x = np.array([-1.0, 1.0, 7.0])
    run = jax.jit(lambda x, g: [jax.vjp(with_kink(case, kink), x)[1](g)[0] for kink in (0.0, 0.5)])
    for gradient in run(np.float32(x), np.full(3, np.inf, np.float32)):
        np.testing.assert_array_equal(gradient, np.where(case.slope(x) == 0, 0.0, np.inf))


# prelu's slope


@quick
def test_prelu_is_torchs_on_nchw_and_nhwc():
    # torch.nn.functional.prelu(x, torch.tensor([0.25, 0.5, 2.0])) for x of shape (1, 3, 1, 3), written out
    x = np.float32([[-4, 0, 4], [-2, -0.5, 1], [3, -1, -8]]).reshape(1, 3, 1, 3)
    y = np.float32([[-1, 0, 4], [-1, -0.25, 1], [3, -2, -16]]).reshape(1, 3, 1, 3)
    dx = np.float32([[0.25, 0.25, 1], [0.5, 0.5, 1], [1, 2, 2]]).reshape(1, 3, 1, 3)
    da = np.float32([-4, -2.5, -9])
    slope = np.float32([0.25, 0.5, 2.0])
    for axis, move in ((1, lambda v: v), (-1, lambda v: np.moveaxis(v, 1, -1)), (3, lambda v: np.moveaxis(v, 1, -1))):

        @jax.jit
        def run(x, slope, axis=axis):
            out, vjp = jax.vjp(functools.partial(jaxrelu.prelu, axis=axis), x, slope)
            return out, vjp(jnp.ones_like(out))

        out, got = run(move(x), slope)
        chex.assert_trees_all_equal(np.asarray(out), move(y))
        chex.assert_trees_all_equal(np.asarray(got[0]), move(dx))
        chex.assert_trees_all_equal(np.asarray(got[1]), da)


@quick
@each_parameter
def test_a_parameter_broadcasts_to_x(case: Case):
    # every shape that broadcasts to (2, 3, 4)
    shapes = [s for rank in range(4) for s in itertools.product(*((1, n) for n in (2, 3, 4)[3 - rank :]))]
    assert len(shapes) == 15
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=(2, 3, 4)))
    parameters = [np.float32(rng.uniform(0.1, 2, size=shape)) for shape in shapes]

    @jax.jit
    def run(x, parameters):
        forms = [jax.vjp(lambda a: case.public(x, a), a) for a in parameters]
        return [(value, pull(jnp.ones_like(value))[0]) for value, pull in forms]

    basis = case.basis(np.minimum(np.float64(x), 0))
    for shape, a, (value, gradient) in zip(shapes, parameters, run(x, parameters), strict=True):
        np.testing.assert_allclose(value, np.maximum(x, 0) + a * basis, rtol=1e-6, err_msg=str(shape))
        kept = tuple(i for i, n in enumerate(shape) if n == 1)
        expected = basis.sum(tuple(range(3 - len(shape)))).sum(kept, keepdims=True)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, err_msg=str(shape))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["float16", "bfloat16"])
def test_slope_gradient_of_a_million_16_bit_numbers(dtype):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=10**6) / 50).astype(dtype)  # / 50: the sum stays in float16's range
    g = rng.uniform(size=10**6).astype(dtype)
    exact = np.sum(np.minimum(x.astype(np.float64), 0) * g.astype(np.float64))
    slopes = [np.asarray(0.25, slope_dtype) for slope_dtype in (jnp.float32, jnp.float16, jnp.bfloat16)]
    run = jax.jit(lambda x, g, slopes: [jax.vjp(lambda a: jaxrelu.prelu(x, a), slope)[1](g)[0] for slope in slopes])
    for slope, gradient in zip(slopes, run(x, g, slopes), strict=True):
        assert gradient.dtype == slope.dtype
        if slope.dtype == jnp.float32:
            assert abs(float(gradient) / exact - 1) < 1e-5
        else:
            assert_ulps(gradient, np.array(exact), 0.51)


def test_slope_gradient_does_not_overflow_float16():
    x = np.full(10**6, -1.0, np.float16)
    assert jax.jit(jax.grad(lambda a, x: jaxrelu.prelu(x, a).astype(jnp.float32).sum()))(np.float32(0.25), x) == -1e6


def test_infinite_input_leaves_the_slope_gradient_finite():
    x = jnp.float32([np.inf, -2.0, 3.0])
    assert jax.grad(lambda a: jaxrelu.prelu(x, a).sum())(jnp.float32(0.25)) == -2
    assert jax.jvp(lambda a: jaxrelu.prelu(x, a), (jnp.float32(0.25),), (jnp.float32(1),))[1].tolist() == [0, -2, 0]


def test_derivative_in_x_takes_no_nan_from_the_slope():
    _, tangent = jax.jvp(lambda x: jaxrelu.prelu(x, 0.25), (jnp.float32(-np.inf),), (jnp.float32(1),))
    assert tangent == 0.25


def test_elu_alpha_gradient():
    x = np.float32(np.random.default_rng(0).normal(size=(5, 7)))

    @jax.jit
    def run(a, x, at):
        return jax.grad(lambda a: jaxrelu.elu(x, a).sum())(a), jax.jacfwd(jax.grad(lambda a, x: jaxrelu.elu(x, a)), 1)(a, at)

    gradient, mixed = run(np.float32(0.5), x, np.float32(-0.5))
    np.testing.assert_allclose(gradient, np.expm1(np.minimum(np.float64(x), 0)).sum(), rtol=1e-6)
    np.testing.assert_allclose(mixed, np.exp(-0.5), rtol=1e-6)


# transformations


def over_rows(function):
    return lambda x: jax.lax.scan(lambda _, row: (None, function(row)), None, x)[1]


def linearized(function):
    def all_three(x):
        value, push = jax.linearize(function, x)
        tangent = push(jnp.ones_like(x))
        return value, tangent, tangent

    return all_three


def vmap_of_grad(function):
    def all_three(x):
        value, slope = jax.vmap(jax.vmap(jax.value_and_grad(function)))(x)
        return value, slope, slope

    return all_three


FORMS = {
    "jit": value_and_derivatives,
    "vmap": lambda f: value_and_derivatives(jax.vmap(f)),
    "vmap over columns": lambda f: value_and_derivatives(jax.vmap(f, 1, 1)),
    "scan": lambda f: value_and_derivatives(over_rows(f)),
    "remat": lambda f: value_and_derivatives(jax.checkpoint(f)),
    "linearize": linearized,
    "vmap of grad": vmap_of_grad,
}
FUNCTIONS = {(case.name, kink): with_kink(case, kink) for case in CASES for kink in (0.0, 0.5)}
TABLE = np.float32(np.concatenate([POINTS, np.random.default_rng(0).normal(size=45) * 4])).reshape(7, 8)


@functools.cache
def without_a_transformation():
    """Returns what each function gives when it is called outside jit, and its derivative there."""
    x = jnp.asarray(TABLE)
    ones = jnp.ones_like(x)
    return {key: agreed((f(x), jax.jvp(f, (x,), (ones,))[1], jax.vjp(f, x)[1](ones)[0])) for key, f in FUNCTIONS.items()}


@pytest.mark.parametrize("form", FORMS)
def test_transformations_agree_bitwise(form):
    # one program for each form, so that XLA cannot take the one for the other
    transform = jax.jit(lambda x: [FORMS[form](function)(x) for function in FUNCTIONS.values()])
    for (key, expected), results in zip(without_a_transformation().items(), transform(TABLE), strict=True):
        for one, other in zip(agreed(results), expected, strict=True):
            assert one.tobytes() == other.tobytes(), key


def test_a_batched_slope():
    x, slopes = np.float32(np.random.default_rng(0).normal(size=(4, 3, 5))), np.float32([0.1, 0.2, 0.3])
    batched = jax.vmap(lambda x, a: jaxrelu.prelu(x, a), in_axes=(1, 0), out_axes=1)(x, slopes)
    chex.assert_trees_all_equal(np.asarray(batched), np.where(x > 0, x, slopes[:, None] * x))


def test_inside_a_pallas_kernel():
    x = np.linspace(-8, 8, 128, dtype=np.float32).reshape(8, 16)

    def kernel(x_ref, *refs):
        for case, y_ref, slope_ref in zip(CASES, refs[::2], refs[1::2], strict=True):
            y_ref[...], slope_ref[...] = jax.jvp(case.function, (x_ref[...],), (jnp.ones_like(x_ref[...]),))

    results = iter(pl.pallas_call(kernel, out_shape=[jax.typeof(x)] * 2 * len(CASES), interpret=True)(x))
    expected = jax.jit(lambda x: [value_and_derivatives(case.function)(x) for case in CASES])(x)
    for case, outside in zip(CASES, expected, strict=True):
        inside = next(results), next(results)
        chex.assert_trees_all_equal(tuple(map(np.asarray, inside)), agreed(outside), custom_message=case.name)


# jax 0.10 raises the first, the newest the second
JET_ERRORS = (jax.errors.UnexpectedTracerError, AttributeError)


@pytest.mark.xfail(reason="jax.experimental.jet has no rule for custom_jvp functions", raises=JET_ERRORS, strict=True)
@each_case
def test_jet(case: Case):
    value, series = jet.jet(case.function, (jnp.float32(1.5),), ((jnp.float32(1.0), jnp.float32(0.0)),))
    assert (value, *series) == (1.5, 1.0, 0.0)


@quick
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
    function = case.public
    assert inspect.isfunction(function)
    assert pickle.loads(pickle.dumps(function)) is copy.deepcopy(function) is function
    assert hash(function) == hash(getattr(jaxrelu, case.name))
    assert next(iter(inspect.signature(function).parameters)) == "x"
    assert function.__annotations__["return"] is jax.Array


@quick
@each_case
def test_without_jit(case: Case):
    with jax.disable_jit():
        assert case.function(2.0) == 2.0
        value, slope = jax.value_and_grad(case.function)(jnp.float32(-1.5))
    exact = np.array([-1.5])
    np.testing.assert_allclose([value, slope], [*case.value(exact), *case.slope(exact)], rtol=1e-6)


@each_case
def test_unselected_sides_stay_finite(case: Case):
    x = np.float32([-3e38, -89.0, -1.0, 0.0, 1.0, 88.9, 129.0, 3e38])
    checked = checkify.checkify(lambda x: jax.vjp(case.function, x)[1](jnp.ones_like(x)), errors=checkify.float_checks)
    error, _ = jax.jit(checked)(x)
    error.throw()


def test_every_function_has_a_row():
    public = {name for name, value in vars(jaxrelu).items() if inspect.isfunction(value)}
    assert public == {case.name for case in CASES} | {"portable"}


@each_parameter
@pytest.mark.parametrize("kink", [0.0, 0.5])
def test_a_parameter_is_a_python_number_or_an_array(case: Case, kink):
    x = np.float32([-np.inf, -3.0, -1.0, -0.0, 0.0, 0.5, 3.0, np.inf, np.nan])
    for dtype, number in itertools.product((jnp.float32, jnp.bfloat16), (0.25, 2.0)):
        as_number = functools.partial(case.public, kink=kink, **{case.parameter: number})
        as_array = functools.partial(case.public, kink=kink, **{case.parameter: np.full(9, number, np.float32)})
        for one, other in zip(*(value_and_derivative(f, x.astype(dtype)) for f in (as_number, as_array)), strict=True):
            np.testing.assert_array_equal(one.astype(np.float32), other.astype(np.float32))


def in_jit(function):
    return lambda x, s: jax.jit(lambda x: function(x, s))(x)


def tangent(function):
    return lambda x, s: jax.jvp(lambda x: function(x, s), (x,), (jnp.ones_like(x),))[1]


@each_parameter
def test_equal_numbers_that_differ_do_not_share_a_compiled_function(case: Case):
    functions = (case.public, getattr(inplace, case.name), in_jit(case.public))
    for function in functions:
        # for x < 0 the value is the number times one that is negative, and the derivative times one that is positive
        for transformed, positive in ((function, -0.0), (tangent(function), 0.0)):
            outputs = [transformed(jnp.array([-2.0]), number) for number in (positive, -positive, positive)]
            assert np.signbit(outputs).ravel().tolist() == [False, True, False]


@each_case
def test_the_value_does_not_depend_on_kink(case: Case):
    x = jnp.array([-1.0, 0.0, 6.0])
    for kink in (-1.0, 1e39):
        np.testing.assert_array_equal(case.function(x, kink=kink), case.function(x))


@each_parameter
def test_a_nan_compiles_once(case: Case):
    x = jnp.ones(3)
    case.public(x, float("nan"))
    with count_traces() as traces:
        case.public(x, float("nan"))
    assert not traces
