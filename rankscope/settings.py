"""Study files: YAML checked by pydantic. One file says what is profiled, searched, trained, and under which budget."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    ValidationError,
    model_validator,
)

from rankscope.errors import FileError, SettingsError, shown
from rankscope.files import read_yaml

if TYPE_CHECKING:
    from rankscope.budget import ParameterBudget
    from rankscope.control import ControllerConfig
    from rankscope.performance import PerformanceModel
    from rankscope.targets import TargetModule
    from rankscope.training import TrainingConfig


MOST = 10**9  # of anything that is counted

Count = Annotated[int, Field(gt=0, le=MOST)]
Rank = Annotated[int, Field(ge=1, le=MOST)]


class _Section(BaseModel):
    """Keys with values: numbers are finite, and neither texts nor truth values. A section that is empty has its defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _empty_has_defaults(cls, values: Any) -> Any:
        return {} if values is None else values


class BudgetSection(_Section):
    """Either adapter parameters, or what uniform LoRA of a rank would use."""

    parameters: Annotated[int, Field(gt=0, lt=2**63)] | None = None
    uniform_rank: Rank | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> BudgetSection:
        if (self.parameters is None) == (self.uniform_rank is None):
            raise ValueError("give either `parameters` or `uniform_rank`")
        return self

    def resolve(self, targets: tuple[TargetModule, ...]) -> ParameterBudget:
        """The budget in parameters."""
        from rankscope.budget import ParameterBudget

        if self.uniform_rank is not None:
            return ParameterBudget.uniform(targets, self.uniform_rank)
        assert self.parameters is not None
        return ParameterBudget(self.parameters)


class ProfileSection(_Section):
    """How the profile is taken; see `rankscope.profile`."""

    batches: int | None = Field(None, ge=2, le=MOST)
    head_steps: int = Field(100, ge=0, le=MOST)
    sketch_size: int | None = Field(None, ge=2, le=MOST)
    tolerance: float | None = Field(None, ge=0)
    keep_directions: int = Field(0, ge=0, le=MOST)


class AllocationSection(_Section):
    """Which one-shot strategy `allocate` runs, and the bounds that search shares; see `rankscope.allocate`."""

    strategy: str = "one-shot"
    options: dict[str, Any] = {}
    min_rank: int = Field(0, ge=0, le=MOST)
    max_rank: Rank | None = None


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, int | float | str) else value


class TrainingSection(_Section):
    """The schedule; see `rankscope.TrainingConfig`. `learning_rate` may be a list: search tunes it for every allocation."""

    steps: Count = 100
    learning_rate: Annotated[list[Annotated[float, Field(gt=0)]], BeforeValidator(_as_list), Field(min_length=1)] = [
        1e-3
    ]
    head_learning_rate: float | None = Field(None, gt=0)
    warmup_fraction: float = Field(0.1, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0)
    gradient_accumulation: Count = 1
    scaling: float = Field(2.0, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    evaluate_every: Count | None = None

    def resolve(self) -> TrainingConfig:
        """The schedule at the first learning rate."""
        from rankscope.training import TrainingConfig

        values = self.model_dump()
        return TrainingConfig(**{**values, "learning_rate": self.learning_rate[0]})


class SearchSection(_Section):
    """The search; see `rankscope.search`. `storage` None: `search.db` (SQLite) in the output folder."""

    trials: Count = 60
    seeds: Count = 1
    confirm_fraction: float = Field(0.25, ge=0, lt=1)
    fidelity: float = Field(1.0, gt=0, le=1)
    sampler: Literal["performance-model", "tpe", "random"] = "performance-model"
    grouping: Literal["depth", "gradient"] = "depth"
    groups: Count = 3
    storage: str | None = None
    pruner: Literal["none", "median", "hyperband"] = "none"


def _on_off(value: Any) -> Any:
    """YAML reads on and off as true and false."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


class ControllerSection(_Section):
    """Whether ranks move while `rankscope train` trains, and how; see `rankscope.ControllerConfig` and its `Policy`.

    `auto`: on where the allocation to start from rests on no gradient (uniform, random).
    """

    mode: Annotated[Literal["off", "on", "auto"], BeforeValidator(_on_off)] = "off"
    every: Count | None = None
    freeze_fraction: float = Field(0.3, gt=0, le=1)
    samples: Count = 8
    margin: float = Field(0.3, ge=0)
    min_gain: float = Field(0.5, ge=0)
    cooldown: int = Field(0, ge=0, le=MOST)
    coarse_fraction: float = Field(0.5, ge=0, le=1)
    max_rank: Rank | None = None

    def resolve(self, performance_model: PerformanceModel | None = None) -> ControllerConfig:
        """The controller's settings."""
        from rankscope.control import ControllerConfig, Policy

        policy = Policy(
            margin=self.margin,
            min_gain=self.min_gain,
            cooldown=self.cooldown,
            coarse_fraction=self.coarse_fraction,
            max_rank=self.max_rank,
        )
        return ControllerConfig(
            every=self.every,
            freeze_fraction=self.freeze_fraction,
            samples=self.samples,
            policy=policy,
            performance_model=performance_model,
        )


class CompareSection(_Section):
    """What `rankscope compare` compares; see `rankscope.compare`.

    `uniform_budgets`: factors of the budget at which uniform alone is trained too, to see how much it must grow.
    """

    methods: Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)] = [
        "uniform", "one-shot", "random", "controller", "adalora", "eva",
    ]  # fmt: skip
    seeds: Count = 8
    tuning_seeds: Count = 2
    budgets: Annotated[list[PositiveFloat], BeforeValidator(_as_list), Field(min_length=1)] = [1.0]
    uniform_budgets: Annotated[list[PositiveFloat], BeforeValidator(_as_list)] = []


_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def _folder_name(name: str) -> str:
    """A name that is one folder's on every system, and no way out of the output folder."""
    if not re.fullmatch(r"\w[\w .,+=@()-]{0,99}(?<![ .])", name) or _RESERVED.fullmatch(name):
        raise ValueError(
            "must be fit to name a folder: at most 100 letters, digits, spaces or marks among .,+=@()-_, "
            "a letter or digit first"
        )
    return name


class Study(_Section):
    """A whole study file.

    Attributes:
        name: Of the study, its output folder and its Optuna study; default: the file's name.
        task: A ready task's name, a mapping for a generic one, or `path/to/file.py:factory`.
        targets: `all-linear`, a regex, or a list of names.
        budget: The limit.
        seed: Of profile, strategy, sampler and training.
        base_dir: The folder that relative paths in the file start from.
    """

    name: Annotated[str, AfterValidator(_folder_name)]
    task: str | dict[str, Any]
    targets: str | list[str] = "all-linear"
    budget: BudgetSection
    seed: int = Field(0, ge=0, lt=2**31)  # scikit-learn takes no larger ones, and runs count on from it
    profile: ProfileSection = ProfileSection()
    allocation: AllocationSection = AllocationSection()
    training: TrainingSection = TrainingSection()
    search: SearchSection = SearchSection()
    controller: ControllerSection = ControllerSection()
    compare: CompareSection = CompareSection()
    base_dir: Path = Field(Path(), exclude=True)


def read_study(path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> Study:
    """Reads and checks a study file.

    Args:
        path: The YAML file.
        overrides: Values by dotted key, as in `{"search.trials": 20}`; they replace those of the file. None values
            are passed over.

    Raises:
        SettingsError: The file is missing, not YAML, or a key is unknown or ill-typed; key, file and nearest key are named.
    """
    path = Path(path)
    try:
        values = read_yaml(path, what="a study")
    except FileError as error:
        raise SettingsError(str(error)) from None
    if not isinstance(values, dict):
        held = "is empty" if values is None else f"holds {type(values).__name__}"
        raise SettingsError(f"`{path}` must hold a study, as keys and values, but {held}.")
    search = values.get("search")
    if isinstance(search, dict) and isinstance(search.get("storage"), str):
        search["storage"] = _from_folder(search["storage"], path.parent)
    for dotted, value in (overrides or {}).items():
        if value is not None:
            _set(values, dotted, value, where=f"`{path}`")
    if "base_dir" in values:
        raise SettingsError(f"`{path}`: unknown key `base_dir`; {_hint(['base_dir'])}")
    try:
        return Study.model_validate({"name": path.stem, **values, "base_dir": path.parent})
    except ValidationError as error:
        raise SettingsError(f"`{path}`: {_first_problem(error)}") from None


def given_flags(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that were given, as `read_study` takes them: either key of the budget replaces the file's budget."""
    flags = {key: value for key, value in overrides.items() if value is not None}
    budget = {key: flags.pop(f"budget.{key}") for key in ("parameters", "uniform_rank") if f"budget.{key}" in flags}
    return {**flags, "budget": budget} if budget else flags


def _from_folder(storage: str, folder: Path) -> str:
    """The storage; a file of SQLite that is given by a relative path starts from the study file's folder."""
    scheme, found, file = storage.partition(":///")
    if not found or not re.fullmatch(r"sqlite(\+\w+)?", scheme) or not file or file.startswith((":", "file:")):
        return storage
    return f"{scheme}:///{folder.absolute() / file}"


def _set(values: dict[Any, Any], dotted: str, value: Any, *, where: str) -> None:
    *sections, last = dotted.split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise SettingsError(f"{where}: `{section}` must be a section of keys and values, but is {shown(values)}.")
    values[last] = value


def _first_problem(error: ValidationError) -> str:
    """The first problem, by its dotted key; pydantic's own message is a page."""
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"] if not _is_type(part)]
    key = ".".join(parts) or "study"
    if first["type"] == "extra_forbidden":
        return f"unknown key `{key}`; {_hint(parts)}"
    if first["type"] == "missing":
        return f"the key `{key}` is missing; add it."
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if first["type"] == "model_type":
        message = "must be a section of keys and values"
    if first["type"] == "too_short":
        message = "must hold at least one value"
    whole = isinstance(first["input"], dict | BaseModel) or (first["input"], first["type"]) == (None, "value_error")
    given = "" if whole else f", but got {shown(first['input'])}"
    return f"`{key}`: {message}{given}."


def _is_type(part: object) -> bool:
    """Whether a part of pydantic's location is no key, but which of a union's types was tried."""
    return part == "str" or str(part).startswith(("function-", "list[", "dict["))


def _hint(parts: list[str]) -> str:
    """What an unknown key may have been meant for: one that is alike here, or the same in another section."""
    section: Any = Study
    for part in parts[:-1]:
        section = section.model_fields[part].annotation
    known = [name for name in section.model_fields if name != "base_dir"]
    here = [".".join([*parts[:-1], name]) for name in difflib.get_close_matches(parts[-1], known, n=1, cutoff=0.55)]
    elsewhere = [name for name in _dotted_keys() if name.rpartition(".")[2] == parts[-1]]
    alike = bool(here) and difflib.SequenceMatcher(None, here[0].rpartition(".")[2], parts[-1]).ratio() > 0.75
    meant = here if alike or not elsewhere else elsewhere
    return f"did you mean `{'` or `'.join(meant)}`?" if meant else f"known keys are {', '.join(known)}."


def _dotted_keys() -> Iterator[str]:
    for name, field in Study.model_fields.items():
        section: Any = field.annotation
        inner = section.model_fields if isinstance(section, type) and issubclass(section, BaseModel) else {}
        yield from (f"{name}.{key}" for key in inner)
        if name != "base_dir":
            yield name
