"""`rankscope compare` and `rankscope report`: methods at equal budgets, and the page that shows what came out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from rankscope.cli.output import print_files, print_json, print_line, print_table, progress, stderr
from rankscope.cli.search import search_of
from rankscope.cli.session import FIRST_REPORTED_SEED, Session
from rankscope.comparison import (
    REFERENCE,
    allocations,
    at_budget,
    compare,
    insert_table,
    read_comparison,
    summarise,
    to_markdown,
)
from rankscope.comparison.comparing import check_terms
from rankscope.comparison.methods import SEARCHED, need_profile
from rankscope.comparison.table import NO_DIFFERENCE, SAME_RUNS, points_over_uniform
from rankscope.exceptions import ComparisonError, FileFormatError
from rankscope.files import remove_others, replacing
from rankscope.profiling import read_profile
from rankscope.report import write_report
from rankscope.searching import SearchResult
from rankscope.targets import TargetModule

TABLE = "comparison.parquet"
FIRST_TUNING_SEED = 10_000
PICTURES = ("forest.png", "trajectories-*.png", "flow-*.png")  # that not every comparison has


def run_compare(path: Path, out: Path | None, overrides: Mapping[str, Any], *, jobs: int, as_json: bool) -> None:
    """`rankscope compare`."""
    session = Session.open(path, out, overrides)
    section = session.study.compare
    first = FIRST_REPORTED_SEED + session.study.seed
    seeds = range(first, first + section.seeds)
    tuning_seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + section.tuning_seeds)
    check_terms(seeds, tuning_seeds, section.budgets)  # before a profile is taken or a search resumed
    searched = _searched(session) if any(SEARCHED in name for name in section.methods) else None
    with progress() as bar:
        line = bar.add_task("comparing", total=None)
        found = compare(
            session.task,
            section.methods,
            budget=session.budget,
            targets=session.targets,
            profile=session.profile_at_hand() if need_profile(section.methods) else None,
            searched=None if searched is None else searched.best_allocation,
            search_steps=0 if searched is None else searched.steps,
            controller=session.study.controller.resolve(),
            training=session.study.training.resolve(),
            learning_rates=session.study.training.learning_rate,
            seeds=seeds,
            tuning_seeds=tuning_seeds,
            budgets=section.budgets,
            uniform_budgets=section.uniform_budgets,
            n_jobs=jobs,
            kept_in=session.out / "runs",
            study=session.study.name,
            base_dir=session.study.base_dir,
            on_run=lambda done, total: bar.update(line, completed=done, total=total),
        )
    files = [found.to_parquet(session.out / TABLE)]
    table = summarise(found.runs)
    files += write_report(
        session.out,
        found.runs,
        table,
        targets=session.targets,
        decisions=found.decisions,
        command=f"rankscope compare {path}",
    )
    remove_others(session.out, PICTURES, kept=files)
    _show(table, files, as_json=as_json)


def _searched(session: Session) -> SearchResult:
    """The study's finished search.

    Raises:
        ComparisonError: There is none.
    """
    if not session.has_search:
        raise ComparisonError(
            f"`searched` needs a search in {session.out}, but there is none; run `rankscope search {session.arguments}` first."
        )
    return search_of(session)


def run_report(folders: list[Path], out: Path | None, into: Path | None, *, as_json: bool) -> None:
    """`rankscope report`: of one folder, or of several studies' folders together."""
    if out is None and len(folders) > 1:
        raise FileFormatError("`--out` must say where the report of several folders goes, but is not given; add it.")
    runs = _told_apart({folder: read_comparison(folder / TABLE) for folder in folders})
    table = summarise(runs)
    card = None if into is None else insert_table(_read_text(into), to_markdown(table), where=str(into))
    targets = _targets_of(folders[0], runs) if len(folders) == 1 else ()
    command = "rankscope report " + " ".join(map(str, folders))
    files = write_report(out or folders[0], runs, table, targets=targets, command=command)
    if into is not None and card is not None:
        with replacing(into) as temporary:
            temporary.write_text(card, encoding="utf-8", newline="")
        files.append(into)
    _show(table, files, as_json=as_json)


def _targets_of(folder: Path, runs: pd.DataFrame) -> tuple[TargetModule, ...]:
    """The modules of the profile beside a comparison, for pictures of ranks; where it is of other modules, that is said."""
    path = folder / "profile.parquet"
    if not path.exists():
        return ()
    try:
        targets = read_profile(path).targets
    except FileFormatError as error:
        stderr.print(f"no pictures of ranks: {error}", soft_wrap=True)
        return ()
    if any(set(ranks) - {target.name for target in targets} for ranks in allocations(runs).values()):
        stderr.print(f"no pictures of ranks: `{path}` is of other modules", soft_wrap=True)
        return ()
    return targets


def _told_apart(runs: Mapping[Path, pd.DataFrame]) -> pd.DataFrame:
    """The runs of several folders; studies of one name, which may be of other data, get their folder's name beside it."""
    names = [name for each in runs.values() for name in each["study"].unique()]
    shared = {name for name in names if names.count(name) > 1}
    parts = [
        each.assign(
            study=each["study"].map(lambda name, folder=folder: f"{name} ({folder})" if name in shared else name)
        )
        for folder, each in runs.items()
    ]
    return pd.concat(parts, ignore_index=True)


def _read_text(path: Path) -> str:
    """The text of the file that `--into` names, its line ends as they are."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except FileNotFoundError:
        raise FileFormatError(f"`--into` must name a text file, but there is no {path}; check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it holds no UTF-8"
        raise FileFormatError(f"`--into` must name a text file, but {path} cannot be read: {reason}.") from None


def _show(table: pd.DataFrame, files: list[Path], *, as_json: bool) -> None:
    if as_json:
        print_json({"methods": json.loads(table.to_json(orient="records")), "files": [str(file) for file in files]})
        return
    for _, rows in table.groupby("study", sort=False):
        for _, group in rows.groupby("factor", sort=False):
            if len(group) > 1:
                _print_methods(group)
        uniform = rows[rows["method"] == REFERENCE]
        if len(uniform) > 1 or len(uniform) == len(rows):
            levels = [_level(row) for _, row in uniform.iterrows()]
            print_table(f"{_name(rows.iloc[0])}: uniform by parameters", ("parameters", "rate", "test"), levels)
    _print_growth(table)
    print_files(files)


def _name(row: pd.Series) -> str:
    """The study's name, and the task's where it is another."""
    return str(row["study"]) if row["task"] in row["study"] else f"{row['study']}, {row['task']}"


def _print_methods(group: pd.DataFrame) -> None:
    """One study's at one budget."""
    first = group.iloc[0]
    scale = "" if first["factor"] == 1.0 else f", {first['factor']:g} x the budget"
    n_seeds = int(first["seeds"])
    noise = f"; seeds alone: up to {100 * first['noise']:.1f}" if n_seeds > 1 else ""
    title = f"{_name(first)}{scale}: {n_seeds} seed{'s' * (n_seeds != 1)}, points over uniform{noise}"
    header = ("method", "parameters", "rate", "test, 95 % interval", "differs")
    print_table(title, header, [_row(row) for _, row in group.iterrows()])


def _row(row: pd.Series) -> tuple[str, ...]:
    parameters, rate, test = _level(row)
    if row["method"] == REFERENCE:
        return REFERENCE, parameters, rate, test, ""
    alike = row["verdict"] in (NO_DIFFERENCE, SAME_RUNS)
    verdict = "no" if alike else str(row["verdict"]).partition(":")[0]
    return str(row["method"]), parameters, rate, points_over_uniform(row), verdict


def _level(row: pd.Series) -> tuple[str, str, str]:
    return f"{row['parameters']:,}", f"{row['learning_rate']:.3g}", f"{100 * row['test']:.1f} %"


def _print_growth(table: pd.DataFrame) -> None:
    """By how much uniform must grow to match the best at the study's budget, where that was measured."""
    limited = at_budget(table).query("budget > 0 and equivalent.notna()")
    for study, group in limited.groupby("study", sort=False):
        best = group.sort_values("test").iloc[-1]
        if best["method"] != REFERENCE:
            times = float(best["equivalent"])
            needs = "more parameters than were tried" if times == float("inf") else f"{times:.2g} x the parameters"
            print_line(f"{study}: uniform needs {needs} to match {best['method']}")
