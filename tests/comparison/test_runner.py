"""Comparing on equal terms: budgets and seeds are kept, rates are tuned per method, no kept run is done twice; refusals."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import peft
import pytest
import torch

import rankscope as rs
from rankscope.comparison import (
    Comparison,
    RunSpec,
    compare,
    find_methods,
    make_grid,
    read_comparison,
    run_all,
    run_tuned,
)
from rankscope.comparison.runner import RunResult, _peak_memory, known_methods, run_one
from rankscope.errors import FileError, SettingsError
from rankscope.settings import AllocationSettings, TrainingSettings
from rankscope.tasks import Task
from rankscope.training import AdaLora, HeadOnly, Lora, PeftAdapter

TRAINING = TrainingSettings(steps=10, learning_rate=0.02)

MINE = """
import rankscope as rs

def last_blocks(targets, budget, profile):
    late = [t for t in targets if t.block == 5]
    found = rs.allocate("uniform", targets=late, budget=budget)
    return rs.RankAllocation.from_ranks(targets, found.ranks)

def broken(targets, budget, profile):
    return targets[-1].name["x"]

def number(targets, budget, profile):
    return 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    (folder / "mine.py").write_text(MINE)
    return folder


@pytest.fixture(scope="module")
def options(digits_profile: rs.Profile, digits_budget: rs.ParameterBudget, folder: Path) -> dict[str, Any]:
    return {
        "budget": digits_budget,
        "targets": digits_profile.targets,
        "profile": digits_profile,
        "training": TRAINING,
        "seeds": range(3),
        "kept_in": folder / "runs",
    }


METHODS = ["one-shot", "random", "qv-only", "eva", "head", "controller", "mine.py:last_blocks"]


@pytest.fixture(scope="module")
def found(digits: Task, options: dict[str, Any], folder: Path) -> Comparison:
    return compare(digits, find_methods(METHODS, base_dir=folder), **options, uniform_budgets=[0.5])


def test_every_method_keeps_the_budget_and_shares_the_seeds(found: Comparison) -> None:
    runs = found.runs
    methods = list(dict.fromkeys(runs["method"]))
    names = ["uniform", "one-shot", "random 1", "random 2", "random 3", *METHODS[2:]]
    assert methods == names
    tuning = runs[runs["role"] == "tuning"]
    assert set(tuning["method"] + ", " + tuning["variant"]) == {"eva, rho 2", "eva, rho 1"}  # the only one to be tuned
    runs = runs[runs["role"] == "reported"]
    assert runs.groupby(["method", "factor"])["seed"].agg(list).map(lambda seeds: seeds == [0, 1, 2]).all()
    limited = runs[runs["budget"] > 0]
    assert (limited["parameters"] <= limited["budget"]).all()
    assert set(runs.loc[runs["method"] == "head", "parameters"]) == {0}
    assert set(runs.loc[runs["factor"] == 0.5, "method"]) == {"uniform"}
    ranks = json.loads(runs.loc[runs["method"] == "mine.py:last_blocks", "ranks"].iloc[0])
    assert {name for name, rank in ranks.items() if rank} == {name for name in ranks if ".5." in name}
    assert list(found.decisions) == ["controller"]
    assert runs["peak_memory"].between(1e8, 1e10).all()


def test_what_is_kept_is_not_run_again_and_a_rerun_gives_the_same(
    digits: Task, options: dict[str, Any], found: Comparison, folder: Path, tmp_path: Path
) -> None:
    again = compare(digits, find_methods(METHODS, base_dir=folder), **options, uniform_budgets=[0.5])
    pd.testing.assert_frame_equal(again.runs, found.runs)  # wall seconds too: they were read
    fresh = compare(digits, ["one-shot"], **(options | {"seeds": range(1, 2), "kept_in": None}))
    one = fresh.runs[fresh.runs["method"] == "one-shot"]
    kept = found.runs[(found.runs["method"] == "one-shot") & (found.runs["seed"] == 1)]
    assert one["test"].item() == pytest.approx(kept["test"].item(), abs=1e-6)
    assert one["validation"].item() == pytest.approx(kept["validation"].item(), abs=1e-6)

    path = found.to_parquet(tmp_path / "comparison.parquet")
    pd.testing.assert_frame_equal(read_comparison(path), found.runs)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FileError, match="must hold a comparison as Parquet, but it cannot be parsed"):
        read_comparison(path)


def test_rate_and_variant_are_tuned_within_the_budget(
    digits: Task, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdaLoRA at its full number of ranks ends above the budget here, so that its smaller variant is chosen."""
    monkeypatch.setattr("rankscope.comparison.runner.FIRST_TUNING_SEED", 100)
    monkeypatch.setattr("rankscope.comparison.runner.SCHEDULES", ((32.0, 0.7),))
    monkeypatch.setattr("rankscope.comparison.runner.SHARES", (1.0, 0.75))
    found = compare(digits, ["adalora"], **(options | {"kept_in": None}), n_tuning_seeds=1)
    tuning = found.runs[(found.runs["role"] == "tuning") & (found.runs["method"] == "adalora")]
    over = tuning[tuning["parameters"] > tuning["budget"]]
    chosen = set(found.runs.loc[(found.runs["role"] == "reported") & (found.runs["method"] == "adalora"), "variant"])
    assert len(tuning) == 2
    assert not set(over["variant"]) & chosen
    assert len(chosen) == 1


def test_a_method_without_a_variant_within_the_budget_is_refused(
    digits: Task, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rankscope.comparison.runner.SCHEDULES", ((8.0, 0.7), (32.0, 0.4)))
    monkeypatch.setattr("rankscope.comparison.runner.SHARES", (1.5,))
    pattern = (
        r"^`AdaLoRA` must end within 6,912 parameters to be compared, but its variants end with [\d,]+ or more; raise "
        r"the budget, or leave it out\.$"
    )
    with pytest.raises(SettingsError, match=pattern):
        compare(digits, ["adalora"], **(options | {"kept_in": None}), n_tuning_seeds=1)


@pytest.mark.parametrize(
    ("methods", "changes", "message"),
    [
        (["one_shot"], {}, "`methods` must be known or `path/to/file.py:function`, but 'one_shot' is not; did you mean 'one-shot'?"),
        (["searched"], {}, "`searched` needs a search at this budget, but there is none; run `rankscope search`."),
        (["head"], {"seeds": [3, 10_000]}, "`tuning_seeds` must be none of `seeds`, but share 10000; take others."),
        (["head"], {"budgets": [0.25]}, "`budgets` must hold the factor 1, the study's own budget; add it, or change `budget`."),
        (["head"], {"budgets": [1.0, 1e-5]}, "`budgets` must leave between 1 and 2^63 parameters, but hold 1e-05 times 6,912 parameters."),
        (["head"], {"seeds": []}, "`seeds` must hold at least one seed, but is empty."),
        (["mine.py:broken"], {}, "`mine.py:broken` must give an allocation or a method, but raised TypeError: string indices must be "
         "integers, not 'str' (mine.py, line 10); --debug shows the traceback."),
        (["mine.py:number"], {}, "`mine.py:number` must give a RankAllocation or a Method, but gave a int."),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_said_before_anything_runs(
    digits: Task, options: dict[str, Any], folder: Path, methods: list[str], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        compare(digits, find_methods(methods, base_dir=folder), **(options | changes))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("controller", "`every` must leave a decision before the ranks freeze at step 0 of 2, but got 1; lower it, or raise "
         "`freeze_fraction`."),
        ("adalora", "`steps` must be at least 10 for AdaLoRA, but got 2; train longer."),
    ],
)  # fmt: skip
def test_a_method_that_cannot_run_is_refused_before_any_training(
    digits: Task, digits_budget: rs.ParameterBudget, method: str, message: str
) -> None:
    def done(number: int, total: int) -> None:
        raise AssertionError("a run was made")

    short = TrainingSettings(steps=2, learning_rate=0.01)
    with pytest.raises(rs.RankscopeError, match=f"^{re.escape(message)}$"):
        compare(digits, ["head", method], budget=digits_budget, training=short, seeds=[3], on_run=done)


def test_an_unknown_method_is_refused_before_a_profile_is_taken(digits: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankscope.comparison.runner.profile_task", lambda *_, **__: pytest.fail("profiled"))
    with pytest.raises(SettingsError, match="'one_shot' is not"):
        compare(digits, ["one-shot", "one_shot"], budget=rs.ParameterBudget(3000), training=TRAINING)


def test_targets_and_profile_are_found_where_they_are_not_given(digits: Task) -> None:
    found = rs.compare(digits, ["one-shot"], budget=rs.ParameterBudget(3000), training=TRAINING, seeds=range(1))
    assert found.runs["method"].tolist() == ["uniform", "one-shot"]
    ranks = [json.loads(each) for each in found.runs["ranks"]]
    assert set(ranks[0]) == set(ranks[1]) == {t.name for t in rs.find_targets(digits.build_model())}
    assert ranks[0] != ranks[1]
    assert (found.runs["parameters"] <= 3000).all()


def test_every_known_method_can_be_made(digits_profile: rs.Profile, digits_budget: rs.ParameterBudget) -> None:
    best = rs.allocate("one-shot", targets=digits_profile.targets, budget=digits_budget, profile=digits_profile)
    searched = SimpleNamespace(best_allocation=best, steps=7)
    for name in {*known_methods()} - {"language-only"}:  # the digits' model has one tower
        for contender in find_methods([name], searched=searched):
            assert contender.name.startswith(name)
            variants = contender.make(digits_profile.targets, digits_budget, digits_profile)
            for method in variants if isinstance(variants, list) else [variants]:
                if isinstance(method, Lora):
                    assert method.allocation.parameters <= digits_budget.limit
                elif isinstance(method, AdaLora):
                    assert method.rank == 1


def test_limits_on_ranks_hold_for_what_strategies_place(
    digits_profile: rs.Profile, digits_budget: rs.ParameterBudget
) -> None:
    names = ["uniform", "one-shot", "random", "uniform-rslora", "controller-one-shot"]
    for contender in find_methods(names, allocation=AllocationSettings(min_rank=1, max_rank=2)):
        method = contender.make(digits_profile.targets, digits_budget.at(10_000), digits_profile)
        assert isinstance(method, Lora)
        assert set(method.allocation.ranks.values()) == {1, 2}


def test_a_strategys_options_hold_where_it_is_compared(
    digits_profile: rs.Profile, digits_budget: rs.ParameterBudget
) -> None:
    terms: Any = {"targets": digits_profile.targets, "budget": digits_budget, "profile": digits_profile}
    usual = rs.allocate("one-shot", **terms)
    asked = rs.allocate("one-shot", **terms, power=0.5)
    assert usual.ranks != asked.ranks
    settings = AllocationSettings(strategy="one-shot", options={"power": 0.5})
    for name, expected in {
        "one-shot": asked,
        "controller-one-shot": asked,
        "uniform": rs.allocate("uniform", **terms),
    }.items():
        (contender,) = find_methods([name], allocation=settings)
        method = contender.make(**terms)
        assert isinstance(method, Lora)
        assert method.allocation.ranks == expected.ranks


def test_functions_and_what_was_searched_are_compared_too(
    digits: Task, digits_profile: rs.Profile, digits_budget: rs.ParameterBudget
) -> None:
    def gradient(targets: Any, budget: Any, profile: Any) -> rs.RankAllocation:
        return rs.allocate("gradient-norm", targets=targets, budget=budget, profile=profile)

    best = rs.allocate("one-shot", targets=digits_profile.targets, budget=digits_budget, profile=digits_profile)
    searched = find_methods(["controller-searched"], searched=SimpleNamespace(best_allocation=best, steps=7))
    runs = compare(
        digits, [gradient, *searched], budget=digits_budget, profile=digits_profile, training=TRAINING, n_seeds=1
    ).runs.set_index("method")
    assert runs.index.tolist() == ["uniform", "gradient", "controller-searched"]
    assert json.loads(runs.loc["gradient", "ranks"]) == dict(
        gradient(digits_profile.targets, digits_budget, digits_profile).ranks
    )
    assert runs["cost_steps"].tolist() == [0, 0, 7]


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
    assert run.test_metrics is not None
    assert run.test == run.test_metrics["accuracy"]
    older = {key: value for key, value in run.to_row().items() if key != "test_metrics"}
    assert RunResult.from_row(older).test_metrics is None


def test_kept_runs_are_read(
    digits: Task,
    digits_profile: rs.Profile,
    digits_budget: rs.ParameterBudget,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
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
    recwarn.clear()
    assert run_all(digits, cells, kept_in=tmp_path, n_jobs=2) == both
    assert not recwarn.list

    for path in tmp_path.glob("*.parquet"):
        path.write_bytes(b"PAR1")
    with pytest.raises(FileError, match=r"^`.*\.parquet` must hold decisions as Parquet, but it cannot be parsed "):
        run_all(digits, cells, kept_in=tmp_path)


def test_equal_runs_are_done_once_under_the_name_of_each(digits: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [RunSpec(method=HeadOnly(), training=TrainingSettings(steps=1), name=name) for name in ("a", "b")]
    done: list[str] = []
    monkeypatch.setattr(
        "rankscope.comparison.runner.run_one", lambda *args: done.append(args[1].name) or run_one(*args)
    )
    first, second = run_all(digits, specs)
    assert done == ["a"]
    assert (first.method, second.method) == ("a", "b")
    assert first == replace(second, method="a")


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


def test_a_run_leaves_the_callers_threads_alone(digits: Task, digits_budget: rs.ParameterBudget) -> None:
    targets = rs.find_targets(digits.build_model())
    uniform = Lora(rs.allocate("uniform", targets=targets, budget=digits_budget))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        run_one(digits, RunSpec(method=uniform, training=TrainingSettings(steps=1)))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_function_with_the_name_of_another_method_is_refused() -> None:
    def uniform(targets: object, budget: object, profile: object) -> None: ...

    message = "`methods` must differ in name, but two are called `uniform`; rename one."
    with pytest.raises(SettingsError, match=re.escape(message)):
        find_methods(["uniform", uniform])
    assert len(find_methods([uniform, uniform])) == 2  # the same method, given twice


def test_a_worker_that_has_not_touched_its_gpu_yet_has_no_peak_to_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    def reset(index: int) -> None:
        raise RuntimeError("Invalid device argument")  # as torch does before CUDA is initialised

    monkeypatch.setattr("rankscope.comparison.runner.best_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    assert _peak_memory(reset=True) == 0


# --- adapters of their own size, and subsets of modules -----------------------------------------------------------


def test_pefts_small_adapters_stand_beside_the_budget_at_their_own_sizes(digits: Task, options: dict[str, Any]) -> None:
    loha = PeftAdapter(peft.LoHaConfig(r=1, target_modules=["q_proj"]), "LoHa", rate_factor=2.0)
    short = options | {"kept_in": None, "seeds": range(2), "training": TrainingSettings(steps=1, learning_rate=0.02)}
    found = compare(digits, ["vera", "ia3", loha], **short, budgets=[0.5, 1], n_tuning_seeds=1).runs
    reported = found[found["role"] == "reported"]
    beside = reported[reported["method"] != "uniform"]
    sizes = {name: set(rows["parameters"]) for name, rows in beside.groupby("method", sort=False)}
    (ia3,) = sizes.pop("ia3")
    assert ia3 in (2_304, 4_608)  # queries, values and the last of each MLP, or all modules
    assert sizes == {"vera-16": {4_032}, "vera-64": {5_760}, "vera-256": {12_672}, "LoHa": {6 * 2 * (64 + 64)}}
    assert set(beside["budget"]) == {0}
    assert set(beside["factor"]) == {1.0}
    assert set(beside["variant"]) >= {"r 16", "r 64", "r 256"}
    rates = beside.groupby("method")["learning_rate"].first().to_dict()
    assert rates == pytest.approx({"LoHa": 0.04, "ia3": 0.4, "vera-16": 0.2, "vera-64": 0.2, "vera-256": 0.2})
    assert not any(contender.needs_profile for contender in find_methods(["vera", "ia3", loha]))
    with pytest.raises(SettingsError, match="^`methods` must differ in name, but two are called `LoHa`; rename one"):
        find_methods([loha, PeftAdapter(peft.LoHaConfig(r=2), "LoHa")])


def test_methods_that_rank_every_module_take_no_part_below_rank_1(digits: Task, options: dict[str, Any]) -> None:
    short = options | {"kept_in": None, "seeds": range(2), "training": TrainingSettings(steps=1, learning_rate=0.02)}
    found = compare(digits, ["eva", "one-shot"], **short, budgets=[0.25, 1.0, 2.0], n_tuning_seeds=1).runs
    factors = found.groupby("method")["factor"].unique().map(sorted).to_dict()
    assert factors == {"uniform": [0.25, 1, 2], "one-shot": [0.25, 1, 2], "eva": [1, 2]}


def test_subsets_of_modules_get_uniform_ranks_within_the_budget(digits_profile: rs.Profile) -> None:
    targets, budget = digits_profile.targets, rs.ParameterBudget(1_664)
    for name, kept in (
        ("last-blocks", {t.name for t in targets if t.block in (4, 5)}),
        ("qv-only", {t.name for t in targets if t.role in ("q_proj", "v_proj")}),
    ):
        (contender,) = find_methods([name])
        ranks = contender.make(targets, budget, None).allocation
        assert (ranks.strategy, ranks.budget) == (name, 1_664)
        assert {module for module, rank in ranks.ranks.items() if rank} <= kept
        assert 1_664 - 128 < ranks.parameters <= 1_664
    towers = [
        rs.TargetModule(name=f"{tower}.{block}", in_features=8, out_features=8, tower=tower, block=block)
        for tower, n in (("vision", 4), ("language", 7))
        for block in range(n)
    ]
    head = rs.TargetModule(name="projector", in_features=8, out_features=8)
    (contender,) = find_methods(["last-blocks"])
    ranks = contender.make([*towers, head], rs.ParameterBudget(16 * 5), None).allocation.ranks
    assert {name for name, rank in ranks.items() if rank} == {f"vision.{i}" for i in (2, 3)} | {
        f"language.{i}" for i in (4, 5, 6)
    }
    (language,) = find_methods(["language-only"])
    ranks = language.make([*towers, head], rs.ParameterBudget(16 * 9), None).allocation.ranks
    assert [
        sum(rank for name, rank in ranks.items() if name.startswith(tower)) for tower in ("vision", "language", "p")
    ] == [0, 9, 0]
    with pytest.raises(
        SettingsError, match="^`language-only` needs modules of a tower `language`, but the targets have none"
    ):
        language.make([head], rs.ParameterBudget(16), None)
    with pytest.raises(SettingsError, match="^`last-blocks` needs modules in blocks, but the targets have none"):
        contender.make([head], rs.ParameterBudget(16), None)
