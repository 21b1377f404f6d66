"""`RankAllocation`: one rank for each target module."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_args

from rankscope.errors import FileError, SettingsError, shown
from rankscope.files import AnyPath, read_json, write_json
from rankscope.targets import Kind, TargetModule, find_targets, fingerprint_targets

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

SCHEMA = 1


class _ByName:
    """Room for the ranks by name, made at the first look and no field: fingerprints, pickles and comparisons leave it out."""

    __slots__ = ("_by_name",)
    _by_name: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class RankAllocation(_ByName):
    """One rank for each target module; 0 leaves it without an adapter. Allocations are equal when modules and ranks are.

    >>> targets = (TargetModule(name="fc1", in_features=64, out_features=256),)
    >>> allocation = RankAllocation(targets, (2,), strategy="uniform")
    >>> allocation.parameters, dict(allocation.ranks)
    (640, {'fc1': 2})
    >>> allocation
    RankAllocation('uniform': 640 parameters, 1 of 1 modules, rank 2)
    """

    targets: tuple[TargetModule, ...]  # in the model's order
    vector: tuple[int, ...]  # the rank of each target
    strategy: str = field(default="", compare=False)  # what computed it, as in "one-shot"
    budget: int | None = field(default=None, compare=False)  # the limit it was computed for, in adapter parameters
    # The least and the most parameters of the towers that the budget bounds.
    tower_bounds: Mapping[str, tuple[int, int]] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        targets, ranks = tuple(self.targets), tuple[Any, ...](self.vector)
        n = len(targets)
        if len(ranks) != n:
            raise SettingsError(f"`vector` must hold one rank for each of the {n} targets, but holds {len(ranks)}.")
        if len({target.name for target in targets}) != n:
            raise SettingsError("`targets` must not name a module twice.")
        for target, rank in zip(targets, ranks, strict=True):
            if isinstance(rank, bool) or not isinstance(rank, Integral):
                raise SettingsError(f"the rank of `{target.name}` must be a whole number, but got {rank!r}.")
            if not 0 <= int(rank) <= max(target.full_rank, target.existing_rank or 0):
                must = f"must lie between 0 and {target.full_rank} (its smaller side)"
                raise SettingsError(f"the rank of `{target.name}` {must}, but got {rank}.")
        object.__setattr__(self, "targets", targets)
        object.__setattr__(self, "vector", tuple(int(rank) for rank in ranks))
        try:
            bounds = {str(tower): (int(least), int(most)) for tower, (least, most) in self.tower_bounds.items()}
        except (AttributeError, TypeError, ValueError):
            must = "must be the least and the most parameters by tower"
            raise SettingsError(f"`tower_bounds` {must}, but got {shown(self.tower_bounds)}.") from None
        object.__setattr__(self, "tower_bounds", bounds)

    @classmethod
    def from_ranks(
        cls, targets: Sequence[TargetModule], ranks: Mapping[str, int], *, strategy: str = "", budget: int | None = None,
        tower_bounds: Mapping[str, tuple[int, int]] = {},
    ) -> RankAllocation:  # fmt: skip
        """An allocation from `{module name: rank}`; target modules not named get rank 0."""
        if unknown := set(ranks) - {target.name for target in targets}:
            raise SettingsError(f"`ranks` must name target modules only, but names {sorted(unknown)[0]!r}.")
        vector = tuple(ranks.get(t.name, 0) for t in targets)
        return cls(tuple(targets), vector, strategy=strategy, budget=budget, tower_bounds=tower_bounds)

    @property
    def ranks(self) -> Mapping[str, int]:
        """The rank of each target module by name, in the model's order; read-only."""
        if not hasattr(self, "_by_name"):
            found = {t.name: rank for t, rank in zip(self.targets, self.vector, strict=True)}
            object.__setattr__(self, "_by_name", MappingProxyType(found))
        return self._by_name

    @property
    def parameters(self) -> int:
        """Trainable adapter parameters: the sum of rank cost times rank, as PEFT's LoRA builds them."""
        return sum(t.rank_cost * rank for t, rank in zip(self.targets, self.vector, strict=True))

    @property
    def parameters_by_tower(self) -> dict[str, int]:
        """The adapter parameters of each tower, in the model's order."""
        found = dict.fromkeys((target.tower for target in self.targets), 0)
        for target, rank in zip(self.targets, self.vector, strict=True):
            found[target.tower] += target.rank_cost * rank
        return found

    @property
    def fingerprint(self) -> str:
        """A short hash of modules and ranks, the same in any process."""
        text = fingerprint_targets(self.targets) + repr(sorted(self.ranks.items()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def difference(self, other: RankAllocation) -> dict[str, int]:
        """How many ranks more than `other` (negative: less) each module has whose ranks differ."""
        if {t.name for t in self.targets} != {t.name for t in other.targets}:
            raise SettingsError("`other` must be an allocation over the same target modules.")
        theirs = other.ranks
        return {name: rank - theirs[name] for name, rank in self.ranks.items() if rank != theirs[name]}

    def renamed(self, strategy: str) -> RankAllocation:
        """The same allocation under another strategy's name."""
        return replace(self, strategy=strategy)

    def __repr__(self) -> str:
        """In one line; `ranks` holds each module's."""
        adapted = [rank for rank in self.vector if rank]
        low, high = min(adapted, default=0), max(adapted, default=0)
        limit = "" if self.budget is None else f" of {self.budget:,}"
        size = f"{self.parameters:,}{limit} parameters, {len(adapted)} of {len(self.vector)} modules"
        ranks = f"rank {high}" if low == high else f"ranks {low} to {high}"
        return f"RankAllocation({self.strategy!r}: {size}, {ranks})"

    def _repr_html_(self) -> str:
        """What notebooks show: the line above, and the ranks as a map."""
        from rankscope.maps import html_card, ranks_png

        png = ranks_png(self.targets, self.ranks, titles=[self.strategy or "allocation"]) if self.targets else None
        return html_card(repr(self), png=png)

    # --- JSON --------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The allocation as plain values, as `to_json` writes them."""
        targets = [asdict(target) for target in self.targets]
        return {
            "schema": SCHEMA,
            "strategy": self.strategy,
            "budget": self.budget,
            **({"tower_bounds": dict(self.tower_bounds)} if self.tower_bounds else {}),
            "parameters": self.parameters,
            "ranks": dict(self.ranks),
            "model": fingerprint_targets(self.targets),
            "targets": [{k: v for k, v in t.items() if (k, v) != ("existing_rank", None)} for t in targets],
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> RankAllocation:
        """The inverse of `to_dict`; a `FileError` where values are missing or contradict each other."""
        if (schema := value.get("schema")) != SCHEMA:
            raise FileError(f"an allocation must have schema {SCHEMA}, but has {schema!r}; write it again.")
        try:
            targets = tuple(_target(target) for target in value["targets"])
            strategy, budget = value["strategy"], value["budget"]
            if not isinstance(strategy, str) or not (budget is None or (type(budget) is int and budget >= 0)):
                raise TypeError(f"strategy {strategy!r}, budget {budget!r}")
            bounds = value.get("tower_bounds", {})
            allocation = cls.from_ranks(targets, value["ranks"], strategy=strategy, budget=budget, tower_bounds=bounds)
            cost, model = allocation.parameters, fingerprint_targets(targets)
            checks = {
                "parameters": (value["parameters"], cost, f"equal what its ranks cost ({cost:,})"),
                "model": (value["model"], model, f"be the fingerprint of its targets ({model})"),
            }
        except (AttributeError, KeyError, TypeError) as error:
            must = f"must hold ranks and targets, but is incomplete ({error})"
            raise FileError(f"an allocation {must}; write it again.") from None
        for key, (stated, actual, must) in checks.items():
            if stated != actual:
                raise FileError(
                    f"an allocation's `{key}` must {must}, but says {stated!r}; it was edited: write it again."
                )
        return allocation

    def to_json(self, path: AnyPath) -> Path:
        """Writes `allocation.json`, atomically; returns the path."""
        write_json(path, self.to_dict(), sealed=True)
        return Path(path)

    @classmethod
    def from_json(cls, path: AnyPath) -> RankAllocation:
        """Reads what `to_json` wrote; a `FileError` where the file is missing, broken or edited."""
        try:
            return cls.from_dict(read_json(path, what="an allocation"))
        except SettingsError as error:
            raise FileError(f"`{path}` does not hold a valid allocation: {error}") from None

    # --- PEFT --------------------------------------------------------------------------------------------------

    def to_lora_config(self, *, scaling: float | None = None, **peft_kwargs: Any) -> LoraConfig:
        """A plain `peft.LoraConfig` with exactly these ranks; see `rankscope.lora.to_lora_config`."""
        from rankscope.lora import to_lora_config

        return to_lora_config(self, scaling=scaling, **peft_kwargs)

    @classmethod
    def from_lora_config(cls, config: LoraConfig, targets: Sequence[TargetModule]) -> RankAllocation:
        """The ranks that a `peft.LoraConfig` gives to these target modules; see `rankscope.lora.from_lora_config`."""
        from rankscope.lora import from_lora_config

        return _of_adapters(targets, from_lora_config(config, targets), "lora-config")

    @classmethod
    def from_peft_model(
        cls, model: PeftModel, targets: Sequence[TargetModule] | None = None, *, adapter_name: str | None = None
    ) -> RankAllocation:
        """The ranks of a PEFT model's adapter, by default the active one; see `rankscope.lora.from_peft_model`."""
        from rankscope.lora import from_peft_model

        ranks = from_peft_model(model, adapter_name=adapter_name)
        return _of_adapters(find_targets(model, list(ranks)) if targets is None else targets, ranks, "peft-model")


def _of_adapters(targets: Sequence[TargetModule], ranks: Mapping[str, Any], strategy: str) -> RankAllocation:
    """Of adapters that exist, whose ranks may be above the full one."""
    above = {t.name: r if type(r := ranks.get(t.name)) is int and r > t.full_rank else None for t in targets}
    known = [replace(target, existing_rank=above[target.name]) for target in targets]
    return RankAllocation.from_ranks(known, ranks, strategy=strategy)


def _target(value: Any) -> TargetModule:
    target = TargetModule(**value)
    sizes = (target.in_features, target.out_features, target.block or 0, target.existing_rank or 0)
    texts = all(type(text) is str for text in (target.name, target.tower, target.role))
    if not texts or not all(type(size) is int and 0 <= size < 2**63 for size in sizes):
        raise TypeError(f"a target of name {target.name!r}")
    if target.kind not in get_args(Kind):
        raise TypeError(f"a target of kind {target.kind!r}")
    return target
