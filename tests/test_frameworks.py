"""Unedited models of other frameworks.

Their statistics are compared with those of the pre-activations that they compute, and their gradients under `lean` with
those that they have without.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrelu
from jaxrelu.diagnostics import observe
from jaxrelu.memory import compare, lean

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.usefixtures("frameworks_promote"),
    pytest.mark.filterwarnings("default"),  # the frameworks' own
    pytest.mark.filterwarnings("error:observe"),
]
RNG = np.random.default_rng(0)
X = RNG.normal(size=(7, 5)).astype(np.float32)
IMAGES = RNG.normal(size=(6, 2, 8, 9)).astype(np.float32)
KEY = jax.random.key(0)


@pytest.fixture
def frameworks_promote(strict_promotion):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def assert_units(stats, z, axis=-1):
    """Asserts that statistics are those of pre-activations whose units lie along an axis."""
    z = np.moveaxis(np.asarray(z, np.float64), axis, -1)
    z = z.reshape(-1, z.shape[-1])
    assert stats.count == len(z)
    # what is within rounding of 0 may be on either side in another program
    np.testing.assert_allclose(stats.fired, (z > 0).sum(0), atol=(abs(z) < 1e-5).sum())
    for name, expected in (("mean", z.mean(0)), ("variance", z.var(0)), ("max", z.max(0)), ("min", z.min(0))):
        np.testing.assert_allclose(getattr(stats, name), expected, rtol=1e-4, atol=1e-4, err_msg=name)


def assert_lean(f, *args):
    """Asserts that under lean the mean square of f and its gradient in the first argument are the same but for rounding."""

    def loss(*args):
        return jnp.mean(jnp.square(f(*args)))

    want, got = (jax.jit(jax.value_and_grad(g))(*args) for g in (loss, lean(loss, platform="gpu")))
    leaves = [jax.tree.leaves(x) for x in (want, got)]
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=4e-6 * np.abs(a).max())


@pytest.mark.parametrize("name", ["relu", "gelu", "silu", "elu", "softplus", "prelu", "our relu"])
def test_equinox_mlp(name):
    import equinox as eqx

    activation = {"prelu": eqx.nn.PReLU(0.2), "our relu": jaxrelu.relu}.get(name) or getattr(jax.nn, name)
    for bias in (True, False):
        model = eqx.nn.MLP(5, 3, 11, 2, activation=activation, use_bias=bias, key=KEY)
        for f, args in (
            *((jax.vmap(model), (X,)), (jax.vmap(model, in_axes=1), (X.T,))),
            *((eqx.filter_jit(eqx.filter_vmap(model)), (X,)), (lambda model, x: jax.vmap(model)(x), (model, X))),
        ):
            out, stats = observe(f)(*args)
            np.testing.assert_allclose(out, f(*args), rtol=1e-5, atol=1e-6)
            assert [key.rsplit("/")[-1] for key in stats] == [name.split()[-1], name.split()[-1] + "_1"]
            z = X
            if len(args) == 2:
                arrays, rest = eqx.partition(model, eqx.is_inexact_array)
                assert_lean(lambda arrays, x, rest=rest: jax.vmap(eqx.combine(arrays, rest))(x), arrays, X)
            for layer, seen in zip(model.layers[:2], stats.values(), strict=True):
                z = jax.vmap(layer)(z)
                assert_units(seen, z)
                z = jax.vmap(jax.vmap(activation))(z)


def test_equinox_with_channels_first():
    import equinox as eqx

    class Network(eqx.Module):
        layers: list

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            first, second = eqx.nn.Conv2d(2, 4, 3, key=keys[0]), eqx.nn.Conv2d(4, 5, 1, use_bias=False, key=keys[1])
            self.layers = [
                *(first, eqx.nn.Lambda(jax.nn.relu), eqx.nn.MaxPool2d(2, 2), eqx.nn.GroupNorm(2, 4)),
                *(eqx.nn.Lambda(jax.nn.elu), second, eqx.nn.PReLU(), eqx.nn.Lambda(jnp.ravel)),
                *(eqx.nn.Linear(45, 7, key=keys[2]), eqx.nn.Lambda(jax.nn.gelu)),
            ]

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model = Network(KEY)
    for f, args in ((jax.vmap(model), (IMAGES,)), (lambda model, x: jax.vmap(model)(x), (model, IMAGES))):
        stats = observe(f)(*args)[1]
        assert [name.rsplit("/")[-1] for name in stats] == ["relu", "elu", "prelu", "gelu"]
        x, seen = IMAGES, dict(zip((1, 4, 6, 9), stats.values(), strict=True))
        for i, layer in enumerate(model.layers):
            if i in seen:
                assert_units(seen[i], x, axis=1)
            x = jax.vmap(layer)(x)
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    assert_lean(lambda arrays, x: jax.vmap(eqx.combine(arrays, rest))(x), arrays, IMAGES)


def test_haiku():
    import haiku as hk

    mlp = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([11, 4, 3])(x)))
    params = mlp.init(KEY, X)
    stats = observe(jax.jit(mlp.apply))(params, X)[1]
    assert list(stats) == ["mlp/relu", "mlp/relu_1"]
    z = X @ params["mlp/~/linear_0"]["w"]
    assert_units(stats["mlp/relu"], z)
    assert_units(stats["mlp/relu_1"], np.maximum(z, 0) @ params["mlp/~/linear_1"]["w"])

    resnet = hk.transform_with_state(lambda x: hk.nets.ResNet18(10)(x, is_training=True))
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    stats = jax.eval_shape(observe(resnet.apply), *jax.eval_shape(resnet.init, KEY, images), KEY, images)[1]
    assert len(stats) == 17
    units = [layer.extremes.shape[-1] for layer in stats.values()]
    assert units == [64] * 5 + [128] * 4 + [256] * 4 + [512] * 4
    images = jnp.asarray(RNG.normal(size=images.shape).astype(np.float32))
    variables = jax.jit(resnet.init)(KEY, images)
    assert_lean(lambda *args: resnet.apply(*args, KEY, images)[0], *variables)


@pytest.mark.skipif(jax.__version_info__ < (0, 11, 1), reason="XLA for the CPU undoes recomputation")
@pytest.mark.parametrize(
    ("name", "shape", "limit"), [("ResNet50", (8, 64, 64, 3), 0.5), ("MobileNetV1", (32, 96, 96, 3), 0.5)]
)
def test_memory_of_haiku(name, shape, limit):
    import haiku as hk

    model = hk.transform_with_state(lambda x: getattr(hk.nets, name)(num_classes=10)(x, is_training=True))
    images = jax.ShapeDtypeStruct(shape, jnp.float32)

    def loss(parameters, state, images):
        y, state = model.apply(parameters, state, None, images)
        return jnp.mean(jnp.square(y)), state

    plain, leaner, *_ = compare(loss, *jax.eval_shape(model.init, KEY, images), images, has_aux=True)
    assert leaner.temp_bytes <= limit * plain.temp_bytes
    assert leaner.flops <= 1.02 * plain.flops


def test_keras(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import keras

    names = ["silu", "elu", "softplus", "mish", "hard_silu", "selu", "celu", "relu6", "leaky_relu", "squareplus", "gelu"]
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Conv2D(4, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.LeakyReLU(),
            layers.Flatten(),
            *(layers.Dense(5, activation=name) for name in names),
            layers.Dense(6),
            layers.ReLU(max_value=6),
        ]
    )
    images = x = np.moveaxis(IMAGES, 1, -1)
    model(x)

    def f(weights, state, x):
        return model.stateless_call(weights, state, x)[0]

    values = [[v.value for v in variables] for variables in (model.trainable_variables, model.non_trainable_variables)]
    stats = observe(f)(*values, x)[1]
    assert [name.rsplit("/")[-1] for name in stats] == ["relu", "leaky_relu", *names, "relu6"]
    seen = iter(stats.values())
    for layer in model.layers:
        if isinstance(layer, layers.Dense | layers.Conv2D):
            z = keras.ops.conv(x, layer.kernel) if isinstance(layer, layers.Conv2D) else x @ layer.kernel
            before = z + layer.bias
        else:
            before = x
        x = layer(x)
        linear = getattr(layer, "activation", keras.activations.linear) is keras.activations.linear
        if not linear or isinstance(layer, layers.LeakyReLU | layers.ReLU):
            assert_units(next(seen), before)
    assert next(seen, None) is None
    assert_lean(lambda weights, state, x: model.stateless_call(weights, state, x, training=True)[0], *values, images)
