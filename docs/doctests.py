"""An extension of griffe: examples in docstrings (`>>> `) are shown as code."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^((?:>>> .*(?:\n(?!\n).*)*)(?:\n\n>>> .*(?:\n(?!\n).*)*)*)", flags=re.MULTILINE)


class Doctests(griffe.Extension):
    """Puts each run of lines that begins with `>>> ` into a fenced block."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change a docstring before it is parsed."""
        if obj.docstring is not None and ">>> " in obj.docstring.value:
            text = EXAMPLE.sub(r"```pycon\n\1\n```", obj.docstring.value)
            obj.docstring.value = re.sub(r"\s*# doctest: \+\w+", "", text)
