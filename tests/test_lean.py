"""`lean` changes neither values nor derivatives, and computes nothing costly twice; `compare` tells what it gains.

That it takes less memory is tested in test_memory.py and test_platforms.py. Here programs are planned for a GPU, as on the
CPU they are planned from JAX 0.11.1 only.
"""

import collections
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec

import jaxrelu
from jaxrelu.memory import Comparison, Row, compare, lean

planned = functools.partial(lean, platform="gpu")
RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(4, 6, 6)).astype(np.float32)) / 2
X = jnp.asarray(RNG.normal(size=(8, 6)).astype(np.float32))
KERNEL = jnp.asarray(RNG.normal(size=(3, 3, 2, 2)).astype(np.float32)) / 3
KEY = jax.random.key(0)


def norm(h, axis_name=None):
    mean = h.mean(0, keepdims=True)
    square = jnp.square(h).mean(0, keepdims=True)
    if axis_name:
        mean, square = lax.pmean((mean, square), axis_name)
    return (h - mean) * lax.rsqrt(square - jnp.square(mean) + 1e-3)


def layer(h, w, activation=jax.nn.relu):
    return activation(norm(h @ w))


def chain(w, x, activation=jax.nn.relu):
    for each in w:
        x = layer(x, each, activation)
    return jnp.mean(x**2)


def residual(w, x):
    for each in w:
        x = jax.nn.elu(x + jax.nn.leaky_relu(x @ each))
    return jnp.mean(x**2)


def dropout(w, x):
    for i, each in enumerate(w):
        keep = jax.random.bernoulli(jax.random.fold_in(KEY, i), 0.5, x.shape)
        x = jnp.where(keep, jax.nn.gelu(x @ each) / 0.5, jnp.zeros_like(x))
    return jnp.mean(x**2)


def attention(w, x):
    q, k, v, out = (x @ each for each in w)
    causal = jnp.tril(jnp.ones((8, 8), bool))
    weights = jax.nn.softmax(jnp.where(causal, q @ k.T, jnp.full((8, 8), -1e9)))
    return -jnp.mean(jax.nn.log_softmax(weights @ v + out)[jnp.arange(8), jnp.arange(8) % 6])


def scanned(w, x):
    def block(h, each):
        return h + jax.nn.silu(layer(h, each) @ each.T), h.sum()

    x, sums = lax.scan(block, x, w)
    return jnp.mean(x**2) + sums.mean()


def conditional(w, x):
    x = lax.cond(x[0, 0] > 0, lambda h: layer(h, w[0]) @ w[1], lambda h: jnp.tanh(h @ w[2]), x)
    return jnp.mean(layer(x, w[3]))


def gated(w, x):
    x = x + layer(x, w[0])
    y = jax.nn.silu(norm(x @ w[1]))
    return jnp.mean((y * jax.nn.sigmoid(jax.nn.relu(y.mean(0, keepdims=True) @ w[2]) @ w[3])) ** 2)


def read_by_many(w, x):
    gate = jnp.tanh(x @ w[0])
    for each in w:
        x = jnp.sin(x @ each) * gate
    return jnp.mean(x**2)


def rematerialised(w, x):
    x = jax.checkpoint(lambda h: layer(layer(h, w[0]), w[1]))(x)
    x = jax.jit(lambda h: layer(h, w[2]))(x)
    return jnp.mean((x @ w[3]) ** 2)


def counted(w, x):
    steps = lax.while_loop(lambda i: i < 3, lambda i: i + 1, 0)
    return chain(w, x) * steps.astype(x.dtype)


@jax.custom_vjp
def straight_through(x):
    return jnp.maximum(x, 0)


straight_through.defvjp(lambda x: (jnp.maximum(x, 0), None), lambda _, g: (g,))


@jax.custom_jvp
def also_straight_through(x):
    return jnp.maximum(x, 0)


@also_straight_through.defjvp
def _(primals, tangents):
    return also_straight_through(*primals), tangents[0]


def straight(w, x):
    x = straight_through(x @ w[0]) @ w[1]
    return jnp.mean((also_straight_through(x) @ w[2]) ** 2)


def convolved(w, x):
    images = jnp.broadcast_to(x[:, :, None, None], (8, 6, 6, 2))
    dims = ("NHWC", "HWIO", "NHWC")
    for _ in range(2):
        images = lax.conv_general_dilated(images, w, (1, 1), "SAME", dimension_numbers=dims)
        images = lax.reduce_window(jax.nn.relu6(norm(images)), -jnp.inf, lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "SAME")
    return jnp.mean(images**2)


def mapped(w, x):
    def one(x):
        for each in w:
            x = jax.nn.relu(each @ x)
        return x

    return jnp.mean(jax.vmap(one)(x) ** 2)


def cast(w, x):
    x = jax.nn.relu((x @ w[0]).astype(jnp.bfloat16)).astype(jnp.float32)
    y = jax.nn.elu(jnp.transpose(x @ w[1])).T
    return jnp.mean((jax.vmap(jax.nn.elu, 1)(y @ w[2]) @ jnp.concatenate([w[3], w[3, :2]])) ** 2)


def rounded(w, x):
    x = x @ w[0]
    x = jnp.where(x >= 0, x, lax.reduce_precision(0.1 * x, 5, 2)) @ w[1]
    x = jnp.where(x >= 0, x, (0.1 * x.astype(jnp.bfloat16)).astype(jnp.float32)) @ w[2]
    return jnp.mean(x**2)


def complex_numbers(w, x):
    x = jnp.abs(jnp.fft.fft(jax.nn.gelu(x @ w[0]))) @ w[1]
    return jnp.mean(jnp.abs(lax.complex(x, x) @ lax.complex(w[2], w[3])))


def closed_over(w, x):
    return planned(lambda x: chain(w, x))(x)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Dense(5)(x)))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=False)(x))


def in_linen(variables, x):
    y, updates = Linen().apply(variables, x, mutable=["batch_stats"], rngs={"dropout": KEY})
    return jnp.mean(y**2), updates


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(6, 5, rngs=rngs), nnx.BatchNorm(5, rngs=rngs)
        self.dropout, self.last = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


def assert_same(f, *args, has_aux=False):
    """Asserts that value and gradient are those of f but for rounding: within 1e-6 of the largest entry of each array."""
    want, got = (jax.jit(jax.value_and_grad(g, has_aux=has_aux))(*args) for g in (f, planned(f)))
    assert any(np.abs(a).max() > 0 for a in jax.tree.leaves(want[1]))
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(a).max())


def counts(jaxpr, names):
    """Returns how many equations with these primitives a program has, in all that it calls too."""
    found = collections.Counter(eqn.primitive.name for eqn in jaxpr.eqns)
    for eqn in jaxpr.eqns:
        for body in core.jaxprs_in_params(eqn.params):
            found.update(counts(getattr(body, "jaxpr", body), names))
    return {name: found[name] for name in names}


@pytest.mark.parametrize(
    "f",
    [
        *(
            chain,
            residual,
            dropout,
            attention,
            scanned,
            conditional,
            gated,
            read_by_many,
            rematerialised,
            counted,
            straight,
            convolved,
        ),
        *(mapped, cast, rounded, complex_numbers, closed_over),
    ],
    ids=lambda f: f.__name__,
)
def test_values_and_gradients_are_those_of_f(f):
    assert_same(f, KERNEL if f is convolved else W, X)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
def test_derivatives_are_those_of_f_at_kinks_and_far_from_them(dtype):
    points = jnp.array([-jnp.inf, -20, -9, -7, -1, -1e-6, 0, 1e-6, 1, 6, 7, jnp.inf], dtype)
    activations = [
        *(jax.nn.relu, jax.nn.relu6, jax.nn.leaky_relu, jax.nn.elu, jax.nn.gelu),
        *(jaxrelu.relu, jaxrelu.relu6, jaxrelu.leaky_relu, jaxrelu.elu),
        *(functools.partial(jaxrelu.relu6, kink=0.5), functools.partial(jaxrelu.elu, save="output")),
        functools.partial(jaxrelu.prelu, negative_slope=jnp.array(0.2, dtype)),
    ]

    def gradients(x, wrap):
        def f(x, activation):
            return jnp.sum(activation(x)[:, None] @ jnp.ones((1, 2), dtype))

        return [jax.grad(wrap(functools.partial(f, activation=activation)))(x) for activation in activations]

    want, got = (jax.jit(gradients, static_argnums=1)(points, wrap) for wrap in (lambda f: f, planned))
    for a, b in zip(want, got, strict=True):
        np.testing.assert_array_equal(a.astype(jnp.float32), b.astype(jnp.float32))


def test_forward_mode_second_derivatives_and_vmap():
    def f(w):
        return jnp.mean(jnp.tanh(norm(jax.nn.relu(X @ w)) @ w) ** 2)

    leaner, w = planned(f), W[0]
    for derivative in (jax.hessian, jax.jacfwd):
        want, got = jax.jit(derivative(f))(w), jax.jit(derivative(leaner))(w)
        np.testing.assert_allclose(want, got, rtol=0, atol=1e-6 * np.abs(want).max())
    want, got = jax.jit(jax.vmap(jax.grad(f)))(W), jax.jit(jax.vmap(jax.grad(leaner)))(W)
    np.testing.assert_allclose(want, got, rtol=0, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("f", [chain, dropout, attention, scanned], ids=lambda f: f.__name__)
def test_nothing_costly_is_computed_twice(f):
    costly = ("dot_general", "random_bits", "reduce_max", "rsqrt")
    want, got = (counts(jax.make_jaxpr(jax.grad(g))(W, X).jaxpr, costly) for g in (f, planned(f)))
    again = got.pop("rsqrt") - want.pop("rsqrt")
    assert (got, again > 0) == (want, f in (chain, scanned))  # the norms are computed again


def test_what_a_model_changes_and_draws_is_kept():
    with jax.numpy_dtype_promotion("standard"):
        variables = Linen().init({"params": KEY, "dropout": KEY}, X)
        assert_same(in_linen, variables, X, has_aux=True)
        graph, parameters, rest = nnx.split(Nnx(nnx.Rngs(0)), nnx.Param, ...)

        def loss(parameters, rest, x):
            model = nnx.merge(graph, parameters, rest, copy=True)
            return jnp.mean(model(x) ** 2), nnx.state(model, nnx.Any(nnx.BatchStat, nnx.RngCount))

        assert_same(loss, parameters, rest, X, has_aux=True)

        def loss_of_model(model, x):
            return jnp.mean(model(x) ** 2)

        with pytest.raises(ValueError, match="lean: loss_of_model replaced an array in one of its arguments"):
            nnx.value_and_grad(planned(loss_of_model))(Nnx(nnx.Rngs(0)), X)


@pytest.mark.parametrize("check_vma", [True, False])
def test_devices(check_vma):
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))

    def synced(w, x):
        for each in w:
            x = jax.nn.relu(norm(x @ each, "batch"))
        return lax.pmean(jnp.mean(x**2), "batch")

    def sharded(f):
        specs = (PartitionSpec(), PartitionSpec("batch"))
        return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=check_vma)

    grads = [jax.jit(jax.grad(f)).lower(W, X) for f in (sharded(synced), planned(sharded(synced)), sharded(planned(synced)))]
    want, *others = (lowered.compile() for lowered in grads)
    for got in others:
        np.testing.assert_allclose(want(W, X), got(W, X), rtol=0, atol=1e-6)
        # a mean over devices is not computed again
        assert got.as_text().count(" all-reduce(") == want.as_text().count(" all-reduce(")


def test_explicit_sharding_and_donation():
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("batch")))
        w = jax.device_put(np.array(W), NamedSharding(mesh, PartitionSpec()))
        step = jax.jit(lambda w, x: w - jax.grad(planned(chain))(w, x), donate_argnums=0)
        np.testing.assert_allclose(step(w, x), W - jax.grad(chain)(W, X), rtol=0, atol=1e-6)
    assert w.is_deleted()


def test_prints_come_once_and_in_order(capfd):
    def f(w, x):
        x = layer(x, w[0])
        jax.debug.print("first {}", x.shape[0], ordered=True)
        x = layer(x, w[1])
        jax.debug.print("second {}", x.shape[0], ordered=True)
        return jnp.mean(x @ w[2])

    jax.block_until_ready(jax.jit(jax.grad(planned(f)))(W, X))
    jax.effects_barrier()
    assert capfd.readouterr().out == "first 8\nsecond 8\n"


def test_other_outputs_and_arguments_pass_through():
    def f(w, x, name, *, scale):
        return chain(w, x) * scale, {"name": name, "x": x, "none": None}

    loss, rest = planned(f)(W, X, "model", scale=2.0)
    assert (float(loss), rest["name"], rest["none"]) == (pytest.approx(2 * float(chain(W, X))), "model", None)
    np.testing.assert_array_equal(rest["x"], X)
    assert planned(f).__name__ == "f"
    assert planned(lambda x: (x, x, 1.0))(2.0) == (2.0, 2.0, 1.0)  # a program of no equations


def test_platforms():
    plain = str(jax.make_jaxpr(jax.grad(chain))(W, X))
    assert str(jax.make_jaxpr(jax.grad(lean(chain, platform="tpu")))(W, X)) == plain
    on_cpu = str(jax.make_jaxpr(jax.grad(lean(chain)))(W, X))
    assert ("remat" in on_cpu) == (jax.__version_info__ >= (0, 11, 1))
    assert on_cpu != plain  # before that, relu is this package's
    want, got = jax.jit(jax.grad(chain))(W, X), jax.jit(jax.grad(lean(chain)))(W, X)
    np.testing.assert_allclose(want, got, rtol=0, atol=1e-6)


def test_errors_and_warnings():
    with pytest.raises(TypeError, match=r"lean: f must be a function, got 3; pass the loss"):
        lean(3)
    with pytest.raises(ValueError, match=r"lean: platform must be None or one of cpu, gpu, cuda, rocm, tpu, got 'metal'"):
        lean(chain, platform="metal")

    def step(w, x):
        return w - 0.1 * jax.grad(chain)(w, x), chain(w, x)

    for gradient in (jax.grad(chain), jax.jit(jax.value_and_grad(chain)), step):
        with pytest.warns(UserWarning, match=r"lean: f returns a gradient, .* use jax.grad\(lean\(loss\)\)"):
            planned(gradient)(W, X)

    def penalised(w, x):
        return jnp.mean(jax.grad(chain, 1)(w, x) ** 2)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(penalised, W, X)


def test_compare():
    shapes = jax.ShapeDtypeStruct((4, 64, 64), jnp.float32), jax.ShapeDtypeStruct((256, 64), jnp.float32)
    rows = compare(chain, *shapes)
    assert [row.name for row in rows] == ["f as it is", "lean", "jax.checkpoint, dots_saveable", "jax.checkpoint"]
    plain, leaner = rows[:2]
    assert plain.flops == pytest.approx(leaner.flops, rel=0.05)
    if jax.__version_info__ >= (0, 11, 1):
        assert leaner.temp_bytes < 0.7 * plain.temp_bytes
        assert "jax.grad(lean(f)) takes 0." in str(rows)
    assert max(map(len, str(rows).splitlines())) <= 80
    both = compare(lambda w, x: (chain(w, x), x), *shapes, argnums=(0, 1), has_aux=True)
    assert both[0].temp_bytes > 0


def test_advice():
    def advice(plain, leaner, saveable, again):
        sizes = (plain, leaner, saveable, again)
        return Comparison(Row(str(i), size, 100.0 if i < 3 else 130.0) for i, size in enumerate(sizes)).advice

    assert advice(100, 40, 90, 100) == "jax.grad(lean(f)) takes 0.40 of the memory, with 1.00 of the operations."
    assert advice(100, 80, 90, 50) == "jax.grad of f under 3 takes 0.50 of the memory, with 1.30 of the operations."
    assert advice(100, 100, 120, 99) == "Leave f as it is: none of these ways takes less memory."
    assert advice(None, None, None, None) == "The compiler does not tell how much memory a gradient takes."


def test_compare_refuses():
    with pytest.raises(TypeError, match=r"compare: f must be a function"):
        compare(3)
    with pytest.raises(TypeError, match=r"compare: f must return a float number, got .*shape=\(8, 6\)"):
        compare(lambda x: x, X)
    with pytest.raises(TypeError, match=r"compare: f must return a float number.*pass has_aux=True"):
        compare(lambda x: (x.sum(), x), X)
