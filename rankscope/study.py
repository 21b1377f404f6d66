"""Study files: YAML checked by pydantic. One file says what is profiled, searched, trained, and under which budget."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, ValidationError, model_validator

from rankscope.budget import ParameterBudget
from rankscope.comparison.comparing import DEFAULT_METHODS
from rankscope.control import ControllerConfig, Policy
from rankscope.exceptions import StudyError
from rankscope.performance import PerformanceModel
from rankscope.searching.confirmation import CONFIRM_FRACTION
from rankscope.targets import TargetModule
from rankscope.training import TrainingConfig

DEFAULTS = ControllerConfig()


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BudgetSection(_Section):
    """Either adapter parameters, or what uniform LoRA of a rank would use."""

    parameters: int | None = Field(None, gt=0)
    uniform_rank: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _exactly_one(self) -> BudgetSection:
        if (self.parameters is None) == (self.uniform_rank is None):
            raise ValueError("give either `parameters` or `uniform_rank`")
        return self

    def resolve(self, targets: tuple[TargetModule, ...]) -> ParameterBudget:
        """The budget in parameters."""
        if self.uniform_rank is not None:
            return ParameterBudget.uniform(targets, self.uniform_rank)
        assert self.parameters is not None
        return ParameterBudget(self.parameters)


class ProfileSection(_Section):
    """How the profile is taken; see `rankscope.profile`."""

    batches: int | None = Field(None, ge=2)
    head_steps: int = Field(100, ge=0)
    sketch_size: int | None = Field(None, ge=2)
    tolerance: float | None = Field(None, ge=0)
    keep_directions: int = Field(0, ge=0)


class AllocationSection(_Section):
    """Which one-shot strategy `allocate` runs, and the bounds that search shares; see `rankscope.allocate`."""

    strategy: str = "one-shot"
    options: dict[str, Any] = {}
    min_rank: int = Field(0, ge=0)
    max_rank: int | None = Field(None, ge=1)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, int | float | str) else value


class TrainingSection(_Section):
    """The schedule; see `rankscope.TrainingConfig`. `learning_rate` may be a list: search tunes it for every allocation."""

    steps: int = Field(100, gt=0)
    learning_rate: Annotated[list[Annotated[float, Field(gt=0)]], BeforeValidator(_as_list), Field(min_length=1)] = [
        1e-3
    ]
    head_learning_rate: float | None = Field(None, gt=0)
    warmup_fraction: float = Field(0.1, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0)
    gradient_accumulation: int = Field(1, gt=0)
    scaling: float = Field(2.0, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    evaluate_every: int | None = Field(None, gt=0)

    def resolve(self) -> TrainingConfig:
        """The schedule at the first learning rate."""
        values = self.model_dump()
        return TrainingConfig(**{**values, "learning_rate": self.learning_rate[0]})


class SearchSection(_Section):
    """The search; see `rankscope.search`. `storage` None: `search.db` (SQLite) in the output folder."""

    trials: int = Field(60, gt=0)
    seeds: int = Field(1, gt=0)
    confirm_fraction: float = Field(CONFIRM_FRACTION, ge=0, lt=1)
    fidelity: float = Field(1.0, gt=0, le=1)
    sampler: Literal["performance-model", "tpe", "random"] = "performance-model"
    grouping: Literal["depth", "gradient"] = "depth"
    groups: int = Field(3, gt=0)
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
    every: int | None = Field(None, gt=0)
    freeze_fraction: float = Field(DEFAULTS.freeze_fraction, gt=0, le=1)
    samples: int = Field(DEFAULTS.samples, gt=0)
    margin: float = Field(DEFAULTS.policy.margin, ge=0)
    min_gain: float = Field(DEFAULTS.policy.min_gain, ge=0)
    cooldown: int = Field(DEFAULTS.policy.cooldown, ge=0)
    coarse_fraction: float = Field(DEFAULTS.policy.coarse_fraction, ge=0, le=1)
    max_rank: int | None = Field(None, gt=0)

    def resolve(self, performance_model: PerformanceModel | None = None) -> ControllerConfig:
        """The controller's settings."""
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

    methods: Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)] = list(DEFAULT_METHODS)
    seeds: int = Field(8, gt=0)
    tuning_seeds: int = Field(2, gt=0)
    budgets: Annotated[list[PositiveFloat], BeforeValidator(_as_list), Field(min_length=1)] = [1.0]
    uniform_budgets: Annotated[list[PositiveFloat], BeforeValidator(_as_list)] = []


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

    name: str
    task: str | dict[str, Any]
    targets: str | list[str] = "all-linear"
    budget: BudgetSection
    seed: int = Field(0, ge=0)
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
        StudyError: The file is missing, not YAML, or a key is unknown or ill-typed; key, file and nearest key are named.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyError(f"`{path}` must be a study file, but there is no such file; check the path.") from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise StudyError(
            f"`{path}` must be a study file in YAML, but cannot be parsed: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(values, dict):
        raise StudyError(f"`{path}` must be a study file with keys and values, but holds {type(values).__name__}.")
    for dotted, value in (overrides or {}).items():
        if value is not None:
            _set(values, dotted.split("."), value)
    try:
        return Study(**{"name": path.stem, **values, "base_dir": path.parent})
    except ValidationError as error:
        raise StudyError(f"`{path}`: {_one_line(error)}") from None


def _set(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
    values[keys[-1]] = value


def _one_line(error: ValidationError) -> str:
    """The first problem, by its dotted key; pydantic's own message is a page."""
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"] if not str(part).startswith(("function-", "list[", "dict["))]
    key = ".".join(parts) or "study"
    if first["type"] == "extra_forbidden":
        known = _known_keys(parts[:-1])
        close = difflib.get_close_matches(parts[-1], known, n=1, cutoff=0.4)
        hint = (
            f"did you mean `{'.'.join([*parts[:-1], close[0]])}`?" if close else f"known keys are {', '.join(known)}."
        )
        return f"unknown key `{key}`; {hint}"
    if first["type"] == "missing":
        return f"the key `{key}` is missing; add it."
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    shown = "" if isinstance(first["input"], dict | Study | BudgetSection) else f", but got {first['input']!r}"
    return f"`{key}`: {message}{shown}."


def _known_keys(path: list[str]) -> list[str]:
    section: Any = Study
    for part in path:
        section = section.model_fields[part].annotation
    return [name for name in section.model_fields if name != "base_dir"]
