"""Rank prefixes: a LoRA model whose forward pass uses only the leading ranks of each module, as many as an allocation says."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rankscope.allocation import RankAllocation
from rankscope.exceptions import AllocationError


class RankPrefix:
    """Restricts a LoRA model to the leading ranks of each module, by hooks; its weights are left alone.

    With r ranks active, a module's update is s B[:, :r] A[:r], that of an adapter of rank r with the same scaling s, and no
    gradient reaches the other ranks. So one nested adapter holds every allocation up to its own ranks (DyLoRA: Valipour,
    Rezagholizadeh, Kobyzev, Ghodsi, arXiv 2210.07558). All ranks are active until `activate`, and again after `remove`, which
    leaving the context calls.

    Args:
        model: With LoRA on linear or convolutional modules.

    Raises:
        AllocationError: The active adapter is DoRA, whose norms take all ranks, or adapts an embedding.
    """

    def __init__(self, model: PeftModel) -> None:
        adapter = str(model.active_adapter)
        layers = {
            name: layer
            for name, layer in model.get_base_model().named_modules()
            if isinstance(layer, LoraLayer) and adapter in layer.r
        }
        for name, layer in layers.items():
            if adapter not in layer.lora_A or layer.use_dora.get(adapter, False):
                kind = "an embedding" if adapter not in layer.lora_A else "DoRA"
                raise AllocationError(
                    f"`model` must have plain LoRA on linear or convolutional modules for rank prefixes, "
                    f"but `{name}` is {kind}; leave it out."
                )
        self.capacity = {name: int(layer.r[adapter]) for name, layer in layers.items()}
        self._active = dict(self.capacity)
        self._handles = [
            layer.lora_A[adapter].register_forward_hook(self._restrict(name)) for name, layer in layers.items()
        ]

    def activate(self, allocation: RankAllocation) -> None:
        """Makes the allocation's ranks the active ones; modules that it does not name get none.

        Raises:
            AllocationError: It asks for more ranks than a module has.
        """
        ranks = {name: rank for name, rank in allocation.ranks.items() if rank}
        if beyond := [name for name, rank in ranks.items() if rank > self.capacity.get(name, 0)]:
            raise AllocationError(
                f"`allocation` must stay within the adapter's ranks, but asks for {ranks[beyond[0]]} of `{beyond[0]}`, "
                f"which has {self.capacity.get(beyond[0], 0)}; lower it, or train a larger adapter."
            )
        self._active = {name: ranks.get(name, 0) for name in self.capacity}

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _restrict(self, name: str) -> Any:
        """A forward hook on A that puts zeros in the place of the inactive ranks' outputs."""

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            rank, capacity = self._active[name], self.capacity[name]
            if rank == capacity:
                return None
            axis = 1 if isinstance(module, nn.Conv2d) else output.dim() - 1  # where A's output has its ranks
            padding = [0, 0] * (output.dim() - 1 - axis) + [0, capacity - rank]
            return nn.functional.pad(output.narrow(axis, 0, rank), padding)

        return hook
