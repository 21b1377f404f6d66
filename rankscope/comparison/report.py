"""`write_report`: a comparison as one self-contained HTML page, with its pictures as PNGs beside it."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import jinja2
import pandas as pd

from rankscope.allocation import RankAllocation
from rankscope.comparison.runner import REFERENCE
from rankscope.comparison.summary import allocations, at_budget, format_row
from rankscope.files import replacing
from rankscope.plotting import plot_budgets, plot_flow, plot_forest, plot_ranks, plot_trajectories, save_plot
from rankscope.targets import TargetModule

MOST_ALLOCATIONS = 6
NAMED = ("forest", "budgets")  # their panels say the study
TITLES = {
    "forest": "Differences to uniform",
    "budgets": "The metric against parameters",
    "ranks": "Where the ranks are, at the end of the first seed's run",
    "trajectories": "Ranks over the run",
    "flow": "Where the budget went",
}


def write_report(
    folder: Path,
    runs: pd.DataFrame,
    table: pd.DataFrame,
    *,
    targets: Sequence[TargetModule] = (),
    decisions: Mapping[str, pd.DataFrame] | None = None,
    pictures_in: Path | None = None,
    command: str = "",
) -> list[Path]:
    """Write `report.html` and the PNGs that it shows to a folder; returns their paths, the page first.

    `table` is what `summarise` makes of the `runs`. Pictures of ranks need the `targets` of a single study, and those of
    controllers their `decisions`, by method; without them, pictures in the folder `pictures_in` are shown as they are.
    """
    plots, studies = _plots(runs, table, targets, decisions or {}), ", ".join(dict.fromkeys(table["study"]))
    drawn = {
        name: save_plot(plot, folder / f"{name}.png", "" if name in NAMED else studies) for name, plot in plots.items()
    }
    patterns = ("ranks.png", "trajectories-*.png", "flow-*.png")  # these need target modules or decisions
    found = [path for pattern in patterns if pictures_in for path in sorted(pictures_in.glob(pattern))]
    shown = {path.stem: path for path in found} | drawn
    pictures = []
    for kind, title in TITLES.items():
        for name in (name for name in shown if name.partition("-")[0] == kind):
            method = name.removeprefix(kind).replace("-", ": ", 1)
            pictures.append((title + method, base64.b64encode(shown[name].read_bytes()).decode()))
    by_study = at_budget(table).groupby("study", sort=False)
    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    page = jinja2.Template(template, autoescape=True, trim_blocks=True, lstrip_blocks=True).render(
        title=f"Rank allocation compared: {studies}",
        studies=[[format_row(row) for _, row in rows.iterrows()] for _, rows in by_study],
        ranking=_ranking(table),
        pictures=pictures,
        n_runs=len(runs),
        revisions=", ".join(sorted(set(runs["revision"]))),
        command=command,
    )
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return [folder / "report.html", *drawn.values()]


def _plots(
    runs: pd.DataFrame, table: pd.DataFrame, targets: Sequence[TargetModule], decisions: Mapping[str, pd.DataFrame]
) -> dict[str, Callable[..., object]]:
    """What can be drawn, by file name; the metric against parameters where a study has several budgets."""
    found: dict[str, Callable[..., object]] = {}
    if (at_budget(table)["method"] != REFERENCE).any():
        found["forest"] = partial(plot_forest, table)
    if table.groupby("study")["factor"].nunique().max() > 1:
        found["budgets"] = partial(plot_budgets, table)
    if targets and table["study"].nunique() == 1:
        ranks = list(allocations(runs).items())[:MOST_ALLOCATIONS]
        shown = [RankAllocation.from_ranks(targets, each, strategy=name) for name, each in ranks]
        found["ranks"] = partial(plot_ranks, *shown)
        for method, each in decisions.items():
            name = re.sub(r"[^\w .,+=@()-]", "-", method)  # it may be that of a file elsewhere
            found[f"trajectories-{name}"] = partial(plot_trajectories, each, targets)
            found[f"flow-{name}"] = partial(plot_flow, each, targets)
    return found


def _ranking(table: pd.DataFrame) -> dict[str, float]:
    """Mean ranks over studies of the methods that are within the budget in all, best first; none for a single study."""
    equal = at_budget(table).query("budget > 0 and not over_budget")
    scores = equal.pivot(index="method", columns="study", values="test").dropna()
    ranks = scores.rank(ascending=False).mean(axis=1).sort_values()
    return {} if scores.shape[1] < 2 else {str(method): float(rank) for method, rank in ranks.items()}
