"""Study files: what they say, what overrides it, and how mistakes are named."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from jsonschema import Draft202012Validator

import rankscope as rs
from rankscope.errors import SettingsError
from rankscope.settings import read_study

MINIMAL = "task: digits-shift\nbudget: {uniform_rank: 1}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(Path("studies").glob("*.yaml")), ids=str)
def test_the_committed_studies_are_valid(path: Path) -> None:
    study = read_study(path)
    assert study.name == path.stem
    assert study.base_dir == Path("studies")


def test_defaults_are_those_of_python(tmp_path: Path) -> None:
    study = read_study(write(tmp_path, MINIMAL))
    assert study.training == rs.TrainingSettings()
    assert study.controller == rs.ControllerSettings()
    assert study.search == rs.SearchSettings()
    assert study.compare == rs.CompareSettings()
    assert study.plan == rs.PlanSettings()


def test_defaults_and_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    study = read_study(path, {"search.n_trials": 7, "seed": None, "training.learning_rate": 0.5})
    assert (study.name, study.seed, study.search.n_trials) == ("study", 0, 7)
    assert study.training.learning_rate == 0.5
    assert study.training == rs.TrainingSettings(steps=100, learning_rate=0.5)
    assert study.budget == rs.BudgetSettings(uniform_rank=1)
    for overrides in ({"budget": {"parameters": 99}}, {"budget.parameters": 99}):
        assert read_study(path, overrides).budget == rs.BudgetSettings(parameters=99)
    searched = read_study(path, {"budget.search": True, "budget.parameters": 99}).budget
    assert searched == rs.BudgetSettings(parameters=99, search=True)
    assert read_study(path, {"budget.search": True}).budget.uniform_rank == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "sead: 1", "unknown key `sead`; did you mean `seed`?"),
        (MINIMAL + "training: {stepz: 1}", "unknown key `training.stepz`; did you mean `training.steps`?"),
        (MINIMAL + "search: {xyz: 1}", "unknown key `search.xyz`; known keys are "
         "n_trials, n_seeds, confirm_fraction, fidelity, sampler, seed, grouping, n_groups, storage, grace_seconds, study_name, artifacts, pruner."),
        (MINIMAL + "training: {steps: many}", "`training.steps`: input should be a valid integer, "
         "but got 'many'."),
        (MINIMAL + "training: {learning_rate: -1}", "`training.learning_rate`: input should be greater than 0, but got -1."),
        (MINIMAL + "trials: 3", "unknown key `trials`; did you mean `search.n_trials`?"),
        (MINIMAL + "training: {hysteresis: 3}", "unknown key `training.hysteresis`; did you mean `controller.hysteresis`?"),
        (MINIMAL + "max_rank: 3", "unknown key `max_rank`; did you mean `allocation.max_rank` or `controller.max_rank`?"),
        (MINIMAL + "seeds: 3", "unknown key `seeds`; did you mean `seed`?"),
        (MINIMAL + "base_dir: x", "unknown key `base_dir`; known keys are name, task, targets, budget, seed, profile, allocation, training, search, controller, compare, plan."),
        (MINIMAL + "search: 3", "`search`: must be a section of keys and values, but got 3."),
        (MINIMAL + "training: [1]", "`training`: must be a section of keys and values, but got [1]."),
        (MINIMAL + "training: {learning_rate: .nan}", "`training.learning_rate`: input should be a finite number, but got nan."),
        (MINIMAL + "training: {learning_rate: [1e-3, 1e400]}", "`training.learning_rate.1`: input should be a finite number, but got inf."),
        (MINIMAL + "training: {learning_rate: []}", "`training.learning_rate`: must hold at least one value, but got []."),
        (MINIMAL + "training: {weight_decay: -.inf}", "`training.weight_decay`: input should be a finite number, but got -inf."),
        (MINIMAL + "training: {scaling: true}", "`training.scaling`: input should be a valid number, but got True."),
        (MINIMAL + "training: {steps: true}", "`training.steps`: input should be a valid integer, but got True."),
        (MINIMAL + "training: {steps: '8'}", "`training.steps`: input should be a valid integer, but got '8'."),
        (MINIMAL + "training: {steps: 1.5}", "`training.steps`: input should be a valid integer, but got 1.5."),
        (MINIMAL + "training: {steps: " + 4000 * "9" + "}", "`training.steps`: input should be less than or equal to 1000000000, but got an integer of about 4000 digits."),
        (MINIMAL + "seed: -1", "`seed`: input should be greater than or equal to 0, but got -1."),
        (MINIMAL + "seed: 9223372036854775808", "`seed`: input should be less than 2147483648, but got an integer of about 19 digits."),
        (MINIMAL + "targets: 3", "`targets`: input should be a valid string, but got 3."),
        (MINIMAL + "targets: [q_proj, 3]", "`targets`: input should be a valid string, but got ['q_proj', 3]."),
        ("task: digits-shift\nbudget: {parameters: 1e30}\n", "`budget.parameters`: input should be a valid integer, but got 1e+30."),
        ("task: digits-shift\nbudget:\n", "`budget`: give either `parameters` or `uniform_rank`."),
        ("task:\nbudget: {uniform_rank: 1}\n", "`task`: input should be a valid string, but got None."),
        ("task: digits-shift\n", "the key `budget` is missing; add it."),
        (MINIMAL[:-2] + ", towers: {vision: {at_mots: 1}}}", "unknown key `budget.towers.vision.at_mots`; did you mean `budget.towers.vision.at_most`?"),
        (MINIMAL[:-2] + ", towers: {vision: -1}}", "`budget.towers.vision.at_most`: input should be greater than or equal to 0, but got -1."),
        (MINIMAL[:-2] + ", towers: {vision: 1.5}}", "`budget.towers.vision.at_most`: must be a share from 0 to 1, or a whole number of parameters, but got 1.5."),
        (MINIMAL[:-2] + ", towers: {vision: true}}", "`budget.towers.vision.at_most`: input should be a valid number, but got True."),
        (MINIMAL[:-2] + ", towers: {vision: half}}", "`budget.towers.vision`: must be a section of keys and values, but got 'half'."),
        (MINIMAL[:-2] + ", towers: {vision: {at_least: 0.5, at_most: 0.2}}}", "`budget.towers.vision`: `at_least` must not exceed `at_most`, but got 0.5 and 0.2."),
        ("task: digits-shift\nbudget: {}\n", "`budget`: give either `parameters` or `uniform_rank`."),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_key_and_file(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(SettingsError, match=f"^{re.escape(f'`{path}`: {message}')}$"):
        read_study(path)


@pytest.mark.parametrize(
    "name",
    ["../x", "/abs", "", " ", ".", "..", ".hidden", "a/b", "a\\b", "con", "COM1.txt", "a.", "a ", "x" * 101, "a\nb", "a\0b", "a:b", "\u202eb"],
)  # fmt: skip
def test_a_name_stays_in_the_output_folder(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + f"name: {json.dumps(name)}\n")
    with pytest.raises(SettingsError) as caught:
        read_study(path)
    message = str(caught.value)
    if "\0" not in name:
        assert message.startswith(f"`{path}`: `name`: must be fit to name a folder: at most 100 letters")
    assert "\n" not in message


@pytest.mark.parametrize("name", ["a", "My study (2), v1.0+x", "größe", "конфигурация", "x" * 100, "constant"])
def test_usual_names_are_names(name: str, tmp_path: Path) -> None:
    assert read_study(write(tmp_path, MINIMAL + f"name: {json.dumps(name)}\n")).name == name


def test_sections_may_be_empty(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "search:\ntraining: {}\ncontroller:\n")
    assert read_study(path) == read_study(write(tmp_path, MINIMAL))
    path = write(tmp_path, MINIMAL + "search:\n")
    assert read_study(path, {"search.n_trials": 5}).search.n_trials == 5
    assert read_study(path, {"profile.n_batches": 5}).profile.n_batches == 5


@pytest.mark.parametrize(("text", "value"), [("3", "3"), ("[1]", "[1]"), ("on", "True")])
def test_a_flag_into_what_is_no_section_is_told(text: str, value: str, tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + f"search: {text}\n")
    message = f"`{path}`: `search` must be a section of keys and values, but is {value}."
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        read_study(path, {"search.n_trials": 5})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, True, "8", 10**30, [], {}])
def test_no_number_of_any_section_takes_what_is_none(value: object, tmp_path: Path) -> None:
    """Every numeric key of every section, as a flag may set it."""
    path = write(tmp_path, MINIMAL)
    for section in ("profile", "training", "search", "controller", "compare", "plan", "allocation", "budget"):
        for key, default in getattr(read_study(path), section):
            annotation = str(type(getattr(read_study(path), section)).model_fields[key].annotation)
            if not re.search(r"\b(int|float)\b", annotation) or isinstance(default, str):
                continue
            if value == 10**30 and "float" in annotation:
                continue
            overrides = {f"{section}.{key}": value}
            if section == "budget":
                overrides = {"budget": {key: value}}
            if (value, key) in (([], "uniform_budgets"), ({}, "towers")):
                continue
            with pytest.raises(SettingsError, match=rf"^`{re.escape(str(path))}`: `{section}\.{key}(\.0)?`: "):
                read_study(path, overrides)


def test_paths_start_from_the_study_file(tmp_path: Path) -> None:
    def storage(url: str) -> str | None:
        return read_study(write(tmp_path, MINIMAL + f"search: {{storage: '{url}'}}\n")).search.storage

    assert storage("sqlite:///db/a.db") == f"sqlite:///{tmp_path}/db/a.db"
    assert storage("sqlite+pysqlite:///a.db") == f"sqlite+pysqlite:///{tmp_path}/a.db"
    for url in ("sqlite:////tmp/a.db", "sqlite:///:memory:", "sqlite://", "postgresql:///a", "mysql://u@h/a"):
        assert storage(url) == url
    path = write(tmp_path, MINIMAL)
    assert read_study(path, {"search.storage": "sqlite:///a.db"}).search.storage == "sqlite:///a.db"


def test_a_controllers_mode_may_be_what_yaml_reads_as_true(tmp_path: Path) -> None:
    study = read_study(write(tmp_path, MINIMAL + "controller: {mode: on, every: 7, hysteresis: 0.1}\n"))
    assert study.controller == rs.ControllerSettings(mode="on", every=7, hysteresis=0.1)


def test_files_that_are_no_study(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"must hold a study, but there is no such file; check the path\.$"):
        read_study(tmp_path / "none.yaml")
    with pytest.raises(SettingsError, match="must hold a study as YAML, but it cannot be parsed"):
        read_study(write(tmp_path, "task: [unclosed"))
    with pytest.raises(SettingsError, match=r"must hold a study, as keys and values, but holds str\.$"):
        read_study(write(tmp_path, "just text"))
    with pytest.raises(SettingsError, match=r"must hold a study, as keys and values, but is empty\.$"):
        read_study(write(tmp_path, "# nothing yet"))
    for path in ("a\0b", "x" * 5000, "\ud800", tmp_path):
        with pytest.raises(SettingsError, match=r"must hold a study, but cannot be read \(.*\); check the path\.$"):
            read_study(path)


def test_another_strategy_drops_the_options_of_the_file_s(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "allocation: {options: {concentration: 0.5}}\n")
    assert read_study(path, {"allocation.strategy": "one-shot"}).allocation.options == {"concentration": 0.5}
    assert read_study(path, {"allocation.strategy": "random"}).allocation.options == {}


def test_overrides_of_settings_in_python() -> None:
    settings = rs.SearchSettings(n_trials=20)
    assert rs.SearchSettings.of(settings, fidelity=0.5) == rs.SearchSettings(n_trials=20, fidelity=0.5)
    for make in (rs.SearchSettings, rs.SearchSettings.of):
        with pytest.raises(SettingsError, match=r"^unknown key `n_trails`; did you mean `n_trials`\?$"):
            make(n_trails=3)
    with pytest.raises(SettingsError, match=r"^`steps`: input should be greater than 0, but got 0\.$"):
        rs.TrainingSettings(steps=0)
    assert rs.SearchSettings.of({"n_trials": 20}, fidelity=0.5) == rs.SearchSettings(n_trials=20, fidelity=0.5)
    with pytest.raises(SettingsError, match=r"^`settings` must be SearchSettings, but got 3\.$"):
        rs.SearchSettings.of(3)  # type: ignore[arg-type]
    rates = rs.TrainingSettings(learning_rate=[0.1, 0.2])
    assert (rates.learning_rates, rates.at(0.2).peak_learning_rate) == ((0.1, 0.2), 0.2)
    with pytest.raises(
        SettingsError, match=r"^`learning_rate` must be one number here, but got \(0\.1, 0\.2\); choose one\.$"
    ):
        _ = rates.peak_learning_rate
    assert rs.TrainingSettings(steps=np.int64(3), learning_rate=np.float32(0.5)).steps == 3


def test_a_section_given_whole_is_merged(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "search: {n_trials: 7}\n")
    search = read_study(path, {"search": {"fidelity": 0.5}}).search
    assert (search.n_trials, search.fidelity) == (7, 0.5)


def test_an_error_blames_what_gave_the_value(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "training: {steps: 3}\n")
    origins = {"search.n_trials": "--trials"}
    with pytest.raises(
        SettingsError, match=r"^`--trials`: `search\.n_trials`: input should be greater than 0, but got 0\.$"
    ):
        read_study(path, {"search.n_trials": 0}, origins=origins)
    write(tmp_path, MINIMAL + "training: {steps: 0}\n")
    with pytest.raises(SettingsError, match=f"^`{re.escape(str(path))}`: `training.steps`: "):
        read_study(path, {"search.n_trials": 1}, origins=origins)


def test_settings_are_values(tmp_path: Path) -> None:
    study = read_study(write(tmp_path, MINIMAL + "allocation: {options: {power: 1}}\ntargets: [q_proj]\n"))
    again = rs.StudySettings(**study.model_dump())
    assert study == again
    assert hash(study) == hash(again)
    assert study != read_study(write(tmp_path, MINIMAL))
    assert hash(rs.TrainingSettings(scaling=2)) == hash(rs.TrainingSettings(scaling=2.0))


@pytest.mark.parametrize(
    "text",
    ["", "search:\n", "compare: {methods: uniform, budgets: 1, uniform_budgets: 2}\n", "training: {learning_rate: [0.1, 0.2]}\n",
     "training: {learning_rate: 1}\n", "controller: {mode: on}\n", "profile: {n_batches: 1}\n", "training: 3\n", "compare: {methods: []}\n",
     "search: {n_trails: 3}\n", "budget: {uniform_rank: 1, towers: {vision: 0.2, language: {at_least: 0.5, at_most: 900}}}\n",
     "budget: {uniform_rank: 1, towers: {vision: {at_mots: 1}}}\n", "budget: {uniform_rank: 1, towers: 3}\n",
     "budget: {uniform_rank: 1, towers: {vision: -1}}\n", "budget: {}\n", "budget: {parameters: 3, uniform_rank: 2}\n", "budget:\n", "budget: {parameters: 3}\n"],
)  # fmt: skip
def test_the_schema_takes_what_is_taken(text: str, tmp_path: Path) -> None:
    lines = MINIMAL if "budget:" not in text.replace("budgets:", "") else "task: digits-shift\n"
    path = write(tmp_path, lines + text)
    try:
        read_study(path)
        taken = True
    except SettingsError:
        taken = False
    values = yaml.safe_load(path.read_text())
    assert Draft202012Validator(rs.StudySettings.model_json_schema()).is_valid(values) == taken


VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 10**9, 10**9 + 1, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -0.5, 0.5, 1.05, 1.1, 1.5, "", "x", " x", "x ",
    ".x", "x.", "a/b", "a-b c,(1)+=@_", "a\nb", "con", "COM1.x", "console", "größe", 101 * "x", "on", "off", "uniform", "full", "random",
    "median", "depth", "mask", [], [1], [0], [-1], [0.5, 1], ["a", "b"], [""], [1, "a"], [None], [True], [[1]], [{}], {}, {"a": 1},
]  # fmt: skip
RELATED = ("`lowest` must be below `highest`", "`n_seeds` must not exceed")  # JSON Schema cannot compare two keys


def test_the_schema_takes_what_is_taken_at_every_key() -> None:
    """Whole numbers such as 1.0 are left out, which are integers to JSON Schema alone."""
    schema = Draft202012Validator(rs.StudySettings.model_json_schema())
    base: dict[str, Any] = {"task": "digits-shift", "budget": {"uniform_rank": 1}}
    budgets = [{"parameters": one, "uniform_rank": other} for one in (None, 0, 1) for other in (None, 1, 2.5)]
    budgets += [{"uniform_rank": 1, "search": value} for value in VALUES]
    studies = [
        {"task": "digits-shift"},
        {"budget": {"uniform_rank": 1}},
        *(base | {"budget": each} for each in budgets),
    ]
    for section, settings in rs.StudySettings(**base):
        studies += [base | {section: value} for value in VALUES]
        for key, _ in settings if isinstance(settings, rs.settings.Settings) else ():
            studies += [base | {section: {key: value}} for value in VALUES]
    for study in studies:
        try:
            rs.StudySettings(**study)
            problem = ""
        except SettingsError as error:
            problem = str(error)
        hidden = study.get("controller") in ({"adapter_name": None}, {"seed": 0})  # keys that `model_dump` writes
        if not hidden and not any(each in problem for each in RELATED):
            assert schema.is_valid(study) == (not problem), (study, problem)


@pytest.mark.parametrize(("key", "value"), [("seed", 3), ("adapter_name", "default")])
def test_what_only_a_controller_in_python_takes_is_no_key(key: str, value: object, tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + f"controller: {{{key}: {value}}}\n")
    message = f"`{path}`: `controller`: `{key}` is for `RankController` in Python, but got {value!r}; leave it out."
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        read_study(path)
