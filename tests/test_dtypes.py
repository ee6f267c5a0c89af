"""Which dtype comes out, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrelu
from cases import CASES, Case, agreed, assert_ulps, each_case, each_dtype, each_parameter, value_and_derivatives

# of tests that ask what is done, not how it is rounded
quick = pytest.mark.usefixtures("quick_compilation")


@functools.cache
def at_every_8_bits(dtype):
    """Returns all 256 numbers of a dtype, and each case's value and derivative at them, computed by one program."""
    x = np.arange(256, dtype=np.uint8).view(dtype)
    results = jax.jit(lambda x: {case.name: value_and_derivatives(case.function)(x) for case in CASES})(x)
    return x, {name: agreed(result) for name, result in results.items()}


@each_case
@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2], ids=["e4m3fn", "e5m2"])
def test_8_bit_floats(case: Case, dtype):
    x, results = at_every_8_bits(dtype)
    finite = np.isfinite(x.astype(np.float32))
    exact = x.astype(np.float64)[finite]
    value, slope = results[case.name]
    assert value.dtype == slope.dtype == dtype
    assert_ulps(value[finite], case.value(exact), case.ulps)
    assert_ulps(slope[finite], case.slope(exact), case.slope_ulps)


@quick
@each_case
@each_dtype
def test_result_has_the_dtype_of_x(case: Case, dtype):
    with jax.enable_x64(True):
        x = np.ones((2, 3), dtype)
        assert jax.eval_shape(case.function, x).dtype == dtype
        # as it is called, outside jit
        assert case.function(x).dtype == dtype


@each_parameter
@each_dtype
def test_result_has_the_dtype_of_x_whatever_that_of_the_parameter(case: Case, dtype):
    with jax.enable_x64(True):
        x = np.ones((2, 3), dtype)
        for other in (jnp.float16, jnp.float32, jnp.float64, jnp.int32):
            assert jax.eval_shape(case.public, x, np.ones(3, other)).dtype == dtype
            assert jax.eval_shape(jax.jit(case.public), x, np.ones((), other)).dtype == dtype


@quick
@each_parameter
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64], ids=["bfloat16", "float64"])
def test_an_eager_call_has_the_dtype_of_x_too(case: Case, dtype):
    with jax.enable_x64(True):
        assert case.public(np.ones((2, 3), dtype), np.ones(3, np.float32)).dtype == dtype


@quick
@each_case
@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32, jnp.int4])
def test_integers(case: Case, dtype, x64):
    with jax.enable_x64(x64):
        signed = np.issubdtype(dtype, np.signedinteger)
        x = np.array([-100 if signed else 1, 0, 3, 7], dtype)
        y = case.function(x)
        assert y.dtype == (dtype if case.keeps_integers else jnp.result_type(float))
        assert not y.weak_type
        assert y[1:].tolist() == [0, 3, min(7, case.top)]
        np.testing.assert_allclose(y.tolist()[0], case.value(np.array([x[0]], float))[0])


@quick
@each_case
def test_python_numbers_are_weakly_typed(case: Case):
    function = functools.partial(case.public, **{name: float(value) for name, value in case.arguments.items()})
    for x in (2.5, 2, -1.5):
        y = function(x)
        assert y.weak_type
        assert jax.jit(function)(x).weak_type
        np.testing.assert_allclose(y, case.value(np.array([float(x)]))[0], rtol=1e-6)
    assert case.function(2).dtype == (jnp.int32 if case.keeps_integers else jnp.float32)
    assert case.function(np.float32(2.5)).weak_type is False
    assert case.function(np.array([1.5])).tolist() == [1.5]
    if case.parameter is not None:  # an array beside the number makes the result strong, as in jax.nn
        assert not getattr(jaxrelu, case.name)(2.5, jnp.float32(0.1)).weak_type


@each_case
def test_empty_arrays(case: Case):
    assert case.function(jnp.zeros((0, 3))).shape == (0, 3)


@quick
@each_case
def test_integer_tangents(case: Case):
    x = jnp.array([-2, 0, 3])
    _, tangent = jax.jvp(case.function, (x,), (np.zeros(3, jax.dtypes.float0),))
    assert tangent.dtype == (jax.dtypes.float0 if case.keeps_integers else jnp.float32)


@each_case
@pytest.mark.parametrize(
    "x",
    [
        *(True, 1j, None, "1", [1.0], (1.0,), {}, np.array([True]), np.array([1j]), np.array(["a"]), jax.random.key(0)),
        *(object(), np.ones(3, np.longdouble), np.longdouble(1), np.ones(3, "timedelta64[s]")),
        np.ones(3, jnp.float8_e8m0fnu),  # it has neither a sign nor a zero
    ],
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


@each_case
def test_numbers_too_large_for_a_float_are_refused(case: Case):
    with pytest.raises(ValueError, match=f"{case.name}: kink must be less than 2\\^1024"):
        case.function(1.0, kink=10**400)


@each_case
@pytest.mark.parametrize("x", [10**400, -(10**400)], ids=["large", "small"])
def test_x_too_large_is_refused(case: Case, x):
    with pytest.raises(ValueError, match=f"{case.name}: x must (fit int32, got 1329 bits|be less than 2\\^1024)"):
        case.function(x)


@each_parameter
def test_parameter_too_large_for_a_float_is_refused(case: Case):
    with pytest.raises(ValueError, match=f"{case.name}: {case.parameter} must be less than 2\\^1024"):
        case.public(1.0, **{case.parameter: 10**400})


@each_case
@pytest.mark.parametrize("name", [name for name in dir(jnp) if name.startswith("float8")])
def test_every_8_bit_float_dtype_is_served_or_refused(case: Case, name):
    dtype = getattr(jnp, name)
    x = np.array([-2.0, 0.5, 4.0]).astype(dtype)
    with jax.enable_x64(True):
        if jnp.finfo(dtype).min < 0:
            y = case.function(x)
            assert y.dtype == dtype
            exact = case.value(x.astype(np.float64)).astype(dtype).astype(np.float64)
            np.testing.assert_allclose(y.astype(np.float64), exact, rtol=2.0 ** -jnp.finfo(dtype).nmant)
        else:
            with pytest.raises(TypeError, match="x must be a real number"):
                case.function(x)


@each_parameter
def test_parameter_is_refused(case: Case):
    function, x, argument = case.public, np.ones((2, 3), np.float32), f"{case.name}: {case.parameter}"
    for bad in (None, "a", True, 1j, [0.1], np.array([True])):
        with pytest.raises(TypeError, match=f"{argument} must be a real number"):
            function(x, bad)
    for bad in (np.ones(2), np.ones((2, 1, 3)), np.ones((3, 3)), np.ones((0,))):
        with pytest.raises(ValueError, match=rf"{argument} of shape \(.*\) must broadcast to x of shape \(2, 3\); "):
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
