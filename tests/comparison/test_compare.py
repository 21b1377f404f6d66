"""`compare` on the real digits task with few steps: equal terms, budgets that are kept, resuming, refusals."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

import rankscope as rs
from rankscope.comparison import Comparison, compare, find_methods, known_methods, read_comparison
from rankscope.errors import FileError, SettingsError
from rankscope.settings import TrainingSettings
from rankscope.tasks import Task
from rankscope.training import AdaLora, Lora

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
        (["head"], {"budgets": [0.25]}, "`budgets` must hold the factor 1, the study's own budget, but holds 0.25; add 1, or change "
         "`budget`."),
        (["head"], {"budgets": [1.0, 1e-5]}, "`budgets` must leave a budget between 1 and 2^63 parameters, but 1e-05 times 6,912 is not; "
         "change the factor."),
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
    for name in known_methods():
        for contender in find_methods([name], searched=searched):
            assert contender.name.startswith(name)
            variants = contender.make(digits_profile.targets, digits_budget, digits_profile)
            for method in variants if isinstance(variants, list) else [variants]:
                if isinstance(method, Lora):
                    assert method.allocation.parameters <= digits_budget.limit
                elif isinstance(method, AdaLora):
                    assert method.rank == 1


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


COMMITTED = Path("studies/results/glosses/comparison.parquet")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        *((lambda runs, name=name: runs.drop(columns=name), f"but has no columns `{name}`; write it again.")
          for name in ("role", "variant", "test", "seed", "schema")),
        (lambda runs: runs.assign(seed=1.5), "with int64 in column `seed`, but it holds double; write it again."),
        (lambda runs: runs.assign(schema=9), "of schema 2, but holds another; compare again."),
        (lambda runs: runs[runs["method"] != "uniform"], "but holds no run of `uniform` at the study's budget; compare again."),
        (lambda runs: runs.assign(factor=0.5), "but holds no run of `uniform` at the study's budget; compare again."),
        (lambda runs: runs.iloc[:0], "but holds no reported run; compare again."),
        (lambda runs: runs[runs["role"] != "reported"], "but holds no reported run; compare again."),
        (lambda runs: pd.concat([runs, runs]), "but holds a run twice; compare again."),
        (lambda runs: runs[(runs["method"] != "eva") | (runs["seed"] != 1000)],
         "but its methods were trained on different seeds; compare again."),
        (lambda runs: runs.assign(test=float("nan")), "but a reported run lacks its factor, learning rate or metric; compare again."),
        (lambda runs: runs.assign(ranks="{"), "but its column `ranks` holds no JSON of ranks; compare again."),
    ],
)  # fmt: skip
def test_a_broken_comparison_is_one_line_when_it_is_read(change: Any, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "comparison.parquet"
    change(pd.read_parquet(COMMITTED)).to_parquet(path)
    with pytest.raises(FileError, match=f"^{re.escape(f'`{path}` must hold a comparison')},? {re.escape(problem)}$"):
        read_comparison(path)


def test_a_comparison_of_the_first_schema_is_named_after_its_task() -> None:
    assert set(read_comparison(COMMITTED)["study"]) == {"glosses"}
