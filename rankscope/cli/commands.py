"""What each command does: open a session, call the library, write the files, print the table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rankscope.adapters import save_lora_config
from rankscope.allocation import RankAllocation
from rankscope.cli.outcome import print_search, search_summary, starts_of
from rankscope.cli.output import print_files, print_json, print_line, print_table, progress
from rankscope.cli.session import Session
from rankscope.plotting import (
    plot_belief,
    plot_energy,
    plot_levels,
    plot_predictions,
    plot_ranks,
    plot_spectra,
    save_figure,
)
from rankscope.profiling.summary import cumulative_energy, group_energy, pooled_signal, rank_modules
from rankscope.searching import search

Overrides = Mapping[str, Any]
SHOWN_MODULES = 9


def run_profile(path: Path, out: Path | None, overrides: Overrides, *, keep_partial: bool, as_json: bool) -> None:
    """`rankscope profile`."""
    session = Session.open(path, out, overrides)
    taken = session.take_profile(keep_partial=keep_partial)
    files = [
        session.profile_path,
        save_figure(plot_energy(taken), session.out / "energy.png"),
        save_figure(plot_spectra(taken), session.out / "spectra.png"),
    ]
    modules, groups = rank_modules(taken), group_energy(taken)
    if as_json:
        summary = {"groups": groups.to_dict("records"), "files": [str(file) for file in files]}
        print_json({"profile": str(session.profile_path), "modules": len(modules), **taken.metadata, **summary})
        return
    shown = modules if len(modules) <= SHOWN_MODULES else pd.concat([modules.head(6), modules.tail(3)])
    title = (
        f"{len(modules)} modules, {taken.metadata['batches']} batches: gradient energy per parameter, most and least"
    )
    header = ("module", "rank cost", "‖G‖", "energy", "signal", "in rank 1")
    print_table(title, header, [_module_row(row) for row in shown.to_dict("records")])
    title = "gradient energy by tower and role, beside the share of parameters at equal ranks"
    rows = [(f"{g['tower']} {g['role']}", str(g["modules"]), f"{g['share']:.1%}", f"{g['parameters']:.1%}")
            for g in groups.to_dict("records")]  # fmt: skip
    print_table(title, ("group", "modules", "energy", "parameters"), rows)
    parameters, captured = cumulative_energy(taken)
    budget = session.budget.limit
    print_line(
        f"the best {budget:,} parameters (this study's budget) capture {np.interp(budget, parameters, captured):.0%} "
        f"of the gradient's energy; signal is {pooled_signal(taken):.0%} of it"
    )
    for kind, names in (
        ("skipped", taken.metadata["skipped"]),
        ("without a gradient", taken.metadata["without_gradient"]),
    ):
        if names:
            print_line(f"{kind}: {', '.join(names)}")
    if taken.metadata["interrupted"]:
        print_line(f"interrupted: the profile holds the {taken.metadata['batches']} batches before")
    print_files(files)


def run_allocate(path: Path, out: Path | None, overrides: Overrides, *, strategy: str | None, as_json: bool) -> None:
    """`rankscope allocate`."""
    session = Session.open(path, out, overrides)
    uniform = session.one_shot("uniform")  # first: it needs no profile, and an infeasible budget shows at once
    allocation = session.one_shot(strategy)
    files = _export(session, allocation, [uniform, allocation] if allocation.strategy != "uniform" else [uniform])
    if as_json:
        print_json({**_summary(allocation), "files": [str(file) for file in files]})
        return
    rows = [_allocation_row(a) for a in dict.fromkeys([uniform, allocation])]
    print_table(
        f"budget {session.budget.limit:,} parameters", ("strategy", "parameters", "modules adapted", "max rank"), rows
    )
    print_files(files)


def run_search(path: Path, out: Path | None, overrides: Overrides, *, as_json: bool) -> None:
    """`rankscope search`."""
    session = Session.open(path, out, overrides)
    section, bounds = session.study.search, session.study.allocation
    taken = session.profile_at_hand()
    with progress() as bar:
        line = bar.add_task("searching", total=section.trials)
        result = search(
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
            warm_start=[s if "://" in s else session.study.base_dir / s for s in section.warm_start],
            evaluator=section.evaluator,
            n_judged=section.judged,
            shared_folder=session.out / "shared-adapter",
            on_trial=lambda trial: bar.update(
                line, description="searching", completed=(trial.number + 1) * section.seeds, total=section.trials
            ),
            on_judged=lambda done, total: bar.update(line, description="judging", completed=done, total=total),
            on_confirm=lambda done, total: bar.update(line, description="confirming", completed=done, total=total),
        )
    best = result.best_trial
    allocation = best.allocation.renamed("searched") if best.proposed else best.allocation
    starts = [t.allocation for t in starts_of(result)]
    files = [
        *_export(session, allocation, list(dict.fromkeys([*starts, allocation]))),
        result.to_parquet(session.out / "trials.parquet"),
    ]
    if result.model is not None:
        files += [
            save_figure(plot_predictions(result.model, result), session.out / "predictions.png"),
            save_figure(plot_belief(result.model), session.out / "belief.png"),
            save_figure(plot_levels(result.model), session.out / "levels.png"),
        ]
    if as_json:
        print_json({**_summary(allocation), **search_summary(result), "files": [str(file) for file in files]})
        return
    print_search(result, modelled=section.sampler == "performance-model")
    print_files(files)


# --- files -------------------------------------------------------------------------------------------------------


def _export(session: Session, allocation: RankAllocation, panels: list[RankAllocation]) -> list[Path]:
    """Writes allocation.json, adapter_config.json and ranks.png."""
    config = allocation.to_lora_config(
        scaling=session.study.training.scaling,
        lora_dropout=session.study.training.lora_dropout,
        modules_to_save=list(getattr(session.task, "head_modules", ())) or None,
    )
    return [
        allocation.to_json(session.out / "allocation.json"),
        save_lora_config(config, session.out / "adapter_config.json"),
        save_figure(plot_ranks(*panels), session.out / "ranks.png"),
    ]


# --- rows --------------------------------------------------------------------------------------------------------


def _module_row(row: Mapping[Any, Any]) -> tuple[str, ...]:
    return (
        row["module"],
        f"{row['rank_cost']:,}",
        f"{row['gradient_norm']:.3g}",
        f"{row['share']:.1%}",
        f"{row['signal_share']:.0%}",
        f"{row['first']:.0%}",
    )


def _summary(allocation: RankAllocation) -> dict[str, Any]:
    return {
        "strategy": allocation.strategy,
        "parameters": allocation.parameters,
        "budget": allocation.budget,
        "ranks": dict(allocation.ranks),
    }


def _allocation_row(allocation: RankAllocation) -> tuple[str, ...]:
    adapted = sum(rank > 0 for rank in allocation.vector)
    modules = f"{adapted} of {len(allocation.targets)}"
    return allocation.strategy, f"{allocation.parameters:,}", modules, str(max(allocation.vector))
