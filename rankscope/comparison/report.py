"""`write_report`: a comparison as one self-contained HTML page, with its pictures as PNGs beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import pandas as pd
from matplotlib.figure import Figure

from rankscope.allocation import RankAllocation
from rankscope.comparison.runner import REFERENCE
from rankscope.comparison.statistics import Ranking, rank_methods
from rankscope.comparison.summary import allocations, at_budget, format_row
from rankscope.files import replacing
from rankscope.plotting import plot_budgets, plot_flow, plot_forest, plot_ranks, plot_trajectories, save_figure
from rankscope.targets import TargetModule

MOST_ALLOCATIONS = 6
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

    `runs` are of one study or several, and `table` is what `summarise` makes of them. Pictures of ranks need the `targets` of a
    single study, and those of controllers their `decisions`, by method; without them, pictures in the folder `pictures_in` are
    shown as they are. The page ends with `command`, which made the runs.
    """
    figures = _figures(runs, table, targets, decisions or {})
    drawn = {name: save_figure(figure, folder / f"{name}.png") for name, figure in figures.items()}
    patterns = ("ranks.png", "trajectories-*.png", "flow-*.png")  # these need target modules or decisions
    found = [path for pattern in patterns if pictures_in for path in sorted(pictures_in.glob(pattern))]
    shown = {path.stem: path for path in found} | drawn
    pictures = []
    for name in sorted(shown, key=lambda name: list(TITLES).index(name.partition("-")[0])):
        kind, _, method = name.partition("-")
        title = f"{TITLES[kind]}: {method}" if method else TITLES[kind]
        pictures.append((title, base64.b64encode(shown[name].read_bytes()).decode()))
    by_study = at_budget(table).groupby("study", sort=False)
    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    page = jinja2.Template(template, autoescape=True, trim_blocks=True, lstrip_blocks=True).render(
        title="Rank allocation compared: " + ", ".join(dict.fromkeys(table["study"])),
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


def _figures(
    runs: pd.DataFrame, table: pd.DataFrame, targets: Sequence[TargetModule], decisions: Mapping[str, pd.DataFrame]
) -> dict[str, Figure]:
    """What can be drawn, by file name."""
    found = {"forest": plot_forest(table)} if (at_budget(table)["method"] != REFERENCE).any() else {}
    found["budgets"] = plot_budgets(table)
    if targets and table["study"].nunique() == 1:
        ranks = list(allocations(runs).items())[:MOST_ALLOCATIONS]
        shown = [RankAllocation.from_ranks(targets, each, strategy=name) for name, each in ranks]
        found["ranks"] = plot_ranks(*shown)
        for name, each in decisions.items():
            found[f"trajectories-{name}"] = plot_trajectories(each, targets)
            found[f"flow-{name}"] = plot_flow(each, targets)
    return found


def _ranking(table: pd.DataFrame) -> Ranking | None:
    """Mean ranks over studies of the methods that are within the budget in all; None for a single study."""
    equal = at_budget(table).query("budget > 0 and not over_budget")
    scores = equal.pivot(index="method", columns="study", values="test").dropna()
    if scores.shape[1] < 2 or len(scores) < 2:
        return None
    return rank_methods({str(name): row.tolist() for name, row in scores.iterrows()})
