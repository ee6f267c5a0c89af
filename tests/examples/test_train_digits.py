import itertools
import math
import re
import resource
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import train_digits
from common import classifiers, digits, runs, training
from common.classifiers import ACTIVATIONS, MODELS
from scripts import arrays, check_picture, check_width, error_of, rows

FIELDS = ["epoch", "loss", "validation_loss", "validation_accuracy", "learning_rate", "gradient_norm"]
FILES = ["curves.png", "metrics.csv", "model", "units.png"]
CHEAP = ["--model", "mlp", "--schedule", "constant", "--clip-norm", "1", "--epochs", "4"]


def run(out, *options):
    train_digits.main(["--out", str(out), *options])


def leave_pictures_blank(monkeypatch):
    """Takes away what drawing costs, where a test is about something else."""
    for writer in ("write_curves", "write_units"):
        monkeypatch.setattr(runs, writer, lambda path, *args: path.touch())


def metrics(out):
    return rows(out / "metrics.csv")


def refusal(capsys, *options):
    """Returns the one line on stderr of a run that exits with code 2."""
    with pytest.raises(SystemExit) as exit_info:
        train_digits.main(list(options))
    assert exit_info.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "usage" not in err
    return err


def check_run(out, model, lines):
    """Checks what every run writes and prints, here one of several epochs; returns its metrics."""
    assert lines[-1].startswith("test accuracy ")
    assert float(lines[-1].split()[2]) > 50  # it learns: one class in ten is 10 %
    assert sorted(path.name for path in out.iterdir()) == FILES
    found = metrics(out)
    layers = ["hidden1", "hidden2"] if model == "mlp" else ["convolution1", "convolution2", "hidden"]
    units = [f"{layer}/{share}" for layer in layers for share in ("dead", "firing_rate")]
    assert list(found[0]) == FIELDS + units
    assert all(0 <= float(row[column]) <= 1 for row in found for column in units)
    assert all(float(found[-1][f"{layer}/firing_rate"]) > 0 for layer in layers)
    assert [row["epoch"] for row in found] == [str(epoch) for epoch in range(1, len(found) + 1)]
    assert float(found[-1]["loss"]) < float(found[0]["loss"])
    for picture in ("curves.png", "units.png"):
        check_picture(out / picture)
    return found


def saved(out):
    """Returns a run's checkpoint."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(out / "model")


def slopes_of(out):
    """Returns the learned slopes in a run's checkpoint."""
    found = jax.tree.leaves_with_path(saved(out))
    assert found
    return [value for path, value in found if "negative_slope" in jax.tree_util.keystr(path)]


def test_short_runs(tmp_path, capsys, monkeypatch):
    a, b = tmp_path / "a", tmp_path / "b"
    traces, shift = [], digits.random_shift
    monkeypatch.setattr(digits, "random_shift", lambda *args: traces.append(1) or shift(*args))
    run(a, *CHEAP)
    assert len(traces) == 1  # one compilation, though 1,257 images are no whole number of batches of 64
    printed, progress = capsys.readouterr()
    assert "4/4" in check_width(progress)
    assert "accuracy " in progress
    check_run(a, "mlp", printed.rstrip().splitlines())
    assert "units recycled" not in printed
    # of the 256 units of hidden2 a third is dead
    share = float(metrics(a)[-1]["hidden2/dead"])
    assert f"No validation image activates {share:.1%} of the units of hidden2. This is no harm" in printed.replace("\n", "")
    assert slopes_of(a) == []

    leave_pictures_blank(monkeypatch)
    run(b, *CHEAP, "--recycle", "18")
    recycled = re.search(r"units recycled\s+│\s+(\d+)", capsys.readouterr().out)
    assert int(recycled[1]) > 0
    dead = [float(metrics(out)[-1]["hidden2/dead"]) for out in (a, b)]
    assert dead[1] < dead[0] / 2

    # equal seeds give equal metrics, and a second run replaces the first
    run(b, *CHEAP)
    assert (a / "metrics.csv").read_bytes() == (b / "metrics.csv").read_bytes()
    assert sorted(path.name for path in b.iterdir()) == FILES
    run(b, *CHEAP, "--seed", "1", "--epochs", "1")
    assert len(metrics(b)) == 1
    assert metrics(b)[0] != metrics(a)[0]


def test_batch_norm(tmp_path, capsys, monkeypatch):
    leave_pictures_blank(monkeypatch)

    def built(*args):
        model = classifiers.NormedCNN(*args)
        # a unit that no batch activates, and whose running mean of thousands would keep a fresh one from firing
        model.convolution1.kernel[...] = model.convolution1.kernel[...].at[..., 3].set(1000.0)
        model.norm1.bias[...] = model.norm1.bias[...].at[3].set(-100.0)
        return model

    monkeypatch.setitem(MODELS, "cnn_norm", built)
    options = ["--model", "cnn_norm", "--epochs", "1"]
    run(tmp_path, *options)
    assert metrics(tmp_path)[0]["convolution1/dead"] == "0.03125"  # one of 32
    assert saved(tmp_path)["norm1"]["mean"][3] > 100
    assert "151,402" in capsys.readouterr().out  # running statistics are no parameters

    run(tmp_path, *options, "--recycle", "19")  # in the last step of the epoch
    assert metrics(tmp_path)[0]["convolution1/dead"] == "0"
    norm = saved(tmp_path)["norm1"]
    assert np.flatnonzero(norm["mean"] == 0).tolist() == np.flatnonzero(norm["var"] == 1).tolist() == [3]
    assert float(capsys.readouterr().out.split()[-2]) > 50


def test_the_best_epoch_has_its_running_statistics(tmp_path, scripted, monkeypatch):
    means, merits = [], iter([0.9, 0.5, 0.9])

    def train_step(model, *args):
        model.norm1.mean[...] += 1
        return 1.0, 1.0

    def evaluate(model, part):
        means.append(float(model.norm1.mean[0]))
        return scored(0.5, next(merits))()

    scripted([], [])
    monkeypatch.setattr(training, "train_step", train_step)
    monkeypatch.setattr(train_digits, "evaluate", evaluate)
    run(tmp_path, "--model", "cnn_norm", "--epochs", "2")
    assert means == [19, 38, 19]  # of the first epoch, the second and the test
    assert (saved(tmp_path)["norm1"]["mean"] == 19).all()


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_short_run(activation, tmp_path, capsys):
    # prelu has one slope per channel, so that it depends on the layer before it; the others do not
    model = {"relu": "cnn", "prelu": "cnn", "relu6": "cnn_norm"}.get(activation, "mlp")
    run(tmp_path, "--activation", activation, "--model", model, "--epochs", "2")
    found = check_run(tmp_path, model, capsys.readouterr().out.rstrip().splitlines())
    assert [row["learning_rate"] for row in found] == ["0.005", "0.0025"]  # half a cosine
    slopes = slopes_of(tmp_path)
    assert len(slopes) == (3 if activation == "prelu" else 0)
    assert all((slope != 0.25).any() for slope in slopes)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_network_can_be_built(activation, model):
    def logits(images):
        return MODELS[model](images.shape[1:3], 7, ACTIVATIONS[activation], nnx.Rngs(0))(images)

    assert nnx.eval_shape(logits, np.zeros((3, 5, 9, 1), np.float32)).shape == (3, 7)


@pytest.mark.parametrize(
    ("schedule", "at_300"),
    [("constant", 0.002), ("cosine", 0.000292893), ("exponential", 0.0000632456), ("step", 0.00002)],
)
def test_schedules(schedule, at_300):
    rate = train_digits.make_schedule(schedule, 0.002, 400)
    rates = [float(rate(step)) for step in range(0, 401, 50)]
    assert rates[0] == pytest.approx(0.002)
    assert rates[6] == pytest.approx(at_300, rel=1e-5)
    assert rates == sorted(rates, reverse=True)
    assert (len(set(rates)) == 1) == (schedule == "constant")


@pytest.fixture
def scripted(monkeypatch):
    """Puts given losses of steps and given results of evaluations in the place of training."""

    leave_pictures_blank(monkeypatch)

    def script(losses, evaluations):
        step, score = itertools.cycle(losses), iter(evaluations)
        monkeypatch.setattr(training, "train_step", lambda *args: (next(step), 1.0))
        monkeypatch.setattr(train_digits, "evaluate", lambda *args: next(score)())

    return script


def scored(loss, accuracy):
    """Returns an evaluation that gives these two, and all units alive."""
    return lambda: (loss, accuracy, {"hidden1/dead": 0.0, "hidden1/firing_rate": 0.5})


@pytest.mark.parametrize("patience", [1, 3])
def test_patience_stops_so_many_epochs_after_the_best(patience, tmp_path, scripted):
    # the best is the third epoch: at the best accuracy the lowest loss, and of equal epochs the first
    merits = [(0.9, 0.5), (0.8, 0.6), (0.7, 0.7), (0.7, 0.7), (0.6, 0.65), (0.75, 0.7)]
    scripted([1.0], [scored(*merit) for merit in [*merits, *[(0.7, 0.7)] * 60]])
    run(tmp_path, *CHEAP, "--epochs", "60", "--patience", str(patience))
    assert len(metrics(tmp_path)) == 3 + patience


@pytest.mark.slow
@pytest.mark.parametrize(("model", "size"), [("cnn", (5, 7)), ("mlp", (28, 28))])
def test_other_data(size, model, tmp_path, capsys):
    np.savez(tmp_path / "data.npz", **arrays(size, test=6))  # as many as validate, so that they share a compilation
    run(tmp_path / "out", "--data", str(tmp_path / "data.npz"), "--model", model, "--epochs", "4", "--batch-size", "8")
    assert "test accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--activation", "gelu"),
        ("--model", "transformer"),
        ("--schedule", "linear"),
        ("--epochs", "0"),
        ("--epochs", "1.5"),
        ("--batch-size", "-1"),
        ("--batch-size", "many"),
        ("--batch-size", "1258"),
        ("--learning-rate", "0"),
        ("--learning-rate", "nan"),
        ("--learning-rate", "inf"),
        ("--clip-norm", "-1"),
        ("--clip-norm", "nan"),
        ("--patience", "-1"),
        ("--seed", "-1"),
        ("--split-seed", "x"),
        ("--out", ""),
    ],
)
def test_bad_option_is_refused_in_one_line(option, value, tmp_path, capsys):
    where = () if option == "--out" else ("--out", str(tmp_path / "out"))
    error = refusal(capsys, *where, f"{option}={value}")
    assert f"argument {option}: " in error
    assert not (tmp_path / "out").exists()


def test_unknown_options_are_refused(capsys):
    assert "--epoch" in refusal(capsys, "--epoch", "1")  # no abbreviations


def test_unwritable_out_is_found_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_digits, "train", lambda *args: pytest.fail("it trains"))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "argument --out: must be a directory to write to" in refusal(capsys, "--out", str(out))


@pytest.mark.parametrize(
    ("number", "epochs", "files"), [(signal.SIGINT, 0, []), (signal.SIGINT, 1, FILES), (signal.SIGTERM, 2, FILES)]
)
def test_a_signal_keeps_the_epochs_so_far(number, epochs, files, tmp_path, scripted, capsys):
    scripted([1.0], [scored(0.5, 0.9)] * epochs + [lambda: signal.raise_signal(number)])
    with pytest.raises(SystemExit) as exit_info:
        run(tmp_path, *CHEAP)
    assert exit_info.value.code == 128 + number
    out, error = capsys.readouterr()
    assert out == ""
    plural = "s" if epochs > 1 else ""
    kept = (
        f"{tmp_path} holds {epochs} epoch{plural} and the model of epoch 1"
        if epochs
        else f"nothing was written to {tmp_path}"
    )
    assert error.rstrip().splitlines()[-1] == f"interrupted: {kept}"
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    if epochs:
        assert [row["epoch"] for row in metrics(tmp_path)] == [str(epoch + 1) for epoch in range(epochs)]


def test_a_disk_without_room_for_the_model_leaves_the_earlier_run(tmp_path, scripted, capsys, monkeypatch):
    scripted([1.0], [scored(0.5, 0.9)] * 5 * 2)
    run(tmp_path, *CHEAP)
    before = (tmp_path / "metrics.csv").stat().st_ino
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # a limit on the size of files, as a full disk would need the rights of root
    monkeypatch.setattr(runs, "write_units", lambda *args: resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, hard)))
    try:
        error = error_of(train_digits, 1, capsys, *CHEAP, "--out", str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error == f"train_digits.py: File too large; nothing was written to {tmp_path}"
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    assert (tmp_path / "metrics.csv").stat().st_ino == before


def test_a_loss_that_is_not_finite_ends_with_code_1_and_leaves_nothing(tmp_path, scripted, capsys):
    scripted([1.0] * 19 + [math.nan], [scored(0.5, 0.9)] * 4)  # 19 steps per epoch
    error = error_of(train_digits, 1, capsys, *CHEAP, "--out", str(tmp_path))
    assert error == "train_digits.py: the loss is nan in epoch 2; lower --learning-rate or --clip-norm"
    assert list(tmp_path.iterdir()) == []


def test_a_last_step_that_ruins_the_network_is_divergence(tmp_path, scripted, capsys):
    scripted([1.0], [scored(0.5, 0.9)] * 3 + [scored(math.nan, 0.1)])
    error = error_of(train_digits, 1, capsys, *CHEAP, "--clip-norm", "0", "--out", str(tmp_path))
    assert error == "train_digits.py: the validation loss is nan in epoch 4; lower --learning-rate or set --clip-norm"
    assert list(tmp_path.iterdir()) == []


def test_what_dead_units_mean_is_said():
    def said(hidden1, hidden2, activation="relu", *, recycling=False):
        units = {"hidden1/dead": hidden1, "hidden1/firing_rate": 0.5, "hidden2/dead": hidden2, "hidden2/firing_rate": 0.9}
        return runs.on_dead_units(runs.Epoch(1, 1.0, 1.0, 0.5, 0.1, 1.0, units), activation, recycling=recycling)

    assert said(0.0, 0.09) == ""
    assert said(0.375, 0.25) == (
        "No validation image activates 37.5% of the units of hidden1. This is no harm in itself: the other units do the "
        "work. But those that no training image activates either get no gradient and learn no more. To keep more of them "
        "alive, try --recycle 100 or --activation elu."
    )
    assert said(0.1, 0.25, "relu6", recycling=True).endswith("try a smaller --recycle or --activation elu.")
    assert "of hidden2. So the network cannot tell images apart." in said(0.1, 1.0)
    for activation in ("leaky_relu", "prelu", "elu"):
        assert said(0.2, 0.1, activation).endswith(
            f"With {activation} they still get a gradient, through the slope below 0, and go on learning."
        )


def test_a_small_data_set_is_one_batch(tmp_path, scripted, monkeypatch, capsys):
    np.savez(tmp_path / "data.npz", **arrays(size=(3, 3)))  # 54 to train
    options = ["--data", str(tmp_path / "data.npz"), "--out", str(tmp_path / "out"), *CHEAP]
    scripted([1.0], [scored(0.5, 0.9)] * 5)
    sizes, batches = [], training.batches
    monkeypatch.setattr(training, "batches", lambda rng, n, size: sizes.append(size) or batches(rng, n, size))
    train_digits.main(options)
    assert sizes == [54] * 4
    error = error_of(train_digits, 2, capsys, *options, "--batch-size", "64")
    assert error == "train_digits.py: error: argument --batch-size: must be at most 54, all training images, got 64"


def test_an_accuracy_of_chance_ends_with_code_1(tmp_path, scripted, capsys):
    scripted([1.0], [scored(0.5, 0.1)] * 5)
    error = error_of(train_digits, 1, capsys, *CHEAP, "--out", str(tmp_path))
    assert error.startswith("train_digits.py: the test accuracy must be above 10.")
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
