"""The errors rankscope raises on purpose. Each message is one line: condition, value, remedy."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

F = TypeVar("F", bound=Callable[..., Any])


class RankscopeError(Exception):
    """The root of every error that rankscope raises on purpose."""

    def __init__(self, message: str = "") -> None:
        super().__init__(without_secrets(" ".join(message.splitlines())))  # names and values may hold line breaks


class SettingsError(RankscopeError, ValueError):
    """An option, budget, bound, study or database that cannot work."""


class FileError(RankscopeError, ValueError):
    """A file that is missing, broken, or made from something else."""


class ModelError(RankscopeError, ValueError):
    """A model, adapter, optimizer or profile that cannot be used as asked."""


class TaskError(RankscopeError, ValueError):
    """A task whose model, data or loss cannot be used."""


class TrainingError(RankscopeError, RuntimeError):
    """A training that failed or diverged."""


def shown_url(url: object) -> str:
    """A storage's URL for messages, without its password, also where it cannot be parsed.

    >>> shown_url(" postgresql//me:p@ss/word@host:5432/db"), shown_url("mysql://host/db?user=me&password=a b")
    ('postgresql//me:***@host:5432/db', 'mysql://host/db?user=me&password=***')
    >>> shown_url("postgresql://me:secret"), shown_url("sqlite:///a.db"), shown_url("grpc://host:13000")
    ('postgresql://me:***', 'sqlite:///a.db', 'grpc://host:13000')
    """
    text = str(url).strip()
    if "@" in text:  # a password may hold any sign, also this one
        before, _, after = text.rpartition("@")
        scheme, slashes, login = before.partition("//")
        user, colon, _ = login.partition(":") if slashes else before.partition(":")
        text = f"{scheme if slashes else ''}{slashes}{user}{':***' if colon else ''}@{after}"
    else:
        text = re.sub(r"(//[^/:?]+):(?!\d+([/?,]|$))[^/?]+", r"\1:***", text)
    return re.sub(r"(?is)((?:passw(?:or)?d|passphrase|pwd|secret)\w*=).*", r"\1***", text)


def one_line(error: BaseException, most: int = 300) -> str:
    """Another library's error message on one line; its type where the message is empty."""
    text = without_secrets(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= most else text[:most] + " …"


# Passwords of URLs, up to the last @ of a word; named ones; tokens of the Hugging Face hub.
_SECRETS = (
    (re.compile(r"(\w://[^\s/:@]*):[^\s`'\"]*@"), r"\1:***@"),
    (re.compile(r"\b((?:password|passwd|pwd|secret|token|api_?key)=)[^\s&;,`'\"]+", re.IGNORECASE), r"\1***"),
    (re.compile(r"\bhf_\w{20,}"), "hf_***"),
)


def without_secrets(text: str) -> str:
    """A text with its passwords and tokens as `***`.

    >>> without_secrets("no driver for postgresql://me:pa/ss@host/db?password=x")
    'no driver for postgresql://me:***@host/db?password=***'
    """
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


def did_you_mean(
    wrong: object, known: Iterable[str], otherwise: str, *, cutoff: float = 0.6, quoted: Callable[[str], str] = repr
) -> str:
    """A message's remedy: "did you mean 'x'?" with the known name most like the wrong one; `otherwise` if none is."""
    close = difflib.get_close_matches(str(wrong), list(known), n=1, cutoff=cutoff)
    return f"did you mean {quoted(close[0])}?" if close else otherwise


def shown(value: object, most: int = 80) -> str:
    """A value for a message, shortened. Python refuses to print integers of thousands of digits."""
    if isinstance(value, int) and abs(value) >= 10**18:
        return f"an integer of about {round(value.bit_length() * math.log10(2))} digits"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else repr(value)
    text = without_secrets(text)  # before it is cut
    return text if len(text) <= most else text[:most] + "…"


# --- types of arguments -------------------------------------------------------------------------------------------

_GIVEN_BY = {"TargetModule": "find_targets", "Profile": "read_profile", "RankAllocation": "allocate"}
_NUMBERS: dict[Any, Any] = {int: Integral, float: Real}  # NumPy's included
_type_hints = functools.cache(get_type_hints)


def checked(public: F) -> F:
    """Decorate a function, or a dataclass, so that an argument which is not of its annotated type is a SettingsError."""
    if isinstance(public, type):
        public.__init__ = checked(public.__init__)  # type: ignore[misc]
        return public
    parameters = inspect.signature(public).parameters

    @functools.wraps(public)
    def checking(*args: Any, **kwargs: Any) -> Any:
        hints = _type_hints(public)
        for name, value in {**dict(zip(parameters, args, strict=False)), **kwargs}.items():
            if name in hints and not fits(value, hints[name]):
                hint = parameters[name].annotation
                gives = [f"`rankscope.{giver}` gives it" for kind, giver in _GIVEN_BY.items() if kind in hint]
                remedy = gives[0] if gives else f"see `help(rankscope.{public.__qualname__.removesuffix('.__init__')})`"
                raise SettingsError(f"`{name}` must be {hint}, but got {shown(value)}; {remedy}.")
        return public(*args, **kwargs)

    return checking  # type: ignore[return-value]


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, and its elements are of theirs; a protocol takes anything."""
    if type(value) is hint:
        return True
    kind, parts, held = get_origin(hint) or hint, get_args(hint), value
    if kind in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if kind in _NUMBERS:
        return isinstance(value, _NUMBERS[kind]) and not isinstance(value, bool)
    if kind is Any or not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return True
    if not isinstance(value, kind) or (parts and isinstance(value, str | bytes)):  # a text is no list of letters
        return False
    if kind is Mapping:
        return all(fits(key, parts[0]) and fits(each, parts[1]) for key, each in held.items())
    looked_into = kind in (Iterable, Sequence, tuple) and parts[0] is not Any and not isinstance(value, Iterator)
    return not looked_into or all(fits(each, parts[0]) for each in held)
