"""A comparison as one Markdown table, a row a method, a column a task; and its place in a README or a model card."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pandas as pd

from rankscope.comparison.runner import REFERENCE, REPORTED
from rankscope.comparison.statistics import equivalent_factor, holm, paired_difference, paired_p_value, seed_noise
from rankscope.errors import SettingsError
from rankscope.searching import FEWEST_PAIRS, Interval

SIGNIFICANCE = 0.05
NO_DIFFERENCE = "no difference"
SAME_RUNS = "same runs as uniform"
_BESIDE = [
    "method",
    "variant",
    "budget",
    "cost_steps",
    "wall_seconds",
    "peak_memory",
    "revision",
]  # the outcome of a run


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a study, budget factor and method, in their order in `runs`.

    Args:
        runs: As `Comparison.runs` has them. Without `study`, the task's name is the study's; a study that holds several tasks
            is several.

    Returns:
        Columns `study`, `task`, `factor`, `method`, `variant`, `learning_rate`, `budget`, `parameters` (the most of a seed),
        `seeds`, `validation`, `test` (means), `deviation` (over seeds), `difference`, `low`, `high` (to uniform at the same
        factor, paired t at 95 %; NaN where there is no interval, as with fewer than 3 seeds), `p` (sign-flip permutation; NaN
        with fewer than 3 seeds), `p_holm` (over the methods of a study and factor), `verdict` (`better`, `worse`, `no
        difference`, `same runs as uniform`, or why there is none), `noise` (`seed_noise` of uniform), `relative` (difference
        over uniform), `seconds` (a run), `peak_memory`, `cost_steps`, `equivalent` (the factor by which uniform must grow; NaN
        without further budgets of uniform).

    Raises:
        SettingsError: A study lacks reported runs of uniform at its own budget, with which all others are compared.
    """
    runs = _labelled(runs)
    reported = runs[runs["role"] == REPORTED]
    uniform = reported[(reported["method"] == REFERENCE) & (reported["factor"] == 1.0)]
    if lacking := [*set(runs["study"]) - set(uniform["study"])] or ["no study"] * runs.empty:
        raise SettingsError(
            f"`runs` must hold reported runs of `{REFERENCE}` at the budget of each study, but `{min(lacking)}` has none; "
            "compare again."
        )
    groups = [group for _, group in reported.groupby(["study", "factor"], sort=False)]
    tables = [_judged(_rows(group)) for group in groups if REFERENCE in set(group["method"])]
    return _with_equivalents(pd.concat(tables, ignore_index=True))


def at_budget(table: pd.DataFrame) -> pd.DataFrame:
    """The rows at the study's own budget, of runs or of a table of theirs."""
    return table[table["factor"] == 1.0]


def points_over_uniform(row: pd.Series) -> str:
    """A row's difference to uniform in points with its interval, as text; runs above the budget are not compared."""
    if row["over_budget"]:
        return "over the budget"
    if row["verdict"] == SAME_RUNS:
        return SAME_RUNS
    return Interval(row["difference"], row["low"], row["high"]).text(scale=100, digits=1)


def allocations(runs: pd.DataFrame, factor: float = 1.0) -> dict[str, dict[str, int]]:
    """The ranks that each method's first reported run ended with, by method, of those that have ranks."""
    chosen = runs[(runs["role"] == REPORTED) & (runs["factor"] == factor)].groupby("method", sort=False).first()
    found = {str(name): json.loads(ranks) for name, ranks in chosen["ranks"].items()}
    return {name: ranks for name, ranks in found.items() if ranks is not None}


def _labelled(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs, each study under a name of its own."""
    study = runs["study"] if "study" in runs else runs["task"]
    several = runs.groupby(study)["task"].transform("nunique") > 1
    return runs.assign(study=study.where(~several, study + ", " + runs["task"]))


def _rows(group: pd.DataFrame) -> pd.DataFrame:
    """Of one study and factor: the figures of every method."""
    by_method = {str(name): rows.sort_values("seed") for name, rows in group.groupby("method", sort=False)}
    uniform = by_method[REFERENCE]
    outcome = [name for name in group if name not in _BESIDE]
    rows = []
    for name, mine in by_method.items():
        first = mine.iloc[0]
        row = {
            key: first[key] for key in ("study", "task", "factor", "variant", "learning_rate", "budget", "cost_steps")
        }
        difference = paired_difference(mine["test"].tolist(), uniform["test"].tolist())
        over = bool(first["budget"]) and int(mine["parameters"].max()) > int(first["budget"])
        rows.append(
            row
            | {
                "method": name,
                "parameters": int(mine["parameters"].max()),
                "over_budget": over,
                "same_runs": mine[outcome].to_dict("list") == uniform[outcome].to_dict("list"),
                "seeds": len(mine),
                "validation": mine["validation"].mean(),
                "test": mine["test"].mean(),
                "deviation": mine["test"].std(),
                "difference": difference.mean,
                "low": difference.low,
                "high": difference.high,
                "p": paired_p_value(mine["test"].tolist(), uniform["test"].tolist()),
                "noise": seed_noise(uniform["test"].tolist()),
                "relative": difference.mean / uniform["test"].mean(),
                "seconds": mine["wall_seconds"].median(),
                "peak_memory": mine["peak_memory"].max(),
            }
        )
    return pd.DataFrame(rows)


def _judged(table: pd.DataFrame) -> pd.DataFrame:
    """With Holm's correction over all methods but uniform, and a verdict in words."""
    tested = (table["method"] != REFERENCE) & table["p"].notna()
    adjusted = np.full(len(table), np.nan)
    adjusted[tested] = holm(table.loc[tested, "p"].tolist())
    verdicts = [_verdict(row, p) for (_, row), p in zip(table.iterrows(), adjusted, strict=True)]
    return table.assign(p_holm=adjusted, verdict=verdicts).drop(columns="same_runs")


def _verdict(row: pd.Series, p_holm: float) -> str:
    if row["method"] == REFERENCE:
        return ""
    if row["over_budget"]:
        return f"refused: {row['parameters']:,} parameters are over the budget"
    if row["same_runs"]:
        return SAME_RUNS
    if row["seeds"] < FEWEST_PAIRS:
        return "too few seeds"
    if p_holm >= SIGNIFICANCE:
        return NO_DIFFERENCE
    return "better" if row["difference"] > 0 else "worse"


def _with_equivalents(table: pd.DataFrame) -> pd.DataFrame:
    values = []
    for _, row in table.iterrows():
        uniform = table[(table["study"] == row["study"]) & (table["method"] == REFERENCE)].sort_values("factor")
        values.append(_growth(row, uniform) if len(uniform) > 1 else np.nan)
    return table.assign(equivalent=values)


def _growth(row: pd.Series, uniform: pd.DataFrame) -> float:
    factors: Sequence[float] = uniform["factor"].tolist()
    return equivalent_factor(float(row["test"]), factors, uniform["test"].tolist()) / float(row["factor"])


BEGIN, END = "<!-- rankscope report: begin -->", "<!-- rankscope report: end -->"


def to_markdown(table: pd.DataFrame) -> str:
    """The table at the study's budget: uniform's metric, and the others' points over it with a 95 % interval.

    Bold: better or worse than uniform by a permutation test with Holm's correction. In italics, and last: methods without a
    budget (full fine-tuning, the head alone). Runs that ended above the budget are not compared. The last column is the mean
    over the studies of the difference over uniform's metric, of methods that every study has, within the budget.

    Args:
        table: What `summarise` makes of the runs, of one study or several.
    """
    table = at_budget(table)
    studies = list(dict.fromkeys(table["study"]))
    unlimited = set(table.loc[table["budget"] == 0, "method"])
    methods = sorted(dict.fromkeys(table["method"]), key=lambda method: method in unlimited)
    cells = {(row["method"], row["study"]): _cell(row) for _, row in table.iterrows()}
    seeds = table.groupby("study", sort=False)["seeds"].first()
    header = ["method", *(f"{study}, {seeds[study]} seeds" for study in studies), "mean relative gain"]
    lines = [_line(header), _line(["---", *["---:"] * (len(studies) + 1)])]
    for method in methods:
        gains = table.loc[(table["method"] == method) & ~table["over_budget"], "relative"]
        mean = f"{100 * gains.mean():+.1f} %" if len(gains) == len(studies) and method != REFERENCE else ""
        name = method.replace("|", r"\|")  # a user's own method is named after its file
        shown = f"*{name}*" if method in unlimited else name
        lines.append(_line([shown, *(cells.get((method, study), "") for study in studies), mean]))
    return "\n".join(lines)


def _cell(row: pd.Series) -> str:
    if row["method"] == REFERENCE:
        return f"{100 * row['test']:.1f} %"
    text = points_over_uniform(row)
    return f"**{text}**" if row["verdict"] in ("better", "worse") else text


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def insert_table(text: str, table: str, *, where: str) -> str:
    r"""The text with the table between its two marker lines, in the place of what was there.

    Args:
        text: Of a README or a model card.
        table: As `to_markdown` makes it.
        where: What to call the text in errors.

    Raises:
        SettingsError: The text does not hold each marker once, in their order.

    >>> insert_table(f"# Mine\n{BEGIN}\nold\n{END}\n", "new", where="card.md").splitlines()[2]
    'new'
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in after:
        raise SettingsError(f"`{where}` must hold the lines `{BEGIN}` and `{END}` once each, but does not; add them.")
    line_end = "\r\n" if "\r\n" in before + after else "\n"
    return before + line_end.join([BEGIN, *table.splitlines(), END]) + after
