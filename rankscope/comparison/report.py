"""`write_report`: a comparison as one self-contained HTML page, with its pictures as PNGs beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from matplotlib.figure import Figure

from rankscope.allocation import RankAllocation
from rankscope.comparison.runner import REFERENCE
from rankscope.comparison.statistics import rank_methods
from rankscope.comparison.summary import allocations, at_budget, format_row
from rankscope.files import replacing
from rankscope.plotting import plot_budgets, plot_flow, plot_forest, plot_ranks, plot_trajectories, save_figure
from rankscope.targets import TargetModule

SHOWN_ALLOCATIONS = 6
COLUMNS = {
    "variant": "method", "parameters": "parameters", "rate": "rate", "test": "test", "deviation": "± seeds",
    "difference": "difference", "interval": "95 % interval", "p": "p (Holm)", "verdict": "verdict",
}  # fmt: skip
TITLES = {
    "forest": "Differences to uniform",
    "budgets": "The metric against parameters",
    "ranks": "Where the ranks are, at the end of the first seed's run",
    "trajectories": "Ranks over the run",
    "flow": "Where the budget went",
}
NOT_ALWAYS_DRAWN = ("ranks.png", "trajectories-*.png", "flow-*.png")  # they need target modules or decisions


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
    """Write `report.html` and the PNGs that it shows; returns their paths, the page first.

    Args:
        folder: Where they go.
        runs: `Comparison.runs`, of one study or several.
        table: What `summarise` makes of them.
        targets: Of the model, for pictures of ranks. Several studies together have none.
        decisions: Of controllers, by method.
        pictures_in: The comparison's folder; pictures there that cannot be drawn again are shown as they are.
        command: What made the runs, for the foot of the page.
    """
    drawn = {
        name: save_figure(figure, folder / f"{name}.png")
        for name, figure in _figures(runs, table, targets, decisions or {}).items()
    }
    found = [path for name in NOT_ALWAYS_DRAWN if pictures_in for path in sorted(pictures_in.glob(name))]
    shown = {path.stem: path for path in found} | drawn
    order = list(TITLES)
    page = jinja2.Template(
        Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    ).render(
        title="Rank allocation compared: " + ", ".join(dict.fromkeys(table["study"])),
        studies=[_study(group) for _, group in at_budget(table).groupby("study", sort=False)],
        ranking=_ranking(table),
        pictures=[
            (_title(name), base64.b64encode(shown[name].read_bytes()).decode())
            for name in sorted(shown, key=lambda name: order.index(name.partition("-")[0]))
        ],
        costs=[
            {**format_row(row), "name": f"{row['study']}: {row['method']}"} for _, row in at_budget(table).iterrows()
        ],
        n_runs=len(runs),
        revisions=", ".join(sorted(set(runs["revision"]))),
        command=command,
    )
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return [folder / "report.html", *drawn.values()]


def _figures(
    runs: pd.DataFrame,
    table: pd.DataFrame,
    targets: Sequence[TargetModule],
    decisions: Mapping[str, pd.DataFrame],
) -> dict[str, Figure]:
    """What can be drawn, by file name."""
    found = {"forest": plot_forest(table)} if (at_budget(table)["method"] != REFERENCE).any() else {}
    found["budgets"] = plot_budgets(table)
    if targets and table["study"].nunique() == 1:
        ranks = list(allocations(runs).items())[:SHOWN_ALLOCATIONS]
        found["ranks"] = plot_ranks(*(RankAllocation.from_ranks(targets, each, strategy=name) for name, each in ranks))
        for name, each in decisions.items():
            found[f"trajectories-{name}"] = plot_trajectories(each, targets)
            found[f"flow-{name}"] = plot_flow(each, targets)
    return found


def _title(name: str) -> str:
    """Of a picture, by its file name."""
    kind, _, method = name.partition("-")
    return f"{TITLES[kind]}: {method}" if method else TITLES[kind]


def _study(table: pd.DataFrame) -> dict[str, Any]:
    """One study at its own budget, for the template."""
    first = table.iloc[0]
    needs = {"needs": "uniform needs"} if table["uniform_budget_multiplier"].notna().any() else {}
    return {
        "name": first["study"] + (f", task {first['task']}" if first["task"] != first["study"] else ""),
        "seeds": int(first["seeds"]),
        "noise": f"{100 * first['noise']:.1f}",
        "columns": {**COLUMNS, **needs},
        "rows": [format_row(row) for _, row in table.iterrows()],
    }


def _ranking(table: pd.DataFrame) -> dict[str, Any] | None:
    """Mean ranks over studies of the methods that are within the budget in all; None for a single study."""
    equal = at_budget(table).query("budget > 0 and not over_budget")
    scores = equal.pivot(index="method", columns="study", values="test").dropna()
    if scores.shape[1] < 2 or len(scores) < 2:
        return None
    found = rank_methods({str(name): row.tolist() for name, row in scores.iterrows()})
    return {
        "studies": scores.shape[1],
        "p": "-" if pd.isna(found.p_value) else f"{found.p_value:.3f}",
        "critical_difference": f"{found.critical_difference:.2f}",
        "rows": [
            {"method": name, "rank": f"{rank:.2f}"}
            for name, rank in sorted(found.mean_ranks.items(), key=lambda item: item[1])
        ],
    }
