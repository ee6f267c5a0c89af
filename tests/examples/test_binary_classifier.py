import math

import numpy as np
import pytest

import binary_classifier
from scripts import quick_run, rows


def test_binary_classifier(tmp_path, capsys):
    lines = quick_run(binary_classifier, tmp_path, capsys)
    found = rows(tmp_path / "binary_classifier.csv")
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
