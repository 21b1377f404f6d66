"""Study files: what they say, what overrides it, and how mistakes are named."""

import re
from pathlib import Path

import pytest

import rankscope as rs
from rankscope.control import Policy
from rankscope.exceptions import StudyError
from rankscope.study import read_study

MINIMAL = "task: digits-shift\nbudget: {uniform_rank: 1}\n"
TARGETS = (rs.TargetModule(name="fc", in_features=10, out_features=20),)


def write(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(Path("studies").glob("*.yaml")), ids=str)
def test_the_committed_studies_are_valid(path: Path) -> None:
    study = read_study(path)
    assert study.name == path.stem
    assert study.base_dir == Path("studies")


def test_defaults_and_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    study = read_study(path, {"search.trials": 7, "seed": None, "training.learning_rate": 0.5})
    assert (study.name, study.seed, study.search.trials) == ("study", 0, 7)
    assert study.training.learning_rate == [0.5]
    assert study.training.resolve() == rs.TrainingConfig(steps=100, learning_rate=0.5)
    assert study.budget.resolve(TARGETS) == rs.ParameterBudget(30)
    assert read_study(path, {"budget": {"parameters": 99}}).budget.resolve(TARGETS) == rs.ParameterBudget(99)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "sead: 1", "unknown key `sead`; did you mean `seed`?"),
        (MINIMAL + "training: {stepz: 1}", "unknown key `training.stepz`; did you mean `training.steps`?"),
        (MINIMAL + "search: {xyz: 1}", "unknown key `search.xyz`; known keys are "
         "trials, seeds, confirm_fraction, fidelity, sampler, grouping, groups, storage, pruner."),
        (MINIMAL + "training: {steps: many}", "`training.steps`: input should be a valid integer, "
         "unable to parse string as an integer, "
         "but got 'many'."),
        (MINIMAL + "training: {learning_rate: -1}", "`training.learning_rate.0`: input should be greater than 0, but got -1."),
        ("task: digits-shift\n", "the key `budget` is missing; add it."),
        ("task: digits-shift\nbudget: {}\n", "`budget`: give either `parameters` or `uniform_rank`."),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_key_and_file(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(StudyError, match=f"^{re.escape(f'`{path}`: {message}')}$"):
        read_study(path)


def test_a_controllers_mode_may_be_what_yaml_reads_as_true(tmp_path: Path) -> None:
    study = read_study(write(tmp_path, MINIMAL + "controller: {mode: on, every: 7, margin: 0.1}\n"))
    assert study.controller.mode == "on"
    assert study.controller.resolve() == rs.ControllerConfig(every=7, policy=Policy(margin=0.1))
    assert read_study(write(tmp_path, MINIMAL)).controller.resolve() == rs.ControllerConfig()


def test_files_that_are_no_study(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"must be a study file, but there is no such file; check the path\.$"):
        read_study(tmp_path / "none.yaml")
    with pytest.raises(StudyError, match="must be a study file in YAML, but cannot be parsed: while parsing"):
        read_study(write(tmp_path, "task: [unclosed"))
    with pytest.raises(StudyError, match=r"must be a study file with keys and values, but holds str\.$"):
        read_study(write(tmp_path, "just text"))
