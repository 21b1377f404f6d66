"""What the README and the Makefile show is run or exists: the Python example, the study file, the figures, the commands."""

import re
from pathlib import Path

import pandas as pd
import torch

from rankscope.cli import app
from rankscope.comparison import insert_table, read_comparison, summarise, to_markdown
from rankscope.settings import read_study
from tests.architectures import build

README = Path("README.md").read_text(encoding="utf-8")
MAKEFILE = Path("Makefile").read_text(encoding="utf-8")


def block(language: str) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    assert len(found) == 1
    return found[0]


def test_the_python_example_runs() -> None:
    ids = torch.randint(2, 50, (3, 2, 9), generator=torch.Generator().manual_seed(0))
    names: dict = {"model": build("llama"), "batches": [{"input_ids": i, "labels": i} for i in ids]}
    exec(block("python"), names)
    assert names["allocation"].parameters <= names["budget"].limit
    trained = sum(p.numel() for p in names["peft_model"].parameters() if p.requires_grad)
    assert trained == names["allocation"].parameters


def test_the_study_file_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "my-study.yaml"
    path.write_text(block("yaml"))
    assert read_study(path).name == "my-study"


def test_the_table_is_that_of_the_committed_runs() -> None:
    """Of the comparisons that the README names, which are all there are."""
    tasks = re.search(r"rankscope report\s+studies/results/\{(.*?)\}", README).group(1).split(",")
    committed = sorted(Path("studies/results").glob("*/comparison.parquet"))
    assert sorted(tasks) == [path.parent.name for path in committed]
    runs = pd.concat(
        [read_comparison(f"studies/results/{task}/comparison.parquet") for task in tasks], ignore_index=True
    )
    assert insert_table(README, to_markdown(summarise(runs)), where="README.md") == README


def test_commands_and_files_exist() -> None:
    commands = re.findall(r"(?:\$ |`|\$\(BIN\)/)rankscope ([a-z]+)", README + MAKEFILE)
    assert {"profile", "search", "compare"} <= set(commands) <= {command.name for command in app.registered_commands}
    files = re.findall(r"\bstudies/[\w/-]+\.(?:yaml|py|json|png)", README + MAKEFILE)
    assert files
    assert all(Path(file).exists() for file in files)
