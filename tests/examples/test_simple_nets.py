import pytest

import simple_nets
from scripts import error_of, quick_run, rows


def test_simple_nets(tmp_path, capsys):
    lines = quick_run(simple_nets, tmp_path, capsys)
    found = rows(tmp_path / "simple_nets.csv")
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
    error = error_of(simple_nets, 1, capsys, "--quick", "--out", str(tmp_path))
    assert error.startswith("simple_nets.py: 10-20-1: linen and nnx must agree, got ")
