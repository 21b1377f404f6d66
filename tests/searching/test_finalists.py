"""The recommendation among finalists: one-shot, unless another is better, as far as the seeds can tell."""

import numpy as np
import pytest
from scipy import stats

import rankscope as rs
from rankscope.searching.confirmation import (
    Finalist,
    Recommendation,
    choose_finalists,
    judge,
    pareto_front,
    recommend,
)
from rankscope.searching.storage import Trial

TARGETS = tuple(rs.TargetModule(name=n, in_features=8, out_features=8) for n in "abc")


def trial(number: int, origin: str, ranks: tuple[int, ...], metric: float = 0.5, reused: int | None = None) -> Trial:
    return Trial(
        number=number,
        origin=origin,
        allocation=rs.RankAllocation(TARGETS, ranks),
        learning_rate=0.01,
        metric=metric,
        loss=1.0 - metric,
        metrics_by_seed={"0": metric},
        difference=None,
        wall_seconds=1.0,
        reused=reused,
    )


def finalists(metrics: dict[str, list[float]]) -> list[Finalist]:
    origins = [name if name in ("uniform", "one-shot") else "sampler" for name in metrics]
    trials = [trial(i, origin, (i, 0, 0)) for i, origin in enumerate(origins)]
    return list(judge(trials, [{str(500 + j): v for j, v in enumerate(values)} for values in metrics.values()]))


def recommended(metrics: dict[str, list[float]]) -> Recommendation:
    return recommend([f.trial for f in finalists(metrics)], list(metrics.values()))


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"uniform": [0.644, 0.647], "one-shot": [0.636, 0.634], "a": [0.643, 0.653]}, 0),  # a is ahead within noise
        ({"uniform": [0.80, 0.82], "one-shot": [0.90, 0.93], "a": [0.92, 0.92]}, 1),  # so is a over one-shot
        ({"uniform": [0.80, 0.82], "one-shot": [0.85, 0.87], "a": [0.91, 0.93], "b": [0.92, 0.94]}, 3),  # no noise: the best
        ({"uniform": [0.51], "one-shot": [0.50], "a": [0.60]}, 1),  # one seed tells too little
        ({"uniform": [0.63, 0.60], "one-shot": [0.61, 0.61], "a": [0.60, 0.62]}, 1),  # within the noise of two
        ({"uniform": [0.63, 0.60], "a": [0.60, 0.64]}, 0),
        ({"uniform": [0.50, 0.60]}, 0),
    ],
)  # fmt: skip
def test_recommendation(metrics: dict[str, list[float]], expected: int) -> None:
    assert recommended(metrics).trial == finalists(metrics)[expected].trial


def test_one_shot_is_kept_most_of_the_time_where_nothing_is_better() -> None:
    """Five equal finalists: the best mean is one-shot's one time in five, the recommendation much more often."""
    rng = np.random.default_rng(0)
    kept = 0
    for _ in range(300):
        noise = rng.normal(size=(5, 4))
        found = recommended({n: row.tolist() for n, row in zip(["uniform", "one-shot", *"abc"], noise, strict=True)})
        kept += found.trial.origin == "one-shot"
    assert kept > 100


def test_a_real_gain_is_recommended() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        gains = np.array([0.0, 0.0, 0.1, 0.0, 0.0])[:, None] + 0.01 * rng.normal(size=(5, 4))
        found = recommended({n: row.tolist() for n, row in zip(["uniform", "one-shot", *"abc"], gains, strict=True)})
        assert found.trial.number == 2


class Belief:
    """A model whose posterior differences are given, by first rank, whatever was measured again."""

    def __init__(self, worth: list[float], half: float) -> None:
        self.worth, self.half = np.array(worth), half

    def posterior_differences(self, ranks: list, reference: int, **retests: object) -> np.ndarray:
        worth = self.worth[[row[0] for row in ranks]]
        mean = worth - worth[reference]
        return np.column_stack([mean, mean - self.half, mean + self.half])


@pytest.mark.parametrize(
    ("fresh", "worth", "half", "expected", "reason"),
    [
        ([[0.5], [0.6], [0.7]], [0.0, 0.1, 0.2], 0.3, 2,
         "trial 2 is recommended: it is above uniform and one-shot on fresh seeds, and best in the posterior mean"),
        ([[0.5], [0.6], [0.59]], [0.0, 0.1, 0.2], 0.3, 1,
         "one-shot is recommended: the posterior mean of trial 2 is higher, but fresh seeds put it below one-shot"),
        ([[0.6], [0.5], [0.4]], [0.2, 0.1, 0.3], 0.3, 0,
         "uniform is recommended: the posterior mean of trial 2 is higher, but fresh seeds put it below uniform and one-shot"),
        ([[0.6], [0.5], [0.4]], [0.0, 0.1, 0.2], 0.3, 1,
         "one-shot is recommended: the posterior puts it +10.0 [-20.0, +40.0] points above uniform, though fresh seeds put it 10.0 points below"),
        ([[0.5], [0.6], [0.59]], [0.0, 0.1, 0.2], 0.05, 2,
         "trial 2 is recommended: the posterior puts it +10.0 [+5.0, +15.0] points above one-shot, though fresh seeds put it 1.0 points below"),
        ([[0.5], [0.6], [0.7]], [0.2, 0.3, 0.1], 0.3, 1, "one-shot is recommended: no proposal is better in the posterior mean"),
        ([[], [], []], [0.0, 0.1, 0.2], 0.3, 1,
         "one-shot is recommended: these are too few trainings to tell proposals from it"),
        ([[], [], []], [0.0, 0.1, 0.2], 0.05, 2,
         "trial 2 is recommended: the posterior puts it +20.0 [+15.0, +25.0] points above uniform, though nothing is confirmed"),
    ],
)  # fmt: skip
def test_nothing_below_uniform_or_one_shot_is_recommended_unless_the_posterior_says_why(
    fresh: list, worth: list, half: float, expected: int, reason: str
) -> None:
    trials = [trial(i, origin, (i, 0, 0)) for i, origin in enumerate(["uniform", "one-shot", "sampler"])]
    assert recommend(trials, fresh, Belief(worth, half)) == Recommendation(trials[expected], reason)


def test_reasons_without_a_model() -> None:
    trials = [trial(i, origin, (i, 0, 0), 0.5 - 0.1 * i) for i, origin in enumerate(["uniform", "one-shot", "sampler"])]
    above = "trial 2 is recommended: it is above uniform and one-shot on fresh seeds"
    assert recommend(trials, [[0.50, 0.51], [0.55, 0.56], [0.6, 0.62]]).reason == above
    for fresh, why in (
        ([[0.50], [0.55], [0.57]], "one fresh seed tells too little to prefer a proposal"),
        ([[0.56], [0.55], [0.57]], "the profile speaks for it, though fresh seeds put it 1.0 points below uniform, by one seed, which tells little"),
        ([[0.50, 0.51], [0.55, 0.6], [0.6, 0.56]], "no proposal is better by more than the standard error of fresh seeds"),
        ([[0.57, 0.59], [0.55, 0.6], [0.5, 0.5]], "the profile speaks for it, though fresh seeds put it 0.5 points below uniform, "
         "within their standard error, 1.8 points"),
        ([[], [], []], "these are too few trainings to tell proposals from it"),
    ):  # fmt: skip
        assert recommend(trials, fresh).reason == f"one-shot is recommended: {why}"
    assert recommend(trials[2:], [[0.57]]).reason == (
        "trial 2 is recommended: neither uniform nor one-shot completed, and it is best of what did"
    )


def test_finalists_over_budgets_are_spread_over_the_front() -> None:
    sizes = {2: ((4, 0, 0), 0.9), 3: ((1, 0, 0), 0.6), 4: ((2, 0, 0), 0.5), 5: ((3, 0, 0), 0.7), 6: ((3, 1, 0), 0.8)}
    trials = [trial(0, "uniform", (2, 1, 1), 0.5), trial(1, "one-shot", (4, 1, 0), 0.6)]
    trials += [trial(number, "sampler", *what) for number, what in sizes.items()]
    assert [t.number for t in pareto_front(trials[2:], [t.metric for t in trials[2:]])] == [3, 5, 2]
    assert [t.number for t in choose_finalists(trials, over_budgets=True)] == [0, 1, 2, 5, 3]


def test_finalists_are_the_start_points_and_the_best_different_proposals() -> None:
    trials = [
        trial(0, "uniform", (1, 1, 1), 0.5),
        trial(1, "uniform", (1, 1, 1), 0.6),
        trial(2, "one-shot", (3, 0, 0), 0.4),
        trial(3, "sampler", (2, 1, 0), 0.9),
        trial(4, "sampler", (2, 1, 0), 0.9, reused=3),
        trial(5, "sampler", (0, 0, 3), 0.7),
        trial(6, "sampler", (3, 0, 0), 0.95),  # one-shot's own ranks, at another rate
        trial(7, "sampler", (0, 3, 0), 0.8),
        trial(8, "sampler", (0, 2, 1), 0.1),
    ]
    assert [t.number for t in choose_finalists(trials)] == [1, 2, 3, 7, 5]


def test_intervals_of_two_finalists_are_those_of_the_paired_t_test() -> None:
    rng = np.random.default_rng(2)
    uniform, other = rng.normal(size=(2, 6))
    found = finalists({"uniform": uniform.tolist(), "a": other.tolist()})
    expected = stats.ttest_rel(other, uniform).confidence_interval(0.95)
    assert found[1].interval == pytest.approx((expected.low, expected.high))
    assert (found[0].difference, found[0].interval) == (None, None)


def test_intervals_hold_for_whichever_finalist_looks_best() -> None:
    """Coverage of the recommended or best finalist's true difference, 0, over draws of five equal finalists."""
    rng = np.random.default_rng(3)
    inside = 0
    for _ in range(400):
        noise = rng.normal(size=(5, 4)) + rng.normal(size=4)  # seeds differ, which pairing takes out
        found = finalists({n: row.tolist() for n, row in zip(["uniform", "one-shot", *"abc"], noise, strict=True)})
        low, high = max(found[1:], key=lambda f: f.metric).interval
        inside += low <= 0.0 <= high
    assert inside >= 0.95 * 400


@pytest.mark.parametrize("metrics", [{"uniform": [0.5], "a": [0.6]}, {"a": [0.5, 0.6]}])
def test_no_interval_without_noise_or_uniform(metrics: dict[str, list[float]]) -> None:
    assert all(finalist.interval is None for finalist in finalists(metrics))
