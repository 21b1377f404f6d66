"""Ranks, alphas and names of modules as the fields of a `peft.LoraConfig`, exact for PEFT's matching rules.

PEFT takes regexes in `rank_pattern`, matches `target_modules` by the last parts of a name, and turns a regex `target_modules`
into a list of last parts on mixture-of-experts models. It compiles a pattern at every look-up once there are more than 512, so
there is one pattern for each distinct value, and names that share parts are factored.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any


def alpha_for(rank: int, scaling: float, *, rslora: bool) -> float:
    """The alpha at which PEFT's scaling (alpha / r, or alpha / sqrt(r)) is `scaling`; an int where it is one.

    >>> alpha_for(3, 2.0, rslora=False), alpha_for(4, 0.7, rslora=True)
    (6, 1.4)
    """
    alpha = scaling * (math.sqrt(rank) if rslora else rank)
    return int(alpha) if float(alpha).is_integer() else alpha


def most_common(values: Mapping[str, Any]) -> Any:
    """The most frequent value, which becomes the config's own; among equals the first."""
    return Counter(values.values()).most_common(1)[0][0]


def name_fields(names: Collection[str]) -> dict[str, Any]:
    r"""`target_modules` and `exclude_modules` that adapt exactly the modules of these full names, on every model.

    The last parts of the names select, and a regex excludes all modules but those named: the one form that PEFT leaves as it is
    on mixture-of-experts models, and that matches in linear time.

    >>> name_fields(["h.0.q", "h.1.q"])
    {'target_modules': ['q'], 'exclude_modules': '(?!h\\.(?:0|1)\\.q$).*'}
    """
    last_parts = dict.fromkeys(name.rsplit(".", 1)[-1] for name in names)
    return {"target_modules": list(last_parts), "exclude_modules": f"(?!{names_regex(names)}$).*"}


def value_patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    r"""A `rank_pattern` or `alpha_pattern`: one regex for the names of each value that is not the default.

    >>> value_patterns({"a": 2, "b.c": 8, "d": 2, "b.e": 8}, default=2)
    {'^b\\.(?:c|e)': 8}
    """
    names: dict[Any, list[str]] = {}
    for name, value in values.items():
        if value != default:
            names.setdefault(value, []).append(name)
    return {f"^{names_regex(members)}": value for value, members in names.items()}  # PEFT appends `$`


def names_regex(names: Iterable[str]) -> str:
    r"""A regex that matches these dotted names, and no other, in full; common parts are written once.

    >>> names_regex(["h.0.q", "h.0.k", "h.1.q", "h.1.k", "head"])
    '(?:h\\.(?:0|1)\\.(?:q|k)|head)'
    """
    return _factored([name.split(".") for name in names])


def _factored(paths: Iterable[Sequence[str]]) -> str:
    following: dict[str, list[Sequence[str]]] = {}
    for first, *rest in paths:
        following.setdefault(first, []).append(rest)
    alike: dict[str, list[str]] = {}
    for part, rests in following.items():
        longer = [rest for rest in rests if rest]
        regex = rf"\.{_factored(longer)}" if longer else ""
        if longer and len(longer) < len(rests):
            regex = f"(?:{regex})?"
        alike.setdefault(regex, []).append(re.escape(part))
    return _either([_either(parts) + regex for regex, parts in alike.items()])


def _either(choices: Sequence[str]) -> str:
    return choices[0] if len(choices) == 1 else f"(?:{'|'.join(choices)})"
