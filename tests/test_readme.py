"""What the README, the Makefile and the page of evidence show is run or exists: examples, commands, figures."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from rankscope.cli import app
from rankscope.comparison import insert_table, read_comparison, summarise, to_markdown
from tests.architectures import build
from tests.cli.terminal import invoke
from tests.tasks.test_chat import chats, save_chat_model
from tests.test_docs import commands

README = Path("README.md").read_text(encoding="utf-8")
EVIDENCE = Path("docs/evidence.md").read_text(encoding="utf-8")
MAKEFILE = Path("Makefile").read_text(encoding="utf-8")
SHORT = {
    "task.model": "path/to/model", "task.data": "path/to/chats.jsonl", "budget.uniform_rank": 1, "profile.n_batches": 2,
    "training.steps": 4, "training.learning_rate": 0.01, "search.n_trials": 3, "search.confirm_fraction": 0.0,
    "compare.methods": ["uniform", "one-shot"], "compare.n_seeds": 1, "compare.n_tuning_seeds": 1, "plan.n_seeds": 2,
    "plan.max_seeds": 2, "plan.n_tuning_seeds": 1, "plan.lowest": 1, "plan.highest": 2, "plan.ceiling": False,
}  # fmt: skip
PLACES = {"STUDY": "my.yaml", "NAME": "another", "DIR": "out/my", "ADAPTER": "out/my/adapter", "N": "200", "URL": "sqlite:///out/my/search.db",
          "ALLOCATION": "out/my/allocation.json", "TOOL": "axolotl"}  # fmt: skip
LAST = ["report", "dashboard", "shrink", "export"]  # what works on other commands' results


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 130


def test_the_python_example_runs() -> None:
    ids = torch.randint(2, 50, (3, 2, 9), generator=torch.Generator().manual_seed(0))
    names: dict = {"model": build("llama"), "batches": [{"input_ids": i, "labels": i} for i in ids]}
    exec(blocks("python")[0], names)
    assert names["allocation"].parameters <= names["budget"].limit
    trained = sum(p.numel() for p in names["peft_model"].parameters() if p.requires_grad)
    assert trained == names["allocation"].parameters


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a user whose model and data are small."""
    save_chat_model(tmp_path / "path/to/model")
    chats(40).to_json(tmp_path / "path/to/chats.jsonl", orient="records", lines=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shorten(path: Path) -> None:
    """Name the small model and data in a study, as its user would, and let it train for a moment."""
    study = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key, value in SHORT.items():
        section, _, name = key.partition(".")
        study.setdefault(section, {})[name] = value
    path.write_text(yaml.safe_dump(study), encoding="utf-8")


def test_every_command_runs_and_the_adapter_loads(folder: Path) -> None:
    """In the README's order, but for those that work on results: last. STUDY, ADAPTER, … are what the first ones wrote."""
    shown = [[PLACES.get(word, word) for word in words] for words in commands(README)]
    shown = [words for words in shown if len(words) > 1 or words == ["schema"]]  # or named only
    assert len({words[0] for words in shown}) >= 12
    shown = [["init", "example"] if words == ["init", "another"] else words for words in shown]  # a name for each
    for words in sorted({tuple(words): None for words in shown}, key=lambda words: words[0] in LAST):
        if words[0] == "dashboard":
            address = opened([*words, "--port", "0"])
            assert address.startswith("http://127.0.0.1:")
        else:
            status, _, errors = invoke(*words)
            assert status == 0, f"rankscope {' '.join(words)}: {errors}"
            if words[:2] == ("init", "my"):
                shorten(folder / "my.yaml")
    names: dict = {}
    exec(blocks("python")[1], names)
    assert {"lora_A" in name for name, _ in names["model"].named_parameters()} == {True, False}


def opened(words: list[str]) -> str:
    """The address that a command tells before it serves there until it is stopped."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "rankscope", *words]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            told = (re.search(r"http://\S+", line) for line in process.stdout)
            return next((match[0] for match in told if match), "")
        finally:
            process.kill()


def test_the_results_are_those_of_the_committed_runs() -> None:
    rows = re.findall(
        r"^\| ([\w-]+), [^|]+ \| ([\d,]+) \| (\d+) \| ([\d.]+) % \| (.*?) \|$", README, flags=re.MULTILINE
    )
    assert 3 <= len(rows) <= 5
    for task, parameters, seeds, uniform, difference in rows:
        found = False
        for folder in (f"studies/results/{task}", f"studies/results/budgets/{task}"):
            if not Path(folder, "comparison.parquet").exists():
                continue
            table = summarise(read_comparison(f"{folder}/comparison.parquet"))
            factors = table.factor[(table.method == "uniform") & (table.parameters == int(parameters.replace(",", "")))]
            for factor in factors:
                at = table[table.factor == factor].set_index("method")
                if "one-shot" not in at.index or at.seeds["one-shot"] != int(seeds):
                    continue
                one = at.loc["one-shot"]
                told = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * one[key] for key in ("difference", "low", "high")))
                found |= (f"{100 * at.test['uniform']:.1f}", told) == (uniform, difference)
        assert found, f"{task} at {parameters} parameters"


def test_the_table_of_evidence_is_that_of_the_committed_runs() -> None:
    """Of the comparisons that the page names, which are all there are."""
    tasks = re.search(r"rankscope report\s+studies/results/\{(.*?)\}", EVIDENCE).group(1).split(",")
    committed = sorted(Path("studies/results").glob("*/comparison.parquet"))
    assert sorted(tasks) == [path.parent.name for path in committed]
    runs = pd.concat(
        [read_comparison(f"studies/results/{task}/comparison.parquet") for task in tasks], ignore_index=True
    )
    assert insert_table(EVIDENCE, to_markdown(summarise(runs)), where="docs/evidence.md") == EVIDENCE


def test_targets_of_make_and_files_exist() -> None:
    shown = re.findall(r"(?:\$ |`)make ([a-z-]+)", README)
    assert {"demo", "test"} <= set(shown) <= set(re.findall(r"^([a-z-]+):", MAKEFILE, flags=re.MULTILINE))
    for words in re.findall(r"\$\(BIN\)/rankscope ([a-z]+)", MAKEFILE):
        assert words in {command.name for command in app.registered_commands}
    files = re.findall(r"\bstudies/[\w/-]+\.(?:yaml|py|json|png)", README + MAKEFILE + EVIDENCE)
    assert files
    assert all(Path(file).exists() for file in files)


def test_what_pip_installs_is_this_package() -> None:
    project = Path("pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r"pip install (\S+)", README) == [re.search(r'name = "(\w+)"', project).group(1), "."]
