import functools
import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import jaxrelu
from cases import Case, count_traces, each_case
from jaxrelu.initializers import gain, kaiming_normal, kaiming_uniform

# of tests that ask what is done, not how it is rounded
quick = pytest.mark.usefixtures("quick_compilation")


def leaky(slope):
    """E[leaky_relu(z)^2] = (1 + slope^2) / 2, and the same of the derivative."""
    closed = math.sqrt(2 / (1 + slope**2))
    return closed, closed


def elu(alpha):
    """E = 1/2 + alpha^2 E[expm1(z)^2; z < 0], with E[exp(k z); z < 0] = exp(k^2 / 2) Phi(-k)."""
    negative = [mpmath.exp(mpmath.mpf(k) ** 2 / 2) * mpmath.ncdf(-k) for k in range(3)]
    forward = 0.5 + alpha**2 * (negative[2] - 2 * negative[1] + negative[0])
    return float(1 / mpmath.sqrt(forward)), float(1 / mpmath.sqrt(0.5 + alpha**2 * negative[2]))


def relu6():
    """E = E[z^2; 0 < z < 6] + 36 P(z > 6)."""
    above, density = mpmath.ncdf(-6), mpmath.npdf(6)
    inside = mpmath.mpf(0.5) - above
    return float(1 / mpmath.sqrt(inside - 6 * density + 36 * above)), float(1 / mpmath.sqrt(inside))


TABLE = [
    (jaxrelu.relu, leaky(0), (1.4142135624, 1.4142135624)),
    (functools.partial(jaxrelu.leaky_relu, negative_slope=0.01), leaky(0.01), (1.4141428570, 1.4141428570)),
    (functools.partial(jaxrelu.leaky_relu, negative_slope=0.1), leaky(0.1), (1.4071950895, 1.4071950895)),
    (functools.partial(jaxrelu.leaky_relu, negative_slope=0.2), leaky(0.2), (1.3867504906, 1.3867504906)),
    (functools.partial(jaxrelu.prelu, negative_slope=0.25), leaky(0.25), (1.3719886811, 1.3719886811)),
    (functools.partial(jaxrelu.elu, alpha=0.5), elu(0.5), (1.3655948588, 1.3582826101)),
    (jaxrelu.elu, elu(1), (1.2451983007, 1.2234285576)),
    (functools.partial(jaxrelu.elu, alpha=2), elu(2), (0.9623477264, 0.9235504250)),
    (jaxrelu.relu6, relu6(), (1.4142135651, 1.4142135638)),
]


@pytest.mark.parametrize(("activation", "closed", "table"), TABLE)
@pytest.mark.parametrize("x64", [False, True])
def test_gain_is_the_closed_form(activation, closed, table, x64):
    with jax.enable_x64(x64):
        forward, backward = gain(activation), gain(activation, backward=True)
    assert forward == pytest.approx(closed[0], rel=1e-9)
    assert backward == pytest.approx(closed[1], rel=1e-9)
    assert (round(forward, 10), round(backward, 10)) == table


@each_case
def test_gain_of_each_activation(case: Case):
    assert (round(gain(case.function), 10), round(gain(case.function, backward=True), 10)) == case.gains


def test_gain_of_other_functions():
    assert gain(lambda x: x) == pytest.approx(1, rel=1e-9)
    assert gain(lambda x: 3 * x, backward=True) == pytest.approx(1 / 3, rel=1e-9)
    # E[max(z - 1, 0)^2] = 2 Phi(-1) - phi(1): a kink where no break is set
    closed = 1 / mpmath.sqrt(2 * mpmath.ncdf(-1) - mpmath.npdf(1))
    assert gain(lambda x: jaxrelu.relu(x - 1)) == pytest.approx(float(closed), rel=1e-9)


def test_gain_inside_jit_and_eval_shape():
    inside = []

    def init(key):
        inside.append(gain(jaxrelu.elu))
        return kaiming_normal(jaxrelu.elu)(key, (4, 3))

    assert jax.eval_shape(init, jax.random.key(0)).dtype == jnp.float32
    assert jax.jit(lambda key: init(key))(jax.random.key(0)).dtype == jnp.float32
    assert inside == [gain(jaxrelu.elu)] * 2


def test_gain_refuses():
    with pytest.raises(TypeError, match="gain: activation must be a function"):
        gain("relu")
    with pytest.raises(TypeError, match="gain: activation must map a scalar to a real scalar"):
        gain(lambda x: jnp.stack([x, x]))
    with pytest.raises(ValueError, match="gain: the second moment must be positive and finite, got "):
        gain(jnp.zeros_like)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float8_e4m3fn], ids=lambda dtype: dtype.__name__)
def test_gain_of_a_function_that_rounds(dtype):
    info = jnp.finfo(dtype)

    def rounded(z):
        return jnp.clip(jaxrelu.elu(z), -float(info.max), float(info.max)).astype(dtype).astype(jnp.float32)

    # in 8 bits, the rounding of a number of magnitude 1 is up to 1/16
    tolerance = 1e-3 if info.bits == 16 else 2e-3
    assert gain(rounded) == pytest.approx(1.2451983007, rel=tolerance)


def test_gain_of_steps():
    assert gain(lambda z: jnp.round(z * 1000) / 1000) == pytest.approx(1, rel=1e-5)
    # E[round(z)^2] = 2 sum (2 k - 1) P(z > k - 1/2)
    closed = 2 * sum((2 * k - 1) * mpmath.ncdf(0.5 - k) for k in range(1, 30))
    assert gain(jnp.round) == pytest.approx(float(1 / mpmath.sqrt(closed)), rel=1e-9)
    assert gain(lambda z: z > 0) == pytest.approx(math.sqrt(2), rel=1e-9)

    def share(low, high):
        return mpmath.ncdf(high) - mpmath.ncdf(low)

    def three(z):
        return jnp.where(z > 0.1234, 1.0, 0.0) + jnp.where(z > 0.3, 1.0, 0.0) + jnp.where(z > -0.77, 2.0, 0.0)

    closed = 4 * share(-0.77, 0.1234) + 9 * share(0.1234, 0.3) + 16 * share(0.3, mpmath.inf)
    assert gain(three) == pytest.approx(float(1 / mpmath.sqrt(closed)), rel=1e-9)
    box = gain(lambda z: jnp.where((z > -0.3) & (z < -0.1), 1.0, 0.0))
    assert box == pytest.approx(float(1 / mpmath.sqrt(share(0.1, 0.3))), rel=1e-9)
    clipped = gain(lambda z: jnp.clip(z, -0.5, 0.5), backward=True)
    assert clipped == pytest.approx(float(1 / mpmath.sqrt(share(-0.5, 0.5))), rel=1e-9)
    # E[exp(-400 (z - 1/2)^2)] = exp(-400 / 801 / 4) / sqrt(801)
    bump = gain(lambda z: jnp.exp(-200 * (z - 0.5) ** 2))
    assert bump == pytest.approx(math.sqrt(math.sqrt(801) * math.exp(100 / 801)), rel=1e-9)


@pytest.mark.parametrize(
    "activation",
    [
        *(lambda z: 1 / z, lambda z: jnp.abs(z) ** -0.5, lambda z: jnp.exp(z * z / 4), lambda z: jnp.exp(z * z)),
        *(lambda z: jnp.exp(20 * z), jnp.log, lambda z: z * jnp.nan),
    ],
)
@pytest.mark.parametrize(("name", "function"), [("gain", gain), ("kaiming_normal", kaiming_normal)])
def test_a_moment_that_is_infinite_is_refused(name, function, activation):
    with pytest.raises(ValueError, match=f"^{name}: the second moment must be positive and finite, got inf"):
        function(activation)


@pytest.mark.parametrize("activation", [np.arctan, np.tanh, math.tanh, lambda z: z if z > 0 else 0.0, float])
@pytest.mark.parametrize("function", [gain, kaiming_normal, kaiming_uniform])
def test_what_is_no_function_of_jax_is_refused(function, activation):
    for _ in range(2):
        with pytest.raises(TypeError, match=f"^{function.__name__}: activation must be a function of JAX, .* got "):
            function(activation)


def test_what_is_not_real_is_refused():
    for result in (lambda z: jax.lax.complex(z, z), lambda z: None, lambda z: (z, z), lambda z: jax.random.key(0)):
        with pytest.raises(TypeError, match="kaiming_uniform: activation must map a scalar to a real scalar, got "):
            kaiming_uniform(result)
    with pytest.raises(TypeError, match=r"gain: activation must map a scalar to a real scalar, got .*bool"):
        gain(lambda z: z > 0, backward=True)
    with pytest.raises(TypeError, match="kaiming_normal: activation must be a function, "):
        kaiming_normal("relu")


def test_an_integral_is_remembered():
    for activation in (
        lambda: jaxrelu.relu,
        lambda: functools.partial(jaxrelu.leaky_relu, negative_slope=0.3),
        lambda: functools.partial(functools.partial(jaxrelu.elu, kink=0.5), alpha=0.7),
    ):
        first = gain(activation())
        kaiming_normal(activation())
        with count_traces() as traces:
            assert gain(activation()) == first
            kaiming_normal(activation())
        assert not traces
    # what compares equal is not the same
    functions = [functools.partial(jaxrelu.leaky_relu, negative_slope=slope) for slope in (1, 1.5)]
    assert gain(functions[0]) > gain(functions[1])
    gain(functools.partial(jaxrelu.relu, kink=1))
    with pytest.raises(TypeError, match="relu: kink must be a Python number"):
        gain(functools.partial(jaxrelu.relu, kink=True))


@quick
@pytest.mark.parametrize("kaiming", [kaiming_normal, kaiming_uniform])
@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.bfloat16, jnp.float16])
def test_weights_of_few_bits_are_those_of_float32_rounded(kaiming, dtype):
    draw = jax.jit(kaiming(), static_argnums=(1, 2))
    weights, exact = (draw(jax.random.key(0), (300, 500), d).astype(jnp.float32) for d in (dtype, jnp.float32))
    rounding = {"rtol": float(jnp.finfo(dtype).eps), "atol": float(jnp.finfo(dtype).smallest_subnormal)}
    np.testing.assert_allclose(weights, exact, **rounding)
    assert float((weights**2).mean()) == pytest.approx(2 / 300, rel=0.03)


def test_weights_of_a_dtype_without_sign_are_refused():
    for dtype in (jnp.float8_e8m0fnu, jnp.int32):
        with pytest.raises(TypeError, match="kaiming_normal: dtype must be one of floats with a sign, got "):
            kaiming_normal()(jax.random.key(0), (3, 4), dtype)


def test_gain_of_a_square_that_overflows():
    # E[exp(20 z)] = exp(200), of squares up to exp(800)
    assert gain(lambda z: jnp.exp(10 * z)) == pytest.approx(math.exp(-100), rel=1e-9)


@quick
@pytest.mark.parametrize("kaiming", [kaiming_normal, kaiming_uniform])
@pytest.mark.parametrize(
    ("mode", "fan", "elu_gain"),
    [("fan_in", 300, 1.2451983007), ("fan_out", 500, 1.2234285576), ("fan_avg", 400, 1.2451983007)],
)
def test_kaiming_variance(kaiming, mode, fan, elu_gain):
    weights = np.asarray(kaiming(jaxrelu.elu, mode=mode)(jax.random.key(0), (300, 500)))
    expected = elu_gain / math.sqrt(fan)
    assert float(weights.std()) == pytest.approx(expected, rel=0.01)  # 150,000 draws: a standard error of 0.2 %
    assert abs(float(weights.mean())) < 0.01 * expected
    largest = float(np.abs(weights).max()) / expected
    # untruncated: 150,000 normal draws reach past 4; a truncated one stops at 2.3
    assert 1.7 < largest < math.sqrt(3) + 1e-3 if kaiming is kaiming_uniform else largest > 4


@quick
def test_kaiming_axes_and_dtypes():
    @jax.jit
    def draw(key):
        assert kaiming_normal()(key, (3, 4), jnp.bfloat16).dtype == jnp.bfloat16
        assert kaiming_normal(dtype=jnp.float16)(key, (3, 4)).dtype == jnp.float16
        return (
            kaiming_normal(in_axis=-1, out_axis=-2)(key, (200, 800)),
            kaiming_normal()(key, (3, 3, 32, 64)),
            kaiming_normal(batch_axis=0)(key, (5, 200, 300)),
        )

    swapped, conv, stacked = jax.device_get(draw(jax.random.key(0)))
    assert float(swapped.std()) == pytest.approx(math.sqrt(2 / 800), rel=0.02)
    assert float(conv.std()) == pytest.approx(math.sqrt(2 / (9 * 32)), rel=0.03)
    assert float(stacked.std()) == pytest.approx(math.sqrt(2 / 200), rel=0.02)
    with pytest.raises(ValueError, match='kaiming_normal: mode must be "fan_in"'):
        kaiming_normal(mode="in")


@quick
def test_he_keeps_the_variance_that_lecun_halves_in_each_layer():
    keys = jax.random.split(jax.random.key(0), 31)

    def last_variance(init):
        @jax.jit
        def run(keys):
            def layer(h, key):
                return jaxrelu.relu(h) @ init(key, (256, 256)), None

            return jax.lax.scan(layer, jax.random.normal(keys[30], (128, 256)), keys[:30])[0]

        return np.var(np.asarray(run(keys), np.float64))

    he = last_variance(kaiming_normal())
    lecun = last_variance(jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal"))
    # the same draws, scaled by sqrt(2) in each of the layers
    assert he / lecun == pytest.approx(2.0**30, rel=1e-3)
    assert 0.1 < he < 10
