import math

import pytest

import stable_training
from scripts import quick_run, rows


@pytest.mark.slow
def test_stable_training(tmp_path, capsys):
    lines = quick_run(stable_training, tmp_path, capsys)
    assert any("NaN" in line for line in lines)
    assert lines[-1].startswith("rate 0.3: test accuracy 0.0 %, with clipping, warm-up cosine ")
    runs = {row["training"]: row for row in rows(tmp_path / "summary.csv")}
    assert math.isnan(float(runs["rate 0.3"]["loss"]))
    assert float(runs["clipping, warm-up cosine"]["loss"]) < math.log(10)
    assert len(rows(tmp_path / "steps.csv")) == 2 * stable_training.QUICK_STEPS
    last = {row["last_function"]: row for row in rows(tmp_path / "negative_output.csv")}
    assert float(last["relu"]["gradient_norm"]) == 0
    # relu gives 0 at best, so the loss is the mean of (1 + x^2)^2 on 65 points from -1 to 1
    points = [-1 + 2 * i / 64 for i in range(65)]
    assert float(last["relu"]["loss"]) == pytest.approx(sum((1 + x * x) ** 2 for x in points) / 65, rel=1e-5)
    assert float(last["nothing"]["loss"]) < 0.5
