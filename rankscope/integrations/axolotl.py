"""A plugin with which an axolotl YAML takes an allocation file, and a controller that moves its ranks.

    plugins:
      - rankscope.integrations.axolotl.RankscopePlugin
    rankscope:
      allocation: out/mine/allocation.json
      controller: true # or settings, as in {every: 50}

Written against axolotl's documented `BasePlugin` (src/axolotl/integrations/base.py at commit 067b021, July 2026). The tests call
these hooks as its loader does; they do not run axolotl itself, which rankscope does not install.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import BaseModel

from rankscope.allocation import RankAllocation
from rankscope.budget import ParameterBudget
from rankscope.control import RankControllerCallback
from rankscope.errors import SettingsError
from rankscope.lora import export
from rankscope.settings import AxolotlSettings

try:
    from axolotl.integrations.base import BasePlugin  # type: ignore[import-not-found]
except ImportError:  # the hooks can be called without axolotl
    BasePlugin = object

_KEYS = ("lora_r", "lora_alpha", "lora_target_modules", "lora_rank_pattern", "lora_alpha_pattern")


class RankscopeArgs(BaseModel):
    """What axolotl's schema gains."""

    rankscope: dict[str, Any] | None = None


class RankscopePlugin(BasePlugin):  # type: ignore[misc]
    """Fills axolotl's LoRA keys from an allocation; checks that it is of this model; runs the controller."""

    def __init__(self) -> None:
        super().__init__()
        self._settings: AxolotlSettings | None = None
        self._allocation: RankAllocation | None = None

    def get_input_args(self) -> str:
        """Name the model of the key `rankscope`."""
        return f"{RankscopeArgs.__module__}.{RankscopeArgs.__qualname__}"

    def register(self, cfg: Any) -> None:
        """Fill `lora_r`, `lora_alpha`, `lora_target_modules` and both patterns, before axolotl validates the YAML."""
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
        allocation = RankAllocation.from_json(settings.allocation)
        if set_too := [key for key in (*_KEYS, "lora_target_linear") if cfg.get(key)]:
            raise SettingsError(f"`{set_too[0]}` follows from `rankscope.allocation`; leave it out.")
        values = yaml.safe_load(export(allocation, "axolotl", scaling=settings.scaling))
        for key in _KEYS:
            if key in values:
                cfg[key] = values[key]
        self._settings, self._allocation = settings, allocation

    def pre_lora_load(self, cfg: Any, model: Any) -> None:
        """Raise a SettingsError if the allocation is of another model."""
        if self._allocation is None:
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


def _plain(value: Any) -> Any:
    """A value without axolotl's own kind of dict."""
    return {key: _plain(each) for key, each in value.items()} if isinstance(value, Mapping) else value
