"""The options that all commands share, and how errors leave: one line on stderr, status 1 or 2."""

from __future__ import annotations

import functools
import select
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from rankscope.exceptions import RankscopeError, TaskError, TrainingError, one_line
from rankscope.user_code import user_errors

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
    from rankscope.study import given_flags, read_study

    read_study(path, given_flags(overrides))


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
