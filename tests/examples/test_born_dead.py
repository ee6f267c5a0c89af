import math

import pytest

import born_dead
from scripts import quick_run, rows


def test_born_dead(tmp_path, capsys):
    quick_run(born_dead, tmp_path, capsys)
    found = rows(tmp_path / "born_dead.csv")
    assert list(found[0]) == ["width", "depth", "dead"]
    dead = {(int(row["width"]), int(row["depth"])): float(row["dead"]) for row in found}
    assert list(dead) == [(width, depth) for width in (2, 3, 4, 5, 10) for depth in (3, 5, 10, 20)]
    # 2,000 networks: 4.5 standard errors
    expected = {(2, 3): 0.15625, (2, 5): 0.497, (2, 10): 0.878, (2, 20): 0.994, (10, 20): 0.0067}
    for cell, share in expected.items():
        assert dead[cell] == pytest.approx(share, abs=4.5 * (share * (1 - share) / 2000) ** 0.5)


def test_bounds_on_networks_dead_at_birth():
    assert born_dead.lower_bound(2, 3) == 0.15625
    for width in (2, 3, 10):
        # two hidden layers: the second is dead on both sides of 0, each of which keeps k units with a binomial's probability
        total = sum(math.comb(width, k) / 2**width * (4**-width if 0 < k < width else 2**-width) for k in range(width + 1))
        assert born_dead.upper_bound(width, 2) == 2**-width
        assert born_dead.lower_bound(width, 3) == pytest.approx(total, rel=1e-6)
    assert born_dead.upper_bound(2, 6) == 0.7626953125  # 1 - (3 / 4)^5


def test_a_missed_figure_is_named():
    shares = {2: born_dead.Shares(*[[0.5] * 20] * 3)}
    assert born_dead.miss(shares, 20_000) == "width 2, depth 3: the share dead must lie in 0.1562 to 0.1562, got 0.5000"
