import jax
import jax.numpy as jnp
import pytest

import relu_prime
from scripts import error_of, quick_run, rows


@pytest.mark.slow
def test_relu_prime(tmp_path, capsys):
    lines = quick_run(relu_prime, tmp_path, capsys)
    shares = {row["dtype"]: float(row["share"]) for row in rows(tmp_path / "minibatches.csv")}
    assert shares["bfloat16"] > 0.5
    assert shares["float32"] == 0
    mean = {(row["rule"], row["kink"]): float(row["mean"]) for row in rows(tmp_path / "accuracy.csv")}
    assert mean["assigned", "10"] < 0.5 < mean["scaled", "10"]
    assert lines[-1].startswith("bfloat16, relu'(0) = 10: test accuracy ")


def test_the_assigned_rule_is_the_wrong_one():
    x = jnp.array([-2.0, 0.0, 3.0])
    for rule, at_zero in (("scaled", 35.0), ("assigned", 5.0)):
        _, vjp = jax.vjp(lambda x, rule=rule: relu_prime.RULES[rule](x, kink=5.0), x)
        assert vjp(jnp.array([7.0, 7.0, 7.0]))[0].tolist() == [0.0, at_zero, 7.0]


def test_a_missed_figure_ends_with_code_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(relu_prime, "share_of_minibatches", lambda part, dtype, *args: float(dtype == "bfloat16"))
    monkeypatch.setattr(
        relu_prime, "accuracies", lambda data, rule, kink, *args: relu_prime.Accuracy(rule, kink, 0.9, 0.8, 1.0)
    )
    error = error_of(relu_prime, 1, capsys, "--quick", "--out", str(tmp_path))
    assert error.startswith("relu_prime.py: the constant 10 in place of the gradient")
