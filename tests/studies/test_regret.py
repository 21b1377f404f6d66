"""Regret curves: every method runs the same course, reproducibly, on real tables; and the picture of them."""

import numpy as np
import pytest
from searches import METHODS, OURS, Synthetic, plot_regret, regret_curve, regret_curves, run_on_table, run_search


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"cma-es"}))  # cma-es needs a package of its own
def test_every_method_searches_the_table_and_repeats_itself(method: str) -> None:
    first, second = (run_search("digits-shift/1", method, 1, (20, 24)) for _ in range(2))
    assert first == second
    assert first[0] == ("digits-shift/1", method, 1)
    assert list(first[1]) == [20, 24]
    assert all(0.0 <= regret < 3.0 for regret in first[1].values())


def test_ours_finds_more_than_random_search_where_there_is_little_noise() -> None:
    ends = {
        name: np.mean(
            [
                regret_curve(land := Synthetic(s, modules=24, noise=0.05), METHODS[name](land, s), (60,))[60]
                for s in range(3)
            ]
        )
        for name in (OURS, "random")
    }
    assert ends[OURS] < ends["random"] < 1.0


def test_bad_names_and_budgets_are_one_line() -> None:
    with pytest.raises(ValueError) as caught:
        regret_curves(["digits-shift/1"], ["tpes"], [0])
    assert str(caught.value) == (
        "`methods` must be among performance-model; tpe; gp; cma-es; random; tpe-raw; random-raw; evolution, but got 'tpes'."
    )
    with pytest.raises(ValueError, match="^`budgets` must leave trials to confirm, but 6 are too few; take more.$"):
        run_search("digits-shift/1", "random", 0, (6,))


def test_recommendations_on_tables_are_compared_with_one_shot() -> None:
    regret, gap = run_on_table("digits-shift/1", 0)
    assert 0.0 <= regret < 1.0
    assert gap.low < gap.mean < gap.high
    assert gap.high - gap.mean == pytest.approx(0.026, abs=0.003)  # 1.96 sqrt(2 / 3) times a run's noise of 0.0164
    with pytest.raises(ValueError, match="^`name` must be that of a table of RankBench, but got 'synthetic/24'.$"):
        run_on_table("synthetic/24", 0)


def test_the_picture_has_a_panel_a_landscape_and_a_line_a_method() -> None:
    found = regret_curves(["digits-shift/1", "synthetic/24"], ["random", "tpe"], [0, 1], (20, 24))
    assert len(found) == 16
    first, second = plot_regret(found).axes
    assert [axis.get_title(loc="left") for axis in (first, second)] == ["digits-shift/1", "synthetic/24"]
    medians = found.groupby(["landscape", "method", "trials"])["regret"].median()
    for axis in (first, second):
        for line in axis.get_lines()[:2]:
            assert list(line.get_ydata()) == medians[axis.get_title(loc="left"), line.get_label()].tolist()
