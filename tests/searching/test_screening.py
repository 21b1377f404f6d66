"""The shared evaluator in a search on the real digits task: trusted or not, resumed, and never recommended unconfirmed."""

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zlib import crc32

import numpy as np
import optuna
import pytest
import torch
from scipy.stats import kendalltau

import rankscope as rs
from rankscope.exceptions import FileFormatError, StudyError, TrainingError
from rankscope.searching import search
from rankscope.searching.screening import CHECK_TRIALS, N_PROMOTED, Screening
from rankscope.searching.shared import STEPS, capacity, draw_allocation, load_shared, train_shared
from rankscope.space import HierarchicalSpace, group_by_depth
from rankscope.tasks import Task
from rankscope.tasks.digits import DigitsShift

TINY = rs.TrainingConfig(steps=1, learning_rate=0.01)
optuna.logging.set_verbosity(optuna.logging.WARNING)


class CountsRanks(DigitsShift):
    """Its metric is read off the ranks that a forward pass really uses, so any evaluator measures the same.

    Args:
        contrary: The adapters above the budget get the metric with the other sign.
    """

    def __init__(self, *, contrary: bool = False) -> None:
        super().__init__()
        self.contrary, self.built = contrary, 0

    def build_model(self) -> torch.nn.Module:
        self.built += 1
        return super().build_model()

    def evaluate(self, model, split="validation"):
        with used_ranks(model) as used:
            metrics = super().evaluate(model, split)
        wide = sum(a.weight.numel() for _, a in first_factors(model)) > 6_912
        merit = sum((i % 7) * np.log1p(rank) for i, rank in used.items()) / 200.0
        return {**metrics, "accuracy": -merit if wide and self.contrary else merit}


def first_factors(model: torch.nn.Module) -> Iterator[tuple[int, torch.nn.Module]]:
    """A of each adapted module, with a number that is the module's own."""
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            yield crc32(name.encode()), module


@contextmanager
def used_ranks(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """The ranks of each module whose outputs of A are not all zero."""
    used: dict[int, int] = {}

    def hook(number):
        return lambda module, inputs, output: used.update({number: int(output.flatten(0, -2).any(0).sum())})

    handles = [module.register_forward_hook(hook(number)) for number, module in first_factors(model)]
    yield used
    for handle in handles:
        handle.remove()


@pytest.fixture
def space(digits_profile: rs.Profile, digits_budget: rs.ParameterBudget) -> HierarchicalSpace:
    return HierarchicalSpace(
        targets=digits_profile.targets,
        gains={name: values**2 for name, values in digits_profile.spectra().items()},
        budget=digits_budget,
        groups=group_by_depth(digits_profile.targets),
    )


@pytest.fixture
def run(digits_profile: rs.Profile, digits_budget: rs.ParameterBudget):
    def run(task: Task, **options) -> rs.SearchResult:
        arguments = {"n_trials": CHECK_TRIALS + N_PROMOTED + 1, "n_judged": 12, "training": TINY, "confirm_fraction": 0.0,
                     "study_name": "screened", "storage": None, "evaluator": "shared", **options}  # fmt: skip
        return search(task, budget=digits_budget, profile=digits_profile, **arguments)

    return run


def profile_tau(result: rs.SearchResult, profile: rs.Profile) -> float:
    """Of the gradients' singular values that an allocation captures, with the trials that are checked on."""
    norms = {name: np.append(0.0, np.cumsum(values)) for name, values in profile.spectra().items()}
    trials = result.trials[:CHECK_TRIALS]
    captured = [sum(norms[n][min(r, len(norms[n]) - 1)] for n, r in t.allocation.ranks.items()) for t in trials]
    return float(kendalltau(captured, [trial.metric for trial in trials])[0])


def test_a_trusted_evaluator_screens_and_its_best_are_trained(run, digits_profile: rs.Profile, tmp_path: Path) -> None:
    storage, judged = f"sqlite:///{tmp_path}/study.db", []
    result = run(CountsRanks(), storage=storage, on_judged=lambda *done: judged.append(done))
    found = result.screening
    assert found is not None
    assert (found.kendall, found.trials, found.steps, found.judged) == (pytest.approx(1.0), CHECK_TRIALS, STEPS, 12)
    assert found.profile == pytest.approx(profile_tau(result, digits_profile))
    assert judged == [(i, 12) for i in range(1, 13)]
    origins = [trial.origin for trial in result.trials]
    assert origins[: CHECK_TRIALS + N_PROMOTED] == [
        "uniform", "one-shot", *["sampler"] * (CHECK_TRIALS - 2), *["screened"] * N_PROMOTED
    ]  # fmt: skip

    beside = optuna.load_study(study_name="screened/shared", storage=storage)
    assert {trial.user_attrs["rankscope"]["evaluator"] for trial in beside.trials} == {"shared"}
    values = {tuple(trial.user_attrs["ranks"]): trial.value for trial in beside.trials}
    earlier = {trial.allocation.vector for trial in result.trials[:CHECK_TRIALS]}
    best = sorted((value for ranks, value in values.items() if ranks not in earlier), reverse=True)[:N_PROMOTED]
    screened = [trial for trial in result.trials if trial.origin == "screened"]
    assert [values[trial.allocation.vector] for trial in screened] == best
    assert all(trial.wall_seconds > 0 and trial.reused is None for trial in screened)
    assert "judged 12 allocations, and the best 5 were trained" in str(result.screening)


@pytest.mark.parametrize(
    ("kendall", "profile", "trusted"),
    [(0.5, 0.2, True), (0.49, 0.2, False), (0.6, 0.6, False), (0.6, None, True), (None, 0.1, False), (0.9, -0.5, True)],
)
def test_it_takes_a_high_correlation_above_the_profiles(kendall, profile, trusted: bool) -> None:
    assert Screening(kendall=kendall, profile=profile, trials=CHECK_TRIALS).trusted == trusted


def test_an_evaluator_that_ranks_otherwise_is_not_used_and_says_so(run, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "rankscope.searching.screening"):
        result = run(CountsRanks(contrary=True))
    line = str(result.screening)
    assert re.fullmatch(
        r"Kendall's tau -1\.00 with 10 stand-alone trials \(profile alone -?0\.\d\d\), after 4 steps of its own; "
        r"not used: 0\.50 with 10 trials, and more than the profile's, is needed",
        line,
    )
    assert f"shared evaluator: {line}" in caplog.messages
    assert len(result.trials) == CHECK_TRIALS + N_PROMOTED + 1
    assert "screened" not in {trial.origin for trial in result.trials}
    assert [s.study_name for s in optuna.get_all_study_summaries(result.study._storage)] == ["screened"]


@pytest.mark.parametrize("contrary", [False, True])
def test_a_resumed_search_trains_and_judges_nothing_again(run, tmp_path: Path, contrary: bool) -> None:
    storage, folder = f"sqlite:///{tmp_path}/study.db", tmp_path / "shared"
    first = run(CountsRanks(contrary=contrary), storage=storage, shared_folder=folder)
    task = CountsRanks(contrary=contrary)
    again = run(task, storage=storage, shared_folder=folder)
    assert task.built == 0
    assert again.screening == first.screening
    assert [t.metric for t in again.trials] == [t.metric for t in first.trials]


def test_an_interrupted_search_goes_on_with_the_kept_adapter(run, tmp_path: Path) -> None:
    storage, folder = f"sqlite:///{tmp_path}/study.db", tmp_path / "shared"

    def interrupt(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(CountsRanks(), storage=storage, shared_folder=folder, on_judged=interrupt)
    task, judged = CountsRanks(), []
    again = run(task, storage=storage, shared_folder=folder, on_judged=lambda done, _: judged.append(done))
    assert judged == list(range(5, 13))
    assert task.built == 1 + len(again.trials) - CHECK_TRIALS  # the kept adapter's, and one a trial that was left
    assert again.screening is not None
    assert again.screening.judged == 12


def test_too_few_trials_are_no_verdict_and_a_longer_search_asks_again(run, tmp_path: Path) -> None:
    options = {
        "storage": f"sqlite:///{tmp_path}/study.db",
        "training": rs.TrainingConfig(steps=2, learning_rate=0.01, evaluate_every=1),
    }
    nothing_is_that_good = optuna.pruners.ThresholdPruner(lower=100.0)
    first = run(CountsRanks(), n_trials=15, pruner=nothing_is_that_good, **options)
    assert first.screening == Screening(kendall=None, trials=2)
    again = run(CountsRanks(), n_trials=29, **options)
    assert again.screening is not None
    assert (again.screening.kendall, again.screening.judged) == (pytest.approx(1.0), 12)


def test_the_check_is_made_at_uniforms_best_learning_rate(run) -> None:
    result = run(CountsRanks(), learning_rates=[0.001, 0.01], n_trials=20)
    at_rate = [trial for trial in result.trials if trial.learning_rate == 0.001]  # all rates are alike to it: the first
    assert result.screening is not None
    assert result.screening.trials == CHECK_TRIALS
    assert {trial.learning_rate for trial in result.trials if trial.origin == "screened"} == {0.001}
    assert len(at_rate) >= CHECK_TRIALS + N_PROMOTED


def test_a_super_adapter_that_diverges_is_not_used(run, caplog: pytest.LogCaptureFixture) -> None:
    class Fragile(CountsRanks):
        def loss(self, model, batch):
            wide = sum(a.weight.numel() for _, a in first_factors(model)) > 6_912
            return super().loss(model, batch) * (float("nan") if wide else 1.0)

    result = run(Fragile())
    assert result.screening == Screening(kendall=None, trials=CHECK_TRIALS, steps=STEPS)
    assert any(m.startswith("the shared evaluator cannot be trained: the loss must be finite") for m in caplog.messages)
    assert len(result.trials) == CHECK_TRIALS + N_PROMOTED + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluator": "oracle"}, "`evaluator` must be 'stand-alone' or 'shared', but got 'oracle'."),
        (
            {"n_trials": 14},
            "`n_trials` must leave 15 trials to explore for the evaluator 'shared' (10 to check it, 5 to train its best), "
            "but leaves 14; raise it, or use 'stand-alone'.",
        ),
        ({"n_judged": 0}, "`n_judged` must be at least 5 (the best of them are trained), but got 0."),
    ],
)
def test_bad_input_leaves_no_study_behind(run, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(StudyError, match=f"^{re.escape(message)}$"):
        run(CountsRanks(), storage=f"sqlite:///{tmp_path}/study.db", **options)
    assert not (tmp_path / "study.db").exists()


def test_a_kept_evaluator_judges_as_before(digits: Task, space: HierarchicalSpace, tmp_path: Path) -> None:
    about = {"seed": 0, "rates": (0.01,)}
    steps = []
    trained = train_shared(digits, space, TINY, on_step=lambda *done: steps.append(done))
    assert steps == [(i, STEPS) for i in range(1, STEPS + 1)]
    trained.save(tmp_path / "shared", about)
    kept = load_shared(digits, tmp_path / "shared", about)
    assert kept is not None
    rng = np.random.default_rng(3)
    for _ in range(4):
        allocation = draw_allocation(space, rng)
        assert kept.judge(allocation) == trained.judge(allocation)
    assert load_shared(digits, tmp_path / "none", about) is None


def test_another_or_broken_evaluator_is_refused(digits: Task, space: HierarchicalSpace, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    train_shared(digits, space, TINY).save(folder, {"seed": 0})
    message = (
        f"`{folder}` must hold a shared evaluator about seed 1, but its is about 0; delete it, or use another folder."
    )
    with pytest.raises(StudyError, match=f"^{re.escape(message)}$"):
        load_shared(digits, folder, {"seed": 1})
    (folder / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(FileFormatError, match=r"^`.*shared` must hold an adapter of this model, but cannot be loaded"):
        load_shared(digits, folder, {"seed": 0})
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(FileFormatError, match="must hold what a shared evaluator is about, but there is no such file"):
        load_shared(digits, folder, {"seed": 0})


def test_training_is_repeatable_and_reaches_the_leading_ranks_only(digits: Task, space: HierarchicalSpace) -> None:
    uniform = space.allocation(space.point(tau=0.0))
    trained = [train_shared(digits, space, TINY, seed=1, draws=[uniform] * (STEPS + 1)) for _ in range(2)]
    first, second = (evaluator.model.state_dict() for evaluator in trained)
    assert all(torch.equal(first[name], second[name]) for name in first)
    outputs = {name: value for name, value in first.items() if "lora_B" in name}
    assert all(value[:, 0].any() and not value[:, 1:].any() for value in outputs.values())


def test_draws_are_feasible_and_different(space: HierarchicalSpace) -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_allocation(space, rng) for _ in range(50)]
    assert len(set(drawn)) > 45
    assert all(allocation.parameters <= space.budget.limit for allocation in drawn)
    assert max(max(allocation.vector) for allocation in drawn) > 2


@pytest.mark.parametrize("bound", [None, 3, {"vit.encoder.layer.0.attention.attention.query": 2}])
def test_capacity_respects_modules_bound_and_budget(space: HierarchicalSpace, bound) -> None:
    space = HierarchicalSpace(
        targets=space.targets, gains=space.gains, budget=space.budget, groups=space.groups, max_rank=bound
    )
    for target, rank in zip(space.targets, capacity(space).vector, strict=True):
        limit = bound.get(target.name, 16) if isinstance(bound, dict) else (bound or 16)
        assert rank == min(16, limit, target.full_rank, 6_912 // target.rank_cost)


def test_a_diverging_training_is_an_error(space: HierarchicalSpace) -> None:
    class Broken(DigitsShift):
        def loss(self, model, batch):
            return super().loss(model, batch) * float("nan")

    with pytest.raises(TrainingError, match="must be finite, but is not by step 4 of 4"):
        train_shared(Broken(), space, TINY)
