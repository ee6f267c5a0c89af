import csv
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import relu6_convnet
import relu_prime
import stable_training


def run(program, out, capsys):
    """Returns what a quick run prints, and the rows of its CSV files by name; checks which files it leaves."""
    program.main(["--quick", "--out", str(out)])
    assert sorted(path.name for path in out.iterdir()) == sorted(program.OUTPUTS)
    (picture,) = out.glob("*.png")
    header = picture.read_bytes()[:20]
    assert header.startswith(b"\x89PNG")
    assert int.from_bytes(header[16:20], "big") == 800  # pixels across
    tables = {}
    for path in out.glob("*.csv"):
        with path.open() as file:
            tables[path.stem] = list(csv.DictReader(file))
    return capsys.readouterr().out, tables


def test_relu6_convnet(tmp_path, capsys):
    out, tables = run(relu6_convnet, tmp_path, capsys)
    (row,) = tables["accuracy"]
    assert (row["activation"], row["dtype"]) == ("relu6", "float32")
    assert out.splitlines()[-1] == (
        f"relu6: test accuracy {100 * float(row['accuracy']):.2f} %, "
        f"with 8-bit activations {100 * float(row['accuracy_8_bits']):.2f} %"
    )
    assert float(row["accuracy_2_bits"]) < float(row["accuracy"])  # the rounding does something
    assert all(0 < float(layer["largest"]) <= 6 for layer in tables["ranges"])
    assert {layer["step_8_bits"] for layer in tables["ranges"]} == {"0.0235294"}  # 6/255


def test_depthwise_is_a_convolution_with_a_group_a_channel():
    x = jax.random.normal(jax.random.key(0), (2, 7, 9, 5))
    for stride in (1, 2):
        ours = relu6_convnet.Depthwise(5, stride, nnx.initializers.normal(), jnp.float32, nnx.Rngs(0))
        peer = nnx.Conv(5, 5, (3, 3), stride, padding=1, use_bias=False, feature_group_count=5, rngs=nnx.Rngs(0))
        peer.kernel[...] = ours.kernel[...]
        y, wanted = nnx.jit(lambda ours, peer: (ours(x), peer(x)))(ours, peer)
        assert y.shape == wanted.shape
        assert jnp.abs(y - wanted).max() < 1e-6 < jnp.abs(y).max()


def test_stable_training(tmp_path, capsys):
    out, tables = run(stable_training, tmp_path, capsys)
    assert "NaN" in out
    assert out.splitlines()[-1].startswith("rate 0.3: test accuracy 0.0 %, with clipping, warm-up cosine ")
    runs = {row["training"]: row for row in tables["summary"]}
    assert math.isnan(float(runs["rate 0.3"]["loss"]))
    assert float(runs["clipping, warm-up cosine"]["loss"]) < math.log(10)
    assert len(tables["steps"]) == 2 * stable_training.QUICK_STEPS
    last = {row["last_function"]: row for row in tables["negative_output"]}
    assert float(last["relu"]["gradient_norm"]) == 0
    # relu gives 0 at best, so the loss is the mean of (1 + x^2)^2 on 65 points from -1 to 1
    points = [-1 + 2 * i / 64 for i in range(65)]
    assert float(last["relu"]["loss"]) == pytest.approx(sum((1 + x * x) ** 2 for x in points) / 65, rel=1e-5)
    assert float(last["nothing"]["loss"]) < 0.5


def test_relu_prime(tmp_path, capsys):
    out, tables = run(relu_prime, tmp_path, capsys)
    shares = {row["dtype"]: float(row["share"]) for row in tables["minibatches"]}
    assert shares["bfloat16"] > 0.5
    assert shares["float32"] == 0
    mean = {(row["rule"], row["kink"]): float(row["mean"]) for row in tables["accuracy"]}
    assert mean["assigned", "10"] < 0.5 < mean["scaled", "10"]
    assert out.splitlines()[-1].startswith("bfloat16, relu'(0) = 10: test accuracy ")


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
    with pytest.raises(SystemExit) as exit_info:
        relu_prime.main(["--quick", "--out", str(tmp_path)])
    assert exit_info.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("relu_prime.py: the constant 10 in place of the gradient")
