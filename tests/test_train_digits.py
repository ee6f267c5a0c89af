import csv
import re
import zipfile

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import digits
import train_digits
from classifiers import ACTIVATIONS

FIELDS = ["epoch", "loss", "validation_loss", "validation_accuracy", "learning_rate", "gradient_norm"]
FILES = ["curves.png", "metrics.csv", "model", "units.png"]
# one program for whatever number of epochs, as the schedule does not depend on it
CHEAP = ["--model", "mlp", "--schedule", "constant", "--clip-norm", "1"]


def run(out, *options):
    train_digits.main(["--out", str(out), *options])


def rows(out):
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def error_of(capsys, *options):
    """Returns the one line on stderr of a run that exits with code 2."""
    with pytest.raises(SystemExit) as exit_info:
        train_digits.main(list(options))
    assert exit_info.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "usage" not in err
    return err


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_short_run(activation, tmp_path, capsys):
    # prelu has a slope a channel, so that it depends on the layer before it; the others do not
    model = "cnn" if activation in ("relu", "prelu") else "mlp"
    run(tmp_path, "--activation", activation, "--model", model, "--epochs", "2")
    out = capsys.readouterr().out.rstrip().splitlines()
    assert out[-1].startswith("test accuracy ")
    assert float(out[-1].split()[2]) > 50  # it learns: one class in ten is 10 %
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    layers = ["hidden1", "hidden2"] if model == "mlp" else ["convolution1", "convolution2", "hidden"]
    units = [f"{layer}/{share}" for layer in layers for share in ("dead", "firing_rate")]
    assert list(rows(tmp_path)[0]) == FIELDS + units
    assert all(0 <= float(row[column]) <= 1 for row in rows(tmp_path) for column in units)
    assert all(float(rows(tmp_path)[-1][f"{layer}/firing_rate"]) > 0 for layer in layers)
    assert [row["epoch"] for row in rows(tmp_path)] == ["1", "2"]
    assert [row["learning_rate"] for row in rows(tmp_path)] == ["0.005", "0.0025"]  # half a cosine
    assert float(rows(tmp_path)[1]["loss"]) < float(rows(tmp_path)[0]["loss"])
    for picture in ("curves.png", "units.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    with ocp.StandardCheckpointer() as checkpointer:
        parameters = checkpointer.restore(tmp_path / "model")
    slopes = [
        value for path, value in jax.tree.leaves_with_path(parameters) if "negative_slope" in jax.tree_util.keystr(path)
    ]
    assert len(slopes) == (3 if activation == "prelu" else 0)
    assert all((slope != 0.25).any() for slope in slopes)


def test_recycle_revives_units(tmp_path, capsys):
    options = [*CHEAP, "--epochs", "4"]
    run(tmp_path / "a", *options)
    assert "units recycled" not in capsys.readouterr().out
    run(tmp_path / "b", *options, "--recycle", "18")
    recycled = re.search(r"units recycled\s+│\s+(\d+)", capsys.readouterr().out)
    assert int(recycled[1]) > 0
    dead = [float(rows(tmp_path / name)[-1]["hidden2/dead"]) for name in "ab"]
    assert dead[1] < dead[0] / 2


def test_equal_seeds_give_equal_metrics_and_a_second_run_replaces_the_first(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    run(a, *CHEAP, "--epochs", "2")
    run(b, *CHEAP, "--epochs", "3", "--seed", "1")
    assert len(rows(b)) == 3
    assert rows(b)[0] != rows(a)[0]
    run(b, *CHEAP, "--epochs", "2")
    assert (a / "metrics.csv").read_bytes() == (b / "metrics.csv").read_bytes()
    assert sorted(path.name for path in b.iterdir()) == FILES


def test_the_step_is_compiled_once(tmp_path, monkeypatch):
    traces = []
    shift = digits.random_shift
    monkeypatch.setattr(digits, "random_shift", lambda *args: traces.append(1) or shift(*args))
    run(tmp_path, *CHEAP, "--epochs", "3")  # 1,257 images: no whole number of batches of 64
    assert len(traces) == 1


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


@pytest.mark.parametrize("patience", [1, 3])
def test_patience_stops_so_many_epochs_after_the_best(patience, tmp_path):
    run(tmp_path, *CHEAP, "--epochs", "60", "--patience", str(patience))
    merits = [(float(row["validation_accuracy"]), -float(row["validation_loss"])) for row in rows(tmp_path)]
    assert len(merits) < 60
    assert merits.index(max(merits)) == len(merits) - 1 - patience


def test_split_is_stratified_and_drawn_with_its_seed():
    data, other = digits.bundled(0), digits.bundled(1)
    assert [len(part.labels) for part in data[:3]] == [1257, 180, 360]
    for part in data[:3]:
        assert np.bincount(part.labels, minlength=10).min() >= 0.095 * len(part.labels)
        assert 0 <= part.images.min() < part.images.max() == 1
    seen = {image.tobytes() for part in data[:3] for image in part.images}
    assert len(seen) == 1797  # no image in two parts
    assert not np.array_equal(data.test.images, other.test.images)


def test_shift_moves_by_one_pixel_at_most():
    image = np.zeros((1, 5, 7, 1), np.float32)
    image[0, 2, 3] = 1
    shifted = np.asarray(digits.random_shift(jax.random.key(0), np.repeat(image, 300, 0)))
    moves = {tuple(at) for at in np.argwhere(shifted[..., 0])[:, 1:]}
    assert moves == {(y, x) for y in (1, 2, 3) for x in (2, 3, 4)}


def arrays(size=(28, 28), classes=3, train=60, test=30):
    rng = np.random.default_rng(0)
    found = {}
    for part, n in (("train", train), ("test", test)):
        labels = np.arange(n) % classes
        images = rng.integers(0, 60, (n, *size), dtype=np.uint8)
        images[np.arange(n), labels, labels] = 255
        found |= {f"x_{part}": images, f"y_{part}": labels.astype(np.uint8)}
    return found


@pytest.mark.parametrize(("model", "size"), [("cnn", (5, 7)), ("mlp", (28, 28))])
def test_other_data(size, model, tmp_path, capsys):
    np.savez(tmp_path / "data.npz", **arrays(size, test=6))  # as many as validate, so that they share a compilation
    run(tmp_path / "out", "--data", str(tmp_path / "data.npz"), "--model", model, "--epochs", "1", "--batch-size", "8")
    assert "test accuracy" in capsys.readouterr().out


def test_other_data_is_scaled_and_split(tmp_path):
    np.savez(tmp_path / "data.npz", **arrays())
    data = digits.from_file(tmp_path / "data.npz", 0)
    assert (data.classes, [len(part.labels) for part in data[:3]]) == (3, [54, 6, 30])
    assert data.test.images.max() == 1
    assert np.bincount(data.validation.labels).tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": None}, "with the arrays x_train, y_train, x_test, y_test, got .* without x_train"),
        ({"x_train": np.zeros((60, 28, 28), np.float32)}, "x_train must be uint8 images.*got float32"),
        ({"x_test": np.zeros((30, 784), np.uint8)}, r"x_test must be uint8 images.*got uint8 of shape \(30, 784\)"),
        ({"x_test": np.zeros((0, 28, 28), np.uint8)}, "x_test must be uint8 images"),
        ({"x_test": np.zeros((30, 27, 28), np.uint8)}, r"x_test must be of the size of x_train, \(28, 28\), got \(27, 28\)"),
        (
            {"y_train": np.zeros(59, np.int64)},
            r"y_train must be 60 integer labels, one an image, got int64 of shape \(59,\)",
        ),
        ({"y_test": np.zeros(30)}, "y_test must be 30 integer labels.*got float64"),
        ({"y_train": np.arange(60) % 3 - 1}, "y_train must be labels of at least 0, got -1"),
        ({"y_test": np.full(30, 7)}, "label 7 in y_test only"),
        ({"y_train": np.zeros(60, int), "y_test": np.zeros(30, int)}, "two or more, got label 0 alone"),
        (
            {"y_train": np.array([2, *[0, 1] * 29, 0])},
            "y_train must hold enough labels of each class|label 2 in y_test only",
        ),
        ({"y_train": np.array([object()] * 60)}, "must be an .npz file"),
    ],
)
def test_malformed_data_is_refused(change, message, tmp_path, capsys):
    changed = {name: value for name, value in (arrays() | change).items() if value is not None}
    np.savez(tmp_path / "data.npz", allow_pickle=True, **changed)
    error = error_of(capsys, "--data", str(tmp_path / "data.npz"), "--out", str(tmp_path / "out"))
    assert re.search(message, error), error


def test_a_file_of_another_kind_is_refused(tmp_path, capsys):
    wanted = "must be an .npz file with the arrays x_train, y_train, x_test, y_test, got"
    assert f"{wanted} '{tmp_path}/no': no such file" in error_of(capsys, "--data", f"{tmp_path}/no")
    assert "a directory" in error_of(capsys, "--data", str(tmp_path))
    (tmp_path / "text.npz").write_text("no archive")
    assert "a file of another kind" in error_of(capsys, "--data", f"{tmp_path}/text.npz")
    np.savez(tmp_path / "cut.npz", **arrays())
    whole = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    assert wanted in error_of(capsys, "--data", f"{tmp_path}/cut.npz")
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
        for name in digits.ARRAYS:
            archive.writestr(f"{name}.npy", b"no array")
    assert "x_train must be uint8 images" in error_of(capsys, "--data", f"{tmp_path}/bad.npz")


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
    error = error_of(capsys, *where, f"{option}={value}")
    assert f"argument {option}: " in error
    assert not (tmp_path / "out").exists()


def test_unknown_options_are_refused(capsys):
    assert "--epoch" in error_of(capsys, "--epoch", "1")  # no abbreviations


def test_unwritable_out_is_found_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_digits, "train", lambda *args: pytest.fail("it trains"))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "argument --out: must be a directory to write to" in error_of(capsys, "--out", str(out))


@pytest.mark.parametrize(("epochs", "files"), [(0, []), (1, FILES)])
def test_ctrl_c_keeps_the_epochs_so_far(epochs, files, tmp_path, monkeypatch, capsys):
    calls, evaluate = [], train_digits.evaluate

    def interrupted(*args):
        calls.append(args)
        if len(calls) > epochs:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(train_digits, "evaluate", interrupted)
    with pytest.raises(SystemExit) as exit_info:
        run(tmp_path, *CHEAP)
    assert exit_info.value.code == 130
    out, error = capsys.readouterr()
    assert out == ""
    kept = f"{tmp_path} holds 1 epochs and the model of epoch 1" if epochs else f"nothing was written to {tmp_path}"
    assert error.rstrip().splitlines()[-1].endswith(f"interrupted: {kept}")
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert len(calls) == epochs + 1
    if epochs:
        assert [row["epoch"] for row in rows(tmp_path)] == ["1"]
