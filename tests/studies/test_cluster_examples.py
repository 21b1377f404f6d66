"""The examples for SLURM, Kubernetes and compose: scripts that bash can parse, and commands with options that exist."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.terminal import invoke

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "studies/examples/cluster"


def commands_of(path: Path) -> list[list[str]]:
    """Every command of rankscope in a file, in words."""
    text = re.sub(r"^\s*#.*", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    if path.suffix == ".sbatch":
        found = [shlex.split(line, comments=True) for line in text.splitlines() if "rankscope " in line]
    else:
        found = [words for document in yaml.safe_load_all(path.read_text()) for words in lists_in(document)]
    return [
        words[words.index("rankscope") :] for words in found if "rankscope" in words[:-1]
    ]  # not a user of that name


def lists_in(value: Any) -> Iterator[list[str]]:
    """The lists of words, with the arguments that stand beside a command."""
    if isinstance(value, dict):
        if isinstance(value.get("command"), list):
            yield [word for each in (*value["command"], *value.get("args", [])) for word in shlex.split(each)]
        for each in value.values():
            yield from lists_in(each)
    elif isinstance(value, list):
        for each in value:
            yield from lists_in(each)


@pytest.mark.parametrize("name", ["search.sbatch", "train.sbatch", "compare.sbatch", "compose.yaml", "kubernetes.yaml"])
def test_commands_exist(name: str) -> None:
    found = commands_of(EXAMPLES / name)
    assert found
    for _, command, *words in found:
        status, page, _ = invoke(command, "--help")
        assert status == 0
        for word in words:
            if word.startswith("--"):
                assert word in page, (command, word)
            elif word.endswith(".yaml"):
                assert (ROOT / word).is_file()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.sbatch")), ids=lambda path: path.name)
def test_scripts_can_be_parsed(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
