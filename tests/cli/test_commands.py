"""Every command on the real digits task, with few steps: files, tables, JSON, and one line for bad input."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import yaml

import rankscope as rs
from rankscope.cli import what_is_kept
from rankscope.cli.commands import _write_study
from rankscope.comparison.summary import BEGIN, END
from rankscope.settings import read_study
from tests.cli.terminal import invoke, invoke_code

STUDY = """
task: digits-shift
budget: {uniform_rank: 1}
profile: {head_steps: 5}
training: {steps: 4, learning_rate: 0.01}
search: {n_trials: 9, confirm_fraction: 0.67}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    (folder / "short.yaml").write_text(STUDY)
    return folder


def test_the_whole_path(folder: Path) -> None:
    study, out = folder / "short.yaml", folder / "out"
    status, text, _ = invoke("profile", study, "--out", out)
    assert status == 0
    assert "36 modules, 7 batches" in text
    assert len(pd.read_parquet(out / "profile.parquet")) == 36

    status, text, _ = invoke("allocate", study, "--out", out, "--json")
    assert status == 0
    printed = json.loads(text)
    one_shot = rs.RankAllocation.from_json(out / "allocation.json")
    assert printed["ranks"] == dict(one_shot.ranks)
    assert (printed["strategy"], printed["budget"]) == ("one-shot", 6_912)

    status, text, _ = invoke("search", study, "--out", out)
    assert status == 0
    assert "to uniform" in text
    assert "performance model: no proposal yet; it needs 8 trials whose metrics differ" in text
    assert "3 trials; finalists on 2 fresh seeds, 95 % intervals; * recommended" in " ".join(text.split())
    assert "cost: 3 trials, 6 confirming runs, 36 steps" in text
    status, text, _ = invoke("search", study, "--out", out, "--json")
    assert status == 0
    found = json.loads(text)
    assert (found["confirming_runs"], found["steps"], found["unconfirmed"]) == (6, 36, None)
    assert [set(finalist["confirmed"]) for finalist in found["finalists"]] == [{"500", "501"}] * 3
    assert [finalist["interval"] for finalist in found["finalists"]] == [None] * 3  # of two seeds there is none
    assert (
        found["reason"].startswith(f"{found['recommended']['origin']} is recommended: ") or "trial 2" in found["reason"]
    )
    assert (found["front"], [finalist["posterior"] for finalist in found["finalists"]]) == (None, [None] * 3)
    assert len(pd.read_parquet(out / "trials.parquet")) == 3

    status, text, _ = invoke(
        "train", study, "--out", out, "--allocation", out / "allocation.json", "--baseline", "--json"
    )
    assert status == 0
    assert json.loads(text)["metric"] == "accuracy"
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    card = (out / "adapter" / "README.md").read_text()
    assert (
        "4 steps at learning rate 0.01. The study's budget is 6,912 adapter parameters. This adapter is of seed 1000"
        in card
    )
    for run in json.loads(text)["runs"]:
        validation, test = (f"{100 * run[split][0]:.1f} %" for split in ("validation", "test"))
        assert f"| {run['strategy']} | {run['parameters']:,} | 1 | {validation} | {test} |" in card
    assert {path.name for path in out.iterdir()} == {
        "profile.parquet", "energy.png", "spectra.png", "allocation.json", "adapter_config.json", "ranks.png", "search.db",
        "trials.parquet", "adapter", "artifacts",
    }  # fmt: skip


def test_a_controller_moves_ranks_while_it_trains(folder: Path) -> None:
    """From uniform; `auto` leaves what a profile has placed. Static runs come along as baselines, and the search screens."""
    study, out = folder / "moving.yaml", folder / "moving"
    study.write_text(STUDY.replace("steps: 4", "steps: 14") + "controller: {hysteresis: 0.0, freeze_fraction: 0.9}\n")
    assert invoke("allocate", study, "--out", out, "--strategy", "uniform")[0] == 0
    status, text, errors = invoke("train", study, "--out", out, "--controller", "auto", "--baseline", "--json")
    assert status == 0
    assert "controller on: the ranks of `uniform` rest on no gradient yet" in errors
    found = json.loads(text)
    assert [run["strategy"] for run in found["runs"]] == ["uniform", "controller from uniform"]
    assert all(run["parameters"] <= 6_912 for run in found["runs"])
    decisions = pd.read_parquet(out / "decisions.parquet")
    assert decisions["step"].tolist() == [3, 6, 9, 12]
    assert "moved" in set(decisions["action"])
    assert {"trajectories.png", "flow.png"} < {path.name for path in out.iterdir()}

    assert invoke("allocate", study, "--out", out)[0] == 0
    status, text, errors = invoke("train", study, "--out", out, "--controller", "auto")
    assert status == 0
    assert "controller off: the ranks of `one-shot` rest on gradients already" in errors
    assert "controller from" not in text
    assert not {"decisions.parquet", "trajectories.png", "flow.png"} & {path.name for path in out.iterdir()}


def test_budget_plans_and_writes_a_study(folder: Path) -> None:
    study, out = folder / "planned.yaml", folder / "planned"
    plan = (
        "n_seeds: 3, max_seeds: 3, n_tuning_seeds: 1, lowest: 0.25, highest: 4, step: 16, margin: 0.9, ceiling: false"
    )
    study.write_text(STUDY + f"plan: {{{plan}}}\n")
    status, text, errors = invoke("budget", study, "--out", out)
    assert (status, errors.splitlines()) == (0, [f"no profile in {out} yet: taking one"])
    assert "planned: accuracy by parameters, with 95 % intervals" in text
    assert re.search(r"^enough: +one-shot at 1,728 parameters: [+-]", text, flags=re.MULTILINE)
    assert re.search(r"^capacity: +does not limit the task: ", text, flags=re.MULTILINE)
    assert re.search(r"^saved: +nothing on this grid: uniform needs no more$", text, flags=re.MULTILINE)
    assert "below:     it is the least budget of the grid" in text
    assert (out / "budget.png").stat().st_size > 10_000
    found = json.loads((out / "plan.json").read_text())
    assert (found["budget"], found["margin"]) == (1728, 0.9)
    recommended = read_study(out / "recommended.yaml")
    assert (recommended.name, recommended.budget.parameters) == ("planned-1728", 1728)
    assert recommended.training == read_study(study).training

    kept = {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    status, text, _ = invoke("budget", study, "--out", out, "--json")
    assert (status, json.loads(text)["budget"]) == (0, 1728)
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()} == kept
    status, _, errors = invoke("budget", study, "--out", out, "--margin", "0.0001")
    assert status == 2
    assert re.fullmatch(
        r"rankscope: `margin` must be at least [\d.]+, the noise of 3 seeds, but got 0\.0001; .*\n", errors
    )


def test_a_recommended_study_names_the_same_files_and_folders(tmp_path: Path) -> None:
    for folder in ("model", "images", "sentiment"):
        (tmp_path / folder).mkdir()
    (tmp_path / "rows.parquet").touch()
    (tmp_path / "mine.py").touch()
    study = tmp_path / "study.yaml"
    study.write_text("""
name: sentiment
task: {type: image-text-to-text, model: model, data: rows.parquet, image_folder: images}
budget: {uniform_rank: 1}
compare: {methods: ["mine.py:place", one-shot]}
""")
    out = tmp_path / "out" / "deep"
    out.mkdir(parents=True)
    session: Any = SimpleNamespace(study=read_study(study), out=out, arguments=str(study))
    values = yaml.safe_load(_write_study(session, 640).read_text())
    task = {
        "type": "image-text-to-text",
        "model": "../../model",
        "data": "../../rows.parquet",
        "image_folder": "../../images",
    }
    assert values["task"] == task
    assert (values["name"], values["compare"]["methods"]) == ("sentiment-640", ["../../mine.py:place", "one-shot"])
    absolute = f"task: {{type: causal-lm, model: {tmp_path / 'model'}, data: {tmp_path / 'rows.parquet'}}}"
    study.write_text(f"name: a\n{absolute}\nbudget: {{uniform_rank: 1}}\n")
    session.study = read_study(study)
    assert yaml.safe_load(_write_study(session, 640).read_text())["task"]["model"] == str(tmp_path / "model")


def test_a_strategy_in_a_file_and_an_older_profile(folder: Path, tmp_path: Path) -> None:
    """A profile made before a setting came stays good; equal ranks are told in words."""
    study, out = tmp_path / "own.yaml", tmp_path / "out"
    study.write_text(STUDY + "allocation: {strategy: 'own.py:even'}\n")
    (tmp_path / "own.py").write_text("def even(request):\n    return {t.name: t.rank_cost for t in request.targets}\n")
    assert invoke_code("profile", study, "--out", out)[0] == 0
    profile = rs.read_profile(out / "profile.parquet")
    made_from = profile.metadata["made_from"]
    older = {key: value for key, value in made_from["profile"].items() if key != "max_skipped"}
    metadata = {**profile.metadata, "made_from": {**made_from, "profile": older}}
    rs.Profile(profile.table, metadata).to_parquet(out / "profile.parquet")
    status, text, errors = invoke_code("allocate", study, "--out", out)
    assert (status, errors) == (0, "")
    assert "even gives every module the rank that uniform gives it" in text
    assert "uniform │" not in text
    assert invoke_code("train", study, "--out", out)[0] == 0
    (tmp_path / "own.py").write_text("def even(request):\n    return {t.name: 1 for t in request.targets}\n")
    status, _, errors = invoke_code("train", study, "--out", out)
    assert status == 2
    assert errors.startswith(f"rankscope: `{out}/allocation.json` must be about the present strategy's code (")


def test_compare_resumes_and_reports(folder: Path) -> None:
    study, out = folder / "compared.yaml", folder / "compared"
    study.write_text(STUDY + "compare: {methods: [one-shot, head], n_seeds: 3, n_tuning_seeds: 1}\n")
    status, text, errors = invoke("compare", study, "--out", out, "--set", "compare.uniform_budgets=2")
    assert (status, errors.splitlines()) == (0, [f"no profile in {out} yet: taking one"])
    assert "compared, digits-shift: 3 seeds, points over uniform" in text
    assert "digits-shift: uniform by parameters" in text
    runs = pd.read_parquet(out / "comparison.parquet")
    assert runs.groupby("method", sort=False).size().to_dict() == {"uniform": 6, "one-shot": 3, "head": 3}
    assert "data:image/png" in (out / "report.html").read_text()
    kept = {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    assert len(kept) == 12

    status, text, _ = invoke("compare", study, "--out", out, "--methods", "one-shot", "--json")
    assert status == 0
    assert [row["method"] for row in json.loads(text)["methods"]] == ["uniform", "one-shot"]
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()} == kept

    status, text, _ = invoke("report", out)
    assert status == 0
    assert "report.html" in text
    at_budget = runs[runs["factor"] == 1.0]
    pd.concat([at_budget, at_budget.assign(factor=2.0)]).assign(schema=2).to_parquet(folder / "comparison.parquet")
    status, text, _ = invoke("report", folder, "--out", folder / "twice")
    assert status == 0
    assert "digits-shift, 2 x the budget: 3 seeds, points over uniform" in text
    at_budget[at_budget["method"] == "uniform"].assign(schema=2).to_parquet(folder / "comparison.parquet")
    status, text, _ = invoke("report", folder, "--out", folder / "alone")
    assert status == 0
    assert "digits-shift: uniform by parameters" in text
    card = folder / "card.md"
    card.write_text("# Model card\n")
    status, _, errors = invoke("report", out, "--into", card)
    assert (status, errors) == (
        2,
        f"rankscope: `{card}` must hold the lines `{BEGIN}` and `{END}` once each, but does not; add them.\n",
    )
    card.write_text(f"# Model card\n\n{BEGIN}\n{END}\nThe end.\n")
    for _ in range(2):
        assert invoke("report", out, "--into", card)[0] == 0
    lines = card.read_text().splitlines()
    assert (lines[:3], lines[-2:]) == (["# Model card", "", BEGIN], [END, "The end."])
    assert lines[3] == "| method | compared, 3 seeds | mean relative gain |"
    assert [line.split(" | ")[0] for line in lines[5:-2]] == ["| uniform", "| one-shot"]
    status, _, errors = invoke("compare", study, "--out", out, "--methods", "searched")
    assert (status, errors) == (
        2,
        f"rankscope: `searched` needs a search in {out}, but there is none; run `rankscope search {study} --out {out}` first.\n",
    )
    status, _, errors = invoke("report", out, out)
    assert status == 2
    assert errors == "rankscope: `--out` must say where the report of several folders goes, but is not given; add it.\n"


EDITED = """
name: edited
task: task.py:make
budget: {uniform_rank: 1}
profile: {head_steps: 1}
training: {steps: 2, learning_rate: 0.01}
search: {n_trials: 2, confirm_fraction: 0}
compare: {methods: [one-shot], n_seeds: 1, n_tuning_seeds: 1}
"""
TASK = """
from pathlib import Path
import torch
from rankscope.tasks import DigitsShift

class Noisy(DigitsShift):
    def train_batches(self, seed):
        noise = float((Path(__file__).parent / "noise.txt").read_text())
        for batch in super().train_batches(seed):
            yield batch | {"pixel_values": batch["pixel_values"] + noise}

def make():
    return Noisy(batch_size=100)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of a user's own task that was profiled, searched and compared."""
    folder = tmp_path_factory.mktemp("edited")
    for name, text in (("edited.yaml", EDITED), ("task.py", TASK), ("noise.txt", "0")):
        (folder / name).write_text(text)
    for command in ("search", "compare"):
        assert invoke_code(command, folder / "edited.yaml", "--out", folder / "out")[0] == 0
    return folder


@pytest.mark.parametrize(
    ("file", "old", "new", "stale"),
    [
        ("edited.yaml", "steps: 1}", "steps: 2}",
         {"allocate": "`{out}/profile.parquet` must be about profile head_steps 2, but is about 1; run `rankscope profile {study} --out {out}` again, or use another --out.",
          "train": "`{out}/allocation.json` must be about the present profile"}),
        ("edited.yaml", "edited\n", "edited\ntargets: [q_proj]\n", {"allocate": "`{out}/profile.parquet` must be about the present targets",
         "search": "`{out}/profile.parquet` must be about the present targets", "train": "`{out}/allocation.json` must be about the present targets",
         "compare": "`{out}/profile.parquet` must be about the present targets"}),
        ("edited.yaml", "rank: 1", "rank: 2", {"search": "study `edited` must be about budget 13824, but its trials are about 6912; use another study name or storage.",
         "train": "`{out}/allocation.json` must be about budget 13824, but is about 6912;"}),
        ("edited.yaml", "steps: 2,", "steps: 3,", {"search": "study `edited` must be about training steps 3, but its trials are about 2; use another study name or storage.",
         "train": "`{out}/allocation.json` must be about training steps 3, but is about 2;"}),
        ("edited.yaml", "edited\n", "edited\nseed: 1\n", {"allocate": "`{out}/profile.parquet` must be about seed 1, but is about 0;",
         "train": "`{out}/allocation.json` must be about seed 1, but is about 0;"}),
        ("task.py", "=100", "=50", {"search": "`{out}/profile.parquet` must be about task batch_size 50, but is about 100;"}),
        ("task.py", "+ noise", "- noise", {"search": "`{out}/profile.parquet` must be about the present code"}),
        ("noise.txt", "0", "0.5", {"allocate": "`{out}/profile.parquet` must be about the present data",
         "train": "`{out}/allocation.json` must be about the present data"}),
    ],
)  # fmt: skip
def test_nothing_is_reused_after_an_edit(made: Path, file: str, old: str, new: str, stale: dict[str, str]) -> None:
    study, out, path = made / "edited.yaml", made / "out", made / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    kept = {each: each.stat().st_mtime_ns for each in out.rglob("*.*") if each.suffix in (".json", ".parquet")}
    try:
        for command, message in stale.items():
            status, stdout, stderr = invoke_code(
                command, study, "--out", out, *(["--force"] if command == "allocate" else [])
            )
            assert (status, stdout, stderr.count("\n")) == (2, "", 1)
            assert stderr.startswith("rankscope: " + message.format(out=out, study=study))
    finally:
        path.write_text(text)
    assert {each: each.stat().st_mtime_ns for each in kept} == kept


def test_what_is_the_same_is_reused(made: Path) -> None:
    """More trials and more seeds go on; a flag of an earlier command does not make its result stale."""
    study, out = made / "edited.yaml", made / "out"
    runs = {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    assert invoke_code("compare", study, "--out", out, "--seeds", 2)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in runs} == runs
    assert len(list((out / "runs").iterdir())) == 2 * len(runs)
    status, text, _ = invoke_code("search", study, "--out", out, "--trials", 3, "--json")
    assert (status, json.loads(text)["trials"]) == (0, 3)

    status, _, stderr = invoke_code("allocate", study, "--out", out)
    assert (status, stderr) == (
        2,
        f"rankscope: `{out}/allocation.json` holds what a search recommended, which `allocate` would replace; pass --force, or use "
        "another --out.\n",
    )
    assert invoke_code("allocate", study, "--out", out, "--force", "--uniform-rank", 2)[0] == 0
    status, _, stderr = invoke_code("train", study, "--out", out, "--baseline")
    assert (status, stderr) == (
        2,
        "rankscope: `--baseline` must compare at equal parameters, but `one-shot` has 13,824 and uniform at the study's budget "
        "6,912; pass --parameters 13824, or leave out --baseline.\n",
    )
    status, text, stderr = invoke_code("train", study, "--out", out, "--json")
    assert (status, json.loads(text)["runs"][0]["parameters"], json.loads(text)["study"]) == (0, 13_824, "edited")
    assert "the allocation has 13,824 parameters, above the study's budget of 6,912: all are trained\n" in stderr
    card = (out / "adapter" / "README.md").read_text()
    assert "budget is 6,912 adapter parameters; the allocation was made for a larger one." in card

    status, text, stderr = invoke_code("train", study, "--out", out, "--uniform-rank", 2, "--baseline", "--json")
    assert (status, "above the study's budget" in stderr) == (0, False)
    assert [run["parameters"] for run in json.loads(text)["runs"]] == [13_824, 13_824]
    status, _, stderr = invoke_code("train", study, "--out", out, "--uniform-rank", 3)
    assert (status, stderr) == (
        2,
        f"rankscope: `{out}/allocation.json` must be for the budget that is given, 20,736 parameters, but was made for 13,824; "
        "run `rankscope allocate` with that budget first.\n",
    )


def test_one_seed_is_reported_without_an_interval(made: Path) -> None:
    out = made / "out"
    status, text, _ = invoke_code("compare", made / "edited.yaml", "--out", out, "--seeds", 1)
    assert status == 0
    assert "edited, digits-shift: 1 seed, points over uniform\n" in text
    assert re.search(r"one-shot .* [+-]\d+\.\d \[-\] .* too few seeds", text)
    assert "<td>-</td>" in (out / "report.html").read_text()
    status, text, _ = invoke("report", out, "--json")
    row = json.loads(text)["methods"][1]
    assert (row["low"], row["high"], row["p"], row["verdict"]) == (None, None, None, "too few seeds")
    status, _, stderr = invoke_code("compare", made / "edited.yaml", "--out", out, "--set", "compare.budgets=0.25")
    assert (status, stderr) == (
        2,
        "rankscope: `budgets` must hold the factor 1, the study's own budget; add it, or change `budget`.\n",
    )


def test_studies_of_one_name_are_told_apart_by_their_folders(made: Path) -> None:
    out, copy = made / "out", made / "copy"
    shutil.copytree(out, copy)
    status, text, _ = invoke("report", out, copy, "--out", made / "both", "--json")
    assert status == 0
    assert {row["study"] for row in json.loads(text)["methods"]} == {f"edited ({out})", f"edited ({copy})"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "`--into` must name a text file, but there is no {card}; check the path."),
        (b"\xff\xfe\x00", "`--into` must name a text file, but {card} cannot be read: it holds no UTF-8."),
        (b"# Card", f"`{{card}}` must hold the lines `{BEGIN}` and `{END}` once each, but does not; add them."),
    ],
)
def test_a_card_without_its_place_is_refused_before_anything_is_written(
    made: Path, content: bytes | None, message: str, tmp_path: Path
) -> None:
    card = tmp_path / "card.md"
    if content is not None:
        card.write_bytes(content)
    status, _, stderr = invoke("report", made / "out", "--out", tmp_path / "new", "--into", card)
    assert (status, stderr) == (2, f"rankscope: {message.format(card=card)}\n")
    assert not (tmp_path / "new").exists()
    assert (card.read_bytes() if card.exists() else None) == content


@pytest.mark.parametrize("command", ["profile", "allocate", "search", "train", "compare"])
def test_where_nothing_can_be_written_nothing_is_begun(command: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    status, stdout, stderr = invoke(command, folder / "short.yaml", "--out", tmp_path / "file" / "deep")
    assert (status, stdout) == (2, "")
    assert (
        stderr
        == f"rankscope: `--out` must be a folder that can be written to, but `{tmp_path}/file` is not; choose another.\n"
    )
    assert (tmp_path / "file").read_text() == "mine"


def test_a_profile_of_another_version_only_costs_the_pictures_of_ranks(made: Path, tmp_path: Path) -> None:
    shutil.copy(made / "out" / "comparison.parquet", tmp_path)
    profile = rs.read_profile(made / "out" / "profile.parquet")
    rs.Profile(profile.table, {**profile.metadata, "schema": 3}).to_parquet(tmp_path / "profile.parquet")
    status, _, errors = invoke("report", tmp_path)
    assert (status, (tmp_path / "ranks.png").exists()) == (0, False)
    assert errors.startswith(
        f"no pictures of ranks: `{tmp_path}/profile.parquet` must have profile schema 4, but has 3"
    )
    rs.Profile(profile.table.iloc[:-1], profile.metadata).to_parquet(tmp_path / "profile.parquet")
    status, _, errors = invoke("report", tmp_path)
    assert (status, errors.startswith("no pictures of ranks")) == (0, True)


def test_line_ends_of_a_card_are_kept(made: Path, tmp_path: Path) -> None:
    card = tmp_path / "card.md"
    card.write_bytes(f"# Card\r\n{BEGIN}\r\n{END}\r\nend\r\n".encode())
    assert invoke("report", made / "out", "--out", tmp_path, "--into", card)[0] == 0
    assert b"\n" not in card.read_bytes().replace(b"\r\n", b"")


def test_adapter_loads_in_plain_peft_and_config_has_the_ranks(folder: Path) -> None:
    out = folder / "plain"
    assert invoke("allocate", folder / "short.yaml", "--out", out, "--uniform-rank", 2)[0] == 0
    code = f"""
import json, sys, torch
from peft import LoraConfig, get_peft_model
from transformers import ViTForImageClassification
config = LoraConfig.from_pretrained({str(out)!r})
model = get_peft_model(ViTForImageClassification.from_pretrained("data/digits_vit", num_labels=5), config)
ranks = {{n: m.r["default"] for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}}
count = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
assert "rankscope" not in sys.modules
print(json.dumps([ranks, count]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ranks, count = json.loads(done.stdout.splitlines()[-1])
    allocation = rs.RankAllocation.from_json(out / "allocation.json")
    assert ranks == {name: rank for name, rank in allocation.ranks.items() if rank}
    assert count == allocation.parameters <= 2 * 6_912


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        (["allocate", "--parameters", "100"], STUDY,
         "`budget` must cover one rank of the cheapest target module (128 parameters), but got 100; raise it."),
        (["allocate", "--set", "allocation.min_rank=2"], STUDY,
         "`budget` must cover rank 2 on all 36 target modules (13,824 parameters), but got 6,912; "
         "drop targets, allow rank 0, or raise it."),
        (["profile", "--set", "allocation.min_rank=2"], STUDY,
         "`budget` must cover rank 2 on all 36 target modules (13,824 parameters), but got 6,912; "
         "drop targets, allow rank 0, or raise it."),
        (["allocate", "--set", "allocation.max_rank=null"], STUDY,
         "`--set` must give `allocation.max_rank` a value, but got 'allocation.max_rank=null'; for its default, leave the key out."),
        (["allocate", "--strategy", "oneshot"], STUDY,
         "`strategy` must be one of uniform, random, gradient-norm, sensitivity, activation, one-shot, but got 'oneshot'; did you mean 'one-shot'?"),
        (["profile"], STUDY.replace("task: digits-shift", "task: digits-shift\ntargets: [q_prj]"),
         "`selection` must match modules of the model, but 'q_prj' matches none; did you mean 'q_proj', 'v_proj', 'o_proj'."),
        (["profile"], STUDY.replace("digits-shift", "digit-shift"),
         "`task` must be one of digits-shift, dinov2-digits, supersense, sentiment, word-order, glosses, emoji-scenes, digit-scenes, but got 'digit-shift'; did you mean 'digits-shift'?"),
        (["train"], STUDY,
         "`{out}/allocation.json` must hold an allocation, but there is no such file; "
         "run `rankscope allocate {study} --out {out}` or `rankscope search {study} --out {out}` first."),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_status_2(arguments: list[str], text: str, message: str, tmp_path: Path) -> None:
    study, out = tmp_path / "bad.yaml", tmp_path / "out"
    study.write_text(text)
    status, stdout, stderr = invoke(arguments[0], study, "--out", out, *arguments[1:])
    lines = [line for line in stderr.splitlines() if "no profile in" not in line]
    assert status == 2
    assert lines == [f"rankscope: {message.format(out=out, study=study)}"]
    assert stdout == ""
    assert not list(out.glob("*alloc*"))


def test_truncated_profile_and_study_of_another_task(folder: Path, tmp_path: Path) -> None:
    study = folder / "short.yaml"
    (tmp_path / "profile.parquet").write_bytes(b"PAR1 and then nothing")
    status, _, stderr = invoke("allocate", study, "--out", tmp_path)
    assert status == 2
    assert re.fullmatch(
        r"rankscope: `.*profile\.parquet` must hold a profile as Parquet, but it cannot be parsed .*\n", stderr
    )

    out = tmp_path / "other"
    assert invoke("search", study, "--out", out, "--trials", 1)[0] == 0
    status, _, stderr = invoke("search", study, "--out", out, "--trials", 1, "--uniform-rank", 2)
    assert status == 2
    assert stderr == (
        "rankscope: study `short` must be about budget 13824, but its trials are about 6912; "
        "use another study name or storage.\n"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--set", "search.fidelity=0.5"],
         "study `short` must be about trial_steps 2, but its trials are about 4; use another study name or storage."),
        (["--set", "search.pruner=median"],
         "`evaluate_every` must be below the 4 steps of a trial, for a pruner to judge by, but is None; lower it, or prune nothing."),
        (["--set", "search.confirm_fraction=1.0"], "`--set`: `search.confirm_fraction`: input should be less than 1, but got 1.0."),
        (["--set", "search.pruner=best"],
         "`--set`: `search.pruner`: input should be 'none', 'median' or 'hyperband', but got 'best'."),
    ],
)  # fmt: skip
def test_bad_input_of_a_search(flags: list[str], message: str, folder: Path) -> None:
    study, out = folder / "short.yaml", folder / "again"
    assert invoke("search", study, "--out", out, "--trials", 1)[0] == 0
    status, stdout, stderr = invoke("search", study, "--out", out, "--trials", 1, *flags)
    assert (status, stdout, stderr) == (2, "", f"rankscope: {message.format(study=study)}\n")


def test_a_search_too_short_to_confirm_says_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    status, text, _ = invoke("search", folder / "short.yaml", "--out", folder / "brief", "--trials", 2)
    assert status == 0
    assert "2 trials; validation split, nothing confirmed; * recommended" in " ".join(text.split())
    assert "is recommended: these are too few trainings to tell proposals from it" in text
    assert "posterior" not in text  # a column that would be empty
    assert (
        "nothing is confirmed: 0 trainings are left, too few to confirm 2 finalists on a fresh seed each; "
        "raise `n_trials` to 9, or to 23 for the three seeds that an interval needs."
    ) in caplog.messages


@pytest.mark.parametrize("given", ["plan.ceiling=false", "compare.budgets=[]", "seed=0"])
def test_set_holds_whatever_the_value(given: str) -> None:
    """Also one that a flag has where it is not given: here it is told to be given twice."""
    status, _, errors = invoke("budget", "studies/digits.yaml", "--set", given, "--set", given)
    key = given.partition("=")[0]
    assert (status, errors) == (2, f"rankscope: `{key}` must be given once, but is by --set and --set; drop one.\n")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    status, _, errors = invoke("profile", tmp_path / "none.yaml", "--debug")
    assert status == 2
    first, *_, last = errors.splitlines()
    assert first == "Traceback (most recent call last):"
    assert last.startswith(f"rankscope: `{tmp_path / 'none.yaml'}` must hold a study, but")


@pytest.mark.parametrize("name", ["profile", "allocate", "search", "train", "compare", "report", "dashboard"])
def test_help_has_an_example_and_version_prints(name: str) -> None:
    status, text, _ = invoke(name, "--help")
    assert status == 0
    argument = "out/my" if name == "report" else "my.yaml"
    assert f"Example: rankscope {name} {argument}" in " ".join(text.split())
    assert invoke("--help")[1].partition("Commands:\n")[2].split()[0] == "init"
    assert invoke("--version")[1] == f"rankscope {rs.__version__}\n"
    assert invoke(name)[0] == 2


INTERRUPTED = """
import signal
from rankscope.tasks import DigitsShift

class Interrupted(DigitsShift):
    profiled = 0

    def loss(self, model, batch):
        if not model.classifier.weight.requires_grad:  # the head is trained: batches are profiled now
            self.profiled += 1
            if self.profiled == 3:
                signal.raise_signal(signal.SIGINT)
        return super().loss(model, batch)

def make():
    return Interrupted()
"""


@pytest.mark.parametrize("keep", [True, False])
def test_ctrl_c_is_heard_while_the_head_is_warmed(tmp_path: Path, keep: bool) -> None:
    """Nothing has been profiled then, which is said."""
    early = INTERRUPTED.replace(
        "if not model.classifier.weight.requires_grad:", "if model.classifier.weight.requires_grad:"
    )
    early = early.replace("return super", "assert self.profiled < 5, 'not heard'\n        return super")
    (tmp_path / "task.py").write_text(early)
    study = STUDY.replace("digits-shift", "task.py:make").replace("head_steps: 5", "head_steps: 500")
    (tmp_path / "short.yaml").write_text(study)
    flags = ["--keep-partial"] if keep else []
    status, text, errors = invoke_code("profile", tmp_path / "short.yaml", "--out", tmp_path / "out", *flags)
    kept = f"rankscope: interrupted; nothing was written to {tmp_path / 'out'}.\n"
    assert (status, text, errors) == (130, "", kept)


def test_ctrl_c_says_what_is_kept(tmp_path: Path) -> None:
    (tmp_path / "old.txt").touch()
    os.utime(tmp_path / "old.txt", (1, 1))
    since = time.time()
    assert what_is_kept(tmp_path, since) == f"nothing was written to {tmp_path}"
    assert what_is_kept(tmp_path / "none", since) == f"nothing was written to {tmp_path / 'none'}"
    (tmp_path / "runs").mkdir()
    for name in ("profile.parquet", "runs/a.json", "runs/b.json", ".half/new"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    kept = f"kept in {tmp_path}: profile.parquet, runs/ (2 files)"
    assert what_is_kept(tmp_path, since) == kept
    assert what_is_kept(tmp_path, since, resumes=True) == f"{kept}; the same command goes on from there"
    stored = (
        "nothing was written to none; trials that ended are in the study's storage; the same command goes on from there"
    )
    assert what_is_kept(Path("none"), since, resumes=True, elsewhere=True) == stored


@pytest.mark.parametrize("keep", [True, False])
def test_ctrl_c_keeps_the_profile_of_the_batches_so_far_if_asked(tmp_path: Path, keep: bool) -> None:
    (tmp_path / "task.py").write_text(INTERRUPTED)
    (tmp_path / "short.yaml").write_text(STUDY.replace("digits-shift", "task.py:make"))
    status, text, _ = invoke_code(
        "profile", tmp_path / "short.yaml", "--out", tmp_path / "out", *(["--keep-partial"] if keep else [])
    )
    assert (status == 0) == keep
    assert (tmp_path / "out" / "profile.parquet").exists() == keep
    if keep:
        assert "interrupted: the profile holds the 3 batches before" in text


CODE = "def even(request):\n    return {t.name: t.rank_cost for t in request.targets}\n"


def test_code_of_a_study_from_elsewhere_runs_only_if_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said before it runs; what the command line names, the user has named."""
    inside, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for place in (inside, elsewhere):
        place.mkdir()
        (place / "own.py").write_text(f"from pathlib import Path\nPath({str(place / 'ran')!r}).touch()\n{CODE}")
        (place / "own.yaml").write_text(STUDY + "allocation: {strategy: 'own.py:even'}\n")
    monkeypatch.chdir(inside)
    status, text, errors = invoke("allocate", elsewhere / "own.yaml")
    assert (status, text) == (2, "")
    assert errors == (
        f"rankscope: `{elsewhere}/own.yaml` must lie in the working directory to run code, but names own.py:even "
        "(allocation.strategy) and lies elsewhere; read that code, then pass --allow-code.\n"
    )
    assert not (elsewhere / "ran").exists()
    link = inside / "link.yaml"
    link.symlink_to(elsewhere / "own.yaml")
    assert invoke("allocate", link)[0] == 2
    status, _, errors = invoke("profile", "own.yaml")
    assert (status, errors) == (0, "`own.yaml` brings code, which runs here: own.py:even (allocation.strategy)\n")
    assert invoke("allocate", "own.yaml")[0] == 0
    assert (inside / "ran").exists()
    assert invoke("allocate", elsewhere / "own.yaml", "--strategy", "uniform")[0] == 0
    assert not (elsewhere / "ran").exists()
    assert invoke_code("allocate", elsewhere / "own.yaml", "--out", tmp_path / "out")[0] == 0
    assert (elsewhere / "ran").exists()


def test_code_that_comes_with_a_model_counts(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "task: {type: causal-lm, model: ./model, data: d.jsonl, model_options: {trust_remote_code: true}}\n"
        "budget: {uniform_rank: 1}\n"
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    status, _, errors = invoke("profile", tmp_path / "a.yaml")
    assert status == 2
    assert "names ./model (task.model_options.trust_remote_code)" in errors


def test_passwords_are_in_no_message_and_no_file(tmp_path: Path) -> None:
    study, url = tmp_path / "a.yaml", "postgresql://me:hush@localhost/db"
    study.write_text(STUDY)
    for arguments in (
        ["--set", f"search.storage=[{url}]"],
        ["--set", f"search.n_trials={url}"],
        ["--set", f"search.storage={url}", "--set", f"search.storage={url}"],
        ["--set", f"{url}"],
    ):
        status, text, errors = invoke("allocate", study, "--debug", *arguments)
        assert status == 2
        assert "hush" not in text + errors
    flags = ["--set", f"search.storage={url}", "--out", tmp_path / "out"]
    assert invoke("profile", study, *flags)[0] == 0
    assert invoke("allocate", study, *flags)[0] == 0
    for path in (tmp_path / "out").iterdir():
        assert b"hush" not in path.read_bytes()
    assert invoke("train", study, "--out", tmp_path / "out", "--set", "training.steps=1")[0] == 0
