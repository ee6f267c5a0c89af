import csv
import math

import pytest

import born_dead
import dying_relu
import gradient_flow

EXAMPLES = [born_dead, dying_relu, gradient_flow]
NAMES = {example: [f"{example.__name__}.csv", f"{example.__name__}.png"] for example in EXAMPLES}


def rows(out, example):
    with (out / f"{example.__name__}.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module", params=EXAMPLES, ids=lambda example: example.__name__)
def run(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param.__name__) / "new" / "folder"
    request.param.main(["--quick", "--out", str(out)])
    return request.param, out


def test_quick_runs_reach_their_figures(run, capsys):
    example, out = run
    assert sorted(path.name for path in out.iterdir()) == NAMES[example]
    assert (out / NAMES[example][1]).read_bytes().startswith(b"\x89PNG")
    found = rows(out, example)
    if example is dying_relu:
        assert list(found[0]) == ["cure", "seed", "mse", "dead_share"]
        assert [row["cure"] for row in found] == ["none", "leaky 0.01", "leaky 0.1", "elu", "recycle"]
        untreated, cured = found[0], found[-1]
        assert 2 * float(cured["mse"]) <= float(untreated["mse"])
        assert float(cured["dead_share"]) <= 0.05 < 0.35 < float(untreated["dead_share"])
    elif example is born_dead:
        assert list(found[0]) == ["width", "depth", "dead"]
        dead = {(int(row["width"]), int(row["depth"])): float(row["dead"]) for row in found}
        assert list(dead) == [(width, depth) for width in (2, 3, 4, 5, 10) for depth in (3, 5, 10, 20)]
        # 2,000 networks: 4.5 standard errors
        expected = {(2, 3): 0.15625, (2, 5): 0.497, (2, 10): 0.878, (2, 20): 0.994, (10, 20): 0.0067}
        for cell, share in expected.items():
            assert dead[cell] == pytest.approx(share, abs=4.5 * (share * (1 - share) / 2000) ** 0.5)
    else:
        assert list(found[0]) == ["layer", "sigmoid", "relu"]
        assert [row["layer"] for row in found] == [str(i) for i in range(1, 11)]
        assert all(float(row["sigmoid"]) < 0.2 * float(row["relu"]) for row in found)


def test_bounds_on_networks_dead_at_birth():
    assert born_dead.lower_bound(2, 3) == 0.15625
    for width in (2, 3, 10):
        # two hidden layers: the second is dead on both sides of 0, each of which keeps k units with a binomial's probability
        total = sum(math.comb(width, k) / 2**width * (4**-width if 0 < k < width else 2**-width) for k in range(width + 1))
        assert born_dead.upper_bound(width, 2) == 2**-width
        assert born_dead.lower_bound(width, 3) == pytest.approx(total, rel=1e-6)
    assert born_dead.upper_bound(2, 6) == 0.7626953125  # 1 - (3 / 4)^5


def test_a_missed_figure_takes_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(gradient_flow.EXPECTED, "relu", [0.3, 0.3])
    with pytest.raises(SystemExit) as exit_info:
        gradient_flow.main(["--quick", "--out", str(tmp_path)])
    assert exit_info.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("gradient_flow.py: the gradients in x must be ")
    assert error.count("\n") == 1
    shares = {2: born_dead.Shares(*[[0.5] * 20] * 3)}
    assert born_dead.miss(shares, 20_000) == "width 2, depth 3: the share dead must lie in 0.1562 to 0.1562, got 0.5000"


def test_a_second_run_replaces_the_first(tmp_path):
    found = []
    for seed in ("0", "1"):
        gradient_flow.main(["--seed", seed, "--out", str(tmp_path)])
        assert sorted(path.name for path in tmp_path.iterdir()) == NAMES[gradient_flow]
        found.append(rows(tmp_path, gradient_flow))
    assert len(found[0]) == len(found[1])
    assert found[0] != found[1]
