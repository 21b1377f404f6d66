"""What each command does: open a session, call the library, write the files, print the table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rankscope.adapters import save_lora_config
from rankscope.allocation import RankAllocation
from rankscope.cli.output import print_files, print_json, print_line, print_table
from rankscope.cli.session import Session
from rankscope.comparison.methods import SEARCHED
from rankscope.exceptions import AllocationError, FileFormatError
from rankscope.files import read_json, write_json
from rankscope.plotting import (
    plot_energy,
    plot_ranks,
    plot_spectra,
    save_figure,
)
from rankscope.profiling.summary import cumulative_energy, group_energy, pooled_signal, rank_modules

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
    taken_on = f"{session.study.name}: {len(modules)} modules, {taken.metadata['batches']} batches"
    title = f"{taken_on}: gradient energy per parameter, most and least"
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


def run_allocate(
    path: Path, out: Path | None, overrides: Overrides, *, strategy: str | None, force: bool, as_json: bool
) -> None:
    """`rankscope allocate`."""
    session = Session.open(path, out, overrides)
    if not force and _is_recommended(session.allocation_path):
        raise AllocationError(
            f"`{session.allocation_path}` holds what a search recommended, which `allocate` would replace; pass --force, or use "
            "another --out."
        )
    uniform = session.one_shot("uniform")  # first: it needs no profile, and an infeasible budget shows at once
    allocation = session.one_shot(strategy)
    panels = [uniform, allocation] if allocation.strategy != "uniform" else [uniform]
    files = export(session, allocation, panels, command="allocate", strategy=strategy)
    if as_json:
        print_json({"study": session.study.name, **summary_of(allocation), "files": [str(file) for file in files]})
        return
    rows = [_allocation_row(a) for a in dict.fromkeys([uniform, allocation])]
    print_table(
        f"{session.study.name}: budget {session.budget.limit:,} parameters",
        ("strategy", "parameters", "modules adapted", "max rank"),
        rows,
    )
    print_files(files)


# --- files -------------------------------------------------------------------------------------------------------


def _is_recommended(path: Path) -> bool:
    """Whether a search wrote this allocation; a file that cannot be read holds nothing that could be lost."""
    try:
        stored = read_json(path, what="an allocation")
    except FileFormatError:
        return False
    return dict(stored.get("made_by") or {}).get("command") == "search" or stored.get("strategy") == SEARCHED


def export(
    session: Session,
    allocation: RankAllocation,
    panels: list[RankAllocation],
    *,
    command: str,
    strategy: str | None = None,
) -> list[Path]:
    """Writes allocation.json, with what it was made by and from, adapter_config.json and ranks.png."""
    made_by = {"command": command, "flags": dict(session.flags), "strategy": strategy}
    made = {"study": session.study.name, "made_by": made_by, "made_from": session.allocation_terms(made_by)}
    write_json(session.allocation_path, {**allocation.to_dict(), **made})
    config = allocation.to_lora_config(
        scaling=session.study.training.scaling,
        lora_dropout=session.study.training.lora_dropout,
        modules_to_save=list(getattr(session.task, "head_modules", ())) or None,
    )
    return [
        session.allocation_path,
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


def summary_of(allocation: RankAllocation) -> dict[str, Any]:
    """An allocation for `--json`."""
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
