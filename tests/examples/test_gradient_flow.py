import pytest

import gradient_flow
from scripts import quick_run, rows


def test_gradient_flow(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    quick_run(gradient_flow, out, capsys)
    first = rows(out / "gradient_flow.csv")
    assert list(first[0]) == ["layer", "sigmoid", "relu"]
    assert [row["layer"] for row in first] == [str(i) for i in range(1, 11)]
    assert all(float(row["sigmoid"]) < 0.2 * float(row["relu"]) for row in first)
    # a second run replaces the first, without --quick too
    gradient_flow.main(["--seed", "1", "--out", str(out)])
    assert sorted(path.name for path in out.iterdir()) == sorted(gradient_flow.OUTPUTS)
    second = rows(out / "gradient_flow.csv")
    assert len(second) == len(first)
    assert second != first


def test_a_missed_figure_takes_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gradient_flow, "layer_gradients", lambda name, key: [1.0] * gradient_flow.LAYERS)
    monkeypatch.setattr(gradient_flow, "draw", lambda path, flows: path.touch())
    monkeypatch.setitem(gradient_flow.EXPECTED, "relu", [0.3, 0.3])
    with pytest.raises(SystemExit) as exit_info:
        gradient_flow.main(["--quick", "--out", str(tmp_path)])
    assert exit_info.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("gradient_flow.py: the gradients in x must be ")
    assert error.count("\n") == 1
