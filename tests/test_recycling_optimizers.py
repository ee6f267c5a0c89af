"""Which optimizers, parameter trees and frameworks recycling works with."""

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
from dying import DEAD, EDGES, RANDOM, SMALL, apply, chain_edges, cure, normal, small_stats, standard, stats_of, stats_with
from jaxrelu.diagnostics import unit_stats
from jaxrelu.recycling import Edge

pytestmark = pytest.mark.usefixtures("quick_compilation")
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
        state, plain_state = jax.jit(lambda params: (tx.init(params), inner.init(params)))(SMALL)
        # seen before, so that no step has to compile how statistics are merged
        state = state._replace(stats=(stats_with(DEAD),))

        @jax.jit
        def step(grads, state, plain_state, params):
            return tx.update(grads, state, params), inner.update(grads, plain_state, params)

        params = SMALL
        for number in range(3):
            grads = jax.tree.map(lambda p, number=number: p * np.float32(0.1) + number + 1, SMALL)
            (updates, state), (plain_updates, plain_state) = step(grads, state, plain_state, params)
            # outside jit, where XLA cannot round an update and its sum at once
            cured, plain = (jax.tree.map(np.add, params, jax.device_get(by)) for by in (updates, plain_updates))
            if number < 2:
                assert jax.tree.all(jax.tree.map(np.array_equal, cured, plain))
                params = cured
        changed = jax.tree.map(np.not_equal, cured, plain)
        assert jax.tree.all(jax.tree.map(np.array_equal, changed, RECYCLED))
        assert jax.tree.structure(state.inner_state) == jax.tree.structure(plain_state)
        reset, untreated = moments(state.inner_state), moments(plain_state)
        assert len(reset) == len(untreated)
        assert (name == "sgd") == (not reset)
        for (new, mask), (old, _) in zip(reset, untreated, strict=True):
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
        stats = small_stats()
        params, state, update = SMALL, jax.jit(tx.init)(SMALL), jax.jit(tx.update)
        for _ in range(2):
            updates, state = update(jax.tree.map(np.ones_like, SMALL), state, params, stats=stats)
            params = optax.apply_updates(params, updates)
        averages = optax.contrib.schedule_free_eval_params(state.inner_state, params)
        for tree in (state.inner_state.z, averages):
            for new, value, mask in zip(*map(jax.tree.leaves, (tree, params, RECYCLED)), strict=True):
                np.testing.assert_allclose(np.asarray(new)[mask], np.asarray(value)[mask], rtol=1e-5)
        assert np.not_equal(
            state.inner_state.z["layer_0"]["kernel"], params["layer_0"]["kernel"]
        ).any()  # elsewhere they differ


def test_mean_second_moments():
    stats = small_stats()
    grads = jax.tree.map(lambda p: p + 1, SMALL)
    tx = cure(optax.adam(1e-2), EDGES, every=1, moments="mean")
    update, start = jax.jit(tx.update), tx.init(SMALL)
    _, state = update(grads, start, SMALL, stats=stats)
    for mu, nu, gradient, mask in zip(
        *map(jax.tree.leaves, (state.inner_state[0].mu, state.inner_state[0].nu, grads, RECYCLED)), strict=True
    ):
        assert not np.asarray(mu)[mask].any()
        square = 0.001 * np.asarray(gradient, np.float64) ** 2
        np.testing.assert_allclose(np.asarray(nu), np.where(mask, square[~mask].mean(), square), rtol=1e-5)
    # nothing is left to take the mean of
    _, state = update(grads, start, SMALL, stats={"hidden": stats_with(range(6))})
    assert not np.asarray(state.inner_state[0].nu["layer_0"]["kernel"]).any()


def test_step_size_after_a_reset():
    # Adam's count is in the thousands, its moments are 0
    with standard():
        adam = optax.scale_by_adam(eps=0.0)

        @jax.jit
        def steps(gradients):
            def step(state, gradient):
                update, state = adam.update(gradient, state)
                return state, update

            return jax.lax.scan(step, adam.init(jnp.zeros(()))._replace(count=jnp.int32(100_000)), gradients)[1]

        constant = np.asarray(steps(np.ones(200, np.float32)))[:40]
        assert constant.max() == pytest.approx(6.57, abs=0.005)
        assert constant.argmax() == 11  # the twelfth
        # the worst gradients, by Cauchy and Schwarz, grow as (b2 / b1)^t
        worst = steps(np.float32((0.999 / 0.9) ** np.arange(-200.0, 0)))
        assert float(worst[-1]) == pytest.approx(7.27, abs=0.005)


class Pair(NamedTuple):
    w: jax.Array
    b: jax.Array


@pytest.mark.parametrize(
    ("params", "producer", "consumer"),
    [
        ({"params": SMALL}, "layer_0", "layer_1"),
        ([(normal(0, 5, 6), normal(2, 6)), (normal(1, 6, 3), normal(3, 3))], "0", "1"),
        ({"layers": (Pair(normal(0, 5, 6), normal(2, 6)), Pair(normal(1, 6, 3), normal(3, 3)))}, "layers/0", "layers/1"),
        ({"mlp/~/linear_0": {"w": normal(0, 5, 6)}, "mlp": {"w": normal(1, 6, 3)}}, "mlp/~/linear_0", "mlp"),
        (nnx.State({"a": {"kernel": nnx.Param(normal(0, 5, 6))}, "b": {"kernel": nnx.Param(normal(1, 6, 3))}}), "a", "b"),
        ({"a": {"kernel": linen.Partitioned(normal(0, 5, 6), ("x", "y"))}, "b": {"kernel": normal(1, 6, 3)}}, "a", "b"),
    ],
    ids=["linen", "pairs", "named pairs", "haiku", "nnx", "boxed"],
)
def test_paths(params, producer, consumer):
    tx = cure(optax.sgd(1e-2, momentum=0.9), [Edge("hidden", producer, [consumer])], every=1)

    @jax.jit
    def step(params, stats):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params, stats=stats)
        return optax.apply_updates(params, updates), state.recycled

    new, recycled = step(params, {"hidden": stats_with([2])})
    assert recycled.tolist() == [1]
    outgoing = next(leaf for leaf in jax.tree.leaves(new) if leaf.shape == (6, 3))
    assert (np.asarray(outgoing) == 0).all(-1).tolist() == [unit == 2 for unit in range(6)]


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
    return x, np.sin(x[:, :1] + x[:, 1:2])


def test_linen_train_state_trains():
    x, y = regression()
    model = Linen()
    tx = cure(optax.adam(1e-2), chain_edges(3), every=25, init=RANDOM)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

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
    optimizer = nnx.Optimizer(model, cure(optax.adam(1e-2), edges, every=25, init=RANDOM), wrt=nnx.Param)

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


def test_it_chains():
    tx = optax.chain(optax.clip_by_global_norm(1.0), cure(optax.adam(1e-2), EDGES, every=1))
    stats = small_stats()
    updates, state = jax.jit(tx.update)(SMALL, tx.init(SMALL), SMALL, stats=stats)
    assert state[1].recycled.tolist() == [2]
    assert not jax.tree.map(np.add, SMALL, jax.device_get(updates))["layer_1"]["kernel"][list(DEAD)].any()


def test_float64_layers():
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: p.astype(np.float64), SMALL)
        tx = cure(optax.adam(1e-2), EDGES, every=1)
        stats = {"hidden": stats_of(apply(params["layer_0"], normal(9, 11, 5).astype(np.float64)))}
        updates, state = jax.jit(tx.update)(params, tx.init(params), params, stats=stats)
        assert state.recycled.tolist() == [len(DEAD)]
        assert {update.dtype for update in jax.tree.leaves(updates)} == {jnp.dtype("float64")}
