import math

import numpy as np
import pytest

import stable_training
from common import options
from scripts import quick_run, rows
from stable_training import CLIPS, EXPLODES, RECIPES, SUITS, Run


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, ""),
        ((SUITS, "dead"), "clipping alone must leave 20 %"),
        ((CLIPS, "dead"), "clipping alone must leave 20 %"),
        (("clipping, step", "accuracy"), "clipping, step must reach 80 %, got nan %"),
        (("nothing", None), "with a relu on a negative output"),
        (("relu", None), "with a relu on a negative output"),
    ],
)
def test_nan_passes_no_check(change, message, capsys):
    runs = {name: Run(np.array([0.1]), np.array([1.0]), np.array([0.04]), 0.9) for name in RECIPES}
    runs[EXPLODES] = runs[EXPLODES]._replace(loss=np.array([math.nan]))
    runs[CLIPS] = runs[CLIPS]._replace(dead=np.array([0.4]))
    fits = {"relu": np.array([[1.9], [0.0]]), "nothing": np.array([[0.001], [0.1]])}
    if change:
        name, figure = change
        if figure is None:
            fits[name] = np.full((2, 1), math.nan)
        else:
            runs[name] = runs[name]._replace(**{figure: np.array([math.nan]) if figure == "dead" else math.nan})
    parser = options.Parser("stable_training.py", "", stable_training.OUTPUTS, "")
    if not message:
        stable_training.check(parser, False, runs, fits)
        return
    with pytest.raises(SystemExit) as exit_info:
        stable_training.check(parser, False, runs, fits)
    assert exit_info.value.code == 1
    assert capsys.readouterr().err.startswith(f"stable_training.py: {message}")
