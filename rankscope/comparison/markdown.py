"""A comparison as one Markdown table, a row a method, a column a task; and its place in a README or a model card."""

from __future__ import annotations

import pandas as pd

from rankscope.comparison.comparing import REFERENCE
from rankscope.comparison.table import at_budget, points_over_uniform
from rankscope.exceptions import ComparisonError

BEGIN, END = "<!-- rankscope report: begin -->", "<!-- rankscope report: end -->"


def to_markdown(table: pd.DataFrame) -> str:
    """The table at the study's budget: uniform's metric, and the others' points over it with a 95 % interval.

    Bold: better or worse than uniform by a permutation test with Holm's correction. In italics, and last: methods without a
    budget (full fine-tuning, the head alone). Runs that ended above the budget are not compared. The last column is the mean
    over the studies of the difference over uniform's metric, of methods that every study has, within the budget.

    Args:
        table: What `summarise` makes of the runs, of one study or several.
    """
    table = at_budget(table)
    studies = list(dict.fromkeys(table["study"]))
    unlimited = set(table.loc[table["budget"] == 0, "method"])
    methods = sorted(dict.fromkeys(table["method"]), key=lambda method: method in unlimited)
    cells = {(row["method"], row["study"]): _cell(row) for _, row in table.iterrows()}
    seeds = table.groupby("study", sort=False)["seeds"].first()
    header = ["method", *(f"{study}, {seeds[study]} seeds" for study in studies), "mean relative gain"]
    lines = [_line(header), _line(["---", *["---:"] * (len(studies) + 1)])]
    for method in methods:
        gains = table.loc[(table["method"] == method) & ~table["over_budget"], "relative"]
        mean = f"{100 * gains.mean():+.1f} %" if len(gains) == len(studies) and method != REFERENCE else ""
        name = method.replace("|", r"\|")  # a user's own method is named after its file
        shown = f"*{name}*" if method in unlimited else name
        lines.append(_line([shown, *(cells.get((method, study), "") for study in studies), mean]))
    return "\n".join(lines)


def _cell(row: pd.Series) -> str:
    if row["method"] == REFERENCE:
        return f"{100 * row['test']:.1f} %"
    text = points_over_uniform(row)
    return f"**{text}**" if row["verdict"] in ("better", "worse") else text


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def insert_table(text: str, table: str, *, where: str) -> str:
    r"""The text with the table between its two marker lines, in the place of what was there.

    Args:
        text: Of a README or a model card.
        table: As `to_markdown` makes it.
        where: What to call the text in errors.

    Raises:
        ComparisonError: The text does not hold each marker once, in their order.

    >>> insert_table(f"# Mine\n{BEGIN}\nold\n{END}\n", "new", where="card.md").splitlines()[2]
    'new'
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in after:
        raise ComparisonError(f"`{where}` must hold the lines `{BEGIN}` and `{END}` once each, but does not; add them.")
    line_end = "\r\n" if "\r\n" in before + after else "\n"
    return before + line_end.join([BEGIN, *table.splitlines(), END]) + after
