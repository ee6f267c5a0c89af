import contextlib
import functools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

import jaxrelu
from jaxrelu.diagnostics import unit_stats
from jaxrelu.initializers import kaiming_uniform
from jaxrelu.recycling import Edge, recycle

KEY = jax.random.key(7)
INIT = kaiming_uniform()  # compiles sooner than normal weights
EDGES = [Edge("hidden", "layer_0", ["layer_1"])]


def cure(inner, edges, **options):
    """Returns recycle around an Optax transformation, which may promote as it likes."""
    return recycle(relaxed(inner), edges, **({"key": KEY, "init": INIT} | options))


def relaxed(inner):
    def update(*args, **kwargs):
        with standard():
            return inner.update(*args, **kwargs)

    return optax.GradientTransformationExtraArgs(inner.init, update)


@contextlib.contextmanager
def standard():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def normal(seed, *shape):
    """Returns a fixed array, drawn by NumPy, as each draw of JAX's would compile."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def dense(seed, inputs, units, dead=()):
    """Returns a dense layer whose given units never fire."""
    bias = np.array(normal(seed + 50, units)) / 10
    bias[list(dead)] = -90
    return {"kernel": normal(seed, inputs, units), "bias": jnp.asarray(bias)}


def apply(layer, x):
    return x @ layer["kernel"] + layer["bias"][None]


def mlp(params, x):
    """Returns the outputs and the statistics of the hidden units."""
    z = apply(params["layer_0"], x)
    return apply(params["layer_1"], jaxrelu.relu(z)), {"hidden": unit_stats(z)}


def convolve(layer, x):
    y = jax.lax.conv_general_dilated(x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y + layer["bias"][None, None, None]


def conv_layer(seed, inputs, units, dead=()):
    return dense(seed, inputs, units, dead) | {"kernel": normal(seed, 3, 3, inputs, units)}


def conv_conv(params, x):
    z = convolve(params["layer_0"], x)
    return convolve(params["layer_1"], jaxrelu.relu(z)), {"hidden": unit_stats(z)}


def conv_flatten_dense(params, x):
    z = convolve(params["layer_0"], x)
    return apply(params["layer_1"], jaxrelu.relu(z).reshape(len(x), -1)), {"hidden": unit_stats(z)}


def batch_norm(params, x):
    z = apply(params["layer_0"], x)
    z = (z - z.mean(0, keepdims=True)) / jnp.sqrt(z.var(0, keepdims=True) + 1e-5)
    z = z * params["BatchNorm_0"]["scale"][None] + params["BatchNorm_0"]["bias"][None]
    return apply(params["layer_1"], jaxrelu.relu(z)), {"hidden": unit_stats(z)}


DEAD = (1, 4)
SMALL = {"layer_0": dense(0, 5, 6, DEAD), "layer_1": dense(1, 6, 3)}
NETWORKS = {
    "dense": (mlp, SMALL, (11, 5), ()),
    "conv -> conv": (conv_conv, {"layer_0": conv_layer(0, 2, 6, DEAD), "layer_1": conv_layer(1, 6, 3)}, (7, 4, 5, 2), ()),
    "conv -> flatten -> dense": (
        conv_flatten_dense,
        {"layer_0": conv_layer(0, 2, 6, DEAD), "layer_1": dense(1, 4 * 5 * 6, 3)},
        (7, 4, 5, 2),
        (),
    ),
    "BatchNorm": (
        batch_norm,
        {
            "layer_0": dense(0, 5, 6),
            "BatchNorm_0": {"scale": 1 + 0.1 * normal(3, 6), "bias": jnp.zeros(6).at[jnp.array(DEAD)].set(-90.0)},
            "layer_1": dense(1, 6, 3),
        },
        (11, 5),
        ["BatchNorm_0"],
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_threshold_0_leaves_the_function_as_it_is(name):
    network, params, shape, between = NETWORKS[name]
    x = normal(9, *shape)
    inner = relaxed(optax.adam(1e-2))
    tx = cure(inner, [Edge("hidden", "layer_0", ["layer_1"], between)], every=1)

    def loss(params):
        out, stats = network(params, x)
        return (out**2).mean(), stats

    grads, stats = jax.grad(loss, has_aux=True)(params)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params, stats=stats)
    plain, _ = jax.jit(inner.update)(grads, inner.init(params), params)
    cured, untreated = optax.apply_updates(params, updates), optax.apply_updates(params, plain)

    np.testing.assert_array_equal(network(cured, x)[0], network(untreated, x)[0])
    assert state.recycled.tolist() == [len(DEAD)]
    alive = [unit for unit in range(6) if unit not in DEAD]
    kernel = np.asarray(cured["layer_0"]["kernel"])
    np.testing.assert_array_equal(kernel[..., alive], untreated["layer_0"]["kernel"][..., alive])
    assert (kernel[..., DEAD] != untreated["layer_0"]["kernel"][..., DEAD]).all()
    assert 0.2 < kernel[..., DEAD].std() / math.sqrt(2 / math.prod(kernel.shape[:-1])) < 2
    # channels are the innermost axis of flattened positions
    outgoing, before = (p["layer_1"]["kernel"].reshape(-1, 6, 3) for p in (cured, untreated))
    assert (outgoing[:, jnp.array(DEAD)] == 0).all()
    np.testing.assert_array_equal(outgoing[:, jnp.array(alive)], before[:, jnp.array(alive)])
    bias = np.asarray(cured["layer_0"]["bias"])
    assert (bias[list(DEAD)] == 0).all()
    assert (bias[alive] == untreated["layer_0"]["bias"][jnp.array(alive)]).all()
    np.testing.assert_array_equal(cured["layer_1"]["bias"], untreated["layer_1"]["bias"])
    if between:
        assert (cured["BatchNorm_0"]["scale"][jnp.array(DEAD)] == 1).all()
        assert (cured["BatchNorm_0"]["bias"][jnp.array(DEAD)] == 0).all()
        assert (cured["BatchNorm_0"]["scale"] == 1).sum() == len(DEAD)
    assert not network(cured, x)[1]["hidden"].dead.any()


@pytest.mark.parametrize(
    "path", ["LayerNorm_0", "norm/RMSNorm_0", "GroupNorm_1", "InstanceNorm_0", "layer_norm", "block/rms_norm", "groupNorm"]
)
def test_normalisations_that_mix_units_are_refused(path):
    with pytest.raises(ValueError, match=rf"recycle: between must name BatchNorms, got '{path}': it mixes units"):
        cure(optax.sgd(0.1), [Edge("hidden", "layer_0", ["layer_1"], [path])])


def test_outgoing_weights_and_biases_are_exactly_0_in_other_dtypes():
    for dtype in (jnp.float16, jnp.bfloat16):
        params = jax.tree.map(lambda p, dtype=dtype: p.astype(dtype), SMALL)
        # updates narrower and wider than the parameters
        for tree, updates in ((params, jax.tree.map(jnp.ones_like, SMALL)), (SMALL, jax.tree.map(jnp.ones_like, params))):
            tx = cure(optax.sgd(0.01), EDGES, every=1)
            stats = {"hidden": unit_stats(apply(SMALL["layer_0"], normal(9, 11, 5)))}
            updates, _ = jax.jit(tx.update)(updates, tx.init(tree), tree, stats=stats)
            with standard():
                new = optax.apply_updates(tree, updates)
            assert {p.dtype for p in jax.tree.leaves(new)} == {p.dtype for p in jax.tree.leaves(tree)}
            assert (new["layer_0"]["bias"] == 0).tolist() == [unit in DEAD for unit in range(6)]
            assert (new["layer_1"]["kernel"] == 0).all(-1).tolist() == [unit in DEAD for unit in range(6)]


def train(network, params, tx, steps, x, y):
    """Returns the parameters, the state and the losses after some steps in a scan."""

    def step(carry, _):
        params, state = carry

        def loss(params):
            out, stats = network(params, x)
            return ((out - y) ** 2).mean(), stats

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params, stats=stats)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))
    (params, state), losses = run((params, tx.init(params)))
    return params, state, losses


def deep(count, params, x):
    """Returns the outputs and the statistics of a network of layers called layer_0, layer_1 and so on."""
    stats = {}
    for i in range(count - 1):
        z = apply(params[f"layer_{i}"], x)
        stats[f"units_{i}"] = unit_stats(z)
        x = jaxrelu.relu(z)
    return apply(params[f"layer_{count - 1}"], x), stats


def chain_edges(count):
    return [Edge(f"units_{i}", f"layer_{i}", [f"layer_{i + 1}"]) for i in range(count - 1)]


def test_a_network_of_dead_layers_heals():
    x = normal(9, 64, 5)
    y = jnp.sin(x[:, :1] + x[:, 1:2])
    params = {f"layer_{i}": dense(i, *shape, dead=range(shape[1])) for i, shape in enumerate([(5, 16), (16, 17)])}
    params["layer_2"] = dense(2, 17, 1)
    network = functools.partial(deep, 3)
    tx = cure(optax.adam(1e-2), chain_edges(3), every=20)
    cured, state, losses = train(network, params, tx, 400, x, y)
    assert (state.recycled > 8).all()
    assert all(stats.dead.mean() < 0.3 for stats in network(cured, x)[1].values())
    assert losses[-1] < 0.05 < 0.2 < losses[19]


def test_twelve_layers_under_scan():
    # sorted as text, layer_10 and layer_11 come before layer_2
    widths = [5, 8, 9, 10, 11, 12, 13, 12, 11, 10, 9, 8, 2]
    dead = {2: [0, 3, 5], 10: [1]}
    params = {f"layer_{i}": dense(i, widths[i], widths[i + 1], dead.get(i, ())) for i in range(12)}
    # positive weights: the others fire
    params = jax.tree.map(lambda p: jnp.abs(p) / 9 if p.ndim == 2 else jnp.where(p < -50, p, 1.0), params)
    tx = cure(optax.sgd(1e-6), chain_edges(12), every=3)
    cured, state, _ = train(functools.partial(deep, 12), params, tx, 5, normal(9, 7, 5), jnp.zeros((7, 2)))
    assert state.recycled.tolist() == [len(dead.get(i, ())) for i in range(11)]
    assert (int(state.recyclings), int(state.step)) == (1, 2)
    for i in range(11):
        assert (cured[f"layer_{i}"]["bias"] > -50).all()
        zeros = (jnp.abs(cured[f"layer_{i + 1}"]["kernel"]) < 1e-4).all(1)
        assert np.flatnonzero(zeros).tolist() == dead.get(i, [])


SCHEDULE = optax.cosine_decay_schedule(1e-2, 100)
OPTIMIZERS = {
    "sgd": lambda: optax.sgd(1e-2),
    "momentum": lambda: optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(SCHEDULE, weight_decay=0.1),
    "amsgrad": lambda: optax.amsgrad(1e-2),
    "chain with clipping": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2), optax.ema(0.9)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=SCHEDULE),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-2), 2),
    "masked": lambda: optax.masked(optax.adam(1e-2), {"layer_0": {"kernel": True, "bias": False}, "layer_1": True}),
    "partition": lambda: optax.partition(
        {"a": optax.adam(1e-2), "b": optax.set_to_zero()}, {"layer_0": "a", "layer_1": {"kernel": "a", "bias": "b"}}
    ),
    "rmsprop": lambda: optax.rmsprop(1e-2, centered=True, momentum=0.9),
    "lion": lambda: optax.lion(1e-2),
    "adagrad": lambda: optax.adagrad(1e-2),
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(1e-2, momentum=0.9)),
    "muon": lambda: optax.contrib.muon(1e-2),
}
# the entries of each parameter that recycling sets
RECYCLED = {
    "layer_0": {"kernel": np.isin(np.arange(6), DEAD)[None].repeat(5, 0), "bias": np.isin(np.arange(6), DEAD)},
    "layer_1": {"kernel": np.isin(np.arange(6), DEAD)[:, None].repeat(3, 1), "bias": np.zeros(3, bool)},
}


def moments(state):
    """Returns the arrays of a state that have the shape of a parameter, with the mask of its recycled entries."""
    found = []
    for path, leaf in jax.tree.leaves_with_path(state):
        masks = [
            mask
            for suffix, mask in jax.tree.leaves_with_path(RECYCLED)
            if path[-len(suffix) :] == suffix and leaf.shape == mask.shape
        ]
        found += [(leaf, mask) for mask in masks]
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name):
    with standard():
        inner = OPTIMIZERS[name]()
        tx = cure(inner, EDGES, every=3)
        stats = {"hidden": unit_stats(apply(SMALL["layer_0"], normal(9, 11, 5)))}
        params = plain = SMALL
        state, plain_state = tx.init(params), inner.init(params)
        update, plain_update = jax.jit(tx.update), jax.jit(inner.update)
        for step in range(3):
            grads = jax.tree.map(lambda p, step=step: p * 0.1 + step + 1, SMALL)
            updates, state = update(grads, state, params, stats=stats)
            plain_updates, plain_state = plain_update(grads, plain_state, plain)
            params, plain = optax.apply_updates(params, updates), optax.apply_updates(plain, plain_updates)
            if step < 2:
                assert jax.tree.all(jax.tree.map(jnp.array_equal, params, plain))
        changed = jax.tree.map(lambda a, b: np.asarray(a != b), params, plain)
        assert jax.tree.all(jax.tree.map(np.array_equal, changed, RECYCLED))
        assert jax.tree.structure(state.inner_state) == jax.tree.structure(plain_state)
        cured, untreated = moments(state.inner_state), moments(plain_state)
        assert len(cured) == len(untreated)
        assert (name == "sgd") == (not cured)
        for (new, mask), (old, _) in zip(cured, untreated, strict=True):
            assert not np.asarray(new)[mask].any()
            np.testing.assert_array_equal(np.asarray(new)[~mask], np.asarray(old)[~mask])


@pytest.mark.parametrize(
    ("inner", "field"),
    [
        (optax.adafactor(1e-2), "v_row"),
        (optax.lbfgs(), "params"),
        (optax.sm3(1e-2), "[0].mu['layer_0']['bias'][0]"),
        (optax.flatten(optax.adam(1e-2)), "[0].mu"),
        (optax.contrib.ademamix(1e-2), "m1"),
    ],
    ids=["adafactor", "lbfgs", "sm3", "flatten", "ademamix"],
)
def test_states_that_cannot_be_reset_are_refused(inner, field):
    with pytest.raises(TypeError, match=f"recycle: inner must keep moments.* got the field {re.escape(repr(field))}"):
        cure(inner, EDGES).init(SMALL)


def test_a_copy_of_the_parameters_follows():
    with standard():
        tx = cure(optax.contrib.schedule_free_adamw(1e-2), EDGES, every=2)
        stats = {"hidden": unit_stats(apply(SMALL["layer_0"], normal(9, 11, 5)))}
        params, state = SMALL, tx.init(SMALL)
        for _ in range(2):
            updates, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, SMALL), state, params, stats=stats)
            params = optax.apply_updates(params, updates)
        averages = optax.contrib.schedule_free_eval_params(state.inner_state, params)
        for tree in (state.inner_state.z, averages):
            for new, value, mask in zip(*map(jax.tree.leaves, (tree, params, RECYCLED)), strict=True):
                np.testing.assert_allclose(np.asarray(new)[mask], np.asarray(value)[mask], rtol=1e-5)
        assert (state.inner_state.z["layer_0"]["kernel"] != params["layer_0"]["kernel"]).any()  # elsewhere they differ


def test_mean_second_moments():
    stats = {"hidden": unit_stats(apply(SMALL["layer_0"], normal(9, 11, 5)))}
    grads = jax.tree.map(lambda p: p + 1, SMALL)
    tx = cure(optax.adam(1e-2), EDGES, every=1, moments="mean")
    _, state = jax.jit(tx.update)(grads, tx.init(SMALL), SMALL, stats=stats)
    for mu, nu, gradient, mask in zip(
        *map(jax.tree.leaves, (state.inner_state[0].mu, state.inner_state[0].nu, grads, RECYCLED)), strict=True
    ):
        assert not np.asarray(mu)[mask].any()
        square = 0.001 * np.asarray(gradient, np.float64) ** 2
        np.testing.assert_allclose(np.asarray(nu), np.where(mask, square[~mask].mean(), square), rtol=1e-5)
    # nothing is left to take the mean of
    stats = {"hidden": unit_stats(jnp.full((2, 6), -1.0))}
    _, state = jax.jit(tx.update)(grads, tx.init(SMALL), SMALL, stats=stats)
    assert not state.inner_state[0].nu["layer_0"]["kernel"].any()


def test_step_size_after_a_reset():
    # Adam's count is in the thousands, its moments are 0
    with standard():
        adam = optax.scale_by_adam(eps=0.0)
        state = adam.init(jnp.zeros(()))._replace(count=jnp.int32(100_000))
        steps = []
        for _ in range(40):
            update, state = adam.update(jnp.ones(()), state)
            steps.append(float(update))
        assert max(steps) == pytest.approx(6.57, abs=0.005)
        assert steps.index(max(steps)) == 11  # the twelfth
        # the worst gradients, by Cauchy and Schwarz, grow as (b2 / b1)^t
        state = adam.init(jnp.zeros(()))._replace(count=jnp.int32(100_000))
        for t in range(200):
            update, state = adam.update(jnp.float32((0.999 / 0.9) ** (t - 200)), state)
        assert float(update) == pytest.approx(7.27, abs=0.005)


def test_nan_dormancy_is_never_recycled():
    z = jnp.full((4, 6), 1.0).at[:, 1].set(-1.0).at[2, 4].set(jnp.nan).at[1, 5].set(jnp.inf)
    for threshold in (0.0, 1e9):
        tx = cure(optax.sgd(0.0), EDGES, every=1, threshold=threshold)
        updates, state = jax.jit(tx.update)(SMALL, tx.init(SMALL), SMALL, stats={"hidden": unit_stats(z)})
        recycled = (updates["layer_1"]["kernel"] != 0).all(-1)
        assert recycled.tolist() == [unit == 1 if threshold == 0 else unit < 4 for unit in range(6)]
        assert state.recycled.tolist() == [recycled.sum()]


def test_nothing_is_recycled_without_statistics():
    tx = cure(optax.sgd(0.0), EDGES, every=2, threshold=1e9)
    update, state = jax.jit(tx.update), tx.init(SMALL)
    for _ in range(5):
        updates, state = update(SMALL, state, SMALL)
        assert not any(update.any() for update in jax.tree.leaves(updates))
    assert (state.recycled.tolist(), int(state.recyclings)) == ([0], 2)


def test_statistics_are_merged_since_the_last_recycling():
    tx = cure(optax.sgd(0.0), EDGES, every=3)
    fires = jnp.eye(6) * 2 - 1  # example i fires unit i alone
    update, state = jax.jit(tx.update), tx.init(SMALL)
    recycled = []
    for units in ([0, 1], [2, 5], None, [4], None, [1, 3, 5]):
        stats = None if units is None else {"hidden": unit_stats(fires[jnp.array(units)])}
        updates, state = update(SMALL, state, SMALL, stats=stats)
        recycled.append(np.flatnonzero((updates["layer_1"]["kernel"] != 0).all(-1)).tolist())
    assert recycled == [[], [], [3, 4], [], [], [0, 2]]
    assert (state.recycled.tolist(), int(state.recyclings)) == ([4], 2)


def test_each_edge_and_each_recycling_draws_its_own():
    params = {f"layer_{i}": dense(i, 6, 6, range(6)) for i in range(3)}
    stats = {f"units_{i}": unit_stats(jnp.full((2, 6), -1.0)) for i in range(2)}
    draws = []
    for key in (KEY, jax.random.PRNGKey(3)):
        tx = cure(optax.sgd(0.0), chain_edges(3), every=1, key=key)
        state = tx.init(params)
        for _ in range(2):
            before = state
            updates, state = jax.jit(tx.update)(params, before, params, stats=stats)
            eager, _ = tx.update(params, before, params, stats=stats)
            for i in range(2):
                np.testing.assert_array_equal(eager[f"layer_{i}"]["kernel"], updates[f"layer_{i}"]["kernel"])
                draws.append(updates[f"layer_{i}"]["kernel"] + params[f"layer_{i}"]["kernel"])
    values = np.round(np.ravel(draws), 4)
    assert len(np.unique(values)) > 0.95 * values.size  # equal draws would halve them


def test_several_consumers_a_slope_and_no_bias():
    params = {
        "layer_0": {"kernel": normal(0, 5, 6)},
        "prelu": {"negative_slope": jnp.full(6, 0.25)},
        "left": dense(1, 6, 3),
        "right": dense(2, 6, 4),
    }
    tx = cure(optax.sgd(0.0), [Edge("hidden", "layer_0", ["left", "right"])], every=1)
    z = jnp.ones((4, 6)).at[:, 2].set(-1.0)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params, stats={"hidden": unit_stats(z)})
    new = optax.apply_updates(params, updates)
    for name in ("left", "right"):
        assert (new[name]["kernel"] == 0).all(-1).tolist() == [unit == 2 for unit in range(6)]
        np.testing.assert_array_equal(new[name]["bias"], params[name]["bias"])
    assert (new["layer_0"]["kernel"] != params["layer_0"]["kernel"]).all(0).tolist() == [unit == 2 for unit in range(6)]
    np.testing.assert_array_equal(new["prelu"]["negative_slope"], params["prelu"]["negative_slope"])


class Pair(NamedTuple):
    w: jax.Array
    b: jax.Array


@pytest.mark.parametrize(
    ("params", "producer", "consumer"),
    [
        ({"params": SMALL}, "layer_0", "layer_1"),
        ([normal(0, 5, 6), normal(1, 6, 3)], "0", "1"),
        ([(normal(0, 5, 6), normal(2, 6)), (normal(1, 6, 3), normal(3, 3))], "0", "1"),
        ({"layers": (Pair(normal(0, 5, 6), normal(2, 6)), Pair(normal(1, 6, 3), normal(3, 3)))}, "layers/0", "layers/1"),
        ({"mlp/~/linear_0": {"w": normal(0, 5, 6)}, "mlp": {"w": normal(1, 6, 3)}}, "mlp/~/linear_0", "mlp"),
        (nnx.State({"a": {"kernel": nnx.Param(normal(0, 5, 6))}, "b": {"kernel": nnx.Param(normal(1, 6, 3))}}), "a", "b"),
        ({"a": {"kernel": linen.Partitioned(normal(0, 5, 6), ("x", "y"))}, "b": {"kernel": normal(1, 6, 3)}}, "a", "b"),
    ],
    ids=["linen", "weights", "pairs", "named pairs", "haiku", "nnx", "boxed"],
)
def test_paths(params, producer, consumer):
    tx = cure(optax.adam(1e-2), [Edge("hidden", producer, [consumer])], every=1)
    z = jnp.ones((4, 6)).at[:, 2].set(-1.0)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params, stats={"hidden": unit_stats(z)})
    new = optax.apply_updates(params, updates)
    assert state.recycled.tolist() == [1]
    outgoing = next(leaf for leaf in jax.tree.leaves(new) if leaf.shape == (6, 3))
    assert (outgoing == 0).all(-1).tolist() == [unit == 2 for unit in range(6)]


class Linen(linen.Module):
    """Two hidden layers, some of whose units are dead at first."""

    @linen.compact
    def __call__(self, x):
        stats = {}
        for i, units in enumerate((16, 17)):
            bias = jax.nn.initializers.constant(-9.0) if i == 0 else jax.nn.initializers.zeros
            z = linen.Dense(units, bias_init=bias, name=f"layer_{i}")(x)
            stats[f"units_{i}"] = unit_stats(z)
            x = jaxrelu.relu(z)
        return linen.Dense(1, name="layer_2")(x), stats


class Nnx(nnx.Module):
    """As Linen."""

    def __init__(self, rngs):
        bias = nnx.initializers.constant(-9.0)
        self.layers = nnx.List([nnx.Linear(5, 16, bias_init=bias, rngs=rngs), nnx.Linear(16, 17, rngs=rngs)])
        self.output = nnx.Linear(17, 1, rngs=rngs)

    def __call__(self, x):
        stats = {}
        for i, layer in enumerate(self.layers):
            z = layer(x)
            stats[f"units_{i}"] = unit_stats(z)
            x = jaxrelu.relu(z)
        return self.output(x), stats


def regression():
    x = normal(9, 64, 5)
    return x, jnp.sin(x[:, :1] + x[:, 1:2])


def test_linen_train_state_trains():
    x, y = regression()
    model = Linen()
    tx = cure(optax.adam(1e-2), chain_edges(3), every=25)
    state = TrainState.create(apply_fn=model.apply, params=model.init(jax.random.key(0), x)["params"], tx=tx)

    @jax.jit
    def step(state):
        def loss(params):
            out, stats = state.apply_fn({"params": params}, x)
            return ((out - y) ** 2).mean(), stats

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        # apply_gradients passes no extra arguments
        updates, opt_state = state.tx.update(grads, state.opt_state, state.params, stats=stats)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), value

    losses = []
    for _ in range(300):
        state, value = step(state)
        losses.append(float(value))
    assert losses[-1] < 0.05 < 0.2 < losses[24]
    assert state.opt_state.recycled[0] >= 16


def test_nnx_optimizer_trains():
    x, y = regression()
    model = Nnx(nnx.Rngs(0))
    edges = [Edge("units_0", "layers/0", ["layers/1"]), Edge("units_1", "layers/1", ["output"])]
    optimizer = nnx.Optimizer(model, cure(optax.adam(1e-2), edges, every=25), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            out, stats = model(x)
            return ((out - y) ** 2).mean(), stats

        (value, stats), grads = nnx.value_and_grad(loss, has_aux=True)(model)
        optimizer.update(model, grads, stats=stats)
        return value

    losses = [float(step(model, optimizer)) for _ in range(300)]
    assert losses[-1] < 0.05 < 0.2 < losses[24]
    assert optimizer.opt_state.recycled[0] >= 16


def test_the_work_is_conditional():
    tx = cure(optax.adam(1e-2), EDGES, every=5)
    stats = {"hidden": unit_stats(jnp.ones((2, 6)))}
    jaxpr = jax.make_jaxpr(functools.partial(tx.update, stats=stats))(SMALL, tx.init(SMALL), SMALL)
    drawing = [equation.primitive.name for equation in jaxpr.eqns if "random" in str(equation)]
    assert drawing == ["cond"]


def test_it_chains():
    tx = optax.chain(optax.clip_by_global_norm(1.0), cure(optax.adam(1e-2), EDGES, every=1))
    stats = {"hidden": unit_stats(apply(SMALL["layer_0"], normal(9, 11, 5)))}
    updates, state = jax.jit(tx.update)(SMALL, tx.init(SMALL), SMALL, stats=stats)
    assert state[1].recycled.tolist() == [2]
    assert (optax.apply_updates(SMALL, updates)["layer_1"]["kernel"][jnp.array(DEAD)] == 0).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"inner": 0.1}, TypeError, "inner must be an Optax transformation"),
        ({"edges": EDGES[0]}, TypeError, "edges must be a list of one recycling.Edge or more"),
        ({"edges": []}, TypeError, "edges must be a list of one"),
        ({"edges": [("hidden", "layer_0", ["layer_1"])]}, TypeError, "edges must be a list of one"),
        ({"every": 1.5}, TypeError, "every must be an int, got 1.5"),
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"threshold": jnp.zeros(2)}, TypeError, "threshold must be a Python number"),
        ({"threshold": -0.1}, ValueError, "threshold must be finite and at least 0, got -0.1"),
        ({"threshold": math.nan}, ValueError, "threshold must be finite and at least 0, got nan"),
        ({"init": 0.0}, TypeError, "init must be an initializer"),
        ({"moments": "keep"}, ValueError, 'moments must be "zero" or "mean", got \'keep\''),
        ({"edges": [Edge("hidden", "layer_0", "layer_1")]}, TypeError, r"consumers must be a list of paths, got 'layer_1'"),
        ({"edges": [Edge("hidden", "layer_0", [])]}, ValueError, "consumers must name the layers that read 'layer_0'"),
        ({"edges": EDGES * 2}, ValueError, "a layer must be the producer of one edge, got 'layer_0' twice"),
        (
            {"edges": [*EDGES, Edge("other", "layer_2", ["layer_1"])]},
            ValueError,
            "a layer must be the consumer of one edge, got 'layer_1' twice",
        ),
        (
            {"edges": [Edge("hidden", "layer_9", ["layer_1"])]},
            ValueError,
            "'hidden' must name layers .* found none at 'layer_9' among layer_0/bias, layer_0/kernel, layer_1/bias",
        ),
        ({"edges": [Edge("hidden", "layer_0", ["layer_1/bias"])]}, ValueError, "found none at 'layer_1/bias'"),
        (
            {"edges": [Edge("hidden", "layer_1", ["layer_0"])]},
            ValueError,
            r"'layer_0' must read the 3 units of 'layer_1', or .* got weights of shape \(5, 6\), which read 5",
        ),
        (
            {"edges": [Edge("hidden", "layer_0", ["layer_1"], ["norm"])]},
            ValueError,
            "between must name a BatchNorm",
        ),
        (
            {"edges": [Edge("hidden", "layer_0", ["layer_1"], ["layer_1"])]},
            ValueError,
            r"of the 6 units of 'layer_0' must have shape \(6,\), got \(3,\)",
        ),
    ],
)
def test_mistakes_are_named(change, error, message):
    arguments = {"inner": optax.sgd(0.1), "edges": EDGES, "key": KEY, "init": INIT} | change
    with pytest.raises(error, match=f"^recycle: .*{message}"):
        recycle(**arguments).init(SMALL)


def test_mistakes_in_updates_are_named():
    tx = cure(optax.sgd(0.1), EDGES)
    state = tx.init(SMALL)
    with pytest.raises(ValueError, match=r"^recycle: update must have params"):
        tx.update(SMALL, state)
    with pytest.raises(ValueError, match=r"^recycle: stats must have the key 'hidden' of an edge; got other"):
        tx.update(SMALL, state, SMALL, stats={"other": unit_stats(jnp.ones((2, 6)))})
    with pytest.raises(ValueError, match=r"stats\['hidden'\] must be of the 6 units of 'layer_0'; got shape \(5,\)"):
        tx.update(SMALL, state, SMALL, stats={"hidden": unit_stats(jnp.ones((2, 5)))})
    convolution = {"layer_0": conv_layer(0, 2, 3), "layer_1": conv_layer(1, 6, 3)}
    with pytest.raises(ValueError, match="'layer_1' must read the 3 units of 'layer_0', or a dense layer a multiple"):
        tx.init(convolution)


def test_float64_layers():
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: p.astype(jnp.float64), SMALL)
        tx = cure(optax.adam(1e-2), EDGES, every=1)
        stats = {"hidden": unit_stats(apply(params["layer_0"], normal(9, 11, 5).astype(jnp.float64)))}
        updates, state = jax.jit(tx.update)(params, tx.init(params), params, stats=stats)
        assert state.recycled.tolist() == [len(DEAD)]
        assert {update.dtype for update in jax.tree.leaves(updates)} == {jnp.dtype("float64")}
