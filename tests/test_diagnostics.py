import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxrelu
from jaxrelu import diagnostics
from jaxrelu.diagnostics import UnitStats, all_reduce, merge, unit_stats
from jaxrelu.initializers import kaiming_normal

RNG = np.random.default_rng(0)
each_dtype = pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])


def reference(z):
    """Returns the statistics of a (rows, units) stream, in NumPy float64."""
    z = np.asarray(z).astype(np.float64)
    with np.errstate(invalid="ignore"):
        output = np.maximum(z, 0).mean(0)
        finite = np.isfinite(output)
        layer = output[finite].mean() if finite.any() else np.nan
        return {
            "count": len(z),
            "fired": (z > 0).sum(0),
            "nonfinite": (~np.isfinite(z)).sum(0),
            "dead": ~(z > 0).any(0) & np.isfinite(z).all(0),
            "firing_rate": (z > 0).mean(0),
            "sparsity": 1 - (z > 0).mean(0),
            "margin": z.max(0),
            "dormancy": np.where(finite, output / layer if layer else 0.0, np.nan),
            "saturation": (z >= 6).mean(0),
            "zero_gradient": (~(z > 0)).mean(0),
            "mean": z.mean(0),
            "variance": z.var(0),
            "min": z.min(0),
            "max": z.max(0),
        }


def assert_stats(stats: UnitStats, z):
    exact = reference(z)
    for name in ("count", "fired", "nonfinite", "dead", "margin", "min", "max"):
        np.testing.assert_array_equal(getattr(stats, name), exact[name], err_msg=name)
    for name in ("firing_rate", "sparsity", "dormancy", "saturation", "zero_gradient"):
        np.testing.assert_allclose(getattr(stats, name), exact[name], rtol=1e-5, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(stats.variance, exact["variance"], rtol=1e-5, err_msg="variance")
    granted = 2e-6 * (np.abs(exact["mean"]) + np.sqrt(exact["variance"]))
    with np.errstate(invalid="ignore"):
        close = np.abs(np.asarray(stats.mean, np.float64) - exact["mean"]) <= granted
    assert (close | ~np.isfinite(exact["mean"])).all()
    np.testing.assert_array_equal(np.isnan(stats.mean), np.isnan(exact["mean"]))


def batches(sizes, mean, dtype):
    """Yields batches of five units: usual, wide, narrow, dead, and always on."""
    for n in sizes:
        z = RNG.normal([0.0, 0.0, 0.0, -9.0, 9.0], [1.0, 5.0, 0.25, 1.0, 1.0], size=(n, 5))
        yield (z + mean).astype(dtype)


@each_dtype
def test_stream_of_batches_equals_numpy(dtype):
    # distinct sizes, each of which compiles anew, for one dtype
    sizes = range(2, 52) if dtype == jnp.float32 else list(itertools.islice(itertools.cycle([13, 2, 34, 5, 21, 3, 8]), 50))
    columns = (batches(sizes, 0.0, dtype), batches(sizes, 1e4, dtype), batches(sizes, 0.0, dtype))
    seen = [np.concatenate(parts, 1) for parts in zip(*columns, strict=True)]
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
    (z,) = batches([n], 1e4, jnp.float32)
    assert_stats(unit_stats(z), z)


def test_a_constant_unit_has_no_variance():
    stats = unit_stats(jnp.full((1001, 3), 1e4 + 1 / 3, jnp.float32))
    assert stats.variance.tolist() == [0.0, 0.0, 0.0]


def test_two_axes_of_examples_and_another_unit_axis():
    z = RNG.normal(size=(7, 3, 11)).astype(np.float32)
    assert_stats(unit_stats(z), z.reshape(21, 11))
    assert_stats(unit_stats(z, axis=1), np.moveaxis(z, 1, -1).reshape(77, 3))
    assert_stats(unit_stats(z[0, 0]), z[:1, 0])
    assert_stats(unit_stats(2.5), np.array([[2.5]]))


def test_integers_have_no_derivative():
    stats = unit_stats(jnp.array([[-2, 3, 7], [-5, -6, 2]]))
    assert stats.dead.tolist() == [True, False, False]
    assert stats.mean.tolist() == [-3.5, -1.5, 4.5]
    assert stats.zero_gradient.tolist() == [1.0, 1.0, 1.0]


@each_dtype
def test_hidden_values_may_be_anything(dtype):
    z = np.asarray(RNG.normal(size=(6, 5, 4)) + 1e3, dtype)
    shown = RNG.random(size=(6, 5)) < 0.6
    padded = np.where(shown[..., None], z, np.asarray([np.nan, np.inf, -np.inf, 6e4], dtype))
    for where in (shown, shown[..., None]):
        assert_stats(unit_stats(padded, where=where), z[shown])
    assert_stats(unit_stats(np.moveaxis(padded, -1, 0), axis=0, where=shown[None]), z[shown])


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
    (z,) = map(jnp.asarray, batches([13], 1e4, jnp.float32))
    z = z.at[0, 0].set(jnp.inf)
    stats, nothing = unit_stats(z), unit_stats(z, where=jnp.zeros(13, bool))
    assert nothing.count == 0
    assert not nothing.dead.any()
    assert all(np.isnan(getattr(nothing, name)).all() for name in ("mean", "variance", "firing_rate", "dormancy"))
    for merged in (merge(stats, nothing), merge(nothing, stats)):
        jax.tree.map(np.testing.assert_array_equal, merged, stats)


def test_merge_takes_what_observe_returns():
    first, second = ({"a": unit_stats(z), "b": unit_stats(z[:, :3])} for z in batches([13, 13], 0.0, jnp.float32))
    merged = merge(first, second)
    for name in ("a", "b"):
        jax.tree.map(np.testing.assert_array_equal, merged[name], merge(first[name], second[name]))
    with pytest.raises(ValueError, match=r"merge: a and b must have units of the same shape, got \(5,\) and \(3,\)"):
        merge(first["a"], first["b"])
    with pytest.raises(ValueError, match=r"merge: .* got \(3,\) and \(1,\)"):  # which would broadcast
        merge(first["b"], unit_stats(jnp.ones((13, 1))))


def test_merge_is_associative_to_rounding():
    a, b, c = (unit_stats(z) for z in batches([3, 50, 7], 1e4, jnp.float32))
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    for name in ("count", "fired", "nonfinite", "min", "max"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
    np.testing.assert_allclose(left.mean, right.mean, rtol=1e-7)
    np.testing.assert_allclose(left.variance, right.variance, rtol=1e-6)


def test_counts_are_exact_past_2_to_the_32():
    (z,) = batches([7], 0.0, jnp.float32)
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


def test_he_and_lecun_weights_kill_the_same_units():
    x = jnp.asarray(RNG.normal(size=(5, 256)), jnp.float32)

    @jax.jit
    @diagnostics.observe
    def network(weights, x):
        for w in weights:
            x = jaxrelu.relu(x @ w)
        return x

    def dead(init):
        weights = [init(key, (256, 256), jnp.float32) for key in jax.random.split(jax.random.key(1), 10)]
        return [np.asarray(s.dead) for s in network(weights, x)[1].values()]

    he, lecun = dead(kaiming_normal()), dead(jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal"))
    assert len(he) == 10
    assert all(0 < dead.sum() < 256 for dead in he)
    np.testing.assert_array_equal(he, lecun)


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
    for bad in (jnp.ones(3, complex), jnp.ones(3, bool), None, "z"):
        with pytest.raises(TypeError, match="unit_stats: z must be a real number or an array"):
            unit_stats(bad)


def mlp(params, x):
    for layer in params["params"].values():
        x = jaxrelu.relu(x @ layer["kernel"] + layer["bias"][None])
    return x


def mlp_params(sizes):
    init = kaiming_normal()
    layers = {
        f"layer_{i}": {"kernel": init(jax.random.key(i), shape), "bias": jnp.zeros(shape[1])}
        for i, shape in enumerate(itertools.pairwise(sizes))
    }
    return {"params": layers}


def test_check_init_names_the_dead():
    params, x = mlp_params([3, 5, 4]), jnp.asarray(RNG.normal(size=(40, 3)), jnp.float32)
    params["params"]["layer_0"]["bias"] = params["params"]["layer_0"]["bias"].at[jnp.array([1, 3])].set(-50.0)
    params["params"]["layer_1"]["bias"] -= 50.0
    with pytest.warns(UserWarning, match="check_init") as caught:
        diagnostics.check_init(mlp, params, x)
    texts = [str(w.message) for w in caught]
    assert any("check_init: relu: 2 of 5 units are dead at birth on 40 examples" in text for text in texts)
    assert any("relu_1: 4 of 4 units" in text for text in texts)
    names = ("layer_0/kernel", "layer_0/bias", "layer_1/kernel", "layer_1/bias")
    assert any(all(f"params/{name}" in text for name in names) for text in texts)


def test_check_init_of_an_array():
    with pytest.warns(UserWarning, match="2 of 2 units"), pytest.warns(match="no gradient reaches the first argument;"):
        diagnostics.check_init(jaxrelu.relu, -jnp.ones((3, 2)))


def test_check_init_is_silent_where_all_is_well():
    params = {"params": {"layer_0": {"kernel": jnp.eye(3), "bias": jnp.ones(3)}}}
    diagnostics.check_init(mlp, params, jnp.ones((2, 3)))


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


def observed():
    params, x = mlp_params([3, 5, 4]), jnp.asarray(RNG.normal(size=(40, 3)), jnp.float32)
    params["params"]["layer_1"]["bias"] = params["params"]["layer_1"]["bias"].at[2].set(-50.0)
    return diagnostics.observe(mlp)(params, x)[1]


def test_scalars_are_python_numbers():
    stats = observed()
    scalars = diagnostics.to_scalars(stats)
    assert scalars["relu/dead"] == 0.0
    assert scalars["relu_1/dead"] == 0.25
    assert scalars["relu_1/count"] == 40
    assert scalars["relu_1/fired"] == int(stats["relu_1"].fired.sum())
    assert scalars["relu_1/margin"] == float(stats["relu_1"].margin.min())
    assert {type(x) for x in scalars.values()} == {int, float}


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


def test_layers_of_a_scan_are_listed_one_by_one():
    weights = jnp.stack([jnp.eye(4), -jnp.eye(4)])
    run = diagnostics.observe(lambda x: lax.scan(lambda x, w: (jaxrelu.relu(x @ w), None), x, weights)[0])
    _, stats = run(jnp.ones((3, 4)))
    assert diagnostics.to_scalars(stats)["relu[0]/dead"] == 0.0
    assert diagnostics.to_scalars(stats)["relu[1]/dead"] == 1.0
    assert stats["relu"].dormancy.tolist() == [[1.0] * 4, [0.0] * 4]
