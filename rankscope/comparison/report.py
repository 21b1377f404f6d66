"""`write_report`: a comparison as one self-contained HTML page, its pictures beside it as PNGs."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from rankscope.allocation import RankAllocation
from rankscope.comparison.runner import REFERENCE
from rankscope.comparison.statistics import rank_methods
from rankscope.comparison.summary import allocations, at_budget
from rankscope.files import replacing
from rankscope.plotting import plot_budgets, plot_flow, plot_forest, plot_ranks, plot_trajectories, save_figure
from rankscope.targets import TargetModule

SHOWN_ALLOCATIONS = 6
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-size: 13px; } th, td { padding: .25rem .6rem; text-align: right; }
th { border-bottom: 1px solid #222; font-weight: 600; } th:first-child, td:first-child { text-align: left; }
tr:nth-child(even) td { background: #f6f6f6; } img { max-width: 100%; } h2 { margin-top: 2.2rem; } .better { color: #1b7f4d; }
.worse { color: #b3402e; } footer { margin-top: 3rem; color: #777; font-size: 12px; }
"""


def write_report(
    folder: Path,
    runs: pd.DataFrame,
    table: pd.DataFrame,
    *,
    targets: Sequence[TargetModule] = (),
    decisions: Mapping[str, pd.DataFrame] | None = None,
    command: str = "",
) -> list[Path]:
    """Writes `report.html` and the PNGs that it shows; returns their paths, the page first.

    Args:
        folder: Where to.
        runs: As `Comparison.runs` has them; several studies' runs may be put together.
        table: What `rankscope.comparison.summarise` makes of them.
        targets: Of the model, for pictures of ranks; without them, and for several studies, those are left out.
        decisions: Of controllers, by method.
        command: What made the runs, for the foot of the page.
    """
    figures = _figures(runs, table, targets, decisions or {})
    pictures = {name: save_figure(figure, folder / f"{name}.png") for name, (_, figure) in figures.items()}
    sections = [
        *(_study_section(group) for _, group in table.groupby("study", sort=False)),
        _ranking_section(table),
        *(_picture(title, pictures[name]) for name, (title, _) in figures.items()),
        _cost_section(table),
    ]
    revisions = ", ".join(sorted(set(runs["revision"])))
    foot = f"{len(runs)} runs, sources at {html.escape(revisions)}. {html.escape(command)}"
    title = "Rank allocation compared: " + ", ".join(dict.fromkeys(table["study"]))
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(title)}</h1>{''.join(sections)}<footer>{foot}</footer></html>"
    )
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return [folder / "report.html", *pictures.values()]


def _figures(
    runs: pd.DataFrame,
    table: pd.DataFrame,
    targets: Sequence[TargetModule],
    decisions: Mapping[str, pd.DataFrame],
) -> dict[str, tuple[str, Figure]]:
    """Title and figure by file name."""
    found = {}
    if (at_budget(table)["method"] != REFERENCE).any():
        found["forest"] = ("Differences to uniform", plot_forest(table))
    found["budgets"] = ("The metric against parameters", plot_budgets(table))
    if not targets or table["study"].nunique() > 1:
        return found
    shown = list(allocations(runs).items())[:SHOWN_ALLOCATIONS]
    ranks = [RankAllocation.from_ranks(targets, each, strategy=name) for name, each in shown]
    found["ranks"] = ("Where the ranks are, at the end of the first seed's run", plot_ranks(*ranks))
    for name, each in decisions.items():
        found[f"trajectories-{name}"] = (f"Ranks over the run: {name}", plot_trajectories(each, targets))
        found[f"flow-{name}"] = (f"Where the budget went: {name}", plot_flow(each, targets))
    return found


def _study_section(table: pd.DataFrame) -> str:
    """The figures of one study at the study's budget, and how to read them."""
    table = at_budget(table)
    growth = bool(table["equivalent"].notna().any())
    header = ["method", "parameters", "rate", "test", "± seeds", "difference", "95 % interval", "p (Holm)", "verdict"]
    rows = [_study_row(row, growth) for _, row in table.iterrows()]
    noise, seeds = 100 * float(table["noise"].iloc[0]), int(table["seeds"].iloc[0])
    plural = "s" * (seeds != 1)
    text = (
        f"{seeds} seed{plural}, paired; rate and variant chosen on validation, test read once. Differences in points; "
        "paired t intervals, p by sign-flip permutation with Holm's correction; a dash: fewer than 3 seeds, or differences that "
        "are all equal."
    )
    if seeds > 1:
        text += f" Two groups of {seeds} seeds of uniform itself differ by up to {noise:.1f} points, 95 % of the time."
    first = table.iloc[0]
    name = html.escape(first["study"] + (f", task {first['task']}" if first["task"] != first["study"] else ""))
    return f"<h2>{name}</h2><p>{text}</p>{_html_table([*header, *(['uniform needs'] if growth else [])], rows)}"


def _study_row(row: pd.Series, growth: bool) -> list[str]:
    name = str(row["method"]) + (f" ({row['variant']})" if row["variant"] else "")
    figures = [
        name,
        f"{row['parameters']:,}",
        f"{row['learning_rate']:.3g}",
        f"{row['test']:.4f}",
        _figure(row["deviation"], ".4f"),
    ]
    if row["method"] == REFERENCE:
        judged = ["", "", "", ""]
    else:
        judged = [
            f"{100 * row['difference']:+.2f}",
            "-" if pd.isna(row["low"]) else f"[{100 * row['low']:+.2f}, {100 * row['high']:+.2f}]",
            _figure(row["p_holm"], ".3f"),
            str(row["verdict"]),
        ]
    return [*figures, *judged, *([_factor(float(row["equivalent"]))] if growth else [])]


def _figure(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _factor(value: float) -> str:
    if math.isnan(value):
        return ""
    return "more than tried" if math.isinf(value) else f"{value:.2g} x the parameters"


def _ranking_section(table: pd.DataFrame) -> str:
    """Mean ranks over studies, of the methods that are within the budget on all; nothing for a single study."""
    equal = at_budget(table).query("budget > 0 and not over_budget")
    scores = equal.pivot(index="method", columns="study", values="test").dropna()
    if scores.shape[1] < 2 or len(scores) < 2:
        return ""
    ranking = rank_methods({str(name): row.tolist() for name, row in scores.iterrows()})
    rows = [[name, f"{rank:.2f}"] for name, rank in sorted(ranking.mean_ranks.items(), key=lambda item: item[1])]
    p_value = _figure(ranking.p_value, ".3f")
    text = (
        f"Mean rank over {scores.shape[1]} studies, at equal parameters, 1 is best; Friedman's p {p_value}. Ranks "
        f"closer than {ranking.critical_difference:.2f} do not differ (Nemenyi, 5 %)."
    )
    return f"<h2>Over all tasks</h2><p>{text}</p>{_html_table(['method', 'mean rank'], rows)}"


def _cost_section(table: pd.DataFrame) -> str:
    rows = [
        [
            f"{row['study']}: {row['method']}",
            f"{row['seconds']:.1f} s",
            "" if pd.isna(row["peak_memory"]) else f"{row['peak_memory'] / 2**20:,.0f} MiB",
            f"{row['cost_steps']:,}" if row["cost_steps"] else "",
        ]
        for _, row in at_budget(table).iterrows()
    ]
    header = ["method", "a run, median", "peak memory", "search, in optimizer steps"]
    return f"<h2>Cost</h2>{_html_table(header, rows)}"


def _picture(title: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    alt = html.escape(title)
    return f'<h2>{alt}</h2><img alt="{alt}" src="data:image/png;base64,{data}">'


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(text: str) -> str:
    mark = f' class="{text}"' if text in ("better", "worse") else ""
    return f"<td{mark}>{html.escape(text)}</td>"
