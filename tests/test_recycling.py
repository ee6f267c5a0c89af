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
    stats_with,
)
from jaxrelu.diagnostics import unit_stats
from jaxrelu.recycling import Edge, recycle

# of tests that ask what is done, not how it is rounded
quick = pytest.mark.usefixtures("quick_compilation")


def convolve(layer, x):
    y = jax.lax.conv_general_dilated(x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y + layer["bias"][None, None, None]


def conv_layer(seed, inputs, units, dead=()):
    return dense(seed, inputs, units, dead) | {"kernel": normal(seed, 3, 3, inputs, units)}


def conv_conv(params, x):
    z = convolve(params["layer_0"], x)
    return convolve(params["layer_1"], jaxrelu.relu(z)), z


def conv_flatten_dense(params, x):
    z = convolve(params["layer_0"], x)
    return apply(params["layer_1"], jaxrelu.relu(z).reshape(len(x), -1)), z


def batch_norm(params, x):
    z = apply(params["layer_0"], x)
    z = (z - z.mean(0, keepdims=True)) / jnp.sqrt(z.var(0, keepdims=True) + 1e-5)
    z = z * params["BatchNorm_0"]["scale"][None] + params["BatchNorm_0"]["bias"][None]
    return apply(params["layer_1"], jaxrelu.relu(z)), z


NETWORKS = {
    "dense": (mlp, SMALL, (11, 5), {}),
    "conv -> conv": (conv_conv, {"layer_0": conv_layer(0, 2, 6, DEAD), "layer_1": conv_layer(1, 6, 3)}, (7, 4, 5, 2), {}),
    "conv -> flatten -> dense": (
        conv_flatten_dense,
        {"layer_0": conv_layer(0, 2, 6, DEAD), "layer_1": dense(1, 4 * 5 * 6, 3)},
        (7, 4, 5, 2),
        {"inputs": "flattened"},
    ),
    "BatchNorm": (
        batch_norm,
        {
            "layer_0": dense(0, 5, 6),
            "BatchNorm_0": {
                "scale": np.float32(1 + 0.1 * normal(3, 6)),
                "bias": np.float32([-90.0 if unit in DEAD else 0.0 for unit in range(6)]),
            },
            "layer_1": dense(1, 6, 3),
        },
        (11, 5),
        {"between": ["BatchNorm_0"]},
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_threshold_0_leaves_the_function_as_it_is(name):
    network, params, shape, options = NETWORKS[name]
    x = normal(9, *shape)
    inner = relaxed(optax.sgd(1e-2, momentum=0.9))
    tx = cure(inner, [Edge("hidden", "layer_0", ["layer_1"], **options)], every=1)
    run = jax.jit(network)
    z = jax.device_get(run(params, x)[1])
    assert np.flatnonzero(~(z > 0).any(tuple(range(z.ndim - 1)))).tolist() == list(DEAD)

    @jax.jit
    def step(params, x, stats):
        grads = jax.grad(lambda params: (network(params, x)[0] ** 2).mean())(params)
        updates, state = tx.update(grads, tx.init(params), params, stats=stats)
        plain, _ = inner.update(grads, inner.init(params), params)
        return updates, plain, state.recycled

    updates, plain, recycled = step(params, x, {"hidden": stats_with(DEAD)})
    # outside jit, where XLA cannot round an update and its sum at once
    cured, untreated = (jax.device_get(optax.apply_updates(params, updates)) for updates in (updates, plain))
    out, z = jax.device_get(run(cured, x))
    np.testing.assert_array_equal(out, run(untreated, x)[0])
    assert recycled.tolist() == [len(DEAD)]
    assert (z > 0).any(tuple(range(z.ndim - 1))).all()  # no unit is dead
    alive = [unit for unit in range(6) if unit not in DEAD]
    kernel = cured["layer_0"]["kernel"]
    np.testing.assert_array_equal(kernel[..., alive], untreated["layer_0"]["kernel"][..., alive])
    np.testing.assert_allclose(kernel[..., DEAD], 0.3, rtol=1e-5)  # what FILL draws
    # channels are the innermost axis of flattened positions
    outgoing, before = (p["layer_1"]["kernel"].reshape(-1, 6, 3) for p in (cured, untreated))
    assert (outgoing[:, list(DEAD)] == 0).all()
    np.testing.assert_array_equal(outgoing[:, alive], before[:, alive])
    bias = cured["layer_0"]["bias"]
    assert (bias[list(DEAD)] == 0).all()
    assert (bias[alive] == untreated["layer_0"]["bias"][alive]).all()
    np.testing.assert_array_equal(cured["layer_1"]["bias"], untreated["layer_1"]["bias"])
    if name == "BatchNorm":
        assert (cured["BatchNorm_0"]["scale"][list(DEAD)] == 1).all()
        assert (cured["BatchNorm_0"]["bias"][list(DEAD)] == 0).all()
        assert (cured["BatchNorm_0"]["scale"] == 1).sum() == len(DEAD)


@pytest.mark.parametrize(
    "path", ["LayerNorm_0", "norm/RMSNorm_0", "GroupNorm_1", "InstanceNorm_0", "layer_norm", "block/rms_norm", "groupNorm"]
)
def test_normalisations_that_mix_units_are_refused(path):
    with pytest.raises(ValueError, match=rf"recycle: between must name BatchNorms, got '{path}': it mixes units"):
        cure(optax.sgd(0.1), [Edge("hidden", "layer_0", ["layer_1"], [path])])


@quick
def test_outgoing_weights_and_biases_are_exactly_0_in_other_dtypes():
    # updates narrower and wider than the parameters
    dtypes = [
        (jnp.float16, jnp.float32),
        (jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.float16),
        (jnp.float32, jnp.bfloat16),
    ]

    @jax.jit
    def run(stats):
        new = []
        for dtype, update_dtype in dtypes:
            params = jax.tree.map(lambda p, dtype=dtype: jnp.asarray(p, dtype), SMALL)
            ones = jax.tree.map(lambda p, dtype=update_dtype: jnp.ones_like(p, dtype), SMALL)
            tx = cure(optax.sgd(0.01), EDGES, every=1)
            updates, _ = tx.update(ones, tx.init(params), params, stats=stats)
            with standard():
                new.append(optax.apply_updates(params, updates))
        return new

    for (dtype, _), new in zip(dtypes, jax.device_get(run(small_stats())), strict=True):
        assert {p.dtype for p in jax.tree.leaves(new)} == {jnp.dtype(dtype)}
        assert (new["layer_0"]["bias"] == 0).tolist() == [unit in DEAD for unit in range(6)]
        assert (new["layer_1"]["kernel"] == 0).all(-1).tolist() == [unit in DEAD for unit in range(6)]


def deep(count, params, x):
    """Returns the outputs and the statistics of a network of layers called layer_0, layer_1 and so on."""
    stats = {}
    for i in range(count - 1):
        z = apply(params[f"layer_{i}"], x)
        stats[f"units_{i}"] = unit_stats(z)
        x = jaxrelu.relu(z)
    return apply(params[f"layer_{count - 1}"], x), stats


@quick
def test_a_network_of_dead_layers_heals():
    x = normal(9, 64, 5)
    y = np.sin(x[:, :1] + x[:, 1:2])
    params = {f"layer_{i}": dense(i, *shape, dead=range(shape[1])) for i, shape in enumerate([(5, 16), (16, 17)])}
    params["layer_2"] = dense(2, 17, 1)
    tx = cure(optax.adam(1e-2), chain_edges(3), every=20, init=RANDOM)

    def step(carry, _):
        params, state = carry

        def loss(params):
            out, stats = deep(3, params, x)
            return ((out - y) ** 2).mean(), stats

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params, stats=stats)
        shares = [layer.dead.mean(dtype=jnp.float32) for layer in stats.values()]
        return (optax.apply_updates(params, updates), state), (value, shares)

    @jax.jit
    def train(params):
        (_, state), (losses, dead) = jax.lax.scan(step, (params, tx.init(params)), length=400)
        return state.recycled, losses, dead

    recycled, losses, dead = train(params)
    assert (recycled > 8).all()
    assert [float(share[0]) for share in dead] == [1.0, 1.0]
    assert all(share[-1] < 0.3 for share in dead)
    assert losses[-1] < 0.05 < 0.2 < losses[19]


@quick
def test_twelve_layers_under_scan():
    # sorted as text, layer_10 and layer_11 come before layer_2
    widths = [5, 8, 9, 8, 9, 8, 9, 8, 9, 8, 9, 8, 2]
    dead = {2: [0, 3, 5], 10: [1]}
    params = {f"layer_{i}": {"kernel": np.ones(widths[i : i + 2], np.float32)} for i in range(12)}
    tx = cure(optax.sgd(1.0), chain_edges(12), every=3, init=jax.nn.initializers.constant(0.01))
    stats = {f"units_{i}": stats_with(dead.get(i, ()), widths[i + 1]) for i in range(11)}

    @jax.jit
    def run(params, stats):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params, stats=stats)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), length=5)
        return params, (state.recycled, state.recyclings, state.step)

    cured, (recycled, recyclings, step) = jax.device_get(run(params, stats))
    assert recycled.tolist() == [len(dead.get(i, ())) for i in range(11)]
    assert (int(recyclings), int(step)) == (1, 2)
    for i in range(12):
        expected = np.ones(widths[i : i + 2], np.float32)
        expected[dead.get(i - 1, [])] = 0.0
        expected[:, dead.get(i, [])] = 0.01
        np.testing.assert_allclose(cured[f"layer_{i}"]["kernel"], expected, rtol=1e-5)  # a zero is exactly 0


@quick
def test_nan_dormancy_is_never_recycled():
    z = np.ones((4, 6), np.float32)
    z[:, 1], z[2, 4], z[1, 5] = -1.0, np.nan, np.inf
    thresholds = (0.0, 1e9)

    @jax.jit
    def run(stats):
        transformations = [cure(optax.sgd(0.0), EDGES, every=1, threshold=threshold) for threshold in thresholds]
        return [tx.update(SMALL, tx.init(SMALL), SMALL, stats=stats) for tx in transformations]

    for threshold, (updates, state) in zip(thresholds, run({"hidden": stats_of(z)}), strict=True):
        recycled = (np.asarray(updates["layer_1"]["kernel"]) != 0).all(-1)
        assert recycled.tolist() == [unit == 1 if threshold == 0 else unit < 4 for unit in range(6)]
        assert state.recycled.tolist() == [recycled.sum()]


@quick
def test_nothing_is_recycled_without_statistics():
    tx = cure(optax.sgd(0.0), EDGES, every=2, threshold=1e9)
    update, state = jax.jit(tx.update), tx.init(SMALL)
    for _ in range(5):
        updates, state = update(SMALL, state, SMALL)
        assert not any(np.asarray(update).any() for update in jax.tree.leaves(updates))
    assert (state.recycled.tolist(), int(state.recyclings)) == ([0], 2)


@quick
def test_statistics_are_merged_since_the_last_recycling():
    tx = cure(optax.sgd(0.0), EDGES, every=3)
    fires = np.eye(6, dtype=np.float32) * 2 - 1  # example i fires unit i alone
    update, state = jax.jit(tx.update), tx.init(SMALL)
    recycled = []
    for units in ([0, 1], [2, 5], None, [4], None, [1, 3, 5]):
        stats = None if units is None else {"hidden": stats_of(np.resize(fires[units], (6, 6)))}
        updates, state = update(SMALL, state, SMALL, stats=stats)
        recycled.append(np.flatnonzero((np.asarray(updates["layer_1"]["kernel"]) != 0).all(-1)).tolist())
    assert recycled == [[], [], [3, 4], [], [], [0, 2]]
    assert (state.recycled.tolist(), int(state.recyclings)) == ([4], 2)


@quick
def test_each_edge_and_each_recycling_draws_its_own():
    params = {f"layer_{i}": dense(i, 6, 6, range(6)) for i in range(3)}
    stats = {f"units_{i}": stats_with(range(6)) for i in range(2)}
    draws = []
    for key in (KEY, jax.random.PRNGKey(3)):
        tx = cure(optax.sgd(0.0), chain_edges(3), every=1, key=key, init=RANDOM)
        update, state = jax.jit(tx.update), tx.init(params)
        for _ in range(2):
            before = state
            updates, state = jax.device_get(update(params, before, params, stats=stats))
            for i in range(2):
                draws.append(updates[f"layer_{i}"]["kernel"] + params[f"layer_{i}"]["kernel"])
    eager, _ = tx.update(params, before, params, stats=stats)
    for i in range(2):
        np.testing.assert_array_equal(eager[f"layer_{i}"]["kernel"], updates[f"layer_{i}"]["kernel"])
    values = np.round(np.ravel(draws), 4)
    assert len(np.unique(values)) > 0.95 * values.size  # equal draws would halve them
    assert 0.8 < values.std() / math.sqrt(2 / 6) < 1.2  # 288 draws


@quick
def test_several_consumers_a_slope_and_no_bias():
    params = {
        "layer_0": {"kernel": normal(0, 5, 6)},
        "prelu": {"negative_slope": np.full(6, 0.25, np.float32)},
        "left": dense(1, 6, 3),
        "right": dense(2, 6, 4),
    }
    tx = cure(optax.sgd(0.0), [Edge("hidden", "layer_0", ["left", "right"])], every=1)

    @jax.jit
    def step(params, stats):
        return optax.apply_updates(params, tx.update(params, tx.init(params), params, stats=stats)[0])

    new = jax.device_get(step(params, {"hidden": stats_with([2])}))
    for name in ("left", "right"):
        assert (new[name]["kernel"] == 0).all(-1).tolist() == [unit == 2 for unit in range(6)]
        np.testing.assert_array_equal(new[name]["bias"], params[name]["bias"])
    assert (new["layer_0"]["kernel"] != params["layer_0"]["kernel"]).all(0).tolist() == [unit == 2 for unit in range(6)]
    np.testing.assert_array_equal(new["prelu"]["negative_slope"], params["prelu"]["negative_slope"])


def test_the_work_is_conditional():
    tx = cure(optax.adam(1e-2), EDGES, every=5)
    stats = {"hidden": stats_with([])}
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
            {"edges": [Edge("hidden", "layer_9", ["layer_1"])]},
            ValueError,
            "'hidden' must name layers .* found none at 'layer_9' among layer_0/bias, layer_0/kernel, layer_1/bias",
        ),
        ({"edges": [Edge("hidden", "layer_0", ["layer_1/bias"])]}, ValueError, "found none at 'layer_1/bias'"),
        (
            {"edges": [Edge("hidden", "layer_1", ["layer_0"])]},
            ValueError,
            r"'layer_0' must read the 3 units of 'layer_1', got weights of shape \(5, 6\), which read 5; if it reads",
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


@quick
def test_mistakes_in_updates_are_named():
    tx = cure(optax.sgd(0.1), EDGES)
    state = tx.init(SMALL)
    with pytest.raises(ValueError, match=r"^recycle: update must have params"):
        tx.update(SMALL, state)
    with pytest.raises(ValueError, match=r"^recycle: stats must have the key 'hidden' of an edge; got other"):
        tx.update(SMALL, state, SMALL, stats={"other": stats_with([])})
    with pytest.raises(ValueError, match=r"stats\['hidden'\] must be of the 6 units of 'layer_0'; got shape \(3,\)"):
        tx.update(SMALL, state, SMALL, stats={"hidden": stats_with([], 3)})
    convolution = {"layer_0": conv_layer(0, 2, 3), "layer_1": conv_layer(1, 6, 3)}
    with pytest.raises(
        ValueError, match=r"'layer_1' must read the 3 units of 'layer_0', got .* 6; if it reads them flattened"
    ):
        tx.init(convolution)
