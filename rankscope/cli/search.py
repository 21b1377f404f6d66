"""`rankscope search`: runs or resumes a study's search, and writes and prints what it recommends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankscope.allocation import RankAllocation
from rankscope.cli.commands import export, summary_of
from rankscope.cli.outcome import print_search, search_summary, starts_of
from rankscope.cli.output import print_files, print_json, progress
from rankscope.cli.session import Session
from rankscope.comparison.methods import SEARCHED
from rankscope.files import remove_others
from rankscope.plotting import plot_belief, plot_levels, plot_predictions, save_figure
from rankscope.searching import SearchResult, search

PICTURES = ("predictions.png", "belief.png", "levels.png")  # of the performance model


def run_search(path: Path, out: Path | None, overrides: Mapping[str, Any], *, as_json: bool) -> None:
    """`rankscope search`."""
    session = Session.open(path, out, overrides)
    result = search_of(session)
    allocation = recommended(result)
    starts = [t.allocation for t in starts_of(result)]
    files = [
        *export(session, allocation, list(dict.fromkeys([*starts, allocation])), command="search"),
        result.to_parquet(session.out / "trials.parquet"),
    ]
    if result.model is not None:
        files += [
            save_figure(plot_predictions(result.model, result), session.out / "predictions.png"),
            save_figure(plot_belief(result.model), session.out / "belief.png"),
            save_figure(plot_levels(result.model), session.out / "levels.png"),
        ]
    remove_others(session.out, PICTURES, kept=files)
    if as_json:
        print_json(
            {
                "study": session.study.name,
                **summary_of(allocation),
                **search_summary(result),
                "files": [str(file) for file in files],
            }
        )
        return
    print_search(result, modelled=session.study.search.sampler == "performance-model")
    print_files(files)


def search_of(session: Session) -> SearchResult:
    """The study's search, to its end: trials that are done already are read."""
    section, bounds = session.study.search, session.study.allocation
    taken = session.profile_at_hand()
    with progress() as bar:
        line = bar.add_task("searching", total=section.trials)
        return search(
            session.task,
            budget=session.budget,
            profile=taken,
            n_trials=section.trials,
            targets=session.targets,
            training=session.study.training.resolve(),
            learning_rates=session.study.training.learning_rate,
            n_seeds=section.seeds,
            confirm_fraction=section.confirm_fraction,
            fidelity=section.fidelity,
            storage=session.storage,
            study_name=session.study.name,
            seed=session.study.seed,
            sampler=section.sampler,
            grouping=section.grouping,
            n_groups=section.groups,
            min_rank=bounds.min_rank,
            max_rank=bounds.max_rank,
            pruner=section.pruner,
            on_trial=lambda trial: bar.update(
                line, description="searching", completed=(trial.number + 1) * section.seeds, total=section.trials
            ),
            on_confirm=lambda done, total: bar.update(line, description="confirming", completed=done, total=total),
        )


def recommended(result: SearchResult) -> RankAllocation:
    """What the search recommends, named after where it comes from."""
    best = result.best_trial
    return best.allocation.renamed(SEARCHED) if best.proposed else best.allocation
