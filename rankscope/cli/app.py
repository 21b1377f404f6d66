"""The typer application: one command a step, from `rankscope profile` on. Heavy imports wait inside the commands."""

from __future__ import annotations

import functools
import io
import os
import select
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from rankscope import __version__
from rankscope.errors import RankscopeError, TaskError, TrainingError, one_line
from rankscope.plugins import user_errors

StudyPath = Annotated[Path, typer.Argument(metavar="STUDY", help="The study file, in YAML.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Output folder.  [default: out/NAME]")]
Seed = Annotated[int | None, typer.Option("--seed", help="Overrides the study's `seed`.")]
Storage = Annotated[str | None, typer.Option(help="Overrides `search.storage`: as Optuna takes it.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
UniformRank = Annotated[int | None, typer.Option(help="Overrides `budget`: what uniform LoRA of this rank uses.")]
Parameters = Annotated[int | None, typer.Option(help="Overrides `budget`: adapter parameters.")]

Command = TypeVar("Command", bound=Callable[..., Any])


def check_study(path: Path, overrides: Mapping[str, Any]) -> None:
    """Checks a study file with the flags that override it; a mistyped key is told before the command loads torch."""
    from rankscope.settings import read_study

    read_study(path, overrides)


def reports_errors(command: Command) -> Command:
    """Turns errors raised on purpose into one line and an exit status: 1 where the work failed, 2 for bad input.

    `--debug` shows the traceback before the line.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            with user_errors("the study's own code", TaskError):
                return command(*args, **kwargs)
        except (RankscopeError, OSError) as error:
            if isinstance(error, BrokenPipeError) and _stdout_is_closed():
                raise typer.Exit(141) from None
            if kwargs.get("debug"):
                traceback.print_exc()
            sys.stderr.write(f"rankscope: {_line(error)}\n")
            raise typer.Exit(1 if isinstance(error, TrainingError) else 2) from None
        except KeyboardInterrupt:
            sys.stderr.write("rankscope: interrupted; what was finished is kept.\n")
            raise typer.Exit(130) from None

    return wrapped  # type: ignore[return-value]


def _line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"`{error.filename}` cannot be used ({error.strerror}); check the path."
    return one_line(error, most=10_000)


def _stdout_is_closed() -> bool:
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return bool(poll.poll(0))  # with no event asked for, only errors are told: the reader has gone


app = typer.Typer(
    name="rankscope",
    help="Which LoRA rank where, for your parameter budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """The entry point of the `rankscope` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may lack a sign of ours, or of a file's name
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone, as `head` does; what is still buffered would raise again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"rankscope {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Which LoRA rank where, for your parameter budget."""


@app.command("profile", epilog="Example: rankscope profile studies/digits.yaml --out out/digits")
@reports_errors
def profile_command(
    study: StudyPath,
    out: Out = None,
    batches: Annotated[int | None, typer.Option(help="Overrides `profile.n_batches`.")] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Overrides `profile.tolerance`: stop when leading singular values move by less."),
    ] = None,
    keep_directions: Annotated[
        int | None, typer.Option(help="Overrides `profile.keep_directions`: singular vectors kept of each module.")
    ] = None,
    keep_partial: Annotated[
        bool, typer.Option("--keep-partial", help="On Ctrl-C, keep the profile of the batches so far.")
    ] = False,
    seed: Seed = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Collect gradient, input and weight features of every target module into profile.parquet, and draw them."""
    overrides = {
        "profile.n_batches": batches,
        "profile.tolerance": tolerance,
        "profile.keep_directions": keep_directions,
        "seed": seed,
    }
    check_study(study, overrides)
    from rankscope.cli.commands import run_profile

    run_profile(study, out, overrides, keep_partial=keep_partial, as_json=json)


@app.command("allocate", epilog="Example: rankscope allocate studies/digits.yaml --strategy one-shot --uniform-rank 2")
@reports_errors
def allocate_command(
    study: StudyPath,
    out: Out = None,
    strategy: Annotated[str | None, typer.Option(help="Overrides `allocation.strategy`.")] = None,
    uniform_rank: UniformRank = None,
    parameters: Parameters = None,
    min_rank: Annotated[int | None, typer.Option(help="Overrides `allocation.min_rank`.")] = None,
    max_rank: Annotated[int | None, typer.Option(help="Overrides `allocation.max_rank`.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what a search recommended.")] = False,
    seed: Seed = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compute an allocation from the profile alone, and export it as a plain PEFT config."""
    overrides = {
        "budget.uniform_rank": uniform_rank,
        "budget.parameters": parameters,
        "allocation.min_rank": min_rank,
        "allocation.max_rank": max_rank,
        "seed": seed,
    }
    check_study(study, overrides)
    from rankscope.cli.commands import run_allocate

    run_allocate(study, out, overrides, strategy=strategy, force=force, as_json=json)


@app.command("search", epilog="Example: rankscope search studies/digits.yaml --trials 60")
@reports_errors
def search_command(
    study: StudyPath,
    out: Out = None,
    trials: Annotated[int | None, typer.Option(help="Overrides `search.n_trials`: trainings in all.")] = None,
    confirm_fraction: Annotated[
        float | None,
        typer.Option(help="Overrides `search.confirm_fraction`: share of the trainings for finalists on fresh seeds."),
    ] = None,
    fidelity: Annotated[
        float | None, typer.Option(help="Overrides `search.fidelity`: share of the steps that a trial takes.")
    ] = None,
    pruner: Annotated[str | None, typer.Option(help="Overrides `search.pruner`: none, median or hyperband.")] = None,
    sampler: Annotated[
        str | None,
        typer.Option(help="Overrides `search.sampler`: performance-model, tpe or random."),
    ] = None,
    storage: Storage = None,
    uniform_rank: UniformRank = None,
    parameters: Parameters = None,
    seed: Seed = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Search with short fine-tuning trials; resumes an earlier run."""
    overrides = {
        "search.n_trials": trials,
        "search.confirm_fraction": confirm_fraction,
        "search.fidelity": fidelity,
        "search.pruner": pruner,
        "search.sampler": sampler,
        "search.storage": storage,
        "budget.uniform_rank": uniform_rank,
        "budget.parameters": parameters,
        "seed": seed,
    }
    check_study(study, overrides)
    from rankscope.cli.commands import run_search

    run_search(study, out, overrides, as_json=json)


@app.command("train", epilog="Example: rankscope train studies/digits.yaml --baseline --seeds 8 --jobs 2")
@reports_errors
def train_command(
    study: StudyPath,
    out: Out = None,
    allocation: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The allocation.  [default: DIR/allocation.json]")
    ] = None,
    controller: Annotated[
        str | None,
        typer.Option(
            help="Overrides `controller.mode`: off, on, or auto (on where the allocation rests on no gradient yet)."
        ),
    ] = None,
    baseline: Annotated[
        bool,
        typer.Option(
            "--baseline", help="Also train uniform LoRA, and the allocation without controller, on the same seeds."
        ),
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each allocation.")] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, each in its own process.")] = 1,
    learning_rate: Annotated[
        float | None, typer.Option(help="Overrides `training.learning_rate`; a single rate is not tuned.")
    ] = None,
    seed: Seed = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Fine-tune an allocation, tune its learning rate, and save the adapter for plain PEFT."""
    overrides = {"training.learning_rate": learning_rate, "controller.mode": controller, "seed": seed}
    check_study(study, overrides)
    from rankscope.cli.commands import run_train

    run_train(
        study, out, overrides, allocation_path=allocation, baseline=baseline, n_seeds=seeds, jobs=jobs, as_json=json
    )


@app.command(
    "compare", epilog="Example: rankscope compare studies/digits.yaml --methods uniform --methods one-shot --jobs 2"
)
@reports_errors
def compare_command(
    study: StudyPath,
    out: Out = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Overrides `compare.methods`; several times. Strategies, uniform-rslora, qv-only, searched, controller, "
            "controller-STRATEGY, adalora, eva, full, head, or path/to/file.py:function.",
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Overrides `compare.n_seeds`: reported runs of each method.")
    ] = None,
    budgets: Annotated[
        list[float] | None, typer.Option(metavar="FACTOR", help="Overrides `compare.budgets`: factors of the budget.")
    ] = None,
    uniform_budgets: Annotated[
        list[float] | None,
        typer.Option(metavar="FACTOR", help="Overrides `compare.uniform_budgets`: how far uniform alone is grown."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, each in its own process.")] = 1,
    uniform_rank: UniformRank = None,
    parameters: Parameters = None,
    seed: Seed = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare methods at equal parameters, each at its best learning rate; resumes an earlier run."""
    overrides = {
        "compare.methods": methods or None,
        "compare.n_seeds": seeds,
        "compare.budgets": budgets or None,
        "compare.uniform_budgets": uniform_budgets or None,
        "budget.uniform_rank": uniform_rank,
        "budget.parameters": parameters,
        "seed": seed,
    }
    check_study(study, overrides)
    from rankscope.cli.commands import run_compare

    run_compare(study, out, overrides, jobs=jobs, as_json=json)


@app.command("report", epilog="Example: rankscope report out/digits")
@reports_errors
def report_command(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders with a comparison.parquet.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Output folder.  [default: DIR]")] = None,
    into: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also put a Markdown table between the marker lines of a README or model card."
        ),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw comparisons as report.html and PNGs: one task, or several together."""
    from rankscope.cli.commands import run_report

    run_report(folders, out, into, as_json=json)


@app.command("dashboard", epilog="Example: rankscope dashboard studies/digits.yaml --open")
@reports_errors
def dashboard_command(
    study: StudyPath,
    out: Out = None,
    storage: Storage = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of this machine's loopback; 0: any free one.")] = 8080,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open it in the browser.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the search's trials in Optuna's dashboard, each with a picture of its ranks. Needs the extra `dashboard`."""
    overrides = {"search.storage": storage}
    check_study(study, overrides)
    from rankscope.cli.dashboard import run_dashboard

    run_dashboard(study, out, overrides, port=port, open_browser=open_browser, as_json=json)
