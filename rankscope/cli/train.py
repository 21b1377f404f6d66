"""`rankscope train`: an allocation fine-tuned, beside uniform LoRA and under the controller if asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankscope.allocation import RankAllocation
from rankscope.cli.output import print_files, print_json, print_table, progress, stderr
from rankscope.cli.session import FIRST_REPORTED_SEED, Session
from rankscope.comparison import Repeats, paired_difference, repeat_all
from rankscope.comparison.methods import SEARCHED
from rankscope.control import ControllerConfig
from rankscope.control.decisions import write_decisions
from rankscope.exceptions import AllocationError, FileFormatError, StudyError
from rankscope.files import read_json, remove_others
from rankscope.fingerprints import require_same
from rankscope.performance import PerformanceModel
from rankscope.plotting import plot_flow, plot_trajectories, save_figure
from rankscope.searching.belief import belief_of
from rankscope.searching.grouping import make_space
from rankscope.searching.study import STUDY_KEY, find_storage, load_study
from rankscope.strategies import NEEDS_PROFILE
from rankscope.training import Lora


def run_train(
    path: Path,
    out: Path | None,
    overrides: Mapping[str, Any],
    *,
    allocation_path: Path | None,
    baseline: bool,
    n_seeds: int,
    jobs: int,
    as_json: bool,
) -> None:
    """`rankscope train`."""
    session = Session.open(path, out, overrides)
    allocation = _read_allocation(session, allocation_path)
    controller = _controller(session, allocation)
    methods = [Lora(allocation, controller)]
    if baseline:
        uniform = session.one_shot("uniform")
        _require_equal(allocation, uniform)
        static = dict.fromkeys([Lora(uniform), Lora(allocation)])
        methods = [*(method for method in static if method != methods[0]), *methods]
    first = FIRST_REPORTED_SEED + session.study.seed
    with progress() as bar:
        line = bar.add_task("training", total=None)
        repeats = repeat_all(
            session.task,
            methods,
            session.study.training.resolve(),
            learning_rates=session.study.training.learning_rate,
            seeds=range(first, first + n_seeds),
            n_jobs=jobs,
            save_first_to=session.out / "adapter",
            on_run=lambda done, total: bar.update(line, completed=done, total=total),
        )
    files = [session.out / "adapter", *_decisions(session, repeats[-1])]
    if as_json:
        runs = [_summary(r, repeats[0], baseline) for r in repeats]
        print_json(
            {
                "study": session.study.name,
                "metric": session.task.metric,
                "runs": runs,
                "files": [str(file) for file in files],
            }
        )
        return
    rows = [_row(r, repeats[0], baseline and len(repeats) > 1) for r in repeats]
    seeds = f"{n_seeds} seeds" if n_seeds > 1 else "one seed"
    title = f"{session.study.name}: mean {session.task.metric} of {seeds}"
    if baseline:
        title += "; paired test difference to uniform, 95 % interval"
    header = ("strategy", "parameters", "rate", "validation", "test", "to uniform")
    print_table(title, header, rows)
    print_files(files)


def _controller(session: Session, allocation: RankAllocation) -> ControllerConfig | None:
    """The study's controller, screened by the search's performance model where there is one; None: ranks stay."""
    mode = session.study.controller.mode
    if mode == "auto":
        mode = "off" if allocation.strategy in NEEDS_PROFILE or allocation.strategy == SEARCHED else "on"
        why = "rest on gradients already" if mode == "off" else "rest on no gradient yet"
        stderr.print(f"controller {mode}: the ranks of `{allocation.strategy}` {why}", soft_wrap=True)
    return session.study.controller.resolve(_belief(session)) if mode == "on" else None


def _belief(session: Session) -> PerformanceModel | None:
    """What this study's search believes; None without a search, and where it is not to be trusted."""
    if not session.has_search:
        return None
    section, bounds = session.study.search, session.study.allocation
    study = load_study(name=session.study.name, storage=find_storage(session.storage))
    kept, facts = study.user_attrs[STUDY_KEY], {key: each for key, each in session.facts.items() if key != "targets"}
    require_same(
        {key: kept.get(key) for key in facts},
        facts,
        what=f"study `{study.study_name}`",
        remedy="search again, or use another output folder.",
        holds="its trials are",
        error=StudyError,
    )
    space = make_space(
        session.profile_at_hand(),
        session.targets,
        session.budget,
        grouping=section.grouping,
        n_groups=section.groups,
        min_rank=bounds.min_rank,
        max_rank=bounds.max_rank,
    )
    return belief_of(study, space)


def _decisions(session: Session, repeats: Repeats) -> list[Path]:
    """Writes and draws the decisions of the run whose adapter is saved; without a controller, removes those of earlier runs."""
    decisions = repeats.runs[0].decisions
    if decisions is None:
        remove_others(session.out, ("decisions.parquet", "trajectories.png", "flow.png"), kept=())
        return []
    return [
        write_decisions(decisions, session.out / "decisions.parquet"),
        save_figure(plot_trajectories(decisions, session.targets), session.out / "trajectories.png"),
        save_figure(plot_flow(decisions, session.targets), session.out / "flow.png"),
    ]


def _read_allocation(session: Session, path: Path | None) -> RankAllocation:
    """The allocation of `--allocation`, or the study's own, which must have been made from the study as it is now."""
    file = path or session.allocation_path
    again = f"run `rankscope allocate {session.arguments}` or `rankscope search {session.arguments}`"
    if not file.exists():
        raise FileFormatError(f"`{file}` must hold an allocation, but there is no such file; {again} first.")
    allocation = RankAllocation.from_json(file)
    if path is None:
        stored = read_json(file, what="an allocation")
        made_by = stored.get("made_by") or {"command": "allocate", "flags": {}, "strategy": None}
        remedy = f"{again} again, or pass `--allocation {file}` to train it all the same."
        require_same(stored.get("made_from", {}), session.allocation_terms(made_by), what=f"`{file}`", remedy=remedy)
    if set(allocation.targets) != set(session.targets):
        raise AllocationError(f"`{file}` must be for this study's target modules, but is for others; allocate again.")
    return allocation


def _require_equal(allocation: RankAllocation, uniform: RankAllocation) -> None:
    """Checks that neither has room for a rank more than the other.

    Raises:
        AllocationError: One has.
    """
    small, large = sorted((allocation, uniform), key=lambda each: each.parameters)
    room = large.parameters - small.parameters
    if any(t.rank_cost <= room for t, rank in zip(small.targets, small.vector, strict=True) if rank < t.full_rank):
        raise AllocationError(
            f"`--baseline` must compare at equal parameters, but `{allocation.strategy}` has {allocation.parameters:,} and "
            f"uniform at the study's budget {uniform.parameters:,}; change `budget`, or leave out --baseline."
        )


def _row(repeats: Repeats, first: Repeats, compared: bool) -> tuple[str, ...]:
    difference = "-"
    if compared and repeats is not first:
        difference = paired_difference(repeats.test, first.test).text()
    return (
        repeats.name,
        f"{repeats.parameters:,}",
        f"{repeats.learning_rate:g}",
        f"{sum(repeats.validation) / len(repeats.runs):.3f}",
        f"{sum(repeats.test) / len(repeats.runs):.3f}",
        difference,
    )


def _summary(repeats: Repeats, first: Repeats, compared: bool) -> dict[str, Any]:
    return {
        "strategy": repeats.name,
        "parameters": repeats.parameters,
        "learning_rate": repeats.learning_rate,
        "seeds": [run.seed for run in repeats.runs],
        "validation": repeats.validation,
        "test": repeats.test,
        "difference": list(paired_difference(repeats.test, first.test)) if compared and repeats is not first else None,
    }
