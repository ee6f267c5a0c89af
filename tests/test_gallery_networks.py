import csv
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import activations
import binary_classifier
import compare_activations
import simple_nets
from compare_activations import Trained


def run(example, out, capsys, *options):
    """Returns the lines that a quick run prints, having checked the files that it writes."""
    example.main(["--quick", "--out", str(out), *options])
    names = [f"{example.__name__}.{kind}" for kind in ("csv", "png")]
    assert sorted(path.name for path in out.iterdir()) == names[example is activations :]
    assert (out / names[1]).read_bytes().startswith(b"\x89PNG")
    return capsys.readouterr().out.splitlines()


def rows(out, example):
    with (out / f"{example.__name__}.csv").open() as file:
        return list(csv.DictReader(file))


def cells(lines, *start):
    """Returns the numbers in the first row of a table that starts with these cells, and in all below of the same name."""
    found = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    return [[float(cell) for cell in row[len(start) :]] for row in found if row[: len(start)] == list(start)]


def test_activations(tmp_path, capsys):
    lines = run(activations, tmp_path / "new" / "folder", capsys)
    # the four numbers, the matrix, the integers and the five draws
    assert cells(lines, "relu", "value") == [
        [0, 2.5, 0, 1.6],
        [0, 2, 0, 0, 4, 0],
        [0, 0, 0, 1, 2],
        [0.3367, 0.1288, 0.2345, 0.2303, 0],
    ]
    assert cells(lines, "leaky_relu", "value")[0] == [-0.05, 2.5, -0.0175, 1.6]
    assert cells(lines, "prelu", "value")[1] == [-0.25, 2, -0.75, 0, 4, -1.25]
    assert cells(lines, "elu", "value")[3][-1] == round(math.expm1(-1.1229), 4)
    assert cells(lines, "relu6", "value")[2] == [0, 0, 0, 1, 2]
    of_the_matrix = [row for row in cells(lines, "", "derivative") if len(row) == 6]
    assert of_the_matrix[:3] == [[0, 1, 0, 0, 1, 0], [0.01, 1, 0.01, 0.01, 1, 0.01], [0.25, 1, 0.25, 0.25, 1, 0.25]]
    assert of_the_matrix[3] == [float(f"{math.exp(x):.4g}") for x in (-1, 0, -3, 0, 0, -5)]
    text = "\n".join(lines)
    assert re.search(r"jaxrelu.relu +│ \[0 0 0 1 2\] +│ int32 │ nan", text)
    assert re.search(r"max\(0, x\) +│ \[0 0 0 1 2\] +│ int64 │ 0", text)
    assert "\nrelu(x) is [0.  2.5], then x is [-5.   2.5]\n" in text
    assert "\ninplace.relu(x) is [0.  2.5], then x raises RuntimeError: Array has been deleted\n" in text
    assert lines[-1].startswith("function, linen, nnx and donated form are equal bit for bit")


def test_a_form_that_differs_is_found(tmp_path, capsys, monkeypatch):
    forms = activations.ACTIVATIONS["relu"]
    x = jnp.array([-1.0, 2.0, 3.0])
    assert activations.differences("relu", x) == []
    for change, message in (
        ({"nnx": lambda x: forms.function(x) * (1 + 2**-23)}, "relu, its nnx form"),
        ({"linen": lambda x: jax.lax.stop_gradient(forms.function(x))}, "relu, its linen form"),
        ({"derivative": lambda x: np.where(x > 2, 1, 0)}, "relu, its derivative by NumPy"),
    ):
        monkeypatch.setitem(activations.ACTIVATIONS, "relu", forms._replace(**change))
        assert activations.differences("relu", x) == [message]
    with pytest.raises(SystemExit) as exit_info:
        activations.main(["--out", str(tmp_path)])
    assert exit_info.value.code == 1
    assert capsys.readouterr().err.startswith("activations.py: all forms must agree, but these do not: relu, its derivative")


def test_binary_classifier(tmp_path, capsys):
    lines = run(binary_classifier, tmp_path, capsys)
    found = rows(tmp_path, binary_classifier)
    assert [(row["data"], row["split"], row["epoch"]) for row in found] == [
        (data, "0", str(epoch)) for data in ("random labels", "breast cancer") for epoch in range(1, 11)
    ]
    assert sum(": loss " in line for line in lines) == 20
    assert float(found[0]["loss"]) == pytest.approx(math.log(2), abs=0.15)
    assert float(found[9]["loss"]) < 0.6 < math.log(2) < float(found[9]["held_out_loss"])
    assert float(found[9]["held_out_accuracy"]) == pytest.approx(0.5, abs=0.06)  # 2,000 coins
    accuracy = float(found[19]["held_out_accuracy"])
    assert lines[-1] == f"held-out accuracy {100 * accuracy:.1f} %"
    assert accuracy > 0.9


def test_breast_cancer_is_standardised_by_what_is_trained_on():
    train, held_out = binary_classifier.breast_cancer(0)
    assert (train.inputs.shape, held_out.inputs.shape) == ((455, 30), (114, 30))
    np.testing.assert_allclose(train.inputs.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(train.inputs.std(0), 1, atol=1e-5)
    assert abs(held_out.inputs.mean(0)).max() > 0.05
    # 357 of 569 are benign
    for part in (train, held_out):
        assert part.labels.sum(1).tolist() == [1] * len(part.labels)
        assert part.labels[:, 1].mean() == pytest.approx(357 / 569, abs=0.005)


def test_simple_nets(tmp_path, capsys):
    lines = run(simple_nets, tmp_path, capsys)
    found = rows(tmp_path, simple_nets)
    assert [(row["network"], row["parameter"], row["shape"], row["count"]) for row in found] == [
        ("10-20-1", "hidden.bias", "20", "20"),
        ("10-20-1", "hidden.kernel", "10 x 20", "200"),
        ("10-20-1", "output.bias", "1", "1"),
        ("10-20-1", "output.kernel", "20 x 1", "20"),
        ("10-5", "output.bias", "5", "5"),
        ("10-5", "output.kernel", "10 x 5", "50"),
    ]
    for row in found:
        if "bias" in row["parameter"]:
            assert row["rms"] == row["expected"] == "0.01"
        else:
            assert float(row["expected"]) == pytest.approx((2 / int(row["shape"].split()[0])) ** 0.5, rel=1e-5)
            # 4.5 standard errors of a root mean square
            assert float(row["rms"]) / float(row["expected"]) == pytest.approx(1, abs=4.5 / (2 * int(row["count"])) ** 0.5)
    assert any(line.startswith("10-20-1: 241 parameters; ") for line in lines)
    assert any(line.startswith("10-5: 55 parameters; ") for line in lines)
    assert "linen and nnx give the same outputs bit for bit" in lines


def test_other_weights_give_other_outputs_and_are_found(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(simple_nets.nnx, "update", lambda model, params: None)
    with pytest.raises(SystemExit) as exit_info:
        simple_nets.main(["--quick", "--out", str(tmp_path)])
    assert exit_info.value.code == 1
    assert capsys.readouterr().err.startswith("simple_nets.py: 10-20-1: linen and nnx must agree, got ")


def test_compare_activations(tmp_path, capsys):
    lines = run(compare_activations, tmp_path, capsys)
    found = {row["activation"]: row for row in rows(tmp_path, compare_activations)}
    assert list(found) == ["relu", "elu", "sigmoid"]
    assert list(found["relu"]) == list(compare_activations.Row._fields)
    for name, row in found.items():
        assert row["depth"] == "10"
        assert 0 < float(row["accuracy"]) < 1
        assert float(row["forward_ms"]) > 0
        assert any(line.startswith(f"│ {name} ") for line in lines)
        if name != "relu":
            assert float(row["zeros"]) < 0.01
            assert float(row["dead"]) == 0
    assert 0.3 < float(found["relu"]["zeros"]) < 0.8
    assert float(found["sigmoid"]["gradient"]) < 1e-3 * float(found["relu"]["gradient"])
    assert abs(float(found["elu"]["mean"])) < float(found["relu"]["mean"])


def test_a_row_holds_the_means_over_the_seeds():
    # two epochs, three seeds, 20 images to validate and two to test
    correct = np.zeros((2, 3, 22), bool)
    correct[0, 0, :19] = correct[1, :2, :20] = True
    correct[1, 0, 20:] = correct[1, 1, 20] = True
    trained = Trained(correct, *np.array([[1.0, 2.0, 6.0], [0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [-1.0, 0.0, 0.5]]))
    row = compare_activations.make_row(("centred", 3, "relu"), trained, 20, [1.5, 2.5])
    assert row[:6] == ("centred", 3, "relu", 0.5, 0.5, 2.0)
    assert row[6:] == pytest.approx((0.2, 0.5, -1 / 6, 3.0, 1.5, 2.5))


def test_the_figures_missed_are_named():
    def row(images, depth, name, **changes):
        figures = {"accuracy": 0.95, "mean": 0.1 if name == "elu" else 0.4, "gradient": 1e-6 if name == "sigmoid" else 0.3}
        if name == "sigmoid" or (images, name) == ("moved", "identity"):
            figures["accuracy"] = 0.4
        rest = dict.fromkeys(compare_activations.Row._fields[3:], 0.0)
        return compare_activations.Row(images, depth, name, **(rest | figures | changes))

    def miss(change=None, quick=False, **changes):
        return compare_activations.miss(
            [
                row(images, depth, name, **(changes if (images, depth, name) == change else {}))
                for images, depth, names in compare_activations.FULL
                for name in names
            ],
            quick=quick,
        )

    assert miss() == miss(quick=True) == ""
    assert "sigmoid's gradient" in miss(("centred", 10, "sigmoid"), quick=True, gradient=0.1)
    assert "elu's mean" in miss(("centred", 10, "elu"), mean=-0.6)
    assert "relu6, 3 layers" in miss(("centred", 3, "relu6"), accuracy=0.89)
    assert miss(("centred", 3, "relu6"), quick=True, accuracy=0.89) == ""
    assert "sigmoid must stall" in miss(("centred", 10, "sigmoid"), accuracy=0.7)
    assert "above identity" in miss(("moved", 3, "identity"), accuracy=0.94)
