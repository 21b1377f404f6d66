"""What commands show: progress on stderr, tables or JSON on stdout."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

NARROWEST = 12  # cells of a table's first column, whose texts wrap

stdout = Console(highlight=False, markup=False)  # names and paths may hold brackets
stderr = Console(stderr=True, highlight=False, markup=False)


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress bar on stderr; silent where stderr is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        yield bar


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout: columns after the first are aligned right and keep their width; the title is not wrapped.

    On a terminal too narrow for that, the table is wider than the terminal: no figure is cut.
    """
    widths = [max(cell_len(text) for text in column) for column in zip(header, *rows, strict=True)]
    widths[0] = min(widths[0], NARROWEST)
    needed = sum(widths) + 3 * len(widths) + 1
    table = Table(width=needed if needed > stdout.width else None)
    for index, (name, width) in enumerate(zip(header, widths, strict=True)):
        justify: Literal["left", "right"] = "left" if index == 0 else "right"
        table.add_column(name, justify=justify, no_wrap=index > 0, overflow="fold", min_width=width)
    for row in rows:
        table.add_row(*row)
    stdout.print(title, style="bold", soft_wrap=True)
    stdout.print(table, crop=False)


def print_json(value: Any) -> None:
    """One JSON object on stdout; what is not finite becomes null, since JSON has no word for it."""
    stdout.print_json(json.dumps(_finite(value), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_line(text: str) -> None:
    """A line on stdout, not wrapped."""
    stdout.print(text, soft_wrap=True)


def print_files(paths: Sequence[Any]) -> None:
    """Which files were written."""
    print_line("wrote " + ", ".join(str(path) for path in paths))
