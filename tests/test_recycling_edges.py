"""Edges: layouts, biases, concatenations, ties, shardings and running statistics that a path alone does not tell."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxrelu
from dying import FILL, KEY, SMALL, cure, dense, normal, standard, stats_with
from jaxrelu.initializers import kaiming_normal
from jaxrelu.recycling import Edge, fresh_batch_stats, recycle

DEAD = (1, 4)
X = normal(9, 11, 5)


def vector(seed, units, dead=()):
    bias = normal(seed, units) / 10
    bias[list(dead)] = -90
    return bias


@pytest.fixture(autouse=True)
def promotes(strict_promotion):
    with standard():
        yield


def flat(params, x):
    w0, b0, w1, b1 = params
    z = x @ w0 + b0
    return jaxrelu.relu(z) @ w1 + b1, z


def named(params, x):
    z = x @ params["W_enc"] + params["b_enc"]
    return jaxrelu.relu(z) @ params["W_dec"] + params["b_dec"], z


def square(params, x):  # as in Equinox, the units come first
    z = x @ params["a"]["weight"].T + params["a"]["bias"]
    return jaxrelu.relu(z) @ params["b"]["weight"].T, z


def concatenated(params, x):
    z = x @ params["a"]["w"] + params["a"]["b"]
    return jnp.concatenate([x, jaxrelu.relu(z), x[:, :2]], -1) @ params["c"]["w"], z


def conv(w, x):
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))


def channels_first(params, x):
    z = conv(params["a"]["weight"], x.reshape(len(x), 1, 5, 1)) + params["a"]["bias"]
    h = jaxrelu.relu(conv(params["b"]["weight"], jaxrelu.relu(z)))
    return h.reshape(len(x), -1) @ params["c"]["kernel"], jnp.moveaxis(z, 1, -1)


def flattened_first(params, x):
    z = conv(params["a"]["weight"], x.reshape(len(x), 1, 5, 1)) + params["a"]["bias"]
    return jaxrelu.relu(z).reshape(len(x), -1) @ params["c"]["kernel"], jnp.moveaxis(z, 1, -1)


def haiku_norm(params, x):
    z = x @ params["a"]["w"]
    z = (z - z.mean(0)) / jnp.sqrt(z.var(0) + 1e-5) * params["bn"]["scale"] + params["bn"]["offset"]
    return jaxrelu.relu(z) @ params["c"]["w"], z


CONV = {"weight": normal(0, 6, 1, 3, 3), "bias": vector(1, 6, DEAD).reshape(6, 1, 1)}
NETWORKS = {
    "a flat list": (
        flat,
        [normal(0, 5, 6), vector(1, 6, DEAD), normal(2, 6, 3), vector(3, 3)],
        Edge("hidden", "0", ["2"], bias="1"),
    ),
    "weights by name": (
        named,
        {"W_enc": normal(0, 5, 6), "b_enc": vector(1, 6, DEAD), "W_dec": normal(2, 6, 3), "b_dec": vector(3, 3)},
        Edge("hidden", "W_enc", ["W_dec"], bias="b_enc"),
    ),
    "square weights, units first": (
        square,
        {"a": {"weight": normal(0, 6, 5)[:, :5], "bias": vector(1, 6, DEAD)}, "b": {"weight": normal(2, 6, 6)}},
        Edge("hidden", "a", ["b"], inputs_axis=1),
    ),
    "a concatenation": (
        concatenated,
        {"a": {"w": normal(0, 5, 6), "b": vector(1, 6, DEAD)}, "c": {"w": normal(2, 13, 3)}},
        Edge("hidden", "a", ["c"], inputs=5),
    ),
    "convolutions, channels first": (
        channels_first,
        {"a": CONV, "b": {"weight": normal(2, 4, 6, 3, 3)}, "c": {"kernel": normal(3, 20, 2)}},
        Edge("hidden", "a", ["b"]),
    ),
    "flattened, channels first": (
        flattened_first,
        {"a": CONV, "c": {"kernel": normal(3, 30, 2)}},
        Edge("hidden", "a", ["c"], inputs="flattened channels first"),
    ),
    "Haiku's BatchNorm": (
        haiku_norm,
        {
            "a": {"w": normal(0, 5, 6)},
            "bn": {"scale": np.ones((1, 6), np.float32), "offset": vector(1, 6, DEAD)[None]},
            "c": {"w": normal(2, 6, 3)},
        },
        Edge("hidden", "a", ["c"], ["bn"]),
    ),
}


def after_recycling(params, edges, dead=DEAD, units=6):
    tx = cure(optax.set_to_zero(), edges, every=1, init=kaiming_normal())
    stats = {edge.stats: stats_with(dead, units) for edge in edges}
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params, stats=stats)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize("name", NETWORKS)
def test_the_function_stays_and_the_dead_revive(name):
    network, params, edge = NETWORKS[name]
    run = jax.jit(network)
    out, z = run(params, X)
    assert np.flatnonzero((z <= 0).all(tuple(range(z.ndim - 1)))).tolist() == list(DEAD)
    new, state = after_recycling(params, [edge])
    cured, z = run(new, X)
    np.testing.assert_array_equal(cured, out)
    assert not (z <= 0).all(tuple(range(z.ndim - 1))).any()
    assert state.recycled.tolist() == [2]
    assert np.flatnonzero(state.fresh[0]).tolist() == list(DEAD)


def test_equinox_by_layer():
    model = eqx.nn.MLP(5, 3, 6, 2, activation=jaxrelu.relu, key=jax.random.key(0))
    model = eqx.tree_at(lambda m: m.layers[0].bias, model, jnp.asarray(vector(1, 6, DEAD)))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    run = jax.jit(lambda params: jax.vmap(eqx.combine(params, static))(X))
    with pytest.raises(ValueError, match=r"inputs_axis must be given for 'layers/1', .* -2 for x @ w, and 1 for w @ x"):
        after_recycling(params, [Edge("hidden", "layers/0", ["layers/1"])])
    new, _ = after_recycling(params, [Edge("hidden", "layers/0", ["layers/1"], inputs_axis=1)])
    np.testing.assert_array_equal(run(new), run(params))
    by_weights, _ = after_recycling(params, [Edge("hidden", "layers/0/weight", ["layers/1/weight"], inputs_axis=1)])
    jax.tree.map(np.testing.assert_array_equal, new, by_weights)
    # variance 2 over the inputs, which come second
    params = {"a": {"weight": normal(0, 6, 50), "bias": vector(1, 6)}, "b": {"weight": normal(1, 2, 6)}}
    drawn = np.asarray(after_recycling(params, [Edge("hidden", "a", ["b"])])[0]["a"]["weight"])[list(DEAD)]
    assert drawn.std() == pytest.approx(np.sqrt(2 / 50), rel=0.2)


def test_two_edges_may_meet_in_a_concatenation():
    params = {"a": dense(0, 5, 6, DEAD), "b": dense(1, 5, 6, DEAD), "c": {"kernel": normal(2, 12, 3)}}

    @jax.jit
    def run(params):
        z = [X @ params[name]["kernel"] + params[name]["bias"] for name in "ab"]
        return jnp.concatenate([jaxrelu.relu(x) for x in z], -1) @ params["c"]["kernel"]

    edges = [Edge("one", "a", ["c"], inputs=0), Edge("two", "b", ["c"], inputs=6)]
    new, state = after_recycling(params, edges)
    np.testing.assert_array_equal(run(new), run(params))
    assert state.recycled.tolist() == [2, 2]
    assert np.flatnonzero((new["c"]["kernel"] == 0).all(-1)).tolist() == [1, 4, 7, 10]
    with pytest.raises(ValueError, match="a layer must be the consumer of one edge, got 'c/kernel' twice; if it"):
        after_recycling(params, [edges[0], edges[1]._replace(inputs=3)])


TIED = normal(0, 6, 6)


@pytest.mark.parametrize(
    ("params", "edge", "message"),
    [
        (
            [normal(0, 5, 6), normal(1, 6, 3), vector(2, 6)],
            Edge("h", "0", ["1"]),
            "must say where the bias of '0' is, which 2",
        ),
        ([normal(0, 5, 6), normal(1, 6, 3)], Edge("h", "0", ["1"]), "must say where the bias of '0' is, as weights alone"),
        ({"W_enc": normal(0, 5, 6), "W": normal(1, 6, 3)}, Edge("h", "W_enc", ["W"]), "must say where the bias of 'W_enc'"),
        (
            {"a": {"w": normal(0, 5, 6), "beta": vector(1, 6)}, "c": {"w": normal(1, 6, 3)}},
            Edge("h", "a", ["c"]),
            "which a/beta",
        ),
        (SMALL, Edge("h", "layer_0", ["layer_1"], bias="nowhere"), "bias must be the path of an array, got 'nowhere' of"),
        (SMALL, Edge("h", "layer_0", ["layer_1"], bias="layer_1/bias"), r"must have shape \(6,\), got \(3,\)"),
        (
            {"a": dense(0, 5, 6), "c": {"kernel": normal(1, 12, 3)}},
            Edge("h", "a", ["c"]),
            "the consumer 'c' must read the 6",
        ),
        (
            {"a": dense(0, 5, 6), "c": {"kernel": normal(1, 9, 3)}},
            Edge("h", "a", ["c"], inputs=4),
            "'c' must read the 6 units",
        ),
        (
            {"a": dense(0, 5, 6), "c": {"kernel": normal(1, 9, 3)}},
            Edge("h", "a", ["c"], inputs="flattened"),
            "'c' must read the 6 units",
        ),
        (SMALL, Edge("h", "layer_0", ["layer_1"], inputs="flat"), 'inputs must be None, "flattened", "flattened channels'),
        (SMALL, Edge("h", "layer_0", ["layer_1"], inputs=-1), 'inputs must be None, "flattened", "flattened channels'),
        (
            SMALL,
            Edge("h", "layer_0", ["layer_1"], units_axis=2),
            r"units_axis 2 is out of range for weights of .layer_0., ",
        ),
        (
            {"a": {"weight": normal(0, 6, 6)}, "c": {"weight": normal(1, 3, 6)}},
            Edge("h", "a", ["c"]),
            r"units_axis must be given for 'a', .* \(6, 6\); it is -1 for x @ w, and 0 for w @ x",
        ),
        ({"V": normal(0, 6, 6), "W": normal(1, 6, 3)}, Edge("h", "V", ["W"], bias=""), "units_axis must be given for 'V'"),
        ({"a": {"w": normal(0, 6, 6)}, "c": {"w": normal(1, 6, 3)}}, Edge("h", "a", ["c"]), "units_axis must be given for"),
        (
            SMALL | {"layer_1": {"kernel": normal(1, 6, 6, 5)}},
            Edge("h", "layer_0", ["layer_1"]),
            "inputs_axis must be given",
        ),
        (SMALL, Edge("h", "layer_0", ["layer_1"], ["nowhere"]), "between must name a BatchNorm by what holds its scale"),
        (
            {"a": {"kernel": TIED}, "c": {"kernel": TIED}},
            Edge("h", "a", ["c"]),
            "'a/kernel' and 'c/kernel' must not be the same array; leave tied weights out",
        ),
        (
            {"a": {"kernel": TIED}},
            Edge("h", "a", ["a"], inputs_axis=-1),
            "the producer 'a' and the consumer 'a' must not be the same weights along the same axis",
        ),
    ],
)
def test_what_is_ambiguous_or_wrong_is_refused(params, edge, message):
    with pytest.raises(ValueError, match=f"^recycle: .*{message}"):
        recycle(optax.sgd(0.1), [edge], key=KEY, init=FILL).init(params)


def test_weights_of_one_input_are_no_bias():
    params = {"a": {"kernel": normal(0, 1, 6)}, "c": {"kernel": normal(1, 6, 1)}}
    assert after_recycling(params, [Edge("hidden", "a", ["c"])])[1].recycled.tolist() == [2]


def test_two_edges_do_not_share_a_bias_and_axes_are_ints():
    params = SMALL | {"layer_2": dense(2, 5, 6), "layer_3": dense(3, 6, 2)}
    edges = [Edge("h", "layer_0", ["layer_1"]), Edge("i", "layer_2", ["layer_3"], bias="layer_0/bias")]
    with pytest.raises(ValueError, match="recycle: a bias or scale must belong to one edge, got 'layer_0/bias' twice"):
        recycle(optax.sgd(0.1), edges, key=KEY, init=FILL).init(params)
    for field in ("units_axis", "inputs_axis"):
        for axis in (1.0, "last", True):
            with pytest.raises(TypeError, match=f"recycle: {field} must be an int or None, got {axis!r}"):
                recycle(optax.sgd(0.1), [edges[0]._replace(**{field: axis})], key=KEY, init=FILL)


@pytest.mark.parametrize("spec", [P("model", None), P(None, "model")], ids=["inputs", "units"])
@pytest.mark.parametrize("moments", ["zero", "mean"])
def test_parameters_on_explicit_axes(spec, moments):
    params = {"layer_0": dense(0, 8, 16, DEAD), "layer_1": dense(1, 16, 8)}
    edge = Edge("hidden", "layer_0", ["layer_1"])
    tx = recycle(optax.adam(1e-2), [edge], every=1, key=KEY, init=kaiming_normal(), moments=moments)
    stats = {"hidden": stats_with(DEAD, 16)}

    @jax.jit
    def step(params, stats):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params, stats=stats)
        return optax.apply_updates(params, updates), state

    whole, _ = step(params, stats)
    mesh = jax.make_mesh((8,), ("model",))
    with jax.set_mesh(mesh):
        layout = {"kernel": NamedSharding(mesh, spec), "bias": NamedSharding(mesh, P(spec[1]))}
        sharded = jax.device_put(params, {"layer_0": layout, "layer_1": layout})
        new, state = step(sharded, stats)
        assert state.recycled.tolist() == [2]
        assert jax.typeof(new["layer_0"]["kernel"]).sharding.spec == spec
        batch = {"norm": {"mean": sharded["layer_0"]["bias"], "var": jnp.ones(16)}}
        reset = fresh_batch_stats(batch, [edge._replace(between=["norm"])], state.fresh)
        assert (np.asarray(reset["norm"]["mean"])[list(DEAD)] == 0).all()
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), new, whole)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        z = nn.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(nn.Dense(6, use_bias=False, name="a")(x))
        return nn.Dense(3, name="c")(jaxrelu.relu(z)), z


def test_running_statistics_of_recycled_units_start_afresh():
    model = Normed()
    variables = jax.tree.map(np.array, model.init(jax.random.key(0), X, False))
    variables["batch_stats"]["norm"]["mean"][list(DEAD)] = 500.0
    variables["batch_stats"]["norm"]["var"][list(DEAD)] = 1e-2
    edges = [Edge("hidden", "a", ["c"], ["norm"])]
    params, state = after_recycling(variables["params"], edges)

    def largest(batch_stats):
        z = np.asarray(model.apply({"params": params, "batch_stats": batch_stats}, X, False)[1])
        alive = [unit for unit in range(6) if unit not in DEAD]
        return np.abs(z[:, list(DEAD)]).max() / np.abs(z[:, alive]).max()

    assert largest(variables["batch_stats"]) > 100
    fresh = jax.jit(lambda batch_stats, recycled: fresh_batch_stats(batch_stats, edges, recycled))(
        variables["batch_stats"], state.fresh
    )
    assert largest(fresh) < 5
    kept = np.asarray(fresh["norm"]["var"]) == variables["batch_stats"]["norm"]["var"]
    assert np.flatnonzero(~kept).tolist() == list(DEAD)
    # a step without recycling changes nothing
    unchanged = fresh_batch_stats(variables["batch_stats"], edges, [jnp.zeros(6, bool)])
    jax.tree.map(np.testing.assert_array_equal, unchanged, variables["batch_stats"])


def test_running_statistics_of_haiku_and_mistakes():
    edges = [Edge("hidden", "a", ["c"], ["net/~/bn"])]
    mask = jnp.array([False, True])
    ema = {"average": jnp.full((1, 2), 3.0), "hidden": jnp.full((1, 2), 5.0), "counter": jnp.array(7)}
    fresh = fresh_batch_stats({"net/~/bn/~/mean_ema": ema, "net/~/bn/~/var_ema": ema}, edges, [mask])
    assert fresh["net/~/bn/~/mean_ema"]["average"].tolist() == [[3.0, 0.0]]
    # an average of 1 is a hidden value of 1 - decay^counter, 5/3 here
    np.testing.assert_allclose(fresh["net/~/bn/~/var_ema"]["hidden"], [[5.0, 5 / 3]], rtol=1e-6)
    assert fresh["net/~/bn/~/mean_ema"]["hidden"].tolist() == [[5.0, 0.0]]
    assert fresh["net/~/bn/~/var_ema"]["counter"] == 7
    with pytest.raises(ValueError, match="fresh_batch_stats: batch_stats must have mean and var of 'net/~/bn', got norm"):
        fresh_batch_stats({"norm": {"mean": mask}}, edges, [mask])
    with pytest.raises(TypeError, match=r"fresh_batch_stats: edges must be a list of one recycling.Edge or more"):
        fresh_batch_stats({}, edges[0], [mask])
    with pytest.raises(ValueError, match="fresh_batch_stats: recycled must have one boolean array for each of the 1 edges"):
        fresh_batch_stats({}, edges, [])
    with pytest.raises(ValueError, match=r"fresh_batch_stats: .*average' must be of the 3 units of 'a', got shape \(1, 2\)"):
        fresh_batch_stats({"net/~/bn/~/mean_ema": ema}, edges, [jnp.zeros(3, bool)])
