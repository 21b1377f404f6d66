"""The command line: options, help and errors. `commands` does the work, and is imported only when a command runs."""

from __future__ import annotations

import errno
import functools
import gc
import importlib
import inspect
import io
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer
import typer.core

from rankscope import __version__
from rankscope.errors import (
    FileError,
    RankscopeError,
    SettingsError,
    TaskError,
    TrainingError,
    one_line,
    without_secrets,
)
from rankscope.plugins import code_of, user_errors

if TYPE_CHECKING:
    from rankscope.settings import StudySettings

__all__ = ["app", "main", "reports_errors", "what_is_kept"]

SEARCHES = ("search", "worker")  # commands that train trials
RESUMING = (*SEARCHES, "compare", "budget")  # commands that go on where they stopped
INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it
Command = TypeVar("Command", bound=Callable[..., Any])

BUDGET = {"uniform_rank": "budget.uniform_rank", "parameters": "budget.parameters"}
UNIFORM_RANK = typer.Option(None, metavar="N", help="Overrides `budget`: what uniform LoRA of this rank uses.")
PARAMETERS = typer.Option(None, metavar="N", help="Overrides `budget`: adapter parameters.")
ALLOW_CODE = typer.Option(
    False, "--allow-code", help="Run the code that the study names though the file is outside the working directory."
)
STORAGE = typer.Option(None, metavar="URL", help="Overrides `search.storage`: where trials are kept.")

UsageError: Any = typer.BadParameter.__base__  # typer's own, or click's where typer uses it


class Commands(typer.core.TyperGroup):
    """A mistyped command or option is one line, as any other error is. Summaries of commands are whole sentences."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The commands' names, that of the first step first."""
        return sorted(super().list_commands(ctx), key=lambda name: name != "init")

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """List the commands; click would cut their summaries."""
        for command in self.commands.values():
            command.short_help = command.short_help or " ".join((command.help or "").split("\n\n")[0].split())
        super().format_commands(ctx, formatter)

    def main(self, *args: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """Run the command of the arguments; exit with its status, unless not `standalone_mode`."""
        try:
            status = super().main(*args, **{**options, "standalone_mode": False})
        except UsageError as error:
            if not standalone_mode:
                raise
            text, about = error.format_message(), f" (see `{error.ctx.command_path} --help`)" if error.ctx else ""
            sys.stderr.write(f"{text}\n" if "\n" in text else f"rankscope: {text}{about}\n")  # or a page of help
            status = error.exit_code
        if standalone_mode:
            sys.exit(status)
        return status


app = typer.Typer(
    name="rankscope",
    cls=Commands,
    help="Which LoRA rank where, for your parameter budget.",
    no_args_is_help=True,
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
            app() if os.environ.get("WORLD_SIZE", "1") == "1" else _run_on_several()
        finally:
            sys.stdout.flush()
            gc.freeze()  # the interpreter's end would look through all modules: 1.6 s of CPU
    except SystemExit as end:
        if (
            end.code == INTERRUPTED
        ):  # a further Ctrl-C leaves at once, without a page about threads that were waited for
            signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
        raise
    except BrokenPipeError:  # the reader has gone, as `head` does; what is still buffered would raise again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _run_on_several() -> None:
    """Under torchrun or accelerate launch, the first process does and says all; the others share each training."""
    from rankscope.distributed import is_first, join_processes, led

    def run() -> None:
        try:
            app()
        except SystemExit as ended:
            if ended.code:  # the launcher ends the others
                raise

    says, joined = os.environ.get("LOCAL_RANK", "0") == "0", False
    try:
        join_processes()
        says, joined = is_first(), True
        if not says:
            _silence()
        led(run)
    except (RankscopeError, KeyboardInterrupt) as error:
        if says and isinstance(error, RankscopeError):
            sys.stderr.write(f"rankscope: {one_line(error, most=10_000)}\n")
        elif not joined and isinstance(error, RankscopeError):
            time.sleep(60)  # the launcher ends all with the first that exits, which must be the one that says why
        sys.exit(2 if says else 1)


def _silence() -> None:
    """Leave warnings and notes, which all processes have, to the first one."""
    import logging
    import warnings

    from rankscope.cli.session import quiet_libraries

    quiet_libraries()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)


def reports_errors(command: Command) -> Command:
    """Turn errors raised on purpose into one line and an exit status: 1 where the work failed, 2 for bad input."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            with user_errors("the study's own code", TaskError):
                return command(*args, **kwargs)
        except (RankscopeError, OSError) as error:
            if isinstance(error, BrokenPipeError) and _stdout_is_closed():
                raise typer.Exit(141) from None
            if kwargs.get("debug"):
                sys.stderr.write(without_secrets(traceback.format_exc()))
            line = one_line(error, most=10_000)
            if isinstance(error, OSError) and error.filename is not None:
                line = f"`{error.filename}` cannot be used ({error.strerror}); check the path."
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                line = (
                    f"the disk is full ({error.strerror}): earlier files are unharmed; make room, then run this again."
                )
            sys.stderr.write(f"rankscope: {line}\n")
            raise typer.Exit(1 if isinstance(error, TrainingError) else 2) from None
        except KeyboardInterrupt as stopped:
            kept = str(stopped) or "files are written whole or not at all"
            sys.stderr.write(f"rankscope: interrupted; {kept}.\n")
            raise typer.Exit(INTERRUPTED) from None

    return wrapped  # type: ignore[return-value]


def _stdout_is_closed() -> bool:
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return bool(poll.poll(0))  # with no event asked for, only errors are told: the reader has gone


def _shared(
    study: Path = typer.Argument(metavar="STUDY", help="The study file, in YAML."),
    out: Path | None = typer.Option(None, metavar="DIR", help="Output folder.  [default: out/NAME]"),
    sets: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="Override any key, as in search.fidelity=0.5."
    ),
    seed: int | None = typer.Option(None, metavar="N", help="Overrides the study's `seed`."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object instead of a table."),
    allow_code: bool = ALLOW_CODE,
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """The arguments and options of every command on a study."""


def _study_command(name: str, example: str, **keys: str) -> Callable[[Callable[..., None]], None]:
    """Register a command on a study.

    Its flags named in `keys` override that key of the study; the others are passed to `run_NAME` of `commands`.
    """

    def register(described: Callable[..., None]) -> None:
        def command(
            study: Path, out: Path | None, sets: list[str], seed: int | None, json: bool, allow_code: bool, debug: bool,
            **own: Any,
        ) -> None:  # fmt: skip
            from rankscope.settings import read_study

            named = [(key, f"--{flag.replace('_', '-')}", own.pop(flag)) for flag, key in keys.items()]
            named += [("seed", "--seed", seed)]
            given = [each for each in named if not (each[2] is None or each[2] is False or each[2] == [])]
            flags, origins = dict[str, Any](), dict[str, str]()
            for key, origin, value in [*given, *map(_parsed, sets)]:
                if key in flags:
                    raise SettingsError(f"`{key}` must be given once, but is by {origins[key]} and {origin}; drop one.")
                flags[key], origins[key] = value, origin
            settings = read_study(study, flags, origins=origins)  # a mistyped key is told before torch loads,
            place = out or Path("out") / settings.name
            _check_early(name, study, settings, place, own)  # and so is what does not exist
            if name != "dashboard":  # which runs nothing of the study
                say_code(study, settings, flags, allowed=allow_code)
            started, elsewhere = time.time(), name in SEARCHES and settings.search.storage is not None
            try:
                work = importlib.import_module(
                    f"rankscope.cli.{name if name in ('dashboard', 'worker') else 'commands'}"
                )
                session = work.Session(study, flags, settings, place)
                getattr(work, f"run_{name}")(session, as_json=json, **own)
            except KeyboardInterrupt:
                told = what_is_kept(place, started, resumes=name in RESUMING, elsewhere=elsewhere)
                raise KeyboardInterrupt(told) from None

        first, second, *last = inspect.signature(_shared, eval_str=True).parameters.values()
        parameters = [first, second, *inspect.signature(described, eval_str=True).parameters.values(), *last]
        named = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        command.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        command.__doc__ = described.__doc__
        app.command(name, epilog=f"Example: rankscope {name} {example}")(reports_errors(command))

    return register


def _check_early(name: str, study: Path, settings: Any, out: Path, own: Mapping[str, Any]) -> None:
    """Raise what needs no work to be found wrong: names, and paths at which there is nothing."""
    from rankscope.early import check_output, check_task_spec

    check_output(out)
    if name == "dashboard":  # which needs the search's database only
        return
    check_task_spec(settings.task, settings.base_dir, dry_run=bool(own.get("dry_run")))
    if name == "train" and not own["dry_run"]:
        require_allocation(own["allocation"] or out / "allocation.json", f"{arguments_of(study, out, settings.name)}")


def arguments_of(study: Path, out: Path, name: str) -> str:
    """Study and output folder as the command line takes them, for messages."""
    return f"{study}" if out == Path("out") / name else f"{study} --out {out}"


def require_allocation(file: Path, arguments: str) -> None:
    """Raise a FileError if there is no allocation to train."""
    if not file.exists():
        again = f"run `rankscope allocate {arguments}` or `rankscope search {arguments}`"
        raise FileError(f"`{file}` must hold an allocation, but there is no such file; {again} first.")


def what_is_kept(folder: Path, since: float, *, resumes: bool = False, elsewhere: bool = False) -> str:
    """What an interrupted command has left: the files of its output folder that changed since, and trials `elsewhere`."""
    found: dict[str, int] = {}
    for path in sorted(folder.rglob("*")):
        first, *rest = path.relative_to(folder).parts
        if not first.startswith(".") and path.is_file() and path.stat().st_mtime >= since - 1:  # clocks of file systems
            found[first] = found.get(first, 0) + bool(rest)
    names = [f"{name}/ ({n} file{'s' * (n != 1)})" if n else name for name, n in found.items()]
    kept = f"kept in {folder}: {', '.join(names)}" if names else f"nothing was written to {folder}"
    kept += "; trials that ended are in the study's storage" if elsewhere else ""
    return kept + ("; the same command goes on from there" if resumes and (names or elsewhere) else "")


def say_code(path: Path, study: StudySettings, flags: Collection[str] = (), *, allowed: bool = False) -> None:
    """Say which code of the study file may run; a SettingsError where the file lies elsewhere, unless `allowed`.

    What the command line names in `flags`, the user has named.
    """
    named = {
        "task": study.task, "allocation.strategy": study.allocation.strategy, "compare.methods": study.compare.methods,
        "plan.strategy": study.plan.strategy,
    }  # fmt: skip
    kept: dict[str, Any] = {key: value for key, value in named.items() if key not in flags}
    if not (code := code_of(kept.pop("task", None), **kept)):
        return
    listed = ", ".join(f"{name} ({key})" for name, key in code.items())
    if not allowed and not path.resolve().is_relative_to(Path.cwd()):
        raise SettingsError(
            f"`{path}` must lie in the working directory to run code, but names {listed} and lies elsewhere; read that code, "
            "then pass --allow-code."
        )
    sys.stderr.write(f"`{path}` brings code, which runs here: {listed}\n")


def _parsed(text: str) -> tuple[str, str, Any]:
    """Key, origin and value of a `--set`."""
    from rankscope.files import parse_yaml

    key, equals, given = text.partition("=")
    value = parse_yaml(given, where=f"`--set {text}`", what="a value")
    if not (key and equals):
        raise SettingsError(f"`--set` must be KEY=VALUE, as in search.fidelity=0.5, but got {text!r}.")
    if value is None:
        raise SettingsError(f"`--set` must give `{key}` a value, but got {text!r}; for its default, leave the key out.")
    return key, "--set", value


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"rankscope {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """Which LoRA rank where, for your parameter budget."""


@_study_command("profile", "my.yaml", keep_partial="profile.keep_partial")
def _profile(
    keep_partial: bool = typer.Option(
        False, "--keep-partial", help="On Ctrl-C, keep the profile of the batches so far."
    ),
) -> None:
    """Collect gradient, input and weight features of every target module into profile.parquet, and draw them."""


@_study_command("allocate", "my.yaml --strategy one-shot --uniform-rank 2", strategy="allocation.strategy", **BUDGET)
def _allocate(
    strategy: str | None = typer.Option(
        None,
        metavar="NAME",
        help="Overrides `allocation.strategy`: one-shot, uniform, random, gradient-norm, sensitivity, activation, or "
        "FILE.py:FUNCTION of yours.",
    ),
    uniform_rank: int | None = UNIFORM_RANK,
    parameters: int | None = PARAMETERS,
    force: bool = typer.Option(False, "--force", help="Replace what a search recommended."),
) -> None:
    """Compute an allocation from the profile alone, and export it as a plain PEFT config."""


@_study_command("budget", "my.yaml --jobs 2", jobs="plan.n_jobs", backend="plan.backend", margin="plan.margin")
def _budget(
    margin: float | None = typer.Option(
        None, metavar="X", help="Overrides `plan.margin`: what may be lost of the metric."
    ),
    jobs: int | None = typer.Option(None, metavar="N", help="Overrides `plan.n_jobs`: runs at a time."),
    backend: str | None = typer.Option(
        None, metavar="NAME", help="Overrides `plan.backend`: loky, or dask://HOST:PORT."
    ),
) -> None:
    """Find how few adapter parameters the task needs, and how many times fewer than uniform LoRA; resumes."""


@_study_command("search", "my.yaml --trials 60", trials="search.n_trials", storage="search.storage", **BUDGET)
def _search(
    trials: int | None = typer.Option(None, metavar="N", help="Overrides `search.n_trials`: trainings in all."),
    storage: str | None = STORAGE,
    uniform_rank: int | None = UNIFORM_RANK,
    parameters: int | None = PARAMETERS,
) -> None:
    """Search with short fine-tuning trials; resumes an earlier run, and shares it with other workers."""


@_study_command(
    "worker", "my.yaml --storage postgresql://me@host/searches --devices all",
    trials="search.n_trials", storage="search.storage", **BUDGET,
)  # fmt: skip
def _worker(
    storage: str | None = STORAGE,
    devices: str | None = typer.Option(None, metavar="LIST", help="GPUs, as in 0,1, or all: one process each."),
    jobs: int = typer.Option(1, metavar="N", min=1, help="Processes, where no devices are given."),
    trials: int | None = typer.Option(None, metavar="N", help="Overrides `search.n_trials`: trainings in all."),
    uniform_rank: int | None = UNIFORM_RANK,
    parameters: int | None = PARAMETERS,
) -> None:
    """Help a search on any number of machines: run its trials and confirming runs until none is left; writes no outputs."""


@_study_command("train", "my.yaml --baseline --seeds 8 --jobs 2", controller="controller.mode", **BUDGET)
def _train(
    allocation: Path | None = typer.Option(
        None, metavar="FILE", help="The allocation.  [default: DIR/allocation.json]"
    ),
    controller: str | None = typer.Option(
        None, metavar="on|off|auto", help="Overrides `controller.mode`: whether ranks move while it trains."
    ),
    uniform_rank: int | None = UNIFORM_RANK,
    parameters: int | None = PARAMETERS,
    baseline: bool = typer.Option(
        False, "--baseline", help="Also train uniform LoRA, and the allocation without controller, on the same seeds."
    ),
    seeds: int = typer.Option(1, metavar="N", min=1, help="Runs of each allocation."),
    jobs: int = typer.Option(1, metavar="N", min=1, help="Runs at a time, each in its own process."),
    dry_run: bool = typer.Option(
        False,
        "--dry-run",
        help="Load only the configuration of a generic task's model; print towers, steps and memory.",
    ),
) -> None:
    """Fine-tune an allocation, tune its learning rate, and save the adapter for plain PEFT."""


@_study_command(
    "compare", "my.yaml --methods uniform --methods one-shot --jobs 2",
    methods="compare.methods", seeds="compare.n_seeds", jobs="compare.n_jobs", backend="compare.backend",
    **BUDGET,
)  # fmt: skip
def _compare(
    methods: list[str] = typer.Option([], metavar="NAME", help="Overrides `compare.methods`; several times."),
    seeds: int | None = typer.Option(
        None, metavar="N", help="Overrides `compare.n_seeds`: reported runs of each method."
    ),
    jobs: int | None = typer.Option(None, metavar="N", help="Overrides `compare.n_jobs`: runs at a time."),
    backend: str | None = typer.Option(
        None, metavar="NAME", help="Overrides `compare.backend`: loky, or dask://HOST:PORT."
    ),
    uniform_rank: int | None = UNIFORM_RANK,
    parameters: int | None = PARAMETERS,
) -> None:
    """Compare methods at equal parameters, each at its best learning rate; resumes an earlier run."""


@app.command("report", epilog="Example: rankscope report out/my")
@reports_errors
def _report(
    folders: list[Path] = typer.Argument(metavar="DIR", help="Folders with a comparison.parquet."),
    out: Path | None = typer.Option(None, metavar="DIR", help="Output folder.  [default: DIR]"),
    into: Path | None = typer.Option(
        None, metavar="FILE", help="Also put a Markdown table between the marker lines of a README or model card."
    ),
    json: bool = typer.Option(False, "--json", help="Print one JSON object instead of a table."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Draw comparisons as report.html and PNGs: one task, or several together."""
    from rankscope.early import check_file_exists

    for folder in folders:
        check_file_exists(folder / "comparison.parquet", what="a comparison")
    from rankscope.cli.commands import run_report

    run_report(folders, out, into, as_json=json)


@_study_command("dashboard", "my.yaml --open", storage="search.storage")
def _dashboard(
    storage: str | None = STORAGE,
    port: int = typer.Option(8080, metavar="N", min=0, max=65535, help="Of this machine's loopback; 0: any free one."),
    open_browser: bool = typer.Option(False, "--open/--no-open", help="Open it in the browser."),
) -> None:
    """Show the search's trials in Optuna's dashboard, each with a picture of its ranks. Needs the extra `dashboard`."""


@app.command("export", epilog="Example: rankscope export out/my/allocation.json --to axolotl")
@reports_errors
def _export(
    source: Path = typer.Argument(
        metavar="ALLOCATION",
        help="An allocation.json, a folder with one, or an adapter's folder; for --padded, the last.",
    ),
    to: str | None = typer.Option(None, metavar="TOOL", help="peft, axolotl, kohya, unsloth or trl."),
    padded: bool = typer.Option(
        False, "--padded", help="Write the adapter with one rank, the same function, for servers such as vLLM."
    ),
    out: Path | None = typer.Option(
        None,
        metavar="PATH",
        help="The file, instead of the terminal; the folder for --padded.  [default: ADAPTER-padded]",
    ),
    scaling: float | None = typer.Option(None, metavar="X", help="alpha / r of every module.  [default: 2; kohya: 1]"),
    dropout: float = typer.Option(0.0, metavar="X", min=0.0, max=1.0, help="Dropout on the inputs of adapters."),
    save: list[str] = typer.Option([], metavar="MODULE", help="Trained in full, as a fresh classifier; several times."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Write an allocation in the words of another tool, or an adapter padded to one rank."""
    if (to is None) is not padded:
        raise SettingsError("one of --to TOOL and --padded must be given, and not both; see `rankscope export --help`.")
    from rankscope.early import check_adapter, check_file_exists, check_tool

    if to:
        check_tool(to)
        check_file_exists(source, what="an allocation")
    else:
        check_adapter(source)
    from rankscope.cli.adapters import run_export, run_pad

    if padded:
        run_pad(source, out)
    else:
        run_export(source, str(to), out, scaling=scaling, lora_dropout=dropout, modules_to_save=save)


@app.command("shrink", epilog="Example: rankscope shrink out/my/adapter --parameters 1728 --study my.yaml")
@reports_errors
def _shrink(
    adapter: Path = typer.Argument(metavar="ADAPTER", help="A LoRA adapter's folder, as `save_pretrained` writes it."),
    parameters: int = typer.Option(metavar="N", help="The most adapter parameters that are left."),
    study: Path | None = typer.Option(
        None, metavar="STUDY", help="Its task's data weighs what is cut, and its metric is told before and after."
    ),
    rule: str = typer.Option(
        "energy", metavar="energy|threshold|uniform", help="What is cut first; threshold is PARA's rule."
    ),
    batches: int = typer.Option(16, metavar="N", min=1, help="Training batches of the study to weigh by."),
    out: Path | None = typer.Option(None, metavar="DIR", help="The new folder.  [default: ADAPTER-shrunk]"),
    json: bool = typer.Option(False, "--json", help="Print one JSON object instead of a table."),
    allow_code: bool = ALLOW_CODE,
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Cut an adapter that is trained to a parameter budget, where its output loses least; no training."""
    from rankscope.early import check_adapter, check_task_spec
    from rankscope.settings import read_study

    check_adapter(adapter)
    if (settings := None if study is None else read_study(study)) is not None and study is not None:
        check_task_spec(settings.task, settings.base_dir)
        say_code(study, settings, allowed=allow_code)
    from rankscope.cli.adapters import run_shrink

    run_shrink(adapter, parameters, settings, out, rule=rule, n_batches=batches, as_json=json)


@app.command("init", epilog="Example: rankscope init my-study --type chat")
@reports_errors
def _init(
    name: str = typer.Argument(metavar="NAME", help="Of the study; the file is NAME.yaml."),
    kind: str | None = typer.Option(
        None,
        "--type",
        metavar="TYPE",
        help="Of the task, for your model and data: sequence-classification, causal-lm, chat, sequence-to-sequence, "
        "token-classification, image-classification, image-text-to-text; or trainer, your own Trainer.",
    ),
    template: str | None = typer.Option(
        None, metavar="NAME", help="A study that runs as it is: digits (no download), or supersense.  [default: digits]"
    ),
) -> None:
    """Write a commented study file: for your own task with --type, else an example that runs as it is."""
    from rankscope.cli.templates import TYPES, write_study
    from rankscope.files import packaged
    from rankscope.settings import read_study

    if kind and template:
        raise SettingsError("one of --type TYPE and --template NAME may be given, and not both; drop one.")
    if kind and kind not in TYPES:
        raise SettingsError(f"`--type` must be one of {', '.join(TYPES)}, but got {kind!r}.")
    if (template := template or "digits") not in ("digits", "supersense"):
        raise SettingsError(f"`template` must be digits or supersense, but got {template!r}.")
    name = name.removesuffix(".yaml")
    source, path = packaged(f"studies/{template}.yaml"), Path(f"{name}.yaml")
    read_study(source, {"name": name}, origins={"name": "NAME"})  # which checks the name
    if path.exists():
        raise FileError(f"`{path}` must not exist yet, but does; choose another name.")
    text = source.read_text(encoding="utf-8").replace(f"name: {template}\n", "")  # the file's is its name
    path.write_text(write_study(name, kind) if kind else text, encoding="utf-8")
    first = "name your model and data there; then" if kind else "next"
    typer.echo(f"wrote {path}; {first}: rankscope profile {path}")


@app.command("schema", epilog="Example: rankscope schema > study.schema.json")
def _schema() -> None:
    """Print the JSON schema of study files, with which editors complete and check them."""
    from json import dumps

    from rankscope.settings import StudySettings

    typer.echo(dumps(StudySettings.model_json_schema(), indent=2))
