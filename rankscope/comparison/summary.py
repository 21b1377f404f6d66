"""Tables of a comparison: runs read back, one row per method with its difference to uniform, and rows as text."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from rankscope.comparison import statistics
from rankscope.comparison.runner import REFERENCE, REPORTED, SCHEMA, UNLIMITED
from rankscope.errors import FileError, SettingsError
from rankscope.files import AnyPath, parse_json, read_parquet
from rankscope.searching import FEWEST_PAIRS
from rankscope.units import AS_IT_IS, SHARE, Interval, unit_of

SIGNIFICANCE = 0.05
MULTIPLIER = [f"uniform_budget_multiplier{end}" for end in ("", "_low", "_high")]
NO_DIFFERENCE = "no difference"
SAME_RUNS = "same runs as uniform"
BEGIN, END = "<!-- rankscope report: begin -->", "<!-- rankscope report: end -->"

_TYPES = {
    pa.string(): ("study", "task", "metric", "method", "variant", "role", "revision", "ranks"),
    pa.int64(): ("budget", "seed", "steps", "parameters", "n_moved", "cost_steps", "schema", "peak_memory"),
    pa.float64(): ("factor", "learning_rate", "validation", "wall_seconds", "test"),
}
_COLUMNS = pa.schema(
    [pa.field(name, kind, name in ("test", "peak_memory")) for kind, names in _TYPES.items() for name in names]
)
# No outcome of a run.
_BESIDE = {"method", "variant", "budget", "cost_steps", "wall_seconds", "peak_memory", "revision"}


def read_comparison(path: AnyPath) -> pd.DataFrame:
    """The runs of `comparison.parquet`, checked."""
    runs: pd.DataFrame = read_parquet(path, what="a comparison", schema=_COLUMNS).to_pandas()
    if problem := _problem(runs):
        raise FileError(f"`{path}` must hold a comparison, but {problem}; compare again.")
    return runs.drop(columns="schema")


def _problem(runs: pd.DataFrame) -> str | None:
    """Why these runs cannot be summarised; None if they can."""
    reported = runs[runs["role"] == REPORTED]
    if not runs["schema"].eq(SCHEMA).all():
        return f"its schema is not {SCHEMA}"
    if reported.empty:
        return "holds no reported run"
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
    """One row per study, budget factor and method, in their order in `runs`: `Comparison.runs` of one study or several.

    Columns are those of the runs, and: `parameters` (of all seeds, the most), `size` (over uniform's), `over_budget`, `seeds`
    (their number), `validation` and `test` (means), `deviation` of `test` over seeds; `difference` to uniform, paired, its 95 %
    interval `low`, `high`, `p` of a sign-flip permutation test and `p_holm` over a study's methods (NaN with fewer than 3
    seeds); `noise` (`seed_noise` of uniform), `relative` (difference over uniform's metric), `seconds` (median run), `verdict`
    (`better`, `worse`, `no difference`, `same runs as uniform`, or why there is none), `share` (whether all of the study's
    metric is from 0 to 1), and `uniform_budget_multiplier` (by how much uniform must grow to match, with its 95 % interval
    `uniform_budget_multiplier_low`, `_high`; see
    `uniform_budget_multipliers`).
    """
    reported = runs[runs["role"] == REPORTED]
    compared = set(at_budget(reported).query("method == @REFERENCE")["study"])
    if lacking := [*set(runs["study"]) - compared] or ["no study"] * runs.empty:
        must = f"must hold reported runs of `{REFERENCE}` at the budget of each study"
        raise SettingsError(f"`runs` {must}, but `{min(lacking)}` has none; compare again.")
    groups = [group for _, group in reported.groupby(["study", "factor"], sort=False)]
    table = pd.concat([_compared(group) for group in groups if REFERENCE in set(group["method"])], ignore_index=True)
    cells = reported.pivot(index=["study", "factor", "method"], columns="seed", values="test")
    metrics = runs[["validation", "test"]].astype(float).groupby(runs["study"])
    table["share"] = table["study"].map({study: unit_of(values) == SHARE for study, values in metrics})
    for _, mine in table.groupby("study"):
        scores = cells.loc[mine[cells.index.names].apply(tuple, axis=1)].dropna(axis=1, how="all").to_numpy()
        uniform = np.flatnonzero(mine["method"] == REFERENCE).tolist()
        found = statistics.uniform_budget_multipliers(scores, mine["parameters"].tolist(), uniform)
        table.loc[mine.index, MULTIPLIER] = found
    return table


def _compared(group: pd.DataFrame) -> pd.DataFrame:
    """Of one study and factor: every method beside uniform."""
    by_method = {str(name): runs.sort_values("seed") for name, runs in group.groupby("method", sort=False)}
    uniform = by_method[REFERENCE]
    outcome = [name for name in group if name not in _BESIDE]
    theirs = uniform["test"].tolist()
    rows: list[dict[Any, Any]] = []
    for name, mine in by_method.items():
        row = mine.iloc[0][["study", "task", "factor", "variant", "learning_rate", "budget", "cost_steps"]].to_dict()
        ours, parameters = mine["test"].tolist(), int(mine["parameters"].max())
        mean, low, high = statistics.paired_difference(ours, theirs)
        row |= {"method": name, "parameters": parameters, "over_budget": bool(0 < row["budget"] < parameters)}
        row |= {"seeds": len(mine), "validation": mine["validation"].mean(), "test": mine["test"].mean()}
        row |= {"size": parameters / max(int(uniform["parameters"].max()), 1), "deviation": mine["test"].std()}
        row |= {"difference": mean, "low": low, "high": high}
        row |= {"p": statistics.paired_p_value(ours, theirs), "noise": statistics.seed_noise(theirs)}
        base = float(uniform["test"].mean())
        row |= {"relative": mean / abs(base) if base else math.nan, "seconds": mine["wall_seconds"].median()}
        same = mine[outcome].to_dict("list") == uniform[outcome].to_dict("list")
        rows.append(row | {"peak_memory": mine["peak_memory"].max(), "same_runs": same})
    table = pd.DataFrame(rows).assign(p_holm=np.nan)
    tested = (table["method"] != REFERENCE) & table["p"].notna()
    table.loc[tested, "p_holm"] = statistics.holm(table.loc[tested, "p"].tolist())
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
    better = "better" if row["difference"] > 0 else "worse"
    return NO_DIFFERENCE if row["p_holm"] >= SIGNIFICANCE else better


def format_row(row: pd.Series) -> dict[str, str]:
    """A row of `summarise` as text. Terminal, HTML and Markdown each show some of its columns.

    `points` is the difference to uniform with its interval, of shares in points; of uniform, the metric itself. Where a method's
    size is its own, as VeRA's, `points` and the verdict name it.
    """
    unit = SHARE if row["share"] else AS_IT_IS
    points = Interval(row["difference"], row["low"], row["high"]).text(unit)
    study, seeds, verdict = str(row["study"]), int(row["seeds"]), str(row["verdict"])
    ends = [unit.difference(row[end], digits=1) for end in ("low", "high")]
    texts = {
        "study": study if row["task"] in study else f"{study}, {row['task']}",
        "name": f"{study}: {row['method']}",
        "seeds": f"{seeds} seed{'s' * (seeds != 1)}",
        "noise": unit.distance(row["noise"]),
        "unit": unit.points,
        "method": str(row["method"]),
        "variant": f"{row['method']} ({row['variant']})" if row["variant"] else str(row["method"]),
        "parameters": f"{row['parameters']:,}",
        "rate": f"{row['learning_rate']:.3g}",
        "test": f"{row['test']:.4f}",
        "deviation": "-" if math.isnan(row["deviation"]) else f"{row['deviation']:.4f}",
        "points": "over the budget" if row["over_budget"] else SAME_RUNS if verdict == SAME_RUNS else points,
        "differs": "no" if verdict in (NO_DIFFERENCE, SAME_RUNS) else verdict.partition(":")[0],
        "difference": unit.difference(row["difference"], digits=1),
        "interval": "-" if math.isnan(row["low"]) else "[{}, {}]".format(*ends),
        "p": "-" if math.isnan(row["p_holm"]) else f"{row['p_holm']:.3f}",
        "verdict": verdict,
        "needs": times(Interval(*row[MULTIPLIER])),
        "seconds": f"{row['seconds']:.1f} s",
        "memory": "" if pd.isna(row["peak_memory"]) else f"{row['peak_memory'] / 2**20:,.0f} MiB",
        "search": f"{row['cost_steps']:,}" if row["cost_steps"] else "",
    }
    if row["method"] == REFERENCE:
        return texts | {"points": unit.value(row["test"]), "difference": "", "interval": "", "p": "", "needs": ""}
    if row["budget"] == 0 and row["method"] not in UNLIMITED:
        texts["points"] += f" at {row['parameters']:,}"
        texts |= {
            name: f"{texts[name]}, with {_digits(row['size'])} x the parameters" for name in ("differs", "verdict")
        }
    return texts


def times(factor: Interval) -> str:
    """A factor with its interval, to two digits; nothing where there is none.

    >>> times(Interval(3.1, 2.2, 6.4)), times(Interval(math.inf, 4.2, math.inf)), times(Interval(3.1, math.nan, math.nan))
    ('3.1 x [2.2, 6.4]', 'more than tried [4.2, more]', '3.1 x [-]')
    >>> times(Interval(0.5, 0.5, 0.5))  # uniform's least budget is always enough
    'at most 0.5 x'
    """
    if math.isnan(factor.mean):
        return ""
    if factor.low == factor.mean == factor.high < math.inf:
        return f"at most {_digits(factor.mean)} x"
    mean = "more than tried" if math.isinf(factor.mean) else f"{_digits(factor.mean)} x"
    ends = ", ".join("more" if math.isinf(end) else _digits(end) for end in factor[1:] if not math.isnan(end))
    return f"{mean} [{ends or '-'}]"


def _digits(value: float) -> str:
    """To two digits, never as a power of ten."""
    return f"{float(f'{value:.2g}'):,.0f}" if value >= 10 else f"{value:.2g}"


def to_markdown(table: pd.DataFrame) -> str:
    """The table at the study's budget as Markdown, one column per study: uniform's metric, and the others' points over it.

    Bold: better or worse than uniform. In italics, and last: methods without a budget (full fine-tuning, the head alone). The
    last column is the mean of `relative` over the studies, of methods that are within the budget in all of them. Where uniform
    was trained at several budgets, a second table says how many times the parameters it needs to match.
    """
    table = at_budget(table)
    seeds = table.groupby("study", sort=False)["seeds"].first()
    unlimited = set(table.loc[table["budget"] == 0, "method"])
    lines = [["method", *(f"{study}, {n} seeds" for study, n in seeds.items()), "mean relative gain"]]
    lines.append(["---", *["---:"] * (len(seeds) + 1)])
    for method in sorted(dict.fromkeys(table["method"]), key=lambda method: method in unlimited):
        rows = table[table["method"] == method].set_index("study", drop=False)
        cells = dict.fromkeys(seeds.index, "")
        for study, row in rows.iterrows():
            bold = "**" * (row["verdict"] in ("better", "worse"))
            cells[study] = f"{bold}{format_row(row)['points']}{bold}"
        gains = rows.loc[~rows["over_budget"], "relative"]
        mean = f"{100 * gains.mean():+.1f} %" if len(gains) == len(seeds) and method != REFERENCE else ""
        name = method.replace("|", r"\|")  # a user's own method is named after its file
        lines.append([f"*{name}*" if method in unlimited else name, *cells.values(), mean])
    grown = table[table["uniform_budget_multiplier"].notna() & ~table["method"].isin([REFERENCE, *UNLIMITED])]
    tables = [lines]
    if not grown.empty:
        needs = grown.assign(needs=[format_row(row)["needs"] for _, row in grown.iterrows()])
        needs = needs.pivot(index="method", columns="study", values="needs").fillna("")
        rows = [[method.replace("|", r"\|"), *cells] for method, *cells in needs.itertuples()]
        tables.append([["uniform needs, to match", *needs.columns], ["---", *["---:"] * needs.shape[1]], *rows])
    return "\n\n".join("\n".join(f"| {' | '.join(cells)} |" for cells in lines) for lines in tables)


def insert_table(text: str, table: str, *, where: str) -> str:
    r"""The text, which errors call `where`, with `table` between its two marker lines, in the place of what was there.

    >>> insert_table(f"# Mine\n{BEGIN}\nold\n{END}\n", "new", where="card.md").splitlines()[2]
    'new'
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in after:
        raise SettingsError(f"`{where}` must hold the lines `{BEGIN}` and `{END}` once each, but does not; add them.")
    line_end = "\r\n" if "\r\n" in before + after else "\n"
    return before + line_end.join([BEGIN, *table.splitlines(), END]) + after
