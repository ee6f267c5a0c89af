import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dying_relu
from scripts import error_of, quick_run, rows


@pytest.mark.slow
def test_dying_relu(tmp_path, capsys):
    quick_run(dying_relu, tmp_path, capsys)
    found = rows(tmp_path / "dying_relu.csv")
    assert list(found[0]) == ["cure", "seed", "mse", "dead_share"]
    assert [row["cure"] for row in found] == ["none", "leaky 0.01", "leaky 0.1", "elu", "recycle"]
    untreated, cured = found[0], found[-1]
    assert 2 * float(cured["mse"]) <= float(untreated["mse"])
    assert float(cured["dead_share"]) <= 0.05 < 0.35 < float(untreated["dead_share"])


def test_a_share_of_the_units_is_killed_at_the_start():
    params = dying_relu.draw_network(np.random.default_rng(0), dying_relu.CURES["none"])
    killed = [int((params[f"layer_{i}"]["bias"] == -5).sum()) for i in range(dying_relu.HIDDEN + 1)]
    assert killed == [0, 51, 51, 51, 0, 0]  # 80 % of 64


def test_a_step_takes_every_cure():
    rng, key = np.random.default_rng(0), jax.random.key(0)
    params = dying_relu.draw_network(rng, dying_relu.CURES["none"])
    points = dying_relu.draw_points(rng)
    batches = jnp.zeros((3, dying_relu.BATCH), int)
    for recycling in (False, True):
        state = jax.eval_shape(dying_relu.optimizer(recycling, key).init, params)
        arguments = (jnp.int32(0), params, state, key, batches, *points)
        after = jax.eval_shape(lambda *a, r=recycling: dying_relu.advance(r, *a), *arguments)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, (jax.eval_shape(lambda x: x, params), state))


def test_a_cure_that_does_not_help_ends_with_code_1(tmp_path, monkeypatch, capsys):
    course = np.array([1.0, 0.5])
    monkeypatch.setattr(dying_relu, "train", lambda name, seed, *args: dying_relu.Run(name, seed, course, course))
    error = error_of(dying_relu, 1, capsys, "--quick", "--out", str(tmp_path))
    assert error.startswith(
        "dying_relu.py: recycling must halve the error of no cure and leave at most 5 % dead; for seed 0"
    )
    assert [row["mse"] for row in rows(tmp_path / "dying_relu.csv")] == ["0.5"] * 5
