"""`rankscope bench`: comparisons that need no training, on what was measured once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rankscope.cli.options import Debug, Json, reports_errors

if TYPE_CHECKING:
    import pandas as pd

bench_app = typer.Typer(
    help="Compare searches on tabulated and synthetic landscapes, without training.", no_args_is_help=True
)
DEFAULT_LANDSCAPES = ("digits-shift/1", "synthetic/24")
DEFAULT_METHODS = ("performance-model", "tpe", "random")


@bench_app.command("search", epilog="Example: rankscope bench search --landscape digits-shift/1 --method tpe --seeds 3")
@reports_errors
def bench_search_command(
    landscape: Annotated[
        list[str] | None,
        typer.Option(
            help="A table of RankBench (digits-shift/1, /2, /4) or a SYNTHETIC landscape (synthetic/24, /72, "
            "/72-quiet, /72-useless-profile, /210); repeatable.  [default: digits-shift/1, synthetic/24]"
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="performance-model, tpe, gp, cma-es, random (over the tilts), tpe-raw, random-raw (over raw ranks) or "
            "evolution; repeatable.  [default: performance-model, tpe, random]"
        ),
    ] = None,
    trials: Annotated[
        list[int] | None, typer.Option(help="Trials after which to judge; repeatable.  [default: 30, 60, 100]")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Searches of each kind.")] = 5,
    jobs: Annotated[int, typer.Option(min=1, help="Searches at a time, each in its own process.")] = 1,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Output folder.")] = Path("out/bench"),
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Search RankBench's tables or synthetic landscapes: median regret of what is recommended (uniform 1, best 0)."""
    run_bench_search(
        landscape or DEFAULT_LANDSCAPES,
        method or DEFAULT_METHODS,
        trials or (30, 60, 100),
        seeds,
        jobs,
        out,
        as_json=json,
    )


def run_bench_search(
    landscapes: Sequence[str],
    methods: Sequence[str],
    budgets: Sequence[int],
    n_seeds: int,
    n_jobs: int,
    out: Path,
    *,
    as_json: bool,
) -> None:
    """`rankscope bench search`."""
    from rankscope.benchmark import regret_curves
    from rankscope.cli.output import print_files, print_json, print_line, print_table, progress
    from rankscope.files import replacing
    from rankscope.plotting import plot_regret, save_figure

    with progress() as bar:
        line = bar.add_task("searching", total=None)
        found = regret_curves(
            landscapes,
            methods,
            range(n_seeds),
            budgets,
            n_jobs=n_jobs,
            on_search=lambda done, total: bar.update(line, completed=done, total=total),
        )
    with replacing(out / "regret.parquet") as temporary:
        found.to_parquet(temporary, index=False)
    files = [out / "regret.parquet", save_figure(plot_regret(found), out / "regret.png")]
    if as_json:
        print_json({"regret": _medians(found).to_dict("records"), "files": [str(file) for file in files]})
        return
    print_line(f"median regret of {n_seeds} searches: uniform 1, best 0")
    for name in landscapes:
        table = _medians(found[found["landscape"] == name]).pivot(index="method", columns="trials", values="regret")
        header = ("method", *(f"{trials} trials" for trials in table.columns))
        rows = [(method, *(f"{value:.2f}" for value in table.loc[method])) for method in methods]
        print_table(name, header, rows)
    print_files(files)


def _medians(found: pd.DataFrame) -> pd.DataFrame:
    return found.groupby(["landscape", "method", "trials"], sort=False)["regret"].median().reset_index()
