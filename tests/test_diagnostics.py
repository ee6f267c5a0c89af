import contextlib
import copy
import functools
import itertools
import json
import os
import pickle
import socket
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxrelu
from dying import assert_stats
from jaxrelu import diagnostics
from jaxrelu.diagnostics import UnitStats, all_reduce, merge, unit_stats
from jaxrelu.initializers import kaiming_normal

# of tests that ask what is done, not how it is rounded
quick = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)
START = RNG.bit_generator.state
each_dtype = pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])


@pytest.fixture(autouse=True)
def same_numbers_in_any_order():
    RNG.bit_generator.state = START


def batches(sizes, dtype=np.float32):
    """Yields batches of three times five units (usual, wide, narrow, dead, always on), the second five around 1e4."""
    mean, spread = np.tile([0.0, 0.0, 0.0, -9.0, 9.0], (3, 1)), [1.0, 5.0, 0.25, 1.0, 1.0]
    mean[1] += 1e4
    for n in sizes:
        yield RNG.normal(mean, spread, size=(n, 3, 5)).reshape(n, 15).astype(dtype)


@each_dtype
def test_stream_of_batches_equals_numpy(dtype):
    # each size compiles anew; fewer in 16 bits, which are summed in float32 too
    sizes = (13, 2, 34, 3, 16, 51, 7, 17) if dtype == jnp.float32 else (13, 34)
    seen = list(batches(itertools.islice(itertools.cycle(sizes), 50), dtype))
    for place, unit, value in ((0, 10, np.nan), (25, 11, np.inf), (25, 12, -np.inf), (49, 13, np.nan)):
        seen[place][1, unit] = value
    stats = functools.reduce(merge, [unit_stats(z) for z in seen])
    assert_stats(stats, np.concatenate(seen))
    assert stats.min.dtype == stats.mean.dtype == jnp.float32


def test_a_position_unlike_the_others():
    z = RNG.normal(size=(16, 512, 3)).astype(np.float32)
    z[:, 0] += 100
    assert_stats(unit_stats(z), z.reshape(-1, 3))


@pytest.mark.parametrize("n", [128, 129, 1000, 4096])
def test_one_large_batch_equals_numpy(n):
    (z,) = batches([n])
    assert_stats(unit_stats(z), z)


def test_a_constant_unit_has_no_variance():
    stats = unit_stats(np.full((1001, 3), 1e4 + 1 / 3, np.float32))
    assert stats.variance.tolist() == [0.0, 0.0, 0.0]


def test_two_axes_of_examples_and_another_unit_axis():
    z = RNG.normal(size=(7, 3, 11)).astype(np.float32)
    last, middle, vector = jax.jit(lambda z: (unit_stats(z), unit_stats(z, axis=1), unit_stats(z[0, 0])))(z)
    assert_stats(last, z.reshape(21, 11))
    assert_stats(middle, np.moveaxis(z, 1, -1).reshape(77, 3))
    assert_stats(vector, z[:1, 0])
    assert_stats(unit_stats(2.5), np.array([[2.5]]))


@quick
def test_integers_have_no_derivative():
    stats = unit_stats(np.array([[-2, 3, 7], [-5, -6, 2]]))
    assert stats.dead.tolist() == [True, False, False]
    assert stats.mean.tolist() == [-3.5, -1.5, 4.5]
    assert stats.zero_gradient.tolist() == [1.0, 1.0, 1.0]


@each_dtype
def test_hidden_values_may_be_anything(dtype):
    z = np.asarray(RNG.normal(size=(6, 5, 4)) + 1e3, dtype)
    shown = RNG.random(size=(6, 5)) < 0.6
    padded = np.where(shown[..., None], z, np.asarray([np.nan, np.inf, -np.inf, 6e4], dtype))

    @jax.jit
    def run(padded, shown):
        first = jnp.moveaxis(padded, -1, 0)
        whole = [unit_stats(padded, where=where) for where in (shown, shown[..., None])]
        return [*whole, unit_stats(first, axis=0, where=shown[None])]

    for stats in run(padded, shown):
        assert_stats(stats, z[shown])


def test_units_that_are_not_finite_are_not_dead():
    z = np.float32([[-1, np.nan, -1, np.inf, -np.inf], [-2, -1, 2, -1, -1], [-4, -1, 1, 1, -1]])
    stats = unit_stats(z)
    assert stats.dead.tolist() == [True, False, False, False, False]
    assert stats.nonfinite.tolist() == [0, 1, 0, 1, 1]
    np.testing.assert_allclose(stats.mean, [-7 / 3, np.nan, 2 / 3, np.inf, -np.inf], rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(stats.variance), [False, True, False, True, True])
    np.testing.assert_array_equal(stats.max, [-1, np.nan, 2, np.inf, -1])
    # of the finite outputs 0, 1 and 0 the mean is 1/3
    np.testing.assert_allclose(stats.dormancy, [0, np.nan, 3, np.nan, 0], rtol=1e-6)
    both = merge(unit_stats(z[:1]), unit_stats(z[1:]))
    np.testing.assert_allclose(both.mean, stats.mean, rtol=1e-6)
    np.testing.assert_allclose(both.dormancy, stats.dormancy, rtol=1e-6)


@each_dtype
def test_dormancy_has_no_scale_and_a_dead_layer_has_none(dtype):
    z = np.asarray([[1, -1, 3], [1, 2, 3]], dtype)
    for scale in (1.0, 2.0**-10) if dtype == jnp.float16 else (1.0, 2.0**-30, 2.0**-70):
        # the outputs' means are 1, 1 and 3 times the scale
        np.testing.assert_allclose(unit_stats(z * np.asarray(scale, dtype)).dormancy, [0.6, 0.6, 1.8], rtol=1e-6)
    dead = unit_stats(-np.abs(z))
    assert dead.dead.all()
    assert dead.dormancy.tolist() == [0.0, 0.0, 0.0]
    assert dead.margin.tolist() == [-1.0, -1.0, -3.0]


def test_merge_of_something_else_is_refused():
    with pytest.raises(TypeError, match="merge: a and b must be UnitStats or pytrees of them, got int and int"):
        merge(1, 2)


def test_merge_with_nothing_seen_changes_nothing():
    (z,) = batches([13])
    z[0, 0] = np.inf
    stats, nothing = unit_stats(z), unit_stats(z, where=np.zeros(13, bool))
    assert nothing.count == 0
    assert not nothing.dead.any()
    assert all(np.isnan(getattr(nothing, name)).all() for name in ("mean", "variance", "firing_rate", "dormancy"))
    for merged in (merge(stats, nothing), merge(nothing, stats)):
        jax.tree.map(np.testing.assert_array_equal, merged, stats)


@quick
def test_merge_takes_what_observe_returns():
    first, second = ({"a": unit_stats(z), "b": unit_stats(z[:, :3])} for z in batches([13, 13]))
    merged = merge(first, second)
    for name in ("a", "b"):
        jax.tree.map(np.testing.assert_array_equal, merged[name], merge(first[name], second[name]))
    with pytest.raises(ValueError, match=r"merge: a and b must have units of the same shape, got \(15,\) and \(3,\)"):
        merge(first["a"], first["b"])
    with pytest.raises(ValueError, match=r"merge: .* got \(3,\) and \(1,\)"):  # which would broadcast
        merge(first["b"], unit_stats(2.5))


def test_merge_is_associative_to_rounding():
    a, b, c = (unit_stats(z) for z in batches([3, 51, 7]))
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    for name in ("count", "fired", "nonfinite", "min", "max"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
    far = slice(5, 10)  # from 0, so that rounding is relative to the mean
    np.testing.assert_allclose(left.mean[far], right.mean[far], rtol=1e-7)
    np.testing.assert_allclose(left.variance[far], right.variance[far], rtol=1e-6)


def test_counts_are_exact_past_2_to_the_32():
    (z,) = batches([7])
    stats, first = unit_stats(z), unit_stats(z)
    for _ in range(31):
        stats = merge(stats, stats)
    stats = merge(stats, first)
    assert stats.count == 7 * 2**31 + 7
    assert stats.count > 2**32
    assert stats.fired.tolist() == ((np.asarray(z) > 0).sum(0) * (2**31 + 1)).tolist()
    np.testing.assert_allclose(stats.firing_rate, first.firing_rate, rtol=1e-6)
    np.testing.assert_allclose(stats.variance, first.variance, rtol=1e-5)


def test_all_reduce_equals_one_device():
    # sorted, so that each device sees its own range: units are dead on some devices
    z = np.sort(RNG.normal([0, 0, 0, -9, 9], size=(8 * 3, 5)), axis=0).astype(np.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=(P(), P()))
    def reduced(z):
        stats = unit_stats(z)
        return all_reduce({"layer": stats}, "data"), lax.pmean(stats.dead.astype(jnp.float32), "data")

    stats, mean_of_dead = jax.jit(reduced)(z)
    assert_stats(stats["layer"], z)
    assert stats["layer"].dead.tolist() == [False, False, False, True, False]
    assert not np.array_equal(mean_of_dead, stats["layer"].dead)


def test_all_reduce_over_two_axes():
    z = RNG.normal(size=(16, 3)).astype(np.float32)
    mesh = jax.make_mesh((3, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:6])
    reduced = jax.shard_map(
        lambda z: all_reduce(unit_stats(z), ("a", "b")), mesh=mesh, in_specs=P(("a", "b")), out_specs=P()
    )
    assert_stats(jax.jit(reduced)(z[:12]), z[:12])


@quick
def test_he_and_lecun_weights_kill_the_same_units():
    x = RNG.normal(size=(5, 256)).astype(np.float32)

    @jax.jit
    def dead(weights, x):
        network = diagnostics.observe(lambda x: lax.scan(lambda x, w: (jaxrelu.relu(x @ w), None), x, weights)[0])
        return network(x)[1]["relu"].dead

    def weights(init):
        return jax.jit(jax.vmap(lambda key: init(key, (256, 256), jnp.float32)))(jax.random.split(jax.random.key(1), 10))

    inits = kaiming_normal(), jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")
    he, lecun = (np.asarray(dead(weights(init), x)) for init in inits)
    assert he.shape == (10, 256)
    assert ((he.sum(1) > 0) & (he.sum(1) < 256)).all()
    np.testing.assert_array_equal(he, lecun)


@quick
def test_bad_arguments_are_refused():
    z = jnp.ones((3, 5, 2))
    for bad in (jnp.ones((3, 2), bool), jnp.ones((3, 5, 2), bool), jnp.ones(3, bool)):
        with pytest.raises(ValueError, match=r"unit_stats: where must have shape \(3, 5\)"):
            unit_stats(z, where=bad)
    with pytest.raises(TypeError, match="unit_stats: where must be boolean"):
        unit_stats(z, where=jnp.ones((3, 5)))
    with pytest.raises(ValueError, match="unit_stats: axis 3 is out of range"):
        unit_stats(z, axis=3)
    with pytest.raises(TypeError, match="unit_stats: axis must be an int"):
        unit_stats(z, axis=True)
    for bad in (jnp.ones(3, complex), jnp.ones(3, bool), None, "z", jnp.ones(3, jnp.float8_e8m0fnu)):
        with pytest.raises(TypeError, match="unit_stats: z must be a real number or an array"):
            unit_stats(bad)
    for name in ("to_scalars", "summary"):
        for bad in (unit_stats(z), [unit_stats(z)], {"relu": z}, None):
            with pytest.raises(TypeError, match=f"{name}: stats must be UnitStats by name, as observe returns them, got "):
                getattr(diagnostics, name)(bad)
    for bad in (z, {"relu": z}):
        with pytest.raises(TypeError, match="all_reduce: stats must be UnitStats or a pytree of them, got "):
            diagnostics.all_reduce(bad, "i")
    for name, argument in (("check_init", "f"), ("gradient_flow", "loss")):
        with pytest.raises(TypeError, match=f"{name}: {argument} must be a function, got "):
            getattr(diagnostics, name)(z, z)


def mlp(params, x):
    for layer in params["params"].values():
        x = jaxrelu.relu(x @ layer["kernel"] + layer["bias"][None])
    return x


def mlp_params(sizes):
    layers = {
        f"layer_{i}": {
            "kernel": np.float32(RNG.normal(size=shape) * (2 / shape[0]) ** 0.5),
            "bias": np.zeros(shape[1], np.float32),
        }
        for i, shape in enumerate(itertools.pairwise(sizes))
    }
    return {"params": layers}


@quick
def test_check_init_names_the_dead():
    params, x = mlp_params([3, 5, 4]), RNG.normal(size=(40, 3)).astype(np.float32)
    params["params"]["layer_0"]["bias"][[1, 3]] = -50.0
    params["params"]["layer_1"]["bias"] -= 50.0
    with pytest.warns(UserWarning, match="check_init") as caught:
        report = diagnostics.check_init(mlp, params, x)
    texts = [str(w.message) for w in caught]
    assert texts == report
    assert any("check_init: relu: 2 of 5 units are dead at birth on 40 examples" in text for text in texts)
    assert any("relu_1: 4 of 4 units" in text for text in texts)
    names = ("layer_0/kernel", "layer_0/bias", "layer_1/kernel", "layer_1/bias")
    assert any(all(f"params/{name}" in text for name in names) for text in texts)


@quick
def test_check_init_of_an_array():
    with pytest.warns(UserWarning, match="2 of 2 units"), pytest.warns(match="no gradient reaches the first argument;"):
        diagnostics.check_init(jaxrelu.relu, np.full((3, 2), -1.0, np.float32))


@quick
def test_check_init_is_silent_where_all_is_well():
    params = {"params": {"layer_0": {"kernel": np.eye(3, dtype=np.float32), "bias": np.ones(3, np.float32)}}}
    assert diagnostics.check_init(mlp, params, np.ones((2, 3), np.float32)) == []

    def centred(params, x):
        h = mlp(params, x)
        return h - h.mean(-1, keepdims=True)

    # a plain sum of these is constant
    for f in (
        centred,
        lambda params, x: jax.nn.softmax(mlp(params, x)),
        lambda params, x: {"a": centred(params, x), "n": 3},
    ):
        assert diagnostics.check_init(f, params, RNG.uniform(size=(2, 3)).astype(np.float32)) == []


def test_gradient_flow():
    # by hand: loss = sum(w2 * w1 * x), so that dw1 = w2 x and dw2 = w1 x
    def loss(params, x):
        return sum((p["w1"] * p["w2"] * x).sum() for p in params["params"].values())

    params = {"params": {f"layer_{i}": {"w1": jnp.float32(1e-25), "w2": jnp.float32(3e-25)} for i in range(11)}}
    flow = diagnostics.gradient_flow(loss, params, jnp.float32(2))
    assert list(flow) == [f"layer_{i}" for i in range(11)]
    np.testing.assert_allclose(list(flow.values()), np.sqrt((6e-25**2 + 2e-25**2) / 2), rtol=1e-6)
    assert all(type(x) is float for x in flow.values())
    assert diagnostics.gradient_flow(lambda w: (w * w).sum(), jnp.float32([3, 4])) == {"": pytest.approx(50**0.5)}


@functools.cache
def observed():
    params, x = mlp_params([3, 5, 4]), RNG.normal(size=(40, 3)).astype(np.float32)
    params["params"]["layer_1"]["bias"] += 1.0  # all but one fire
    params["params"]["layer_1"]["bias"][2] = -50.0
    return jax.jit(diagnostics.observe(mlp))(params, x)[1]


@quick
def test_scalars_are_python_numbers():
    stats = observed()
    scalars = diagnostics.to_scalars(stats)
    assert scalars["relu/dead"] == 0.0
    assert scalars["relu_1/dead"] == 0.25
    assert scalars["relu_1/count"] == 40
    assert scalars["relu_1/fired"] == int(stats["relu_1"].fired.sum())
    assert scalars["relu_1/margin"] == float(stats["relu_1"].margin.min())
    assert {type(x) for x in scalars.values()} == {int, float}


@quick
def test_what_has_no_finite_number_is_left_out():
    stats = {
        "unseen": unit_stats(jnp.zeros((0, 3))),
        "unitless": unit_stats(jnp.zeros((5, 0))),
        "infinite": unit_stats(jnp.array([[jnp.inf, 1.0], [jnp.nan, -1.0]])),
    }
    scalars = json.loads(json.dumps(diagnostics.to_scalars(stats), allow_nan=False))
    counts = {"count", "fired", "nonfinite"}
    assert {name for name in scalars if name.startswith("unitless/")} == {f"unitless/{name}" for name in counts}
    assert {name for name in scalars if name.startswith("unseen/")} == {f"unseen/{name}" for name in (*counts, "dead")}
    assert (scalars["unseen/count"], scalars["unitless/count"], scalars["infinite/nonfinite"]) == (0, 5, 2)
    assert "infinite/max" not in scalars
    head, *lines = diagnostics.summary(stats).splitlines()
    assert [line.split().count("-") for line in lines] == [8, 8, 0]
    assert len({len(line) for line in (head, *lines)}) == 1


@quick
def test_statistics_can_be_kept(tmp_path):
    stats = {"relu": unit_stats(jnp.array([[1.0, -2.0], [3.0, -4.0]]))}
    empty = jax.tree.map(jnp.zeros_like, stats)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "stats", stats)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "stats", empty)
    eqx.tree_serialise_leaves(tmp_path / "leaves", stats)
    for kept in (
        *(serialization.from_bytes(empty, serialization.to_bytes(stats)), restored, pickle.loads(pickle.dumps(stats))),
        *(eqx.tree_deserialise_leaves(tmp_path / "leaves", empty), copy.deepcopy(stats)),
    ):
        assert type(kept["relu"]) is UnitStats
        assert diagnostics.to_scalars(kept) == diagnostics.to_scalars(stats)
        assert kept["relu"] != stats["relu"] == stats["relu"]
        assert len({kept["relu"], stats["relu"]}) == 2


def test_exact_counts_inside_jit():
    stats = unit_stats(jnp.array([[1.0, -2.0], [3.0, -4.0]]))
    for read in (lambda s: s.fired, lambda s: s.count, lambda s: s.nonfinite):
        with pytest.raises(TypeError, match="exact integers of NumPy's, which jit cannot hold; read them outside"):
            jax.jit(read)(stats)
    printed = []
    jax.jit(lambda s: printed.append(repr(s)))(stats)
    assert printed == ["UnitStats(2 units, not readable here)"]
    floats, rest = eqx.partition(stats, eqx.is_inexact_array)
    assert all("None" in repr(part) for part in (floats, rest))


def test_check_init_on_explicit_axes():
    params = {"w": np.eye(4, dtype=np.float32)}
    with jax.set_mesh(jax.make_mesh((4,), ("d",))):
        sharded = jax.device_put(params, jax.NamedSharding(jax.sharding.get_mesh(), P(None, "d")))
        assert diagnostics.check_init(lambda p, x: jaxrelu.relu(x @ p["w"]), sharded, np.ones((3, 4), np.float32)) == []


ON_PROCESSES = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxrelu.diagnostics import summary, to_scalars, unit_stats

mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
sharding = NamedSharding(mesh, PartitionSpec(None, "model"))
z = np.arange(-6.0, 6.0, dtype=np.float32).reshape(3, 4)
x = jax.make_array_from_callback(z.shape, sharding, lambda index: z[index])
units = NamedSharding(mesh, PartitionSpec(None, None, "model"))
stats = jax.jit(unit_stats)(x)
stats = stats._replace(counts=jax.device_put(stats.counts, units))
assert not stats.counts.is_fully_addressable and not stats.counts.is_fully_replicated
assert repr(stats) == "UnitStats(on several processes)"
assert stats.fired.tolist() == [1, 1, 1, 2], stats.fired
read, expected = to_scalars({"relu": stats}), to_scalars({"relu": unit_stats(z)})
assert read.keys() == expected.keys()
np.testing.assert_allclose([*read.values()], [*expected.values()], rtol=1e-5)
assert summary({"relu": stats}) == summary({"relu": unit_stats(z)})
print("read")
"""


def test_units_on_several_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", ON_PROCESSES, address, str(index)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    env=environment,
                )
            )
            for index in range(2)
        ]
        for child in children:
            stack.callback(child.kill)  # of what has ended, this does nothing
        for child in children:
            output = child.communicate(timeout=120)[0]
            assert child.returncode == 0, output
            assert output.endswith("read\n")


@quick
def test_summary_is_a_table_with_one_transfer(monkeypatch):
    stats = observed()
    transfers = []
    device_get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: transfers.append(1) or device_get(x))
    text = diagnostics.summary(stats)
    assert len(transfers) == 1
    head, *lines = text.splitlines()
    assert head.split()[:3] == ["layer", "units", "dead"]
    assert [line.split()[:3] for line in lines] == [["relu", "5", "0.0%"], ["relu_1", "4", "25.0%"]]
    assert len({len(line) for line in text.splitlines()}) == 1


@quick
def test_layers_of_a_scan_are_listed_one_by_one():
    weights = np.stack([np.eye(4, dtype=np.float32), -np.eye(4, dtype=np.float32)])
    run = diagnostics.observe(lambda x: lax.scan(lambda x, w: (jaxrelu.relu(x @ w), None), x, weights)[0])
    _, stats = jax.jit(run)(np.ones((3, 4), np.float32))
    scalars = diagnostics.to_scalars(stats)
    assert (scalars["relu[0]/dead"], scalars["relu[1]/dead"]) == (0.0, 1.0)
    assert stats["relu"].dormancy.tolist() == [[1.0] * 4, [0.0] * 4]
