import numpy as np
import pytest

import compare_activations
from compare_activations import Trained
from scripts import quick_run, rows


@pytest.mark.slow
def test_compare_activations(tmp_path, capsys):
    lines = quick_run(compare_activations, tmp_path, capsys)
    found = {row["activation"]: row for row in rows(tmp_path / "compare_activations.csv")}
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
