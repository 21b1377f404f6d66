"""A plugin with which an axolotl YAML takes an allocation file, or allocates on the spot, and a controller that moves ranks.

    plugins:
      - rankscope.integrations.axolotl.RankscopePlugin
    rankscope:
      budget: {uniform_rank: 8} # or `allocation: out/mine/allocation.json`
      strategy: one-shot
      controller: true # or settings, as in {every: 50}

On the spot means: axolotl prepares its data set and loads its model; then, before it adds adapters, rows of that very data set
profile that very model, and the ranks go into axolotl's own keys. Profile and allocation are kept in `OUTPUT_DIR/rankscope`.

Written against axolotl's documented `BasePlugin` (src/axolotl/integrations/base.py at commit 067b021, July 2026).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import yaml
from pydantic import BaseModel
from torch import Tensor, nn

from rankscope.allocation import RankAllocation
from rankscope.budget import ParameterBudget
from rankscope.control import RankControllerCallback
from rankscope.distributed import batch_device, is_first, mixed_precision, n_processes, process_index
from rankscope.errors import SettingsError, TaskError
from rankscope.lora import export
from rankscope.profiling import profile
from rankscope.settings import AxolotlSettings
from rankscope.strategies import allocate, needs_profile
from rankscope.targets import find_targets
from rankscope.tasks import IGNORED

try:
    from axolotl.integrations.base import BasePlugin  # type: ignore[import-not-found]
except ImportError:  # the hooks can be called without axolotl
    BasePlugin = object

logger = logging.getLogger("axolotl.rankscope")  # axolotl shows what its own loggers say

_KEYS = ("lora_r", "lora_alpha", "lora_target_modules", "lora_rank_pattern", "lora_alpha_pattern")
_KERNELS = ("lora_qkv_kernel", "lora_o_kernel", "lora_mlp_kernel", "lora_embedding_kernel")
_SHARDS = ("fsdp", "fsdp_config", "deepspeed", "tensor_parallel_size", "context_parallel_size")


class RankscopeArgs(BaseModel):
    """What axolotl's schema gains."""

    rankscope: dict[str, Any] | None = None


class RankscopePlugin(BasePlugin):  # type: ignore[misc]
    """Fills axolotl's LoRA keys from an allocation, which it reads or makes; runs the controller."""

    def __init__(self) -> None:
        super().__init__()
        self._settings: AxolotlSettings | None = None
        self._allocation: RankAllocation | None = None
        self._data: Any = None  # axolotl's `TrainDatasetMeta`

    def get_input_args(self) -> str:
        """Name the model of the key `rankscope`."""
        return f"{RankscopeArgs.__module__}.{RankscopeArgs.__qualname__}"

    def register(self, cfg: Any) -> None:
        """Check the section, before axolotl validates the YAML; with an allocation file, fill axolotl's keys."""
        section = cfg.get("rankscope")
        if not isinstance(section, Mapping) or not section:
            raise SettingsError(
                "the axolotl YAML must have a section `rankscope` with its plugin; see rankscope's docs."
            )
        settings = AxolotlSettings.of({key: _plain(value) for key, value in section.items()})
        if cfg.get("adapter") not in ("lora", "qlora"):
            raise SettingsError(f"`adapter` must be lora or qlora for `rankscope`, but is {cfg.get('adapter')!r}.")
        if cfg.get("peft_use_rslora"):
            raise SettingsError("`peft_use_rslora` must be off, since every module has the same scaling; leave it out.")
        source = "budget" if settings.allocation is None else "allocation"
        if set_too := [key for key in (*_KEYS, "lora_target_linear") if cfg.get(key)]:
            raise SettingsError(f"`{set_too[0]}` follows from `rankscope.{source}`; leave it out.")
        if settings.controller is not False:
            _turn_off_kernels(cfg)
        self._settings = settings
        if settings.allocation is None:
            _check_on_the_spot(cfg)
        else:
            self._fill(cfg, RankAllocation.from_json(settings.allocation))

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> Any:
        """Let axolotl prepare its data, and keep it to profile on; None, as axolotl takes it, where no profile is needed."""
        settings = self._settings
        if preprocess or settings is None or settings.allocation is not None or not needs_profile(settings.strategy):
            return None
        from axolotl.common.datasets import load_datasets  # type: ignore[import-not-found]

        self._data = load_datasets(cfg=cfg)
        return self._data

    def pre_lora_load(self, cfg: Any, model: Any) -> None:
        """Allocate on the spot; or raise a SettingsError if the allocation is of another model."""
        if self._settings is None:
            return
        if self._allocation is None:
            self._fill(cfg, self._made(cfg, model, self._settings))
            return
        present = {name for name, _ in model.named_modules()}
        if missing := [name for name, rank in self._allocation.ranks.items() if rank and name not in present]:
            lacks = f"{type(model).__name__} has no module {missing[0]!r} ({len(missing)} such)"
            raise SettingsError(f"`rankscope.allocation` must be for this model, but {lacks}; allocate for it again.")

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Bind a controller to the trainer, which adds its callback itself."""
        settings, allocation = self._settings, self._allocation
        if settings is None or allocation is None or settings.controller is False:
            return []
        given = {} if settings.controller is True else dict(settings.controller)
        RankControllerCallback(budget=ParameterBudget.of(allocation), settings=given).bind(trainer)
        return []

    def _fill(self, cfg: Any, allocation: RankAllocation) -> None:
        """Set `lora_r`, `lora_alpha`, `lora_target_modules` and both patterns."""
        assert self._settings is not None
        values = yaml.safe_load(export(allocation, "axolotl", scaling=self._settings.scaling))
        for key in _KEYS:
            if key in values:
                cfg[key] = values[key]
        self._allocation = allocation

    def _made(self, cfg: Any, model: Any, settings: AxolotlSettings) -> RankAllocation:
        """The allocation of a profile of this model on rows of axolotl's data set; written beside the adapter."""
        assert settings.budget is not None
        targets, seed = find_targets(model, settings.targets), int(cfg.get("seed") or 0)
        budget = ParameterBudget.from_settings(settings.budget, targets)
        folder, taken = Path(str(cfg.get("output_dir") or "model-out"), "rankscope"), None
        if needs_profile(settings.strategy):
            batches = _batches(self._data, settings, int(cfg.get("micro_batch_size") or 1), seed, batch_device(model))
            with _whole_attention(model):
                taken = profile(
                    model, batches, targets=targets, loss_fn=_loss, budget=budget, seed=seed, settings=settings.profile
                )
        allocation = allocate(settings.strategy, targets=targets, budget=budget, profile=taken, seed=seed)
        if is_first():
            folder.mkdir(parents=True, exist_ok=True)
            if taken is not None:
                taken.to_parquet(folder / "profile.parquet")
            allocation.to_json(folder / "allocation.json")
        adapted, most = sum(rank > 0 for rank in allocation.vector), max(allocation.vector)
        logger.info(
            "%s: %d of %d modules adapted, largest rank %d, %s adapter parameters; kept in %s",
            settings.strategy, adapted, len(targets), most, f"{allocation.parameters:,}", folder,
        )  # fmt: skip
        return allocation


def _plain(value: Any) -> Any:
    """A value without axolotl's own kind of dict."""
    return {key: _plain(each) for key, each in value.items()} if isinstance(value, Mapping) else value


def _turn_off_kernels(cfg: Any) -> None:
    """Keep axolotl from turning on LoRA kernels, which compute adapters past their modules; a SettingsError if the YAML did."""
    if on := [key for key in _KERNELS if cfg.get(key)]:
        must = f"`rankscope.controller` must see the adapters' gradients, but `{on[0]}` computes them past the modules"
        raise SettingsError(f"{must}; leave it out, or the controller.")
    for key in _KERNELS:
        cfg[key] = False


@contextmanager
def _whole_attention(model: nn.Module) -> Iterator[None]:
    """Give attention the projections that axolotl's LoRA kernels take out of its `forward` and put back with the adapters."""
    try:
        from axolotl.monkeypatch import lora_kernels  # type: ignore[import-not-found]
    except ImportError:  # no such kernels
        yield
        return
    cut: list[Any] = [each for each in model.modules() if hasattr(type(each), "_original_forward")]
    for attention in cut:
        attention.apply_qkv = MethodType(lora_kernels.original_apply_qkv_optional_v, attention)
        attention.apply_o = MethodType(lora_kernels.original_apply_o, attention)
    try:
        yield
    finally:
        for attention in cut:
            del attention.apply_qkv, attention.apply_o


def _check_on_the_spot(cfg: Any) -> None:
    """Raise a SettingsError where there would be no rows to profile on, or no whole model."""
    remedy = "allocate with `rankscope profile` and `rankscope allocate` first, and set `rankscope.allocation`."
    if kind := cfg.get("rl"):
        raise SettingsError(
            f"`rankscope.budget` must profile on supervised rows, but `rl` is {getattr(kind, 'value', kind)}; {remedy}"
        )
    if shards := [key for key in _SHARDS if cfg.get(key) and cfg.get(key) != 1]:
        raise SettingsError(f"`rankscope.budget` must profile a whole model, but `{shards[0]}` shards it; {remedy}")
    if cfg.get("lora_model_dir"):
        raise SettingsError("`lora_model_dir` already has ranks, and `rankscope.budget` makes others; leave one out.")


def _batches(
    data: Any, settings: AxolotlSettings, size: int, seed: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Padded batches of rows of the training set, at random if it has a length; each process has its own."""
    must = "`rankscope.budget` must profile on tokenised rows of axolotl's training set"
    rows = getattr(data, "train_dataset", None)
    if rows is None:
        raise TaskError(
            f"{must}, but this way to run axolotl has not loaded them through its plugins; use `axolotl train`."
        )
    processes, place = n_processes(), process_index()
    n_rows = (settings.profile.n_batches or 32) * size * processes
    if hasattr(rows, "__len__"):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()[:n_rows]
        chosen: Iterator[Any] = (rows[index] for index in order)
    else:
        chosen = islice(iter(rows), n_rows)
    mine = [row for number, row in enumerate(chosen) if number % processes == place]
    if odd := [row for row in mine if not {"input_ids", "labels"} <= set(row)]:
        raise TaskError(
            f"{must}, but they hold {', '.join(map(str, odd[0]))}; allocate first, with `rankscope profile`."
        )
    learned = [row for row in mine if any(label != IGNORED for label in row["labels"])]
    for start in range(0, len(learned), size):
        yield _padded(learned[start : start + size], device)


def _padded(rows: Sequence[Mapping[str, Any]], device: torch.device) -> dict[str, Tensor]:
    """A batch of rows, padded on the right."""
    tokens, labels = ([torch.as_tensor(row[name]).long() for row in rows] for name in ("input_ids", "labels"))
    pad = nn.utils.rnn.pad_sequence
    batch = {
        "input_ids": pad(tokens, batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=IGNORED),
    }
    batch["attention_mask"] = pad([torch.ones_like(each) for each in tokens], batch_first=True)
    return {name: value.to(device) for name, value in batch.items()}


def _loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    with mixed_precision(model):
        loss: Tensor = model(**batch).loss
    return loss
