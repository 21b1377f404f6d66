"""`rankscope train`: an allocation fine-tuned, beside uniform LoRA and under the controller if asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rankscope.allocation import RankAllocation
from rankscope.cli.session import (
    FIRST_REPORTED_SEED,
    Session,
    print_files,
    print_json,
    print_line,
    print_search,
    print_table,
    progress,
    search_summary,
    starts_of,
    stderr,
)
from rankscope.comparison import (
    REFERENCE,
    SEARCHED,
    Repeats,
    allocations,
    at_budget,
    check_terms,
    compare,
    format_row,
    insert_table,
    need_profile,
    paired_difference,
    read_comparison,
    repeat_all,
    summarise,
    to_markdown,
    write_report,
)
from rankscope.control import write_decisions
from rankscope.errors import FileError, SettingsError
from rankscope.files import read_json, remove_others, replacing, require_same, write_json
from rankscope.lora import save_lora_config
from rankscope.performance import PerformanceModel
from rankscope.plotting import (
    plot_belief,
    plot_energy,
    plot_flow,
    plot_levels,
    plot_predictions,
    plot_ranks,
    plot_spectra,
    plot_trajectories,
    save_figure,
)
from rankscope.profiling import cumulative_energy, group_energy, pooled_signal, rank_modules, read_profile
from rankscope.searching import STUDY_KEY, SearchResult, belief_of, find_storage, load_study, make_space, search
from rankscope.settings import ControllerSettings
from rankscope.strategies import NEEDS_PROFILE
from rankscope.targets import TargetModule
from rankscope.training import Lora

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
        raise SettingsError(
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
    except FileError:
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


TABLE = "comparison.parquet"
FIRST_TUNING_SEED = 10_000
PICTURES = ("forest.png", "trajectories-*.png", "flow-*.png")  # that not every comparison has


def run_compare(path: Path, out: Path | None, overrides: Mapping[str, Any], *, jobs: int, as_json: bool) -> None:
    """`rankscope compare`."""
    session = Session.open(path, out, overrides)
    section = session.study.compare
    first = FIRST_REPORTED_SEED + session.study.seed
    seeds = range(first, first + section.n_seeds)
    tuning_seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + section.n_tuning_seeds)
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
            controller=session.study.controller,
            training=session.training_config(),
            learning_rates=session.study.training.learning_rates,
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
        SettingsError: There is none.
    """
    if not session.has_search:
        raise SettingsError(
            f"`searched` needs a search in {session.out}, but there is none; run `rankscope search {session.arguments}` first."
        )
    return search_of(session)


def run_report(folders: list[Path], out: Path | None, into: Path | None, *, as_json: bool) -> None:
    """`rankscope report`: of one folder, or of several studies' folders together."""
    if out is None and len(folders) > 1:
        raise FileError("`--out` must say where the report of several folders goes, but is not given; add it.")
    runs = _told_apart({folder: read_comparison(folder / TABLE) for folder in folders})
    table = summarise(runs)
    card = None if into is None else insert_table(_read_text(into), to_markdown(table), where=str(into))
    targets = _targets_of(folders[0], runs) if len(folders) == 1 else ()
    command = "rankscope report " + " ".join(map(str, folders))
    kept = folders[0] if len(folders) == 1 else None
    files = write_report(out or folders[0], runs, table, targets=targets, pictures_in=kept, command=command)
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
    except FileError as error:
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
        raise FileError(f"`--into` must name a text file, but there is no {path}; check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it holds no UTF-8"
        raise FileError(f"`--into` must name a text file, but {path} cannot be read: {reason}.") from None


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
            levels = [_cells(row, "parameters", "rate", "points") for _, row in uniform.iterrows()]
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
    columns = ("method", "parameters", "rate", "points", "differs")
    print_table(title, header, [_cells(row, *columns) for _, row in group.iterrows()])


def _cells(row: pd.Series, *columns: str) -> list[str]:
    texts = format_row(row)
    return [texts[name] for name in columns]


def _print_growth(table: pd.DataFrame) -> None:
    """By how much uniform must grow to match the best at the study's budget, where that was measured."""
    limited = at_budget(table).query("budget > 0 and uniform_budget_multiplier.notna()")
    for study, group in limited.groupby("study", sort=False):
        best = group.sort_values("test").iloc[-1]
        if best["method"] != REFERENCE:
            times = float(best["uniform_budget_multiplier"])
            needs = "more parameters than were tried" if times == float("inf") else f"{times:.2g} x the parameters"
            print_line(f"{study}: uniform needs {needs} to match {best['method']}")


SEARCH_PICTURES = ("predictions.png", "belief.png", "levels.png")  # of the performance model


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
    remove_others(session.out, SEARCH_PICTURES, kept=files)
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
        line = bar.add_task("searching", total=section.n_trials)
        return search(
            session.task,
            budget=session.budget,
            profile=taken,
            n_trials=section.n_trials,
            targets=session.targets,
            training=session.training_config(),
            learning_rates=session.study.training.learning_rates,
            n_seeds=section.n_seeds,
            confirm_fraction=section.confirm_fraction,
            fidelity=section.fidelity,
            storage=session.storage,
            study_name=session.study.name,
            seed=session.study.seed,
            sampler=section.sampler,
            grouping=section.grouping,
            n_groups=section.n_groups,
            min_rank=bounds.min_rank,
            max_rank=bounds.max_rank,
            pruner=section.pruner,
            on_trial=lambda trial: bar.update(
                line, description="searching", completed=(trial.number + 1) * section.n_seeds, total=section.n_trials
            ),
            on_confirm=lambda done, total: bar.update(line, description="confirming", completed=done, total=total),
        )


def recommended(result: SearchResult) -> RankAllocation:
    """What the search recommends, named after where it comes from."""
    best = result.best_trial
    return best.allocation.renamed(SEARCHED) if best.proposed else best.allocation


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
    belief = _belief(session) if controller else None
    methods = [Lora(allocation, controller, performance_model=belief)]
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
            session.training_config(),
            learning_rates=session.study.training.learning_rates,
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


def _controller(session: Session, allocation: RankAllocation) -> ControllerSettings | None:
    """The study's controller; None: ranks stay."""
    mode = session.study.controller.mode
    if mode == "auto":
        mode = "off" if allocation.strategy in NEEDS_PROFILE or allocation.strategy == SEARCHED else "on"
        why = "rest on gradients already" if mode == "off" else "rest on no gradient yet"
        stderr.print(f"controller {mode}: the ranks of `{allocation.strategy}` {why}", soft_wrap=True)
    return session.study.controller if mode == "on" else None


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
        error=SettingsError,
    )
    space = make_space(
        session.profile_at_hand(),
        session.targets,
        session.budget,
        grouping=section.grouping,
        n_groups=section.n_groups,
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
        raise FileError(f"`{file}` must hold an allocation, but there is no such file; {again} first.")
    allocation = RankAllocation.from_json(file)
    if path is None:
        stored = read_json(file, what="an allocation")
        made_by = stored.get("made_by") or {"command": "allocate", "flags": {}, "strategy": None}
        remedy = f"{again} again, or pass `--allocation {file}` to train it all the same."
        require_same(stored.get("made_from", {}), session.allocation_terms(made_by), what=f"`{file}`", remedy=remedy)
    if set(allocation.targets) != set(session.targets):
        raise SettingsError(f"`{file}` must be for this study's target modules, but is for others; allocate again.")
    return allocation


def _require_equal(allocation: RankAllocation, uniform: RankAllocation) -> None:
    """Checks that neither has room for a rank more than the other.

    Raises:
        SettingsError: One has.
    """
    small, large = sorted((allocation, uniform), key=lambda each: each.parameters)
    room = large.parameters - small.parameters
    if any(t.rank_cost <= room for t, rank in zip(small.targets, small.vector, strict=True) if rank < t.full_rank):
        raise SettingsError(
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
