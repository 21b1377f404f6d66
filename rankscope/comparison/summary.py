"""Tables of a comparison: runs read back, one row per method with its difference to uniform, and rows as text."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from rankscope.comparison.runner import REFERENCE, REPORTED, SCHEMA
from rankscope.comparison.statistics import (
    holm,
    paired_difference,
    paired_p_value,
    seed_noise,
    uniform_budget_multiplier,
)
from rankscope.errors import FileError, SettingsError
from rankscope.files import parse_json, read_parquet
from rankscope.searching import FEWEST_PAIRS, Interval

SIGNIFICANCE = 0.05
NO_DIFFERENCE = "no difference"
SAME_RUNS = "same runs as uniform"
BEGIN, END = "<!-- rankscope report: begin -->", "<!-- rankscope report: end -->"

_TEXTS = ("task", "metric", "method", "variant", "role", "revision", "ranks")
_INTEGERS = ("budget", "seed", "steps", "parameters", "n_moved", "cost_steps", "schema")
_NUMBERS = ("factor", "learning_rate", "validation", "wall_seconds")
_COLUMNS = pa.schema(
    [
        *(pa.field(name, pa.string(), nullable=False) for name in _TEXTS),
        *(pa.field(name, pa.int64(), nullable=False) for name in _INTEGERS),
        *(pa.field(name, pa.float64(), nullable=False) for name in _NUMBERS),
        pa.field("test", pa.float64()),
        pa.field("peak_memory", pa.int64()),
    ]
)
# What two methods with the same runs may differ in.
_BESIDE = {"method", "variant", "budget", "cost_steps", "wall_seconds", "peak_memory", "revision"}


def read_comparison(path: str | os.PathLike[str]) -> pd.DataFrame:
    """The runs of `comparison.parquet`. Schema 1 has no column `study`; it gets the task's name.

    Raises:
        FileError: The file is missing or broken, has another schema, or holds runs that cannot be compared.
    """
    table = read_parquet(path, what="a comparison", schema=_COLUMNS)
    if not set(table.column("schema").to_pylist()) <= {1, SCHEMA}:
        raise FileError(f"`{path}` must hold a comparison of schema {SCHEMA}, but holds another; compare again.")
    runs: pd.DataFrame = table.to_pandas().drop(columns="schema")
    if "study" not in runs:
        runs.insert(0, "study", runs["task"])
    if problem := _problem(runs):
        raise FileError(f"`{path}` must hold a comparison, but {problem}; compare again.")
    return runs


def _problem(runs: pd.DataFrame) -> str | None:
    """Why these runs cannot be summarised; None if they can."""
    reported = runs[runs["role"] == REPORTED]
    if reported.empty:
        return "holds no reported run"
    if not runs["study"].map(lambda name: isinstance(name, str)).all():
        return "its column `study` holds no text"
    if not np.isfinite(reported[["factor", "learning_rate", "validation", "test"]].to_numpy()).all():
        return "a reported run lacks its factor, learning rate or metric"
    if not reported["ranks"].map(_is_ranks).all():
        return "its column `ranks` holds no JSON of ranks"
    if reported.duplicated(["study", "factor", "method", "seed"]).any():
        return "holds a run twice"
    if set(reported["study"]) != set(at_budget(reported).query("method == @REFERENCE")["study"]):
        return f"holds no run of `{REFERENCE}` at the study's budget"
    seeds = reported.groupby(["study", "factor", "method"])["seed"].agg(frozenset)
    if seeds.groupby(level=["study", "factor"]).nunique().max() > 1:
        return "its methods were trained on different seeds"
    return None


def _is_ranks(text: str) -> bool:
    try:
        found = parse_json(text, where="`ranks`", what="ranks")
    except FileError:
        return False
    return found is None or (isinstance(found, dict) and all(type(rank) is int for rank in found.values()))


def at_budget(table: pd.DataFrame) -> pd.DataFrame:
    """The rows at the study's own budget."""
    return table[table["factor"] == 1.0]


def allocations(runs: pd.DataFrame) -> dict[str, dict[str, int]]:
    """By method, the ranks at the end of its first reported run at the study's budget; methods without ranks are left out."""
    chosen = at_budget(runs).query("role == @REPORTED").groupby("method", sort=False).first()
    found = {str(name): json.loads(ranks) for name, ranks in chosen["ranks"].items()}
    return {name: ranks for name, ranks in found.items() if ranks is not None}


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per study, budget factor and method, in their order in `runs`.

    Args:
        runs: `Comparison.runs`, of one study or several. Where a study holds several tasks, each task is a study of its own.

    Returns:
        Columns of the runs (`study`, `task`, `factor`, `variant`, `learning_rate`, `budget`, `cost_steps`, `method`), and:
        `parameters` (largest of all seeds); `over_budget`; `seeds` (their number); `validation`, `test` (means); `deviation` of
        `test` over seeds; `difference` to uniform at the same factor, paired, with its 95 % interval `low`, `high`; `p` of a
        sign-flip permutation test and `p_holm` (over the methods of a study and factor); these are NaN with fewer than 3
        seeds; `noise` (`seed_noise` of uniform); `relative` (difference over uniform's metric); `seconds` (median run);
        `peak_memory`; `verdict` (`better`, `worse`, `no difference`, `same runs as uniform`, or why there is none);
        `uniform_budget_multiplier` (how many times the parameters uniform needs; NaN where it has one budget only).

    Raises:
        SettingsError: A study has no reported run of uniform at its own budget.
    """
    study = runs["study"] if "study" in runs else runs["task"]
    several = runs.groupby(study)["task"].transform("nunique") > 1
    runs = runs.assign(study=study.where(~several, study + ", " + runs["task"]))
    reported = runs[runs["role"] == REPORTED]
    compared = set(at_budget(reported).query("method == @REFERENCE")["study"])
    if lacking := [*set(runs["study"]) - compared] or ["no study"] * runs.empty:
        raise SettingsError(
            f"`runs` must hold reported runs of `{REFERENCE}` at the budget of each study, but `{min(lacking)}` has none; "
            "compare again."
        )
    groups = [group for _, group in reported.groupby(["study", "factor"], sort=False)]
    table = pd.concat([_compared(group) for group in groups if REFERENCE in set(group["method"])], ignore_index=True)
    return table.assign(uniform_budget_multiplier=[_multiplier(row, table) for _, row in table.iterrows()])


def _compared(group: pd.DataFrame) -> pd.DataFrame:
    """Of one study and factor: every method beside uniform."""
    by_method = {str(name): rows.sort_values("seed") for name, rows in group.groupby("method", sort=False)}
    uniform = by_method[REFERENCE]
    outcome = [name for name in group if name not in _BESIDE]
    theirs = uniform["test"].tolist()
    rows: list[dict[str, Any]] = []
    for name, mine in by_method.items():
        first, ours, parameters = mine.iloc[0], mine["test"].tolist(), int(mine["parameters"].max())
        difference = paired_difference(ours, theirs)
        labels = ("study", "task", "factor", "variant", "learning_rate", "budget", "cost_steps")
        rows.append(
            {key: first[key] for key in labels}
            | {
                "method": name,
                "parameters": parameters,
                "over_budget": bool(0 < first["budget"] < parameters),
                "seeds": len(mine),
                "validation": mine["validation"].mean(),
                "test": mine["test"].mean(),
                "deviation": mine["test"].std(),
                "difference": difference.mean,
                "low": difference.low,
                "high": difference.high,
                "p": paired_p_value(ours, theirs),
                "noise": seed_noise(theirs),
                "relative": difference.mean / uniform["test"].mean(),
                "seconds": mine["wall_seconds"].median(),
                "peak_memory": mine["peak_memory"].max(),
                "same_runs": mine[outcome].to_dict("list") == uniform[outcome].to_dict("list"),
            }
        )
    table = pd.DataFrame(rows)
    tested = (table["method"] != REFERENCE) & table["p"].notna()
    table["p_holm"] = np.nan
    table.loc[tested, "p_holm"] = holm(table.loc[tested, "p"].tolist())
    return table.assign(verdict=[_verdict(row) for _, row in table.iterrows()]).drop(columns="same_runs")


def _verdict(row: pd.Series) -> str:
    if row["method"] == REFERENCE:
        return ""
    if row["over_budget"]:
        return f"refused: {row['parameters']:,} parameters are over the budget"
    if row["same_runs"]:
        return SAME_RUNS
    if row["seeds"] < FEWEST_PAIRS:
        return "too few seeds"
    if row["p_holm"] >= SIGNIFICANCE:
        return NO_DIFFERENCE
    return "better" if row["difference"] > 0 else "worse"


def _multiplier(row: pd.Series, table: pd.DataFrame) -> float:
    uniform = table[(table["study"] == row["study"]) & (table["method"] == REFERENCE)].sort_values("factor")
    if len(uniform) < 2:
        return math.nan
    factors: Sequence[float] = uniform["factor"].tolist()
    return uniform_budget_multiplier(float(row["test"]), factors, uniform["test"].tolist()) / float(row["factor"])


def format_row(row: pd.Series) -> dict[str, str]:
    """A row of `summarise` as text. Terminal, HTML and Markdown each show some of its columns.

    `points` is the difference to uniform in points with its interval; of uniform, the metric itself.
    """
    reference, judged = row["method"] == REFERENCE, not row["over_budget"] and row["verdict"] != SAME_RUNS
    difference = Interval(row["difference"], row["low"], row["high"])
    points = "over the budget" if row["over_budget"] else SAME_RUNS
    multiplier, verdict = row["uniform_budget_multiplier"], str(row["verdict"])
    texts = {
        "method": str(row["method"]),
        "variant": f"{row['method']} ({row['variant']})" if row["variant"] else str(row["method"]),
        "parameters": f"{row['parameters']:,}",
        "rate": f"{row['learning_rate']:.3g}",
        "test": f"{row['test']:.4f}",
        "deviation": _number(row["deviation"], ".4f"),
        "points": difference.text(scale=100, digits=1) if judged else points,
        "differs": "no" if verdict in (NO_DIFFERENCE, SAME_RUNS) else verdict.partition(":")[0],
        "difference": f"{100 * row['difference']:+.2f}",
        "interval": "-" if math.isnan(difference.low) else f"[{100 * row['low']:+.2f}, {100 * row['high']:+.2f}]",
        "p": _number(row["p_holm"], ".3f"),
        "verdict": verdict,
        "needs": "more than tried" if math.isinf(multiplier) else _number(multiplier, ".2g", " x the parameters"),
        "seconds": f"{row['seconds']:.1f} s",
        "memory": "" if pd.isna(row["peak_memory"]) else f"{row['peak_memory'] / 2**20:,.0f} MiB",
        "search": f"{row['cost_steps']:,}" if row["cost_steps"] else "",
    }
    own = {"points": f"{100 * row['test']:.1f} %", "difference": "", "interval": "", "p": ""}
    return texts | own if reference else texts


def _number(value: float, form: str, unit: str = "") -> str:
    return "-" if math.isnan(value) else format(value, form) + unit


def to_markdown(table: pd.DataFrame) -> str:
    """The table at the study's budget as Markdown, one column per study: uniform's metric, and the others' points over it.

    Bold: better or worse than uniform. In italics, and last: methods without a budget (full fine-tuning, the head alone). The
    last column is the mean of `relative` over the studies, of methods that are within the budget in all of them.

    Args:
        table: What `summarise` gives.
    """
    table = at_budget(table)
    studies = list(dict.fromkeys(table["study"]))
    unlimited = set(table.loc[table["budget"] == 0, "method"])
    seeds = table.groupby("study", sort=False)["seeds"].first()
    lines = [["method", *(f"{study}, {seeds[study]} seeds" for study in studies), "mean relative gain"]]
    lines.append(["---", *["---:"] * (len(studies) + 1)])
    for method in sorted(dict.fromkeys(table["method"]), key=lambda method: method in unlimited):
        rows = table[table["method"] == method].set_index("study", drop=False)
        cells = {study: format_row(row)["points"] for study, row in rows.iterrows()}
        bold = {study for study, row in rows.iterrows() if row["verdict"] in ("better", "worse")}
        gains = rows.loc[~rows["over_budget"], "relative"]
        mean = f"{100 * gains.mean():+.1f} %" if len(gains) == len(studies) and method != REFERENCE else ""
        name = method.replace("|", r"\|")  # a user's own method is named after its file
        cells = {study: f"**{text}**" if study in bold else text for study, text in cells.items()}
        lines.append([f"*{name}*" if method in unlimited else name, *(cells.get(each, "") for each in studies), mean])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def insert_table(text: str, table: str, *, where: str) -> str:
    r"""The text with `table` between its two marker lines, in the place of what was there.

    Raises:
        SettingsError: The text does not hold each marker once, in their order; `where` names the text.

    >>> insert_table(f"# Mine\n{BEGIN}\nold\n{END}\n", "new", where="card.md").splitlines()[2]
    'new'
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in after:
        raise SettingsError(f"`{where}` must hold the lines `{BEGIN}` and `{END}` once each, but does not; add them.")
    line_end = "\r\n" if "\r\n" in before + after else "\n"
    return before + line_end.join([BEGIN, *table.splitlines(), END]) + after
