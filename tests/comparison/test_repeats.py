"""Comparing on equal terms: rate and variant are tuned per method, seeds are shared, and no kept run is done twice."""

from pathlib import Path

import pytest

import rankscope as rs
from rankscope.comparison import RunResult, RunSpec, make_grid, run_all, run_one, run_tuned
from rankscope.errors import FileError
from rankscope.settings import TrainingSettings
from rankscope.tasks import Task
from rankscope.training import AdaLora, HeadOnly, Lora


def reported(runs: list[RunResult]) -> list[RunResult]:
    return [run for run in runs if run.role == "reported"]


def test_rates_are_tuned_on_validation_and_seeds_are_shared(
    digits: Task, digits_profile: rs.Profile, digits_budget: rs.ParameterBudget
) -> None:
    options = {"targets": digits_profile.targets, "budget": digits_budget, "profile": digits_profile}
    allocations = [rs.allocate(name, **options) for name in ("uniform", "one-shot")]
    grids = [make_grid(each, TrainingSettings(steps=15, learning_rate=[1e-5, 1e-2])) for each in allocations]
    one, two = (run_tuned(digits, grids, seeds=[7, 8], tuning_seeds=[0], n_jobs=jobs) for jobs in (1, 2))
    for sequential, parallel in zip(map(reported, one), map(reported, two), strict=True):
        assert {run.learning_rate for run in [*sequential, *parallel]} == {1e-2}
        assert [run.seed for run in sequential] == [7, 8]
        assert [run.validation for run in sequential] == pytest.approx([run.validation for run in parallel], abs=0.01)
        assert all(run.test is not None for run in sequential)
    counted: list[tuple[int, int]] = []
    single = [make_grid(allocations[0], TrainingSettings(steps=1))]
    run_tuned(digits, single, seeds=[1], on_run=lambda *n: counted.append(n))
    assert counted == [(1, 1)]


def test_the_best_variant_is_chosen_with_its_rate(digits: Task, digits_profile: rs.Profile) -> None:
    """An alpha of 1e-6 learns nothing with the adapters, and a rate of 1e-6 nothing at all."""
    variants = [AdaLora(digits_profile.targets, 1, alpha) for alpha in (1e-6, 32.0)]
    grid = make_grid(variants, TrainingSettings(steps=12, learning_rate=[1e-6, 2e-2]))
    ((*tuning, found),) = run_tuned(digits, [grid], seeds=[5], tuning_seeds=[0, 1])
    assert len(tuning) == 8
    assert (found.method, found.variant, found.learning_rate) == ("AdaLoRA", variants[1].variant, 2e-2)


def test_a_row_holds_the_whole_run(digits: Task, tmp_path: Path) -> None:
    run = run_one(digits, RunSpec(method=HeadOnly(), training=TrainingSettings(steps=1)))
    assert RunResult.from_row(run.to_row()) == run


def test_kept_runs_are_read(
    digits: Task, digits_profile: rs.Profile, digits_budget: rs.ParameterBudget, tmp_path: Path
) -> None:
    uniform = rs.allocate("uniform", targets=digits_profile.targets, budget=digits_budget)
    bold = rs.ControllerSettings(freeze_fraction=0.8, hysteresis=0.0, min_gain_ratio=0.0)
    config = TrainingSettings(steps=8, learning_rate=0.01)
    cells = [RunSpec(method=Lora(uniform, controller), training=config, seed=3) for controller in (None, bold)]
    first = run_all(digits, cells[:1], kept_in=tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    both = run_all(digits, cells, kept_in=tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 2
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert both[0] == first[0]
    assert both[0].ranks == dict(uniform.ranks)
    assert (both[0].n_moved, both[1].n_moved > 0) == (0, True)
    assert both[1].parameters <= digits_budget.limit
    (again,) = run_all(digits, cells[1:], kept_in=tmp_path)
    assert (again.ranks, again.test) == (both[1].ranks, both[1].test)
    assert again.decisions is not None
    assert both[1].decisions is not None
    assert again.decisions["step"].tolist() == both[1].decisions["step"].tolist()

    for path in tmp_path.glob("*.parquet"):
        path.write_bytes(b"PAR1")
    with pytest.raises(FileError, match=r"^`.*\.parquet` must hold decisions as Parquet, but it cannot be parsed "):
        run_all(digits, cells, kept_in=tmp_path)


def test_a_run_is_kept_under_all_that_it_depends_on(tmp_path: Path) -> None:
    """Batch size, data, weights and code; a broken file is one line."""
    config = TrainingSettings(steps=1, learning_rate=0.01)
    cell = RunSpec(method=HeadOnly(), training=config, seed=0)
    small, large = (rs.load_task({"name": "digits-shift", "batch_size": size}) for size in (4, 100))
    first = run_all(small, [cell], kept_in=tmp_path)
    assert run_all(large, [cell], kept_in=tmp_path)[0].test == run_all(large, [cell])[0].test
    assert run_all(rs.load_task({"name": "digits-shift", "batch_size": 4}), [cell], kept_in=tmp_path) == first
    assert len(list(tmp_path.glob("*.json"))) == 2

    changed = rs.load_task({"name": "digits-shift", "batch_size": 4})
    for row in changed._rows["train"]:
        row["pixel_values"].neg_()
    run_all(changed, [cell], kept_in=tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 3
    for path in tmp_path.glob("*.json"):
        path.write_text("{}")
    message = r"^`.*\.json` must say what it was made from, but does not: an older rankscope wrote it; delete it, and it is done again\.$"
    with pytest.raises(FileError, match=message):
        run_all(small, [cell], kept_in=tmp_path)
