import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxrelu
from dying import (
    DEAD,
    EDGES,
    FILL,
    KEY,
    RANDOM,
    SMALL,
    apply,
    chain_edges,
    cure,
    dense,
    mlp,
    normal,
    relaxed,
    small_stats,
    standard,
    stats_of,
)
from jaxrelu.diagnostics import unit_stats
from jaxrelu.recycling import Edge, recycle


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
    tx = cure(inner, [Edge("hidden", "layer_0", ["layer_1"], between)], every=1, init=RANDOM)

    def loss(params):
        out, stats = network(params, x)
        return (out**2).mean(), stats

    grads, stats = jax.jit(jax.grad(loss, has_aux=True))(params)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params, stats=stats)
    plain, _ = jax.jit(inner.update)(grads, inner.init(params), params)
    cured, untreated = optax.apply_updates(params, updates), optax.apply_updates(params, plain)
    run = jax.jit(network)
    np.testing.assert_array_equal(run(cured, x)[0], run(untreated, x)[0])
    assert state.recycled.tolist() == [len(DEAD)]
    alive = [unit for unit in range(6) if unit not in DEAD]
    cured, untreated = jax.device_get((cured, untreated))
    kernel = cured["layer_0"]["kernel"]
    np.testing.assert_array_equal(kernel[..., alive], untreated["layer_0"]["kernel"][..., alive])
    assert (kernel[..., DEAD] != untreated["layer_0"]["kernel"][..., DEAD]).all()
    assert 0.2 < kernel[..., DEAD].std() / math.sqrt(2 / math.prod(kernel.shape[:-1])) < 2
    # channels are the innermost axis of flattened positions
    outgoing, before = (p["layer_1"]["kernel"].reshape(-1, 6, 3) for p in (cured, untreated))
    assert (outgoing[:, list(DEAD)] == 0).all()
    np.testing.assert_array_equal(outgoing[:, alive], before[:, alive])
    bias = cured["layer_0"]["bias"]
    assert (bias[list(DEAD)] == 0).all()
    assert (bias[alive] == untreated["layer_0"]["bias"][alive]).all()
    np.testing.assert_array_equal(cured["layer_1"]["bias"], untreated["layer_1"]["bias"])
    if between:
        assert (cured["BatchNorm_0"]["scale"][list(DEAD)] == 1).all()
        assert (cured["BatchNorm_0"]["bias"][list(DEAD)] == 0).all()
        assert (cured["BatchNorm_0"]["scale"] == 1).sum() == len(DEAD)
    assert not run(cured, x)[1]["hidden"].dead.any()


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
            stats = small_stats()
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


def test_a_network_of_dead_layers_heals():
    x = normal(9, 64, 5)
    y = jnp.sin(x[:, :1] + x[:, 1:2])
    params = {f"layer_{i}": dense(i, *shape, dead=range(shape[1])) for i, shape in enumerate([(5, 16), (16, 17)])}
    params["layer_2"] = dense(2, 17, 1)
    network = functools.partial(deep, 3)
    tx = cure(optax.adam(1e-2), chain_edges(3), every=20, init=RANDOM)
    cured, state, losses = train(network, params, tx, 400, x, y)
    assert (state.recycled > 8).all()
    assert all(stats.dead.mean() < 0.3 for stats in jax.jit(network)(cured, x)[1].values())
    assert losses[-1] < 0.05 < 0.2 < losses[19]


def test_twelve_layers_under_scan():
    # sorted as text, layer_10 and layer_11 come before layer_2
    widths = [5, 8, 9, 10, 11, 12, 13, 12, 11, 10, 9, 8, 2]
    dead = {2: [0, 3, 5], 10: [1]}
    params = {f"layer_{i}": dense(i, widths[i], widths[i + 1], dead.get(i, ())) for i in range(12)}
    # positive weights: the others fire
    params = jax.tree.map(np.asarray, params)
    params = jax.tree.map(lambda p: np.abs(p) / 9 if p.ndim == 2 else np.where(p < -50, p, np.float32(1)), params)
    tx = cure(optax.sgd(1e-6), chain_edges(12), every=3, init=jax.nn.initializers.constant(0.01))
    cured, state, _ = train(functools.partial(deep, 12), params, tx, 5, normal(9, 7, 5), jnp.zeros((7, 2)))
    assert state.recycled.tolist() == [len(dead.get(i, ())) for i in range(11)]
    assert (int(state.recyclings), int(state.step)) == (1, 2)
    cured = jax.device_get(cured)
    for i in range(11):
        np.testing.assert_allclose(cured[f"layer_{i}"]["kernel"][:, dead.get(i, [])], 0.01, atol=1e-4)
        assert (cured[f"layer_{i}"]["bias"] > -50).all()
        zeros = (np.abs(cured[f"layer_{i + 1}"]["kernel"]) < 1e-4).all(1)
        assert np.flatnonzero(zeros).tolist() == dead.get(i, [])


def test_nan_dormancy_is_never_recycled():
    z = jnp.full((4, 6), 1.0).at[:, 1].set(-1.0).at[2, 4].set(jnp.nan).at[1, 5].set(jnp.inf)
    for threshold in (0.0, 1e9):
        tx = cure(optax.sgd(0.0), EDGES, every=1, threshold=threshold)
        updates, state = jax.jit(tx.update)(SMALL, tx.init(SMALL), SMALL, stats={"hidden": stats_of(z)})
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
        stats = None if units is None else {"hidden": stats_of(fires[jnp.array(units)])}
        updates, state = update(SMALL, state, SMALL, stats=stats)
        recycled.append(np.flatnonzero((updates["layer_1"]["kernel"] != 0).all(-1)).tolist())
    assert recycled == [[], [], [3, 4], [], [], [0, 2]]
    assert (state.recycled.tolist(), int(state.recyclings)) == ([4], 2)


def test_each_edge_and_each_recycling_draws_its_own():
    params = {f"layer_{i}": dense(i, 6, 6, range(6)) for i in range(3)}
    stats = {f"units_{i}": stats_of(jnp.full((2, 6), -1.0)) for i in range(2)}
    draws = []
    for key in (KEY, jax.random.PRNGKey(3)):
        tx = cure(optax.sgd(0.0), chain_edges(3), every=1, key=key, init=RANDOM)
        state = tx.init(params)
        for _ in range(2):
            before = state
            updates, state = jax.jit(tx.update)(params, before, params, stats=stats)
            for i in range(2):
                draws.append(updates[f"layer_{i}"]["kernel"] + params[f"layer_{i}"]["kernel"])
    eager, _ = tx.update(params, before, params, stats=stats)
    for i in range(2):
        np.testing.assert_array_equal(eager[f"layer_{i}"]["kernel"], updates[f"layer_{i}"]["kernel"])
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
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params, stats={"hidden": stats_of(z)})
    new = optax.apply_updates(params, updates)
    for name in ("left", "right"):
        assert (new[name]["kernel"] == 0).all(-1).tolist() == [unit == 2 for unit in range(6)]
        np.testing.assert_array_equal(new[name]["bias"], params[name]["bias"])
    assert (new["layer_0"]["kernel"] != params["layer_0"]["kernel"]).all(0).tolist() == [unit == 2 for unit in range(6)]
    np.testing.assert_array_equal(new["prelu"]["negative_slope"], params["prelu"]["negative_slope"])


def test_the_work_is_conditional():
    tx = cure(optax.adam(1e-2), EDGES, every=5)
    stats = {"hidden": stats_of(jnp.ones((2, 6)))}
    jaxpr = jax.make_jaxpr(functools.partial(tx.update, stats=stats))(SMALL, tx.init(SMALL), SMALL)
    drawing = [equation.primitive.name for equation in jaxpr.eqns if "random" in str(equation)]
    assert drawing == ["cond"]


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
        ({"edges": (edge for edge in EDGES)}, TypeError, "edges must be a list of one"),
        ({"edges": [Edge("hidden", "layer_0", iter(["layer_1"]))]}, TypeError, "consumers must be a list of paths"),
        ({"key": None}, TypeError, "key must be a key from jax.random, got None"),
        ({"key": 0}, TypeError, "key must be a key from jax.random, got 0"),
        ({"key": jnp.uint32(3)}, TypeError, "key must be a key from jax.random"),
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
    arguments = {"inner": optax.sgd(0.1), "edges": EDGES, "key": KEY, "init": FILL} | change
    with pytest.raises(error, match=f"^recycle: .*{message}"):
        recycle(**arguments).init(SMALL)


def test_mistakes_in_updates_are_named():
    tx = cure(optax.sgd(0.1), EDGES)
    state = tx.init(SMALL)
    with pytest.raises(ValueError, match=r"^recycle: update must have params"):
        tx.update(SMALL, state)
    with pytest.raises(ValueError, match=r"^recycle: stats must have the key 'hidden' of an edge; got other"):
        tx.update(SMALL, state, SMALL, stats={"other": stats_of(jnp.ones((2, 6)))})
    with pytest.raises(ValueError, match=r"stats\['hidden'\] must be of the 6 units of 'layer_0'; got shape \(5,\)"):
        tx.update(SMALL, state, SMALL, stats={"hidden": stats_of(jnp.ones((2, 5)))})
    convolution = {"layer_0": conv_layer(0, 2, 3), "layer_1": conv_layer(1, 6, 3)}
    with pytest.raises(ValueError, match="'layer_1' must read the 3 units of 'layer_0', or a dense layer a multiple"):
        tx.init(convolution)
