"""Nothing dangerous is loaded: no source unpickles, evaluates text, or unpacks an archive unchecked."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rankscope.cli.dashboard import HOST
from rankscope.errors import RankscopeError, one_line, shown, without_secrets

ROOT = Path(__file__).parents[1]
SOURCES = [path for folder in ("rankscope", "studies", "data") for path in sorted((ROOT / folder).rglob("*.py"))]
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib.externals.cloudpickle"}
# Calls by the end of their name, and the keyword, with its value, that makes them safe; None: nothing does.
CALLS = {
    "torch.load": ("weights_only", "True"),
    "np.load": ("allow_pickle", "False"),
    "numpy.load": ("allow_pickle", "False"),
    "joblib.load": None,
    "read_pickle": None,
    "yaml.load": ("Loader", "_YamlLoader"),
    "yaml.unsafe_load": None,
    "yaml.full_load": None,
    "extractall": ("filter", "'data'"),
    "extract": ("filter", "'data'"),
    "eval": None,
    "exec": None,
    "os.system": None,
    "os.popen": None,
}


def dangers(source: str) -> Iterator[str]:
    """What a source does that may run code of a file, or write outside a folder."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = {getattr(node, "module", None) or "", *names, *(name.partition(".")[0] for name in names)}
            yield from (f"line {node.lineno}: imports {name}" for name in sorted(modules & PICKLES))
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {each.arg: ast.unparse(each.value) for each in node.keywords}
            if keywords.get("shell") == "True":
                yield f"line {node.lineno}: runs a shell"
            ends = [".".join(name.split(".")[-length:]) for length in (1, 2)]
            for end in (end for end in ends if end in CALLS):
                if end in ("eval", "exec") and "." in name:  # a module's mode, a cursor's query
                    continue
                needed = CALLS[end]
                if needed is None or keywords.get(needed[0]) != needed[1]:
                    yield f"line {node.lineno}: calls {name}({', '.join(sorted(map(str, keywords)))})"


def test_no_source_loads_what_may_run() -> None:
    assert len(SOURCES) > 100
    found = {path.relative_to(ROOT): list(dangers(path.read_text(encoding="utf-8"))) for path in SOURCES}
    assert {str(path): each for path, each in found.items() if each} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import joblib.externals.cloudpickle", "torch.load(f)",
        "torch.load(f, weights_only=False)", "np.load(f)", "np.load(f, allow_pickle=True)", "joblib.load(f)",
        "pd.read_pickle(f)", "yaml.load(f, Loader=yaml.Loader)", "yaml.load(f)", "archive.extractall(p)", "archive.extract(m)",
        "eval(text)", "exec(text)", "subprocess.run(c, shell=True)", "os.system(c)",
    ],
)  # fmt: skip
def test_the_scan_sees_dangers(source: str) -> None:
    assert list(dangers(source))


def test_the_scan_lets_the_safe_forms_pass() -> None:
    safe = "model.eval()\ntorch.load(f, weights_only=True)\nnp.load(f, allow_pickle=False)\narchive.extractall(p, filter='data')"
    assert list(dangers(safe)) == []


def test_the_dashboard_is_on_loopback() -> None:
    assert HOST == "127.0.0.1"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("postgresql+psycopg://me:hush@host:5432/db", "postgresql+psycopg://me:***@host:5432/db"),
        ("mysql://me:hu@sh/hush@host/db", "mysql://me:***@host/db"),
        ("at 'redis://:hush@host' and more", "at 'redis://:***@host' and more"),
        ("postgresql://host/db?user=me&password=hush&ssl=1", "postgresql://host/db?user=me&password=***&ssl=1"),
        ("a token hf_hushhushhushhushhush of mine", "a token hf_*** of mine"),
        ("the pad_token is at 12:30, mail me@host", "the pad_token is at 12:30, mail me@host"),
    ],
)
def test_secrets_are_in_no_message(text: str, kept: str) -> None:
    assert without_secrets(text) == kept
    assert str(RankscopeError(text)) == kept
    assert one_line(ValueError(text)) == kept
    assert shown(text + "x" * 200).startswith(repr(kept)[:20])
    assert "hush" not in shown("x" * 60 + text)


def test_bandit_finds_nothing() -> None:
    command = [sys.executable, "-m", "bandit", "-q", "-c", "pyproject.toml", "-r", "rankscope", "studies", "data"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
