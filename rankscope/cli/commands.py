"""What each command does: call the library on a session, write the files, print the tables."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
import yaml

from rankscope import comparison, plotting, profiling, searching
from rankscope.allocation import RankAllocation
from rankscope.cli import require_allocation
from rankscope.cli.session import Session, finite, print_files, print_json, print_line, print_table, progress, stderr
from rankscope.comparison import REFERENCE, SEARCHED
from rankscope.control import write_decisions
from rankscope.early import PATHS
from rankscope.errors import FileError, SettingsError, without_secrets
from rankscope.files import read_json, remove_others, replacing, write_json
from rankscope.lora import save_lora_config
from rankscope.searching import Finalist, SearchResult, Trial
from rankscope.strategies import needs_profile
from rankscope.targets import TargetModule
from rankscope.training import Lora, add_to_card, describe_towers, estimate_memory
from rankscope.units import Interval, Unit, unit_of

FEW_TRIALS = 30  # measured on synthetic landscapes: below, nothing beats a good one-shot
SHOWN_MODULES = 9
COMPARISON = "comparison.parquet"
PEFT_TASKS = ("CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS")  # task types that PEFT knows, of rankscope's tasks


# --- profile and allocate ---------------------------------------------------------------------------------------


def run_profile(session: Session, *, as_json: bool) -> None:
    """`rankscope profile`."""
    taken = session.take_profile()
    facts, modules = taken.metadata, profiling.rank_modules(taken)
    groups = profiling.group_energy(taken).to_dict("records")
    pictures = session.draw(energy=partial(plotting.plot_energy, taken), spectra=partial(plotting.plot_spectra, taken))
    told = {"image": "{image}"} if taken.tells_modalities else {}
    if told:
        pictures += session.draw(modalities=partial(plotting.plot_modalities, taken))
    remove_others(session.out, ("modalities.png",), kept=pictures)
    files = [session.profile_path, *pictures]
    if as_json:
        made = {"profile": str(session.profile_path), "modules": len(modules)}
        print_json({**made, **facts, "groups": groups}, files)
        return
    shown = modules if len(modules) <= SHOWN_MODULES else pd.concat([modules.head(6), modules.tail(3)])
    title = f"{session.study.name}: {len(modules)} modules, {facts['batches']} batches"
    print_table(
        f"{title}: gradient energy per parameter, most and least",
        {"module": "{module}", "rank cost": "{rank_cost:,}", "‖G‖": "{gradient_norm:.3g}", "energy": "{share:.1%}",
         "signal": "{signal_share:.0%}", "in rank 1": "{first:.0%}"},
        shown.to_dict("records"),
    )  # fmt: skip
    print_table(
        "gradient energy by tower and role, beside the share of parameters at equal ranks",
        {
            "group": "{tower} {role}",
            "modules": "{modules}",
            "energy": "{share:.1%}",
            "parameters": "{parameters:.1%}",
            **told,
        },
        [{**row, "image": "-" if math.isnan(row.get("image", math.nan)) else f"{row['image']:.0%}"} for row in groups],
    )
    if told:
        image, text = (taken.table[name].sum() for name in profiling.MODALITIES)
        of_all = f", {facts['image_tokens'] / facts['tokens']:.0%} of all," if facts["tokens"] else ""
        print_line(
            f"image tokens{of_all} have {image / (image + text):.0%} of the gradient energy of the modules that see both, each "
            "part's counted on its own"
        )
    limit = session.budget.limit
    print_line(
        f"the best {limit:,} parameters (this study's budget) capture "
        f"{np.interp(limit, *profiling.cumulative_energy(taken)):.0%} of the gradient's energy; "
        f"signal is {taken.pooled_signal():.0%} of it"
    )
    for kind, names in {"skipped": facts["skipped"], "without a gradient": facts["without_gradient"]}.items():
        if names:
            print_line(f"{kind}: {', '.join(names)}")
    if facts["interrupted"]:
        print_line(f"interrupted: the profile holds the {facts['batches']} batches before")
    print_files(files)


def run_allocate(session: Session, *, force: bool, as_json: bool) -> None:
    """`rankscope allocate`."""
    if not force and _is_recommended(session.allocation_path):
        held = f"`{session.allocation_path}` holds what a search recommended, which `allocate` would replace"
        raise SettingsError(f"{held}; pass --force, or use another --out.")
    uniform = session.one_shot("uniform")  # first: it needs no profile, and an infeasible budget shows at once
    allocation = session.one_shot()
    shown = [allocation] if allocation == uniform else [uniform, allocation]
    files = _export(session, allocation, shown, command="allocate")
    if as_json:
        print_json({"study": session.study.name, **_allocation_summary(allocation)}, files)
        return
    print_table(
        f"{session.study.name}: budget {session.budget.limit:,} parameters",
        {"strategy": "{a.strategy}", "parameters": "{a.parameters:,}", "modules adapted": "{adapted}", "max rank": "{most}"},
        [
            {"a": a, "adapted": f"{np.count_nonzero(a.vector)} of {len(a.targets)}", "most": max(a.vector)}
            for a in shown
        ],
    )  # fmt: skip
    if len(allocation.parameters_by_tower) > 1:
        _print_towers(shown)
    if allocation == uniform and allocation.strategy != "uniform":
        print_line(f"{allocation.strategy} gives every module the rank that uniform gives it")
    print_files(files)


def _print_towers(allocations: list[RankAllocation]) -> None:
    """What each tower gets of the parameters, and within which bounds."""
    last = allocations[-1]
    rows = []
    for tower in last.parameters_by_tower:
        members = [t.tower == tower for t in last.targets]
        low, high = last.tower_bounds.get(tower, (0, None))
        row = {"tower": tower, "modules": sum(members), "bounds": f"{low:,} to {high:,}" if high is not None else "-"}
        for place, each in enumerate(allocations):
            spent = each.parameters_by_tower[tower]
            mean = float(np.mean([rank for rank, mine in zip(each.vector, members, strict=True) if mine]))
            row[f"a{place}"] = f"{spent:,} ({spent / max(each.parameters, 1):.0%}), {mean:.2f}"
        rows.append(row)
    bounds = {"least to most": "{bounds}"} if last.tower_bounds else {}
    strategies = {each.strategy: f"{{a{place}}}" for place, each in enumerate(allocations)}
    columns = {"tower": "{tower}", "modules": "{modules}", **bounds, **strategies}
    print_table("by tower: parameters (share), mean rank", columns, rows)


def _is_recommended(path: Path) -> bool:
    """Whether a search wrote this allocation; a file that cannot be read holds nothing that could be lost."""
    try:
        stored = read_json(path, what="an allocation")
    except FileError:
        return False
    return dict(stored.get("made_by") or {}).get("command") == "search" or stored.get("strategy") == SEARCHED


def _export(session: Session, allocation: RankAllocation, shown: list[RankAllocation], *, command: str) -> list[Path]:
    """Write allocation.json, with what it was made by and from, adapter_config.json and ranks.png."""
    write_json(session.allocation_path, {**allocation.to_dict(), **session.provenance(command)}, sealed=True)
    training, heads = session.study.training, list(getattr(session.task, "head_modules", ()))
    config = allocation.to_lora_config(
        scaling=training.scaling, lora_dropout=training.lora_dropout, modules_to_save=heads or None
    )
    if (kind := getattr(session.task, "task_type", None)) in PEFT_TASKS:
        config.task_type = kind
    config_path = save_lora_config(config, session.out / "adapter_config.json")
    return [session.allocation_path, config_path, *session.draw(ranks=partial(plotting.plot_ranks, *shown))]


def _allocation_summary(allocation: RankAllocation) -> dict[str, Any]:
    values = {key: getattr(allocation, key) for key in ("strategy", "parameters", "budget")}
    return {**values, "towers": allocation.parameters_by_tower, "ranks": dict(allocation.ranks)}


# --- search -----------------------------------------------------------------------------------------------------


def run_search(session: Session, *, as_json: bool) -> None:
    """`rankscope search`."""
    result = search_study(session)
    best = result.best_trial
    allocation = best.allocation.renamed(SEARCHED) if best.proposed else best.allocation
    shown = dict.fromkeys([*(trial.allocation for trial in _starts_of(result)), allocation])
    files = _export(session, allocation, list(shown), command="search")
    files.append(result.to_parquet(session.out / "trials.parquet"))
    if result.model is not None:
        files += session.draw(predictions=partial(plotting.plot_predictions, result.model, result))
        files += session.draw(
            belief=partial(plotting.plot_belief, result.model), levels=partial(plotting.plot_levels, result.model)
        )
    remove_others(session.out, ("predictions.png", "belief.png", "levels.png"), kept=files)
    if as_json:
        print_json({"study": session.study.name, **_allocation_summary(allocation), **_search_summary(result)}, files)
        return
    _print_search(result, modelled=session.study.search.sampler == "performance-model")
    print_files(files)


def search_study(session: Session) -> SearchResult:
    """The study's search, to its end, with any other workers; trials that are done already are read."""
    settings, bounds = session.study.search, session.study.allocation
    taken = session.profile  # before the bar is shown
    with progress("searching") as update:
        return searching.search(
            session.task,
            budget=session.budget,
            profile=taken,
            targets=session.targets,
            settings=settings,
            training=session.study.training,
            min_rank=bounds.min_rank,
            max_rank=bounds.max_rank,
            on_progress=lambda stage, done, total: update(done, total, stage),
            storage=session.storage,
            artifacts=session.artifacts,
            study_name=session.study_name,
            seed=session.study.seed if settings.seed is None else settings.seed,
        )


def _print_search(result: SearchResult, *, modelled: bool) -> None:
    """The finalists (without a confirmation, the start points and the best observed trial), and what to make of them."""
    name, metric = result.study.study_name, result.metric_name
    if result.finalists:
        n_seeds = len(result.finalists[0].metrics_by_seed)
        title = f"finalists on {n_seeds} fresh seed{'s' * (n_seeds != 1)}, 95 % intervals; * recommended"
        shown = [finalist.trial for finalist in result.finalists]
    else:
        title = "validation split, nothing confirmed; * recommended"
        shown = [*_starts_of(result), result.best_trial, result.best_of_origin(None)]
    size = {"parameters": "{parameters:,}"} if result.over_budgets else {"rate": "{learning_rate:g}"}
    texts = {metric: "{metric}", "to uniform": "{to_uniform}"}
    texts |= {"posterior": "{posterior}"} if result.posterior else {}
    rows = {trial.number: _row(result, trial) for trial in shown}
    print_table(f"{name}: {len(result.trials)} trials; {title}", {"strategy": "{name}", **size, **texts}, rows.values())
    if result.over_budgets and result.front:
        rows = {trial.number: _row(result, trial) for trial in result.front}
        title = (
            "trials that none with as many parameters or fewer matches in the posterior mean; finalists on fresh seeds"
        )
        print_table(f"{name}: {title}", {"strategy": "{name}", **size, **texts}, rows.values())
    if result.posterior:
        print_line(
            "posterior: the difference to uniform that the performance model expects after all trials and fresh seeds"
        )
    for line in filter(None, (result.recommendation.reason, _verdict(result))):
        print_line(line)
    states = Counter(trial.state.name for trial in result.study.get_trials(deepcopy=False))
    others = {"pruned": states["PRUNED"], "failed": states["FAIL"]}
    said = ", ".join(f"{count} {how}" for how, count in others.items() if count)
    trials = f"{states['COMPLETE'] + sum(others.values())} trials{f' ({said})' if said else ''}"
    print_line(f"cost: {trials}, {result.confirming_runs} confirming runs, {result.steps:,} steps")
    for agreement in result.agreements:
        print_line(f"fidelity: {agreement}")
    if modelled and result.model is None:
        print_line(f"performance model: no proposal yet; it needs {searching.START_TRIALS} trials whose metrics differ")
    elif modelled:
        scores = str(result.validation) if result.validation else "too few different allocations to validate it"
        if len(result.trials) < FEW_TRIALS:
            scores += f". Fewer than {FEW_TRIALS} trials seldom find more than one-shot gives"
        print_line(f"performance model: {scores}")


def _starts_of(result: SearchResult) -> list[Trial]:
    """The best trials of uniform and of one-shot, as far as the search has come."""
    origins = {trial.origin for trial in result.trials}
    return [result.best_of_origin(origin) for origin in ("uniform", "one-shot") if origin in origins]


def _finalist(result: SearchResult, trial: Trial) -> Finalist | None:
    """What fresh seeds say of a trial, if it is a finalist."""
    return next((finalist for finalist in result.finalists if finalist.trial.number == trial.number), None)


def _row(result: SearchResult, trial: Trial) -> dict[str, Any]:
    """A trial as the tables show it; an interval is on a line of its own."""
    found = _finalist(result, trial)
    difference = trial.difference if found is None else found.difference
    ends = (found.interval if found else None) or (math.nan, math.nan)
    known = difference is not None and trial.origin != "uniform"
    expected = None if trial.origin == "uniform" else result.posterior.get(trial.allocation)
    return {
        "name": f"{trial.name} *" if trial.number == result.best_trial.number else trial.name,
        "parameters": trial.allocation.parameters,
        "learning_rate": trial.learning_rate,
        "metric": result.unit.value(found.metric if found else trial.metric),
        "to_uniform": _on_two_lines(Interval(difference or 0.0, *ends), result.unit) if known else "-",
        "posterior": _on_two_lines(expected, result.unit) if expected else "-",
    }


def _on_two_lines(interval: Interval, unit: Unit) -> str:
    r"""The mean, and the interval below it if there is one.

    >>> from rankscope.units import SHARE
    >>> _on_two_lines(Interval(0.02, 0.01, 0.03), SHARE), _on_two_lines(Interval(0.02, math.nan, math.nan), SHARE)
    ('+2.0\n[+1.0, +3.0]', '+2.0')
    """
    return interval.text(unit).removesuffix(" [-]").replace(" [", "\n[")


def _verdict(result: SearchResult) -> str:
    """What fresh seeds say of the recommendation, in words."""
    found = _finalist(result, result.best_trial)
    if found is None:
        return ""  # the search has warned, and said why
    if found.trial.origin == "uniform":
        return ""  # the reason says it
    if found.difference is None:
        return "uniform did not complete: whether the recommendation is better is not known"
    if found.interval is None:
        return "whether it differs from uniform is not known: an interval needs 3 fresh seeds or more, and differences that vary"
    (low, high), unit = found.interval, result.unit
    if low > 0:
        return f"better than uniform: {unit.difference(found.difference)}{unit.points}, and not less than {unit.difference(low)}"
    return f"not told apart from uniform: {unit.difference(low)} to {unit.difference(high)}{unit.points}"


def _search_summary(result: SearchResult) -> dict[str, Any]:
    return {
        "recommended": _trial_summary(result, result.best_trial),
        "reason": result.recommendation.reason,
        "finalists": [_trial_summary(result, finalist.trial) for finalist in result.finalists],
        "front": [_trial_summary(result, trial) for trial in result.front] if result.over_budgets else None,
        "unconfirmed": result.unconfirmed,
        "performance_model": asdict(result.validation) if result.validation else None,
        "trials": len(result.trials),
        "confirming_runs": result.confirming_runs,
        "steps": result.steps,
        "fidelity": [agreement._asdict() for agreement in result.agreements],
    }


def _trial_summary(result: SearchResult, trial: Trial) -> dict[str, Any]:
    """A trial; what fresh seeds say of a finalist stands in place of its own difference to uniform."""
    row = trial.to_row()
    shown = {key: row[key] for key in ("trial", "parameters", "origin", "learning_rate", "metric", "difference")}
    expected = result.posterior.get(trial.allocation)
    shown["posterior"] = expected._asdict() if expected else None
    if (found := _finalist(result, trial)) is not None:
        confirmed = {"confirmed": dict(found.metrics_by_seed), "difference": found.difference}
        shown |= {**confirmed, "interval": found.interval}
    return shown


# --- train ------------------------------------------------------------------------------------------------------


def run_train(
    session: Session,
    *,
    allocation: Path | None,
    baseline: bool,
    seeds: int,
    jobs: int,
    dry_run: bool,
    as_json: bool,
) -> None:
    """`rankscope train`."""
    if dry_run:
        _run_dry(replace(session, dry_run=True), allocation, as_json=as_json)
        return
    ranks = _read_allocation(session, allocation)
    methods = [Lora(ranks)]
    if _is_controlled(session, ranks):
        methods = [Lora(ranks, session.study.controller)]
    if baseline:
        uniform = session.one_shot("uniform")
        _require_equal(ranks, uniform)
        static = dict.fromkeys([Lora(uniform), Lora(ranks)])
        methods = [*(method for method in static if method != methods[0]), *methods]
    if ranks.parameters > session.budget.limit:
        spent, limit = f"{ranks.parameters:,}", f"{session.budget.limit:,}"
        stderr.print(
            f"the allocation has {spent} parameters, above the study's budget of {limit}: all are trained",
            soft_wrap=True,
        )
    with progress("training") as on_run:
        groups = comparison.run_tuned(
            session.task,
            [comparison.make_grid(method, session.study.training) for method in methods],
            seeds=_reported_seeds(session, seeds),
            n_jobs=jobs,
            save_first_to=session.out / "adapter",
            on_run=on_run,
        )
    reported = [[run for run in runs if run.role == comparison.REPORTED] for runs in groups]
    files = [session.out / "adapter", *_decisions(session, reported[-1][0].decisions)]
    rows: list[dict[str, Any]] = []
    for runs in reported:
        row: dict[str, Any] = {"strategy": runs[0].method, "parameters": max(run.parameters for run in runs)}
        row |= {"learning_rate": runs[0].learning_rate, "seeds": [run.seed for run in runs]}
        row |= {"validation": [run.validation for run in runs], "test": [run.test for run in runs]}
        row["difference"] = comparison.paired_difference(row["test"], rows[0]["test"]) if baseline and rows else None
        rows.append(row)
    add_to_card(session.out / "adapter", "Results", _results(session, rows, reported[-1][0].seed, baseline=baseline))
    if as_json:
        print_json({"study": session.study.name, "metric": session.task.metric, "runs": rows}, files)
        return
    _print_runs(session, rows, baseline=baseline)
    print_files(files)


def _print_runs(session: Session, rows: list[dict[str, Any]], *, baseline: bool) -> None:
    """What was trained, a row each, and whether it was compared."""
    n = len(rows[-1]["seeds"])
    title = f"{session.study.name}: mean {session.task.metric} of {f'{n} seeds' if n > 1 else 'one seed'}"
    unit = _unit_of(rows)
    print_table(
        title + ("; paired test difference to uniform, 95 % interval" if baseline else ""),
        {"strategy": "{strategy}", "parameters": "{parameters:,}", "rate": "{learning_rate:g}",
         "validation": "{validation}", "test": "{test}", "to uniform": "{difference}"},
        [
            {**row, "validation": unit.value(fmean(row["validation"])), "test": unit.value(fmean(row["test"])),
             "difference": row["difference"].text(unit) if row["difference"] else "-"}
            for row in rows
        ],
    )  # fmt: skip
    if not baseline:
        print_line("not compared with uniform LoRA at as many parameters; --baseline does")


def _unit_of(rows: list[dict[str, Any]]) -> Unit:
    return unit_of([value for row in rows for value in (*row["validation"], *row["test"])])


def _results(session: Session, rows: list[dict[str, Any]], seed: int, *, baseline: bool) -> list[str]:
    """What the trainings gave, as Markdown for the adapter's model card."""
    metric, last, training, unit = session.task.metric, rows[-1], session.study.training, _unit_of(rows)
    above = "; the allocation was made for a larger one" if last["parameters"] > session.budget.limit else ""
    lines = [
        f"`rankscope train` on the study `{session.study.name}`: {training.steps:,} steps at learning rate "
        f"{last['learning_rate']:g}. The study's budget is {session.budget.limit:,} adapter parameters{above}. "
        f"This adapter is of seed {seed}, "
        f"the {'first' if len(last['seeds']) > 1 else 'only one'}.",
        "", f"| mean {metric} | parameters | seeds | validation | test | to uniform, 95 % interval |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for row in rows:
        means = f"{unit.value(fmean(row['validation']))} | {unit.value(fmean(row['test']))}"
        difference = row["difference"].text(unit) if row["difference"] else "-"
        lines.append(f"| {row['strategy']} | {row['parameters']:,} | {len(row['seeds'])} | {means} | {difference} |")
    if not baseline:
        lines += ["", "It was not compared with uniform LoRA at as many parameters; `rankscope train --baseline` does."]
    return lines


def _run_dry(session: Session, allocation: Path | None, *, as_json: bool) -> None:
    """`rankscope train --dry-run`: what would be trained, and about how much memory it takes."""
    outline, training, name = session.outline, session.study.training, session.study.name
    ranks = _read_allocation(session, allocation) if allocation else session.one_shot("uniform")
    towers = describe_towers(outline.model, ranks)
    memory = estimate_memory(outline.model, ranks, batch_size=outline.batch_size, max_length=outline.max_length)
    facts: dict[str, Any] = {"study": name, "model": type(outline.model).__name__, "budget": session.budget.limit}
    facts |= {"strategy": ranks.strategy, "parameters": ranks.parameters, "towers": towers, "steps": training.steps}
    rows = training.steps * training.gradient_accumulation * outline.batch_size
    facts |= {"rows": rows, "batch_size": outline.batch_size, "gradient_accumulation": training.gradient_accumulation}
    facts |= {"max_length": outline.max_length, "memory": {**memory, "total": sum(memory.values())}}
    if as_json:
        print_json(facts)
        return
    dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in outline.model.parameters()}))
    print_table(
        f"{name}: {facts['model']}, weights in {dtypes}; budget {session.budget.limit:,} parameters, here {ranks.strategy}",
        {"tower": "{tower}", "weights": "{weights:,}", "blocks": "{blocks}", "target\nmodules": "{modules}",
         "rank 1": "{rank_cost:,}", "parameters": "{parameters:,}", "mean\nrank": "{mean_rank:.2f}"},
        towers,
    )  # fmt: skip
    rates = ", ".join(f"{rate:g}" for rate in training.learning_rates)
    print_line(
        f"{training.steps:,} steps of {training.gradient_accumulation} x {outline.batch_size} rows = {rows:,} rows of at most "
        f"{outline.max_length:,} tokens; learning rate {rates}"
    )
    columns = {"memory, about": "{what}", "GB": "{gigabytes:.{digits}f}"}
    print_table(
        "one process, without kernels' buffers and the device's context",
        columns,
        [
            {"what": what, "gigabytes": size / 1e9, "digits": 2 if size > 1e8 else 4}
            for what, size in facts["memory"].items()
        ],
    )


def _reported_seeds(session: Session, n: int) -> range:
    """Seeds of reported runs, apart from those of search and tuning."""
    return range(1000 + session.study.seed, 1000 + session.study.seed + n)


def _read_allocation(session: Session, path: Path | None) -> RankAllocation:
    """The allocation of `--allocation`, or the study's own, which must have been made from the study as it is now."""
    file = path or session.allocation_path
    require_allocation(file, session.arguments)
    allocation = RankAllocation.from_json(file)
    if path is None:
        again = f"run `rankscope allocate {session.arguments}` or `rankscope search {session.arguments}`"
        remedy = f"{again} again, or pass `--allocation {file}` to train it all the same."
        kept = read_json(file, what="an allocation")
        session.require_present(kept, file, command="allocate", remedy=remedy)
        _require_told_budget(session, kept, file)
    if set(allocation.targets) != set(session.targets):
        raise SettingsError(f"`{file}` must be for this study's target modules, but is for others; allocate again.")
    return allocation


def _require_told_budget(session: Session, kept: Mapping[str, Any], file: Path) -> None:
    """Raise a SettingsError if this command is given a budget, and the allocation was made for another."""
    made_for, now = kept.get("made_from", {}).get("budget"), session.budget.limit
    if made_for != now and any(key.partition(".")[0] == "budget" for key in session.flags):
        must = f"`{file}` must be for the budget that is given, {now:,} parameters"
        raise SettingsError(f"{must}, but was made for {made_for:,}; run `rankscope allocate` with that budget first.")


def _require_equal(allocation: RankAllocation, uniform: RankAllocation) -> None:
    """Raise a SettingsError if one has room for a rank more than the other."""
    small, large = sorted((allocation, uniform), key=lambda each: each.parameters)
    spent, room = small.parameters_by_tower, large.parameters - small.parameters
    rooms = {tower: min(small.tower_bounds.get(tower, (0, math.inf))[1] - used, room) for tower, used in spent.items()}
    growing = [t for t, rank in zip(small.targets, small.vector, strict=True) if rank < t.full_rank]
    if any(t.rank_cost <= rooms[t.tower] for t in growing):
        made_for = allocation.budget or allocation.parameters
        raise SettingsError(
            f"`--baseline` must compare at equal parameters, but `{allocation.strategy}` has {allocation.parameters:,} and "
            f"uniform at the study's budget {uniform.parameters:,}; pass --parameters {made_for}, or leave "
            "out --baseline."
        )


def _is_controlled(session: Session, allocation: RankAllocation) -> bool:
    """Whether the study's controller moves ranks. `auto`: where they rest on no gradient yet."""
    mode = session.study.controller.mode
    if mode != "auto":
        return mode == "on"
    placed = allocation.strategy == SEARCHED or needs_profile(allocation.strategy)
    mode, why = ("off", "rest on gradients already") if placed else ("on", "rest on no gradient yet")
    stderr.print(f"controller {mode}: the ranks of `{allocation.strategy}` {why}", soft_wrap=True)
    return not placed


def _decisions(session: Session, decisions: pd.DataFrame | None) -> list[Path]:
    """Write and draw the decisions of the run whose adapter is saved; without a controller, remove those of earlier runs."""
    if decisions is None:
        remove_others(session.out, ("decisions.parquet", "trajectories.png", "flow.png"), kept=())
        return []
    written = write_decisions(decisions, session.out / "decisions.parquet")
    trajectories = partial(plotting.plot_trajectories, decisions, session.targets)
    return [
        written,
        *session.draw(trajectories=trajectories, flow=partial(plotting.plot_flow, decisions, session.targets)),
    ]


# --- budget -----------------------------------------------------------------------------------------------------


def run_budget(session: Session, *, as_json: bool) -> None:
    """`rankscope budget`."""
    study, settings = session.study, session.study.plan
    with progress("planning") as on_run:
        plan = comparison.plan_budget(
            session.task,
            targets=session.targets,
            profile=session.profile,
            seeds=_reported_seeds(session, settings.max_seeds),
            training=study.training,
            settings=settings,
            towers=study.budget.towers,
            allocation=study.allocation,
            kept_in=session.out / "runs",
            on_run=on_run,
        )
    table, found = plan.table(), plan.assessment
    runs = comparison.Comparison(plan.all_runs().assign(study=study.name), {})
    files = [runs.to_parquet(session.out / "plan.parquet")]
    picture = partial(plotting.plot_plan, table, level=found.level, budget=plan.budget, metric=session.task.metric)
    files += session.draw(budget=picture)
    facts: dict[str, Any] = {"study": study.name, "metric": session.task.metric, "budget": plan.budget}
    facts |= {"reference": found.reference, "margin": found.margin, "saved": plan.saved, "answers": plan.answers()}
    facts |= {"budgets": json.loads(table.to_json(orient="records"))}
    if plan.budget is not None:
        files.append(_write_study(session, plan.budget))
    write_json(session.out / "plan.json", finite({**session.provenance("budget"), **facts}), sealed=True)
    files.append(session.out / "plan.json")
    if as_json:
        print_json(facts, files)
        return
    columns = {"method": "{method}", "parameters": "{parameters:,}", "seeds": "{seeds}",
               "validation": "{shown}", "to the reference": "{points}", "enough": "{verdict}"}  # fmt: skip
    rows = table.to_dict("records")
    for row in rows:
        ends = (row["difference"], row["difference_low"], row["difference_high"])
        own = (row["method"], row["budget"]) == found.reference
        row["points"] = "reference" if own else Interval(*ends).text(plan.unit)
        row["shown"] = plan.unit.value(row["validation"])
        row["verdict"] = {True: "yes", False: "no"}.get(row["enough"], "open")
    print_table(f"{study.name}: {session.task.metric} by parameters, with 95 % intervals", columns, rows)
    for name, text in plan.answers().items():
        print_line(f"{name + ':':<11}{text}")
    print_files(files)


def _write_study(session: Session, budget: int) -> Path:
    """The study at this budget, in the output folder; relative paths go on to name the same files."""
    values = session.study.model_dump(mode="json", exclude_unset=True)
    towers = {key: each for key, each in values["budget"].items() if key == "towers"}
    values |= {"name": f"{session.study.name}-{budget}"[-100:], "budget": {"parameters": budget, **towers}}
    base, folder = session.study.base_dir, session.out
    if "***" in without_secrets(str(values.get("search", {}).get("storage"))):
        del values["search"]["storage"]  # passwords are not copied

    def moved(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {each: moved(inner, each) for each, inner in value.items()}
        if isinstance(value, list):
            return [moved(each) for each in value]
        if not isinstance(value, str) or os.path.isabs(value):
            return value
        a_file = "." in value and (base / value.partition(":")[0]).is_file()
        a_folder = key in PATHS and value and (base / value).is_dir()  # others may be named like a folder by chance
        return os.path.relpath(base / value, folder) if a_file or a_folder else value

    path = folder / "recommended.yaml"
    with replacing(path) as temporary:
        text = yaml.safe_dump(moved(values), sort_keys=False, allow_unicode=True)
        temporary.write_text(f"# By `rankscope budget {session.arguments}`.\n{text}", encoding="utf-8")
    return path


# --- compare and report -----------------------------------------------------------------------------------------


def run_compare(session: Session, *, as_json: bool) -> None:
    """`rankscope compare`."""
    settings, study = session.study.compare, session.study
    seeds = _reported_seeds(session, settings.n_seeds)
    comparison.check_terms(settings, session.budget, seeds)  # before a profile is taken or a search resumed
    searched = None
    if any(SEARCHED in name for name in settings.methods):
        if not session.has_search:
            raise SettingsError(
                f"`searched` needs a search in {session.out}, but there is none; "
                f"run `rankscope search {session.arguments}` first."
            )
        searched = search_study(session)
    methods = comparison.find_methods(
        dict.fromkeys((comparison.REFERENCE, *settings.methods)),
        seed=seeds[0],
        allocation=study.allocation,
        controller=study.controller,
        searched=searched,
        base_dir=study.base_dir,
    )
    with progress("comparing") as on_run:
        found = comparison.compare(
            session.task,
            methods,
            budget=session.budget,
            targets=session.targets,
            profile=session.profile if any(method.needs_profile for method in methods) else None,
            seeds=seeds,
            training=study.training,
            settings=settings,
            kept_in=session.out / "runs",
            on_run=on_run,
        )
    found.runs["study"] = study.name
    table, command = comparison.summarise(found.runs), f"rankscope compare {session.path}"
    files = [found.to_parquet(session.out / COMPARISON)]
    files += comparison.write_report(
        session.out, found.runs, table, targets=session.targets, decisions=found.decisions, command=command
    )
    earlier = ("forest.png", "budgets.png", "trajectories-*.png", "flow-*.png")
    remove_others(session.out, earlier, kept=files)
    _print_comparison(table, files, as_json=as_json)


def run_report(folders: list[Path], out: Path | None, into: Path | None, *, as_json: bool) -> None:
    """`rankscope report`: of one folder, or of several studies' folders together."""
    if out is None and len(folders) > 1:
        raise FileError("`--out` must say where the report of several folders goes, but is not given; add it.")
    runs = _told_apart({folder: comparison.read_comparison(folder / COMPARISON) for folder in folders})
    table = comparison.summarise(runs)
    card = comparison.insert_table(_read_card(into), comparison.to_markdown(table), where=str(into)) if into else ""
    targets = _targets_of(folders[0], runs) if len(folders) == 1 else ()
    command = "rankscope report " + " ".join(map(str, folders))
    kept = folders[0] if len(folders) == 1 else None
    files = comparison.write_report(out or folders[0], runs, table, targets=targets, pictures_in=kept, command=command)
    if into is not None:
        with replacing(into) as temporary:
            temporary.write_text(card, encoding="utf-8", newline="")
        files.append(into)
    _print_comparison(table, files, as_json=as_json)


def _told_apart(runs: Mapping[Path, pd.DataFrame]) -> pd.DataFrame:
    """The runs of several folders; studies of one name, which may be of other data, get their folder's name beside it."""
    table = pd.concat([each.assign(folder=str(folder)) for folder, each in runs.items()], ignore_index=True)
    several = table.groupby("study")["folder"].transform("nunique") > 1
    study, folder = table["study"], table.pop("folder")
    return table.assign(study=study.where(~several, study + " (" + folder + ")"))


def _read_card(path: Path) -> str:
    """The text of the file that `--into` names, its line ends as they are."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except FileNotFoundError:
        problem = f"there is no {path}; check the path"
    except (OSError, UnicodeDecodeError) as error:
        problem = f"{path} cannot be read: {error.strerror if isinstance(error, OSError) else 'it holds no UTF-8'}"
    raise FileError(f"`--into` must name a text file, but {problem}.")


def _targets_of(folder: Path, runs: pd.DataFrame) -> tuple[TargetModule, ...]:
    """The modules of the profile beside a comparison, for pictures of ranks; none, with a note, if it is of other modules."""
    path = folder / "profile.parquet"
    if not path.exists():
        return ()
    try:
        targets = profiling.read_profile(path).targets
        if any(set(ranks) - {target.name for target in targets} for ranks in comparison.allocations(runs).values()):
            raise FileError(f"`{path}` is of other modules")
    except FileError as error:
        stderr.print(f"no pictures of ranks: {error}", soft_wrap=True)
        return ()
    return targets


def _print_comparison(table: pd.DataFrame, files: list[Path], *, as_json: bool) -> None:
    if as_json:
        print_json({"methods": json.loads(table.to_json(orient="records"))}, files)
        return
    for _, rows in table.groupby("study", sort=False):
        for _, group in rows.groupby("factor", sort=False):
            if len(group) > 1:
                _print_methods(group)
        uniform = rows[rows["method"] == REFERENCE]
        if len(uniform) > 1 or len(uniform) == len(rows):
            texts = [comparison.format_row(row) for _, row in uniform.iterrows()]
            columns = {"parameters": "{parameters}", "rate": "{rate}", "test": "{points}"}
            print_table(f"{texts[0]['study']}: uniform by parameters", columns, texts)
    grown = table[table["uniform_budget_multiplier"].notna() & (table["method"] != REFERENCE)]
    for study, group in grown.groupby("study", sort=False):
        texts = [comparison.format_row(row) for _, row in group.iterrows()]
        columns = {"method": "{method}", "parameters": "{parameters}", "uniform needs": "{needs}"}
        print_table(f"{study}: parameters that uniform needs to match, over the method's", columns, texts)
    print_files(files)


def _print_methods(group: pd.DataFrame) -> None:
    """One study's at one budget."""
    texts = [comparison.format_row(row) for _, row in group.iterrows()]
    first, factor, n_seeds = texts[0], group["factor"].iloc[0], group["seeds"].iloc[0]
    scale = "" if factor == 1.0 else f", {factor:g} x the budget"
    noise = f"; seeds alone: up to {first['noise']}" if n_seeds > 1 else ""
    title = f"{first['study']}{scale}: {first['seeds']},{first['unit']} over uniform{noise}"
    columns = {"method": "{method}", "parameters": "{parameters}", "rate": "{rate}"}
    print_table(title, {**columns, "test, 95 % interval": "{points}", "differs": "{differs}"}, texts)
