"""All settings: the same frozen models are keyword arguments in Python, sections of a study file, and CLI overrides.

Functions take `settings: SearchSettings | None = None, **overrides` and call `SearchSettings.of(settings, **overrides)`.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from fractions import Fraction
from numbers import Number
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    WrapValidator,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema

from rankscope.errors import FileError, SettingsError, checked, shown
from rankscope.files import read_yaml

MAX_COUNT = 10**9  # of anything that is counted
SIZES = ("parameters", "uniform_rank")  # of a budget

Count = Annotated[int, Field(gt=0, le=MAX_COUNT)]
Natural = Annotated[int, Field(ge=0, le=MAX_COUNT)]
AtLeast2 = Annotated[int, Field(ge=2, le=MAX_COUNT)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


def _as_tuple(value: Any) -> Any:
    """A tuple of a list, or of a single text or number; pydantic's strict mode takes nothing else."""
    if isinstance(value, int | float | str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _as_url(value: Any) -> Any:
    """An SQLite URL of a path."""
    return f"sqlite:///{os.fspath(value)}" if isinstance(value, os.PathLike) else value


def _as_text(value: Any) -> Any:
    """The text of a path."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _as_mode(value: Any) -> Any:
    """YAML reads `on` and `off` as true and false."""
    return ("on" if value else "off") if isinstance(value, bool) else value


def _share_or_parameters(size: float) -> float:
    """A share up to 1; above, a whole number of parameters."""
    if size > 1 and not size.is_integer():
        raise ValueError("must be a share from 0 to 1, or a whole number of parameters")
    return size if size <= 1 else int(size)


# In Python, an object of a library is taken as it is, such as an Optuna sampler instead of its name.
OrObject = WrapValidator(lambda value, check: check(value) if type(value).__module__ == "builtins" else value)
# Bounds stand inside validators, since the JSON schema has none that stand outside.
OneOrMore = Field(min_length=1)
Numbers = tuple[Positive, ...]
SomeNumbers = Annotated[Numbers, OneOrMore]
Rates = Annotated[
    SomeNumbers, BeforeValidator(_as_tuple), AfterValidator(lambda rates: rates[0] if len(rates) == 1 else rates)
]
Factors = Annotated[Numbers, BeforeValidator(_as_tuple, json_schema_input_type=Positive | Numbers)]
SomeFactors = Annotated[SomeNumbers, BeforeValidator(_as_tuple, json_schema_input_type=Positive | SomeNumbers)]
Name = Annotated[str, OneOrMore]
SomeNames = Annotated[tuple[Name, ...], OneOrMore]
Names = Annotated[SomeNames, BeforeValidator(_as_tuple, json_schema_input_type=Name | SomeNames)]
Mode = Literal["off", "on", "auto"] | None


class Settings(BaseModel):
    """The common base: frozen and strict. A wrong name, type or value is a SettingsError that names the nearest known key."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, json_schema_extra={"type": ["object", "null"]}
    )

    _free: ClassVar[frozenset[str]] = frozenset()  # fields on which results do not depend

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SettingsError(_first_problem(error, type(self))) from None

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # sections of a study are validated without it

    @classmethod
    def of(cls, settings: Self | Mapping[str, Any] | None = None, /, **overrides: Any) -> Self:
        """Settings, or values by name, with some values replaced; without any, of the defaults.

        >>> SearchSettings.of(SearchSettings(n_trials=20), fidelity=0.5).n_trials
        20
        """
        if not isinstance(settings, cls | Mapping | None):
            raise SettingsError(f"`settings` must be {cls.__name__}, but got {shown(settings)}.")
        return cls(**{**(dict(settings) if settings else {}), **overrides})

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and dict(self) == dict(other)

    def __hash__(self) -> int:
        return hash(tuple(value for value in dict(self).values() if isinstance(value, Hashable)))

    def terms(self) -> dict[str, Any]:
        """The values on which results depend, for fingerprints."""
        return self.model_dump(exclude=set(self._free))

    @classmethod
    def filled(cls, kept: Mapping[str, Any]) -> dict[str, Any]:
        """Kept `terms`; fields that came after they were kept have their defaults."""
        return {**cls().terms(), **kept}

    @model_validator(mode="before")
    @classmethod
    def _prepared(cls, values: Any) -> Any:
        """An empty section has its defaults, and NumPy numbers become Python's."""
        if not isinstance(values, dict | None):
            return values
        items = (values or {}).items()
        return {key: each.item() if isinstance(each, Number) and hasattr(each, "item") else each for key, each in items}


TowerSize = Annotated[float, Field(ge=0), AfterValidator(_share_or_parameters)]


class TowerSettings(Settings):
    """The least and the most adapter parameters of one tower: up to 1, as a share of the budget; above, as a number.

    >>> TowerSettings(at_least=1000, at_most=0.25).bounds(10_000)
    (1000, 2500)
    """

    at_least: TowerSize = Field(0.0, description="The least.")
    at_most: TowerSize = Field(1.0, description="The most.")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.at_least > self.at_most and (self.at_least > 1) == (self.at_most > 1):
            raise ValueError(f"`at_least` must not exceed `at_most`, but got {self.at_least:g} and {self.at_most:g}")
        return self

    def bounds(self, limit: int) -> tuple[int, int]:
        """The least and the most parameters under a budget of `limit`; shares are read as the decimals they are written in."""
        least, most = (
            Fraction(str(size)) * limit if size <= 1 else Fraction(size) for size in (self.at_least, self.at_most)
        )
        return math.ceil(least), min(math.floor(most), limit)


def _as_most(value: Any) -> Any:
    """A number alone is the most."""
    return {"at_most": value} if isinstance(value, Number) else value


Tower = Annotated[TowerSettings, BeforeValidator(_as_most, json_schema_input_type=TowerSize | TowerSettings)]


class BudgetSettings(Settings):
    """The most adapter parameters: either a number, or as many as uniform LoRA of a rank uses."""

    model_config = ConfigDict(
        json_schema_extra={
            "type": "object",
            "oneOf": [{"required": [size], "properties": {size: {"type": "integer"}}} for size in SIZES],
        }
    )

    parameters: int | None = Field(None, gt=0, lt=2**63, description="Adapter parameters.")
    uniform_rank: Count | None = Field(None, description="As many parameters as uniform LoRA of this rank uses.")
    towers: dict[str, Tower] = Field(
        {}, description="Bounds on towers by name, as in `{vision: 0.2, language: {at_least: 0.5, at_most: 20000}}`: up to 1, "
        "shares of the budget; above, parameters. A number alone is the most.",
    )  # fmt: skip
    search: bool = Field(False, description="Whether a search tries smaller budgets as well, down to a sixteenth.")

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.parameters is None) == (self.uniform_rank is None):
            raise ValueError("give either `parameters` or `uniform_rank`")
        return self


class ProfileSettings(Settings):
    """How a profile is taken."""

    _free = frozenset({"keep_partial"})

    n_batches: AtLeast2 | None = Field(None, description="Batches to profile. Default: all; of a task, an epoch.")
    head_steps: Natural = Field(100, description="AdamW steps that warm up a fresh head first.")
    sketch_size: AtLeast2 | None = Field(
        None, description="Singular values measured for each module; later ones are estimated. Default: twice the budget's "
        "mean rank, at least 56, if that fits a quarter of the model's weights or 1 GiB.",
    )  # fmt: skip
    tolerance: NotNegative | None = Field(
        None, description="Stop when the leading 8 singular values change by at most this share. Default: never."
    )
    keep_directions: Natural = Field(0, description="Leading singular vectors kept for each module.")
    max_skipped: Share = Field(0.1, description="Largest share of batches skipped because their loss is not finite.")
    keep_partial: bool = Field(False, description="On Ctrl-C, keep the profile of the batches so far.")


class AllocationSettings(Settings):
    """The one-shot strategy. Its bounds also hold for `search`, `compare` and `budget`, its options for the latter two."""

    strategy: str = Field("one-shot", description="The one-shot strategy, or `path/to/file.py:function`.")
    options: dict[str, Any] = Field({}, description="Options of the strategy.")
    min_rank: Natural = Field(0, description="Smallest rank of a target module.")
    max_rank: Count | None = Field(None, description="Largest rank of a target module. Default: its full rank.")


class TrainingSettings(Settings):
    """How a model is fine-tuned: AdamW with linear warm-up and linear decay.

    >>> settings = TrainingSettings(steps=300, learning_rate=[1e-4, 5e-4])
    >>> settings.learning_rates, settings.at(5e-4).peak_learning_rate
    ((0.0001, 0.0005), 0.0005)
    """

    steps: Count = Field(100, description="Optimizer steps.")
    learning_rate: Annotated[
        Annotated[Positive, Tag("float")] | Annotated[Rates, Tag("list[float]")],
        Discriminator(lambda value: "list[float]" if isinstance(value, list | tuple) else "float"),
    ] = Field(1e-3, description="Peak learning rate. Of a list, search and comparison choose one by validation.")
    head_learning_rate: Positive | None = Field(None, description="Peak rate of the head. Default: `learning_rate`.")
    warmup_fraction: Share = Field(0.1, description="Share of the steps over which the rate rises from zero.")
    weight_decay: NotNegative = Field(0.0, description="Weight decay of AdamW.")
    max_grad_norm: NotNegative = Field(1.0, description="Gradients are clipped to this norm; 0: no clipping.")
    gradient_accumulation: Count = Field(1, description="Batches for each optimizer step.")
    scaling: Positive = Field(2.0, description="LoRA's alpha / r: the factor on every update, whatever its rank.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of adapters.")
    evaluate_every: Count | None = Field(None, description="Steps between evaluations. Default: only at the end.")

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """All rates to choose from."""
        return self.learning_rate if isinstance(self.learning_rate, tuple) else (self.learning_rate,)

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate; SettingsError while there are several to choose from."""
        if isinstance(self.learning_rate, tuple):
            raise SettingsError(f"`learning_rate` must be one number here, but got {self.learning_rate}; choose one.")
        return self.learning_rate

    def at(self, learning_rate: float) -> TrainingSettings:
        """These settings at one learning rate."""
        return self.of(self, learning_rate=learning_rate)


class SearchSettings(Settings):
    """How allocations are searched."""

    _free = frozenset({"n_trials", "confirm_fraction", "storage", "study_name", "pruner", "artifacts", "grace_seconds"})

    n_trials: Count = Field(60, description="Trainings in all, confirmation included.")
    n_seeds: Count = Field(1, description="Training seeds of each trial; each counts as one of `n_trials`.")
    confirm_fraction: float = Field(0.25, ge=0, lt=1, description="Share of trainings that confirm finalists. 0: none.")
    fidelity: float = Field(1.0, gt=0, le=1, description="Share of the training steps that a trial takes.")
    sampler: Annotated[Literal["performance-model", "tpe", "random"], OrObject] = Field(
        "performance-model", description="What proposes allocations."
    )
    seed: int | None = Field(None, ge=0, lt=2**31, description="Seed of the sampler. Default: the study's, or 0.")
    grouping: Literal["depth", "gradient"] = Field(
        "depth", description="Groups of blocks: by depth, or by their gradients."
    )
    n_groups: Count = Field(3, description="Block groups in each tower.")
    storage: Annotated[str | None, OrObject, BeforeValidator(_as_url)] = Field(
        None, description="Where trials are kept: `sqlite:///FILE`, `postgresql://…`, `mysql://…`, `journal:FILE` or "
        "`grpc://HOST:PORT`; relative paths start from the study file. Default: `search.db` in the output folder; in Python, "
        "memory.",
    )  # fmt: skip
    grace_seconds: float = Field(
        30.0, ge=1, description="Seconds without a sign of life after which a worker's trial is given to another."
    )
    study_name: str | None = Field(None, description="Name of the Optuna study. Default: the study's, or the task's.")
    artifacts: Annotated[str | None, BeforeValidator(_as_text)] = Field(
        None, description="Folder for the rank maps that Optuna's dashboard shows, from the study file on. Default: `artifacts` "
        "in the output folder; in Python, beside an SQLite database.",
    )  # fmt: skip
    pruner: Annotated[Literal["none", "median", "hyperband"], OrObject] = Field(
        "none", description="What stops bad trials early; needs `training.evaluate_every`."
    )


class ControllerSettings(Settings):
    """How ranks move during training, and when a move is worth making.

    >>> ControllerSettings().every_of(1000), ControllerSettings().every_of(100), ControllerSettings(every=10).every_of(100)
    (50, 7, 10)
    """

    _free = frozenset({"mode", "adapter_name", "seed"})

    mode: Annotated[Mode, BeforeValidator(_as_mode, json_schema_input_type=Mode | bool)] = Field(
        None, description="Whether ranks move: off, on, or auto (if the allocation to start from uses no gradient). Default: off "
        "in `rankscope train`, on in `rs.train`.",
    )  # fmt: skip
    every: Count | None = Field(
        None,
        description="Optimizer steps between decisions. Default: 50; less in short runs, so that four decisions fit.",
    )
    freeze_fraction: float = Field(0.3, gt=0, le=1, description="Share of the run after which ranks stay fixed.")
    samples: Count = Field(8, description="Steps before each decision whose gradients are recorded.")
    rank_change: Literal["auto", "resize", "mask"] = Field(
        "auto", description="How ranks change: `resize` factors, or `mask` them at fixed capacity. auto: masks under several "
        "processes, DistributedDataParallel and torch.compile, and where the model already has masks.",
    )  # fmt: skip
    sketch_size: AtLeast2 | None = Field(
        None, description="Singular values measured for each module. Default: twice the largest rank, at least 16, if that "
        "fits a quarter of the model's weights or 1 GiB.",
    )  # fmt: skip
    hysteresis: NotNegative = Field(
        0.3, description="A move must gain this share more than it gives up; noise raises it."
    )
    min_gain_ratio: NotNegative = Field(
        0.5,
        description="Least gain of a move, as a share of the gradient energy, over the share of the budget it moves.",
    )
    cooldown: Natural = Field(0, description="Decisions during which a module that moved stays fixed.")
    coarse_fraction: Share = Field(
        0.5, description="Share of the time until the freeze in which a decision may move all modules; later: one rank."
    )
    max_rank: Count | None = Field(None, description="Largest rank of a module. Default: its full rank.")
    adapter_name: SkipJsonSchema[str | None] = Field(None, description="Whose ranks move, if the model has several.")
    seed: SkipJsonSchema[int] = Field(0, ge=0, lt=2**32, description="Seed of sketches and new adapter rows.")

    def every_of(self, steps: int) -> int:
        """Optimizer steps between decisions, in a run of `steps` steps."""
        return self.every or max(1, min(50, int(self.freeze_fraction * steps) // 4))


class AxolotlSettings(Settings):
    """The section `rankscope` of an axolotl YAML: an allocation file, or the budget of one that is made on the spot."""

    allocation: Name | None = Field(None, description="An allocation file, from the folder in which axolotl runs.")
    budget: BudgetSettings | None = Field(None, description="The most adapter parameters, to allocate on the spot.")
    strategy: Name = Field("one-shot", description="What allocates on the spot.")
    targets: str | list[str] = Field("all-linear", description="What it allocates to, as in a study.")
    profile: ProfileSettings = ProfileSettings(n_batches=32)
    scaling: Positive = Field(2.0, description="alpha / r of every module.")
    controller: bool | dict[str, Any] = Field(
        False, description="Whether ranks move during the training, or the controller's settings."
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.allocation is None) == (self.budget is None):
            raise ValueError("give either `allocation` or `budget`")
        return self


DASK = "dask://"
_BACKENDS = rf"^(loky|{DASK}[A-Za-z0-9._-]+:[0-9]{{1,5}})$"
_BACKEND = (
    "Where runs are done: `loky`, by processes of this machine; `dask://HOST:PORT`, by all workers of a Dask cluster, which "
    "share the output folder."
)


def _as_backend(backend: str) -> str:
    """`loky`, or a Dask scheduler's address."""
    if re.fullmatch(_BACKENDS, backend):
        return backend
    if backend == "ray":
        raise ValueError("must be loky or dask://HOST:PORT: Ray is not supported")
    raise ValueError("must be loky or dask://HOST:PORT")


class CompareSettings(Settings):
    """What is compared at equal parameters, on how many seeds."""

    _free = frozenset({"n_jobs", "backend"})

    methods: Names = Field(
        ("uniform", "one-shot", "random", "controller", "adalora", "eva"),
        description="Strategies, `uniform-rslora`, `qv-only`, `last-blocks`, `language-only`, `searched`, `controller`, "
        "`controller-STRATEGY`, `adalora`, `eva`, `vera`, `ia3`, `full`, `head`, or `path/to/file.py:function`.",
    )  # fmt: skip
    n_seeds: Count = Field(8, description="Reported runs of each method.")
    n_tuning_seeds: Count = Field(2, description="Runs that choose each method's learning rate.")
    budgets: SomeFactors = Field((1.0,), description="Factors of the budget to compare all methods at.")
    uniform_budgets: Factors = Field((), description="Further factors for uniform: how much must it grow to match?")
    n_jobs: Count = Field(1, description="Runs at the same time, each in a process of its own.")
    backend: Annotated[str, AfterValidator(_as_backend)] = Field(
        "loky", description=_BACKEND, json_schema_extra={"pattern": _BACKENDS}
    )


class PlanSettings(Settings):
    """Which budgets `rankscope budget` tries, and what is enough."""

    _free = frozenset({"n_jobs", "backend"})

    strategy: str = Field("one-shot", description="What places ranks: a method of `compare`.")
    reference: Literal["uniform", "full"] | Count = Field(
        "uniform", description="What must be reached: `uniform` at its best budget of the grid, or at this many parameters; or "
        "`full` fine-tuning.",
    )  # fmt: skip
    margin: Positive | None = Field(
        None, description="What may be lost of the metric. Default: one seed's standard deviation at the reference."
    )
    lowest: Positive = Field(0.0625, description="Smallest budget, in parameters of uniform rank 1.")
    highest: Positive = Field(16.0, description="Largest budget, in parameters of uniform rank 1.")
    step: float = Field(2.0, ge=1.1, description="Factor from one budget of the grid to the next.")
    n_seeds: AtLeast2 = Field(8, description="Runs of each budget.")
    max_seeds: AtLeast2 = Field(32, description="Runs of a budget where the decision is open.")
    n_tuning_seeds: Count = Field(2, description="Runs that choose each budget's learning rate.")
    ceiling: bool = Field(True, description="Whether full fine-tuning is trained as the ceiling.")
    n_jobs: Count = Field(1, description="Runs at the same time, each in a process of its own.")
    backend: Annotated[str, AfterValidator(_as_backend)] = Field(
        "loky", description=_BACKEND, json_schema_extra={"pattern": _BACKENDS}
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.lowest >= self.highest:
            raise ValueError(f"`lowest` must be below `highest`, but got {self.lowest:g} and {self.highest:g}")
        if self.n_seeds > self.max_seeds:
            raise ValueError(f"`n_seeds` must not exceed `max_seeds`, but got {self.n_seeds} and {self.max_seeds}")
        return self


class ModelSettings(Settings):
    """How a task loads its model: `model_options` of the generic tasks.

    >>> ModelSettings(attn_implementation="sdpa").trust_remote_code
    False
    """

    dtype: Literal["bfloat16", "float32"] | None = Field(
        None, description="Of the frozen weights; the rest is trained in float32. Default: the checkpoint's."
    )
    quantization: Literal["4bit", "8bit"] | None = Field(
        None, description="Frozen weights in 4 bits (NF4, doubly quantised, as in QLoRA) or 8, by bitsandbytes."
    )
    device_map: Name | dict[str, int | Name] | None = Field(None, description="As transformers takes it; one device.")
    attn_implementation: Name | None = Field(None, description="`eager`, `sdpa`, `flash_attention_2`, ...")
    revision: Name | None = Field(None, description="Branch, tag or commit of the model on the hub.")
    trust_remote_code: bool = Field(False, description="Whether code that comes with the model may run.")
    gradient_checkpointing: bool = Field(
        False, description="Whether activations are computed again in the backward pass."
    )


_PROBLEMS = {"model_type": "must be a section of keys and values", "too_short": "must hold at least one value"}
_UNION_MEMBER = re.compile(
    r"(str|float|constrained-int)$|function-|list\[|dict\[|tuple\(|literal\["
)  # a part of pydantic's locations
# For a schema's readers, to which \w is ASCII: all but the ASCII characters that a folder's name may not start with, or hold.
_RESERVED = re.sub("[a-z]", lambda letter: f"[{letter[0]}{letter[0].upper()}]", "con|prn|aux|nul|com[0-9]|lpt[0-9]")
_FOLDER_NAME = rf"^(?!({_RESERVED})(\.|$))[^\x00-/:-@\[-^`{{-\x7f][^\x00-\x1f!-'*/:-<>?\[-^`{{-\x7f]{{0,99}}(?<![ .])$"


def _folder_name(name: str) -> str:
    """A name that is one folder's on every system, and no way out of the output folder."""
    if not re.match(_FOLDER_NAME, name) or not re.fullmatch(r"[\w .,+=@()-]+", name):
        raise ValueError(
            "must be fit to name a folder: at most 100 letters, digits, spaces or marks among .,+=@()-_, "
            "a letter or digit first"
        )
    return name


def _in_a_study(controller: ControllerSettings) -> ControllerSettings:
    """A study's seed is its own, and its models have one adapter: neither would change anything."""
    for key in ("adapter_name", "seed"):
        if (value := getattr(controller, key)) != ControllerSettings.model_fields[key].default:
            raise ValueError(f"`{key}` is for `RankController` in Python, but got {shown(value)}; leave it out")
    return controller


class StudySettings(Settings):
    """A whole study file."""

    model_config = ConfigDict(json_schema_extra={"type": "object"})

    name: Annotated[str, AfterValidator(_folder_name)] = Field(
        "study",
        description="Name of the study, its output folder and its Optuna study. Default: the file's name.",
        json_schema_extra={"pattern": _FOLDER_NAME},
    )
    task: str | dict[str, Any] = Field(
        description="A ready task, a mapping for a generic one, or `path/to/file.py:factory`."
    )
    targets: str | list[str] = Field("all-linear", description="`all-linear`, a regex, or a list of module names.")
    budget: BudgetSettings = Field(description="The most adapter parameters.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of profile, strategy, sampler and training.")
    profile: ProfileSettings = ProfileSettings()
    allocation: AllocationSettings = AllocationSettings()
    training: TrainingSettings = TrainingSettings()
    search: SearchSettings = SearchSettings()
    controller: Annotated[ControllerSettings, AfterValidator(_in_a_study)] = ControllerSettings()
    compare: CompareSettings = CompareSettings()
    plan: PlanSettings = PlanSettings()

    _base_dir: Path = PrivateAttr(Path())

    @property
    def base_dir(self) -> Path:
        """The study file's folder; relative paths start from it."""
        return self._base_dir


@checked
def read_study(
    path: str | os.PathLike[str],
    overrides: Mapping[str, Any] | None = None,
    *,
    origins: Mapping[str, str] | None = None,
) -> StudySettings:
    """Read and check a study file.

    Args:
        path: The YAML file.
        overrides: Values by dotted key that replace those of the file, as in `{"search.n_trials": 20}` or
            `{"search": {"n_trials": 20}}`, unless None. A size of the budget replaces the other, another strategy also the
            strategy's options.
        origins: Where overrides come from, by the same keys, as errors name it.

    Raises:
        SettingsError: The file is missing or not YAML, or a key is unknown or ill-typed; file and nearest key are named.
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
    given = {key: value for key, value in _dotted(overrides or {}) if value is not None}
    if given.keys() & {f"budget.{size}" for size in SIZES} and isinstance(values.get("budget"), dict):
        values["budget"] = {key: value for key, value in values["budget"].items() if key not in SIZES}
    allocation = values.get("allocation")
    if isinstance(allocation, dict):
        own = allocation.get("strategy", "one-shot")
        if given.get("allocation.strategy", own) != own:
            allocation.pop("options", None)
    for dotted, value in given.items():
        _set(values, dotted, value, where=f"`{path}`")
    try:
        study = StudySettings.model_validate({"name": path.stem, **values})
    except ValidationError as error:
        key = ".".join(_parts(error))
        where = next((origin for given, origin in (origins or {}).items() if key.startswith(given)), path)
        raise SettingsError(f"`{where}`: {_first_problem(error, StudySettings)}") from None
    study._base_dir = path.parent
    return study


def _dotted(overrides: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Overrides by dotted key, also where a whole section is given."""
    for key, value in overrides.items():
        if isinstance(value, Mapping) and key in _sections(StudySettings):
            yield from ((f"{key}.{name}", each) for name, each in value.items())
        else:
            yield key, value


def _from_folder(storage: str, folder: Path) -> str:
    """The storage; a relative path of SQLite or a journal starts from the study file's folder."""
    if storage.startswith("journal:"):
        return f"journal:{folder.absolute() / storage.removeprefix('journal:').removeprefix('//')}"
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


def _parts(error: ValidationError) -> list[str]:
    """Where the first problem is; pydantic's locations name members of unions, too."""
    return [str(part) for part in error.errors()[0]["loc"] if not _UNION_MEMBER.match(str(part))]


def _first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem in one line, by its dotted key; pydantic's own message is a page."""
    first, parts = error.errors()[0], _parts(error)
    kind, value = first["type"], first["input"]
    key = ".".join(parts) or model.__name__.removesuffix("Settings").lower()
    if kind == "extra_forbidden":
        return f"unknown key `{key}`; {_hint(parts, model)}"
    if kind == "missing":
        return f"the key `{key}` is missing; add it."
    message = _PROBLEMS.get(kind, first["msg"].removeprefix("Value error, "))
    whole = isinstance(value, dict | BaseModel) or (value is None and kind == "value_error")
    given = "" if whole else f", but got {shown(list(value) if isinstance(value, tuple) else value)}"
    return f"`{key}`: {message[0].lower()}{message[1:]}{given}."


def _hint(parts: list[str], model: type[BaseModel]) -> str:
    """What an unknown key may have been meant for: one that is alike here, or in another section."""
    *path, wrong = parts
    for part in path:
        model = _sections(model).get(part, model)  # a name in a mapping of sections is none itself
    known = list(model.model_fields)
    elsewhere = {
        f"{section}.{name}": name for section, each in _sections(StudySettings).items() for name in each.model_fields
    }

    def alike(names: Iterable[str], cutoff: float) -> list[str]:
        return difflib.get_close_matches(wrong, names, n=1, cutoff=cutoff)

    near = [".".join([*path, name]) for name in alike(known, 0.75)]
    near = near or [key for key, name in elsewhere.items() if name in alike(elsewhere.values(), 0.75)]
    near = near or [".".join([*path, name]) for name in alike(known, 0.55)]
    return f"did you mean `{'` or `'.join(near)}`?" if near else f"known keys are {', '.join(known)}."


def _sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The settings that a model holds, by their key; of a mapping of settings, one of these."""
    kinds: dict[str, Any] = {name: field.annotation for name, field in model.model_fields.items()}
    for name, kind in kinds.items():
        if get_origin(kind) is dict and get_origin(held := get_args(kind)[1]) is Annotated:
            kinds[name] = get_args(held)[0]
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}
