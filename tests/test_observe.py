import functools
import gc
import math
import warnings
from collections import OrderedDict

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import export, lax
from jax.experimental import io_callback
from jax.experimental import pallas as pl
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxrelu
import jaxrelu.linen
import jaxrelu.nnx
from cases import Case, each_case
from dying import assert_stats, reference
from jaxrelu import inplace
from jaxrelu.diagnostics import check_init, observe, unit_stats

# of tests that ask what is done, not how it is rounded
quick = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)
START = RNG.bit_generator.state
X = jnp.asarray(RNG.normal(size=(7, 3)), jnp.float32)
W = jnp.asarray(RNG.normal(size=(3, 3)), jnp.float32)
STACK = jnp.asarray(RNG.normal(size=(2, 3, 3)), jnp.float32)


@pytest.fixture(autouse=True)
def same_numbers_in_any_order():
    RNG.bit_generator.state = START


@pytest.fixture(autouse=True)
def flax_promotes(strict_promotion):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def assert_same(a, b):
    """Asserts that two pytrees are equal to the bit."""
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_saw(f, *args, names):
    """Asserts that f is seen, eager and in jit, with the same output and jitted gradient, and returns the statistics."""
    out, stats = observe(f)(*args)
    assert_same(out, f(*args))
    assert isinstance(stats, OrderedDict)
    assert list(stats) == names

    def loss(*args):
        out = f(*args)
        return sum((y * y).sum() for y in jax.tree.leaves(out)), out

    def watched(*args):
        (total, out), stats = observe(loss)(*args)
        return total, (out, stats)

    (_, (out, jitted)), gradient = jax.jit(jax.value_and_grad(watched, has_aux=True))(*args)
    (_, expected), exact = jax.jit(jax.value_and_grad(loss, has_aux=True))(*args)
    assert_same((out, gradient), (expected, exact))
    assert isinstance(jitted, OrderedDict)
    assert list(jitted) == names
    for name in names:
        for key in ("count", "fired", "nonfinite", "min", "max", "mean", "variance", "dormancy", "zero_gradient"):
            np.testing.assert_allclose(getattr(jitted[name], key), getattr(stats[name], key), rtol=1e-5, atol=1e-5)
    return stats


@each_case
def test_every_activation_is_seen(case: Case):
    z = np.asarray(X * 4)
    stats = assert_saw(lambda x: case.function(x * 4), X, names=[case.name])[case.name]
    slope, output = case.slope(z.astype(np.float64)), np.abs(case.value(z.astype(np.float64))).mean(0)
    np.testing.assert_allclose(stats.zero_gradient, (slope == 0).mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats.dormancy, output / output.mean(), rtol=1e-5)
    np.testing.assert_array_equal(stats.fired, (z > 0).sum(0))


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def softplus(z):
    return np.log1p(np.exp(z))


def elu(z, alpha=1.0):
    return np.where(z > 0, z, alpha * np.expm1(np.minimum(z, 0)))


# of jax.nn's, by name: the value, and where the derivative is 0
OF_JAX_NN = {
    "relu": (lambda z: np.maximum(z, 0), lambda z: z <= 0),
    "relu6": (lambda z: np.clip(z, 0, 6), lambda z: (z <= 0) | (z >= 6)),
    "leaky_relu": (lambda z: np.where(z > 0, z, 0.01 * z), None),
    "elu": (elu, None),
    "celu": (elu, None),
    "selu": (lambda z: 1.0507009873554805 * elu(z, 1.6732632423543772), None),
    "gelu": (lambda z: z * np.vectorize(lambda z: (1 + math.erf(z / 2**0.5)) / 2)(z), None),
    "silu": (lambda z: z * sigmoid(z), None),
    "softplus": (softplus, None),
    "mish": (lambda z: z * np.tanh(softplus(z)), None),
    "squareplus": (lambda z: (z + np.sqrt(z * z + 4)) / 2, None),
    "soft_sign": (lambda z: z / (1 + np.abs(z)), None),
    "hard_tanh": (lambda z: np.clip(z, -1, 1), lambda z: abs(z) >= 1),
    "hard_sigmoid": (lambda z: np.clip(z + 3, 0, 6) / 6, lambda z: abs(z) >= 3),
    "hard_silu": (lambda z: z * np.clip(z + 3, 0, 6) / 6, lambda z: z <= -3),
    "tanh": (np.tanh, None),
    "sigmoid": (sigmoid, None),
}


@quick
def test_activations_of_jax_nn():
    @jax.jit
    @functools.partial(observe, activations=tuple(OF_JAX_NN))
    def f(x):
        gelu = functools.partial(jax.nn.gelu, approximate=False)
        functions = {name: getattr(jax.nn, name) for name in OF_JAX_NN} | {"gelu": gelu}
        return {name: function(4 * x) for name, function in functions.items()}

    out, stats = f(X)
    z = 4 * np.asarray(X, np.float64)
    assert list(stats) == list(OF_JAX_NN)
    for name, (value, is_flat) in OF_JAX_NN.items():
        np.testing.assert_allclose(out[name], value(z), atol=1e-5)
        output = np.abs(value(z)).mean(0)
        np.testing.assert_allclose(stats[name].dormancy, output / output.mean(), rtol=1e-5, err_msg=name)
        np.testing.assert_array_equal(stats[name].fired, (z > 0).sum(0))
        zeros = is_flat(z) if is_flat else np.zeros_like(z)
        np.testing.assert_allclose(stats[name].zero_gradient, zeros.mean(0), rtol=1e-6, err_msg=name)


OTHERS = np.random.default_rng(1)
V, BIAS = (OTHERS.normal(size=shape).astype(np.float32) for shape in ((5, 3), (5,)))
IMAGES, KERNEL = (OTHERS.normal(size=shape).astype(np.float32) for shape in ((7, 2, 8, 9), (4, 2, 3, 3)))


def one_example(x):
    """A layer for one example, with its activation for one number, as in Equinox's MLP."""
    return jax.vmap(jax.nn.relu)(V @ x + BIAS)


def one_image(x):
    """A layer for one image with channels first, as Equinox's Conv2d."""
    z = lax.conv_general_dilated(x[None], KERNEL, (1, 1), "SAME")[0]
    return jnp.where(z >= 0, z, jnp.float32(0.25) * z)  # as Flax and Equinox write it


@quick
def test_one_example_at_a_time_and_channels_first():
    def f(x, images):
        with jax.named_scope("mlp"):
            y = jax.vmap(one_example)(x)
        return y, jax.vmap(one_example, in_axes=1, out_axes=1)(x.T), jax.vmap(one_image)(images)

    stats = assert_saw(f, X, IMAGES, names=["mlp/relu", "relu", "leaky_relu"])
    assert_stats(stats["mlp/relu"], X @ V.T + BIAS)
    assert_stats(stats["relu"], X @ V.T + BIAS)
    z = np.asarray(lax.conv_general_dilated(IMAGES, KERNEL, (1, 1), "SAME"))
    np.testing.assert_array_equal(stats["leaky_relu"].fired, (z > 0).sum((0, 2, 3)))
    np.testing.assert_allclose(stats["leaky_relu"].max, z.max((0, 2, 3)), rtol=1e-5)
    output = np.abs(np.where(z > 0, z, 0.25 * z)).mean((0, 2, 3))
    np.testing.assert_allclose(stats["leaky_relu"].dormancy, output / output.mean(), rtol=1e-5)


def layer(x):
    return jax.nn.relu(jax.vmap(lambda x: V @ x + BIAS)(x))


@quick
def test_wherever_an_activation_of_jax_nn_is_called():
    mesh = jax.make_mesh((7,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:7])
    z = X @ V.T + BIAS
    for f in (
        *(jax.jit(layer), jax.checkpoint(layer), jax.jit(jax.checkpoint(lambda x: jax.nn.relu(x @ V.T + BIAS)))),
        lambda x: lax.cond(x.sum() < 1e9, layer, lambda x: x @ V.T, x),
        lambda x: lax.scan(lambda carry, _: (carry, layer(carry)), x, length=1)[1][0],
        lambda x: jax.jit(jax.nn.relu)(x @ V.T + BIAS),
        lambda x: jax.checkpoint(lambda z: 2 * jax.nn.relu(z))(jax.vmap(lambda x: V @ x + BIAS)(x)),
        jax.shard_map(layer, mesh=mesh, in_specs=P("data"), out_specs=P("data")),
        lambda x: jax.value_and_grad(lambda x: layer(x).sum())(x),
        lambda x: jax.value_and_grad(jax.jit(lambda x: layer(x).sum()))(x),
        lambda x: jax.value_and_grad(jax.checkpoint(lambda x: layer(x).sum()))(x),
    ):
        ((name, stats),) = jax.jit(observe(f))(X)[1].items()
        assert name == "relu"
        assert stats.fired.ravel().tolist() == (z > 0).sum(0).tolist()
        np.testing.assert_allclose(stats.max.ravel(), z.max(0), rtol=1e-5)


@quick
def test_in_the_gradient_of_a_scan():
    def loss(x):
        return lax.scan(lambda x, w: (jax.nn.elu(x @ w), None), x, STACK)[0].sum()

    stats = jax.jit(observe(jax.value_and_grad(loss)))(X)[1]["elu"]
    np.testing.assert_array_equal(stats.fired[0], (np.asarray(X) @ np.asarray(STACK[0]) > 0).sum(0))


@quick
def test_a_call_that_computes_several():
    @jax.jit
    def both(x):
        y = jax.nn.relu(x)
        return y, jax.nn.elu(x), jax.nn.relu(y @ W)

    assert list(jax.jit(observe(both))(X)[1]) == ["relu", "elu", "relu_1"]
    assert list(jax.jit(observe(lambda x: jax.jit(lambda x: (jax.nn.relu(x), jax.nn.elu(x)))(x)))(X)[1]) == ["relu", "elu"]


@quick
def test_prelu_of_flax():
    linen, nnx_prelu = nn.PReLU(), nnx.PReLU(0.5)
    variables = linen.init(jax.random.key(0), X)

    def f(variables, x):
        return linen.apply(variables, x), nnx_prelu(x)

    stats = jax.jit(observe(f))(variables, X)[1]
    assert list(stats) == ["PReLU/prelu", "prelu"]
    for slope, layer in zip((0.01, 0.5), stats.values(), strict=True):
        output = np.abs(np.where(X > 0, X, slope * X)).mean(0)
        np.testing.assert_allclose(layer.dormancy, output / output.mean(), rtol=1e-5)
    # slopes that vmap maps, and pre-activations that it does not
    slopes = jnp.array([0.0, 0.5])
    (layer,) = jax.jit(observe(jax.vmap(lambda s: jax.nn.leaky_relu(X, s)), axis=-1))(slopes)[1].values()
    assert layer.count == 14
    np.testing.assert_allclose(layer.zero_gradient, (X < 0).mean(0) / 2, rtol=1e-6)


@quick
def test_which_activations_and_which_axis():
    def f(x):
        return jnp.tanh(jnp.maximum(jaxrelu.relu(jax.nn.elu(x)), 0))

    for names in (("elu",), ("relu",), ("elu", "tanh"), ("relu", "maximum")):
        assert set(jax.jit(observe(f, activations=names))(X)[1]) == set(names)
    for axis, units in ((0, 7), (-2, 7), (1, 3), (-1, 3), (2, 3), (-3, 3)):
        stats = jax.jit(observe(f, axis=axis))(X)[1]
        assert {layer.fired.shape for layer in stats.values()} == {(units,)}
    for wrong in ("relu", (1,), 3):
        with pytest.raises(TypeError, match="observe: activations must be a tuple of names, got"):
            observe(f, activations=wrong)
    with pytest.raises(ValueError, match=r"observe: activations must be among relu, .*, got swish"):
        observe(f, activations=["relu", "swish"])
    for wrong in (1.0, True, "last"):
        with pytest.raises(TypeError, match="observe: axis must be an int or None"):
            observe(f, axis=wrong)


@quick
def test_an_unknown_unit_axis_under_vmap_warns():
    with pytest.warns(UserWarning, match="observe: elu is under vmap, where nothing shows which axis its units lie along"):
        stats = jax.jit(observe(jax.vmap(jax.nn.elu)))(X)[1]["elu"]
    assert stats.fired.shape == (3,)
    assert jax.jit(observe(jax.vmap(jax.nn.elu), axis=-1))(X)[1]["elu"].fired.shape == (3,)
    assert observe(jax.nn.elu)(X)[1]["elu"].fired.shape == (3,)


def test_names_carry_scopes_and_are_unique():
    def f(x):
        x = jaxrelu.relu(x @ W)
        with jax.named_scope("hidden1"):
            x = jaxrelu.relu(x @ W)
            x = jax.vmap(jaxrelu.relu)(x)
        return jaxrelu.elu(jaxrelu.relu(x))

    assert_saw(f, X, names=["relu", "hidden1/relu", "hidden1/relu_1", "relu_1", "elu"])


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jaxrelu.relu(nn.Dense(3)(x)), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jaxrelu.relu(nn.Dense(3)(x))
        x = jaxrelu.linen.ELU(name="hidden1")(x)
        x, _ = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)(name="blocks")(x, None)
        return nn.remat(Block)(name="last")(x, None)[0]


def test_linen():
    model = Model()
    variables = jax.jit(model.init)(jax.random.key(0), X)
    names = ["Model/relu", "Model/hidden1/elu", "Model/blocks/relu", "Model/last/relu"]
    stats = assert_saw(model.apply, variables, X, names=names)
    assert stats["Model/blocks/relu"].fired.shape == (2, 3)
    assert stats["Model/blocks/relu"].count.tolist() == [7, 7]
    one = jax.jit(observe(jax.vmap(model.apply, in_axes=(None, 0))))(variables, X)[1]
    assert list(one) == names
    for name in names:
        np.testing.assert_array_equal(one[name].count, stats[name].count)


def nnx_model():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
        nnx.Linear(3, 5, rngs=rngs), jaxrelu.nnx.ReLU(), nnx.BatchNorm(5, rngs=rngs), jaxrelu.relu, jaxrelu.nnx.PReLU()
    )


def test_nnx():
    model = nnx_model()
    model.eval()
    names = ["relu", "relu_1", "prelu"]
    graph, state = nnx.split(model)
    assert_saw(lambda state, x: nnx.merge(graph, state)(x), state, X, names=names)
    out, stats = observe(model)(X)
    assert_same(out, model(X))
    assert list(stats) == names
    # read at each call
    watch, method = observe(model), observe(model.__call__)
    model.layers[0].bias[...] += 100.0
    for watched in (watch, method):
        assert watched(X)[1]["relu"].firing_rate.tolist() == [1.0] * 5


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        return jaxrelu.relu(self.linear(x))


def test_nnx_transformations_leave_a_model_as_it_is():
    block = NnxBlock(nnx.Rngs(0))
    stack = nnx.vmap(lambda key: NnxBlock(nnx.Rngs(key)))(jax.random.split(jax.random.key(0), 2))
    call = NnxBlock.__call__
    for f, model in (
        (nnx.jit(call), block),
        (nnx.remat(call), block),
        (nnx.jit(nnx.remat(call)), block),
        (nnx.vmap(call, in_axes=(None, 0)), block),
        (nnx.scan(call, in_axes=(0, nnx.Carry), out_axes=nnx.Carry), stack),
        (lambda model, x: nnx.cond(x.sum() > 0, call, lambda _, x: x, model, x), block),
    ):
        out, stats = observe(f)(model, X)
        assert list(stats) == ["relu"]
        np.testing.assert_allclose(out, f(model, X), rtol=1e-6)


@quick
def test_check_init_of_an_nnx_model():
    dead = NnxBlock(nnx.Rngs(0))
    dead.linear.bias[...] -= 99.0
    with (
        pytest.warns(UserWarning, match="relu: 3 of 3"),
        pytest.warns(match="no gradient reaches linear/bias, linear/kernel;"),
    ):
        check_init(lambda model, x: model(x), dead, X)


@quick
def test_a_model_that_changes_its_state_is_refused_and_goes_through_split():
    model = nnx_model()
    with pytest.raises(ValueError, match=r"observe: .* replaced an array in one of its arguments.*nnx.split"):
        observe(model)(X)

    @observe
    def step(graph, state, x):
        model = nnx.merge(graph, state)
        return model(x), nnx.state(model)

    (_, state), stats = step(*nnx.split(model), X)
    assert list(stats) == ["relu", "relu_1", "prelu"]
    nnx.update(model, state)
    assert model.layers[2].mean[...].any()


def test_scan_is_stacked():
    def f(x, ws):
        def outer(x, w):
            return lax.scan(lambda x, _: (jaxrelu.relu(x @ w), x.sum()), x, None, length=5)

        return lax.scan(outer, x, ws, reverse=True)

    stats = assert_saw(f, X, STACK, names=["relu"])["relu"]
    assert stats.dead.shape == (2, 5, 3)
    z = X
    for i in range(5):
        z = np.maximum(z, 0) @ STACK[1] if i else X @ STACK[1]
        np.testing.assert_allclose(stats.max[1, i], np.asarray(z).max(0), rtol=1e-5)


def test_remat_cond_and_jit():
    def f(x):
        x = jax.checkpoint(lambda x: jaxrelu.relu(x @ W), policy=jax.checkpoint_policies.everything_saveable)(x)
        x = jax.jit(lambda x: jaxrelu.relu6(x @ W))(x)
        return lax.cond(x.sum() > 1e9, jaxrelu.elu, lambda x: jaxrelu.leaky_relu(x @ W, jnp.float32(0.1)), x)

    stats = assert_saw(f, X, names=["relu", "relu6", "leaky_relu", "elu"])
    assert_stats(stats["relu"], X @ W)
    # the branch not taken
    assert stats["leaky_relu"].count == 7
    assert stats["elu"].count == 0
    assert np.isnan(stats["elu"].firing_rate).all()
    assert not stats["elu"].dead.any()


@quick
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_mapped_axes_are_examples(axis):
    z = RNG.normal(size=(7, 5, 3)).astype(np.float32)  # examples, positions, units
    f = jax.vmap(lambda z: jaxrelu.relu(z), in_axes=axis, out_axes=axis)
    (stats,) = observe(f)(np.moveaxis(z, 0, axis))[1].values()
    assert_stats(stats, z.reshape(35, 3))
    twice = jax.vmap(f, in_axes=3)
    (stats,) = observe(twice)(np.moveaxis(z, 0, axis)[..., None] * np.ones(2, np.float32))[1].values()
    assert_stats(stats, np.concatenate([z.reshape(35, 3)] * 2))


def test_slopes_may_be_mapped_along_another_axis():
    z, slopes = jnp.asarray(RNG.normal(size=(5, 4, 3)), jnp.float32), jnp.float32([0.1, 0.2, 0.3, 0.4])
    f = jax.vmap(lambda z, slope: jaxrelu.prelu(z, slope), in_axes=(1, 0))
    output = np.abs(np.where(z > 0, z, z * slopes[:, None])).mean((0, 1))
    stats = assert_saw(f, z, slopes, names=["prelu"])["prelu"]
    np.testing.assert_allclose(stats.dormancy, output / output.mean(), rtol=1e-5)
    (stats,) = observe(jax.vmap(lambda slope: jaxrelu.prelu(z[:, 0], slope)))(slopes)[1].values()
    assert stats.count == 20
    np.testing.assert_array_equal(stats.fired, 4 * np.asarray(z[:, 0] > 0).sum(0))


def test_convolution_and_its_vmap():
    images = RNG.normal(size=(5, 6, 7, 2)).astype(np.float32)
    kernel = RNG.normal(size=(3, 3, 2, 4)).astype(np.float32)

    def network(images, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jaxrelu.relu(lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=numbers))

    stats = assert_saw(network, images, kernel, names=["relu"])["relu"]
    assert stats.count == 5 * 6 * 7
    for axis in (0, 3):
        one = jax.vmap(lambda image: network(image[None], kernel), in_axes=axis)
        (mapped,) = observe(one)(np.moveaxis(images, 0, axis))[1].values()
        np.testing.assert_array_equal(mapped.fired, stats.fired)
        assert mapped.count == stats.count
        np.testing.assert_allclose(mapped.variance, stats.variance, rtol=1e-5)


@pytest.mark.parametrize("check", [True, False])
def test_devices_are_examples(check):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    z = RNG.normal(np.repeat([1, -1, 1, -1], 2)[:, None], size=(8, 3)).astype(np.float32)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=check)
    def f(z):
        return lax.cond(z.sum() > 0, jaxrelu.relu, lambda z: z, jaxrelu.relu(z) - 1)

    stats = assert_saw(f, z, names=["relu", "relu_1"])
    assert_stats(stats["relu"], z)
    taken = sum(shard.sum() > 0 for shard in np.asarray(z).reshape(4, 2, 3))
    assert 0 < taken < 4
    assert stats["relu_1"].count == 2 * taken


@quick
@pytest.mark.parametrize("spec", [P("data"), P(None, "data")], ids=["examples", "units"])
def test_explicit_sharding(spec):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4])
    z = RNG.normal(size=(300, 12)).astype(np.float32)
    sharded = jax.device_put(z, jax.sharding.NamedSharding(mesh, spec))
    stats = jax.jit(observe(jaxrelu.relu))(sharded)[1]["relu"]
    assert_stats(stats, z)
    # read where the devices hold it
    np.testing.assert_array_equal(stats.dead, ~(z > 0).any(0))
    np.testing.assert_allclose(stats.dormancy, reference(z)["dormancy"], rtol=1e-5)
    with jax.set_mesh(mesh):
        assert unit_stats(sharded, where=jax.device_put(z[:, 0] > 0)).count == (z[:, 0] > 0).sum()


@quick
def test_devices_that_do_the_same_work_count_once():
    mesh = jax.make_mesh((2, 3), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:6])
    f = jax.shard_map(jaxrelu.relu, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert observe(f)(jnp.ones((4, 3)))[1]["relu"].count == 4


@quick
@pytest.mark.parametrize(
    ("name", "f"),
    [
        ("while", lambda x: lax.while_loop(lambda x: x.sum() > 1, lambda x: jaxrelu.relu(x) / 2, x)),
        ("while", lambda x: lax.while_loop(lambda x: x.sum() > 1, lambda x: jax.nn.elu(x) / 2, x)),
        ("custom_vjp_call", lambda x: custom_of_jax_nn(x)),
        ("custom_vjp_call", lambda x: custom(x)),
        ("custom_jvp_call", lambda x: custom_forward(x)),
        ("differentiated", jax.grad(lambda x: jaxrelu.elu(x).sum())),
        ("(CustomRoot|custom_jvp_call)", lambda x: root(x)),
        ("custom_linear_solve", lambda x: lax.custom_linear_solve(lambda y: 2 * y, x, lambda _, b: jaxrelu.relu(b) / 2)),
        ("reduce", lambda x: lax.reduce(x, 0.0, lambda a, b: jaxrelu.relu(a) + b, (0,))),
        ("pallas_call", lambda x: pl.pallas_call(double, jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)),
        ("pure_callback", lambda x: jax.pure_callback(np.abs, jax.ShapeDtypeStruct(x.shape, x.dtype), x)),
        ("io_callback", lambda x: io_callback(np.abs, jax.ShapeDtypeStruct(x.shape, x.dtype), x)),
        ("(call_exported|custom_vjp_call)", lambda x: export.export(jax.jit(jaxrelu.relu))(X).call(x)),
    ],
)
def test_what_cannot_be_entered_warns(name, f):
    for watched in (observe(f), jax.jit(observe(f))):
        with pytest.warns(UserWarning, match=rf"observe: (relu|elu|any activation) inside .*{name}"):
            out, stats = watched(X)
        assert not stats
        np.testing.assert_allclose(out, f(X), rtol=1e-6)


@jax.custom_vjp
def custom(x):
    return jaxrelu.relu(x)


@jax.custom_vjp
def custom_of_jax_nn(x):
    return jax.nn.relu(x)


custom_of_jax_nn.defvjp(lambda x: (custom_of_jax_nn(x), None), lambda _, g: (g,))
custom.defvjp(lambda x: (custom(x), None), lambda _, g: (g,))


@jax.custom_jvp
def custom_forward(x):
    return jaxrelu.relu(x)


custom_forward.defjvp(lambda x, t: (custom_forward(*x), *t))


def root(x):
    return lax.custom_root(lambda y: y - jaxrelu.elu(x), x, lambda f, y: y - f(y), lambda g, y: y)


def double(x, out):
    out[...] = 2 * jaxrelu.relu(x[...])


@quick
def test_no_activation_warns():
    for f in (jnp.tanh, jax.nn.sigmoid, jax.jit(lambda x: x @ W), lambda x: jnp.maximum(x, 0)):
        for watched in (observe(f), jax.jit(observe(f))):
            with pytest.warns(
                UserWarning, match=r"observe: no activation was found; it looks for relu, .*, of jax.nn, Flax,"
            ):
                assert not watched(X)[1]
    with pytest.warns(UserWarning, match="no activation was found"):  # as what is not read is not computed
        assert not observe(lambda x: (jaxrelu.relu(x), x)[1])(X)[1]


@quick
def test_without_jit():
    with jax.disable_jit():
        assert list(observe(lambda x: jaxrelu.elu(jaxrelu.relu(x)))(X)[1]) == ["relu", "elu"]


@quick
def test_callables_that_are_no_functions():
    class Layer(eqx.Module):
        w: jax.Array

        def __call__(self, x):
            return jaxrelu.relu(self.w @ x)

    class Named:
        __name__ = property(lambda self: 3)
        w = W

        def __call__(self, x):
            return jaxrelu.relu(x @ self.w)

    layer = Layer(W.T)
    expected = unit_stats(X @ W)
    for f in (
        *(
            eqx.filter_jit(eqx.filter_vmap(layer)),
            eqx.filter_vmap(layer),
            jax.jit(jax.vmap(layer)),
            Named(),
            Named().__call__,
        ),
        *(functools.partial(dense, W), jax.tree_util.Partial(dense, W), functools.partial(jax.jit(dense), W)),
    ):
        (stats,) = observe(f)(X)[1].values()
        assert stats.fired.tolist() == expected.fired.tolist()


@quick
def test_a_batch_of_unknown_size():
    batch, length = export.symbolic_shape("batch, length")
    f = jax.jit(observe(lambda x: jaxrelu.relu(x @ W)))
    for shape in ((batch, 3), (batch, length, 3), (batch, 2, 3)):
        exported = export.export(f)(jax.ShapeDtypeStruct(shape, jnp.float32))
        x = RNG.normal(size=[n if isinstance(n, int) else 7 for n in shape]).astype(np.float32)
        assert_stats(exported.call(x)[1]["relu"], x.reshape(-1, 3) @ W)
    masked = export.export(jax.jit(lambda z, where: unit_stats(z, where=where)))(
        jax.ShapeDtypeStruct((batch, 3), jnp.float32), jax.ShapeDtypeStruct((batch,), bool)
    )
    shown = np.arange(7) % 2 == 0
    assert_stats(masked.call(X, shown), X[shown])


@quick
def test_traces_of_changing_arguments_are_let_go():
    traced = []

    def f(x, step):
        traced.append(step)
        with jax.ensure_compile_time_eval():
            constant = jnp.zeros((54321, 2))  # kept as long as the trace is
        return jaxrelu.relu(x) + constant.sum()

    watched = observe(f)
    for step in range(100):
        watched(X, step)
    gc.collect()
    assert 32 <= sum(x.shape == (54321, 2) for x in jax.live_arrays()) <= 80
    watched(X, 99)
    assert len(traced) == 100
    for rows in range(1, 101):
        watched(jnp.ones((rows, 3)), 0)
    gc.collect()
    assert 32 <= sum(x.shape == (54321, 2) for x in jax.live_arrays()) <= 80
    traced.clear()
    # what compares equal and differs is another argument; what is equal is not
    for step in (0.0, -0.0, 0, False, 0.0, -0.0, float("nan"), float("nan")):
        watched(X, step)
    assert len(traced) == 5


def test_in_place_refuses_while_observing_too():
    with pytest.raises(TypeError, match="elu: x must be a JAX array of floats"):
        observe(inplace.elu)(jnp.array([1, 2]))


def test_only_arrays_are_traced():
    calls = []

    def f(x, mode, flag, number, nothing, *, scale=1.0, options=None):
        calls.append(1)
        assert (mode, flag, number, nothing, scale, options) == ("train", True, 3, None, 2.0, {"depth": [1, None]})
        return {"y": jaxrelu.relu(x) * scale, "mode": mode, "none": None, "f": len, "pair": (number, 2.5)}

    watched = observe(f)
    for x in (X, X + 1, np.asarray(X)):
        out, stats = watched(x, "train", True, 3, None, scale=2.0, options={"depth": [1, None]})
        assert_same(out.pop("y"), 2 * np.maximum(x, 0))
        assert out == {"mode": "train", "none": None, "f": len, "pair": (3, 2.5)}
        assert list(stats) == ["relu"]
    assert len(calls) == 1
    with pytest.raises(AssertionError):
        watched(X, "train", 1.0, 3, None, scale=2.0, options={"depth": [2, None]})


@quick
def test_one_trace_for_repeated_calls():
    calls = []

    def f(x):
        calls.append(1)
        return jaxrelu.relu(x)

    for watched in (observe(f), jax.jit(observe(f))):
        calls.clear()
        for x in (X, X + 1, X + 2):
            watched(x)
        assert len(calls) <= 1  # the second may find the first one's trace


def dense(w, x):
    return jaxrelu.relu(x @ w)


@quick
@pytest.mark.parametrize("enter", [lambda f: f, jax.jit, jax.checkpoint])
def test_arrays_closed_over_are_let_go(enter):
    for i in range(3):
        observe(enter(functools.partial(dense, jnp.full((3, 54321), float(i)))))(X)
    gc.collect()
    assert not [x.shape for x in jax.live_arrays() if 54321 in x.shape]


@quick
def test_no_tracer_is_kept():
    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def step(w, x):
        y, stats = observe(jax.jit(lambda x: jaxrelu.relu(x @ w)))(x)
        return y.sum(), stats

    with jax.checking_leaks():
        (_, stats), _ = step(W, X)
    assert_stats(stats["relu"], X @ W)


def test_nested():
    def f(x):
        y, stats = observe(lambda x: jaxrelu.relu(x @ W))(x)
        return y, stats["relu"].firing_rate

    (_, rate), stats = observe(f)(X)
    assert list(stats) == ["relu"]
    np.testing.assert_array_equal(rate, stats["relu"].firing_rate)
    # and statistics that are taken by hand are no layer
    with pytest.warns(UserWarning, match="no activation was found"):
        assert not observe(lambda x: unit_stats(x).mean)(X)[1]


@quick
def test_rank_0_and_1_integers_and_no_examples():
    assert observe(jaxrelu.relu)(jnp.float32(3))[1]["relu"].fired.tolist() == [1]
    assert observe(jaxrelu.relu)(X[0])[1]["relu"].count == 1
    assert observe(jaxrelu.relu)(jnp.array([[-1, 2]]))[1]["relu"].fired.tolist() == [0, 1]
    assert observe(jaxrelu.relu)(X[:0])[1]["relu"].count == 0


@quick
def test_scalars_under_vmap_are_one_unit_with_a_warning():
    with pytest.warns(UserWarning, match="observe: relu was given scalars under vmap, so all its units count as one; apply"):
        stats = observe(jax.vmap(jaxrelu.relu))(X[:, 0])[1]["relu"]
    assert stats.fired.tolist() == [(X[:, 0] > 0).sum()]
    assert stats.count == 7
    # as Equinox's MLP calls it, behind a product
    for f, x in ((lambda x: x @ W, X), (lambda x: V @ x, X.T)):
        axis = int(f(jnp.ones(3)).shape != (3,))
        stats = jax.jit(observe(jax.vmap(lambda x, f=f: jax.vmap(jaxrelu.relu)(f(x)), in_axes=axis)))(x)[1]["relu"]
        assert_stats(stats, X @ V.T if axis else X @ W)


def test_observed_function_keeps_its_name_and_must_be_one():
    assert observe(custom).__name__ == "custom"
    with pytest.raises(TypeError, match="observe: f must be a function"):
        observe(X)


def test_no_warning_where_nothing_is_hidden():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        observe(lambda x: lax.while_loop(lambda x: x.sum() > 1, lambda x: x / 2, jaxrelu.relu(x)))(X)
    assert not caught
