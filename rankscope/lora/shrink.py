"""Shrink: cut an adapter that is trained to a parameter budget, where its output loses least."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn

from rankscope.allocation import RankAllocation
from rankscope.budget import ParameterBudget, RankLimits, allocate_marginal, allocate_proportional
from rankscope.errors import ModelError, SettingsError, checked
from rankscope.files import AnyPath
from rankscope.lora.config import with_ranks
from rankscope.lora.factors import singular_values, truncate_svd
from rankscope.lora.resize import EMBEDDING_FACTORS, LiveAdapter
from rankscope.lora.saved import SavedAdapter, read_adapter, write_adapter

RULES = ("energy", "threshold", "uniform")
_NEGLIGIBLE = 1e-12  # of the largest energy: rounding errors of directions that are not there


class Moments(NamedTuple):
    """Second moments of what goes through one module's adapter, both (rank, rank) in float64."""

    inputs: Tensor  # E[(A x)(A x)^T], the mean over positions
    gradients: Tensor | None = None  # E[(B^T g)(B^T g)^T], g the loss's gradient at the output; summed over positions


@dataclass(frozen=True, slots=True, kw_only=True)
class ShrunkAdapter:
    """What `shrink` wrote."""

    path: Path
    before: RankAllocation
    after: RankAllocation
    energies: Mapping[str, NDArray[np.float64]]  # of each module's ranks in falling order: squared singular values

    @property
    def kept(self) -> float:
        """The fraction of the energy that is left."""
        whole = sum(float(energy.sum()) for energy in self.energies.values())
        left = sum(float(energy[: self.after.ranks[name]].sum()) for name, energy in self.energies.items())
        return left / whole if whole else 1.0

    def kept_of(self, name: str) -> float:
        """The fraction of one module's energy that is left; 1 if it had none."""
        energy = self.energies[name]
        whole = float(energy.sum())
        return float(energy[: self.after.ranks[name]].sum()) / whole if whole else 1.0


@checked
def shrink(
    adapter: AnyPath,
    parameters: int,
    out: AnyPath,
    *,
    rule: str = "energy",
    moments: Mapping[str, Moments] | None = None,
) -> ShrunkAdapter:
    """Cut a LoRA adapter of any ranks to a budget, without training, and write it as PEFT loads it.

    With the update W = s B A of a module, the second moment C of its inputs x and G of the loss's gradients at its outputs, the
    rank-k update W' that loses least, tr(G (W - W') C (W - W')^T), is the truncated SVD of G^(1/2) W C^(1/2), mapped back by the
    inverse roots (weighted Eckart-Young; as a loss it is K-FAC's, Martens and Grosse, arXiv 1503.05671). What is lost is the sum
    of the squared singular values that are cut, the energy. Only A C A^T and B^T G B are needed, (rank, rank) by module, which
    `measure_moments` measures. Without gradients G is the identity, and it is the output that loses least; without moments C is,
    too, and it is the weight.

    Args:
        adapter: A folder that `save_pretrained` wrote: LoRA, rsLoRA or DoRA. Trained modules (`modules_to_save`) are copied.
        parameters: The most adapter parameters, trained modules not counted.
        out: The new folder.
        rule: `energy` fills the budget with the ranks of most energy per parameter; `threshold` keeps all singular values above
            one threshold for the whole adapter (PARA, Kumaravelu et al., arXiv 2604.27796), and then what still fits; `uniform`
            gives every module the same rank. Modules of DoRA, or with biases, keep rank 1 at least, since they act without.
        moments: By module, as `measure_moments` measures them on this adapter.

    Raises:
        FileError: `adapter` is no adapter's folder.
        ModelError: Its ranks cannot change, or its update is zero.
        SettingsError: The budget pays for no rank.
    """
    if rule not in RULES:
        raise SettingsError(f"`rule` must be among {', '.join(RULES)}, but got {rule!r}.")
    saved = read_adapter(adapter)
    before = saved.allocation
    if moments is not None:
        _check_moments(saved, moments)
    energies = {name: _energy(saved, name, moments) for name in saved.keys}
    least = min(target.rank_cost for target in before.targets)
    if parameters < least:
        raise SettingsError(
            f"`parameters` must pay for one rank at least ({least:,} parameters, of the smallest module), but got {parameters:,}."
        )
    if parameters >= before.parameters:
        path = write_adapter(saved, out, saved.config, saved.tensors)
        return ShrunkAdapter(path=path, before=before, after=before.renamed(rule), energies=energies)
    after = _allocate(saved, before, energies, parameters, rule)
    tensors = dict(saved.tensors)
    for name, rank in after.ranks.items():
        _cut(saved, tensors, name, rank, moments)
    config = with_ranks(saved.config, after.ranks, saved.scalings)
    path = write_adapter(saved, out, config, tensors)
    return ShrunkAdapter(path=path, before=before, after=after, energies=energies)


def _allocate(
    saved: SavedAdapter,
    before: RankAllocation,
    energies: Mapping[str, NDArray[np.float64]],
    parameters: int,
    rule: str,
) -> RankAllocation:
    """The ranks after the cut: none without energy, and none above the present one."""
    largest = max(float(energy.max()) for energy in energies.values())
    if largest == 0.0:
        raise ModelError(f"the adapter in `{saved.folder}` must change the model to be shrunk, but its update is zero.")
    config = saved.config
    lowest = int(bool(config.use_dora or config.lora_bias or config.bias != "none"))
    highest = {name: max(int((each > _NEGLIGIBLE * largest).sum()), lowest) for name, each in energies.items()}
    budget, limits = ParameterBudget(int(parameters)), RankLimits(min_rank=lowest, max_rank=highest)
    if rule == "uniform":
        allocation = allocate_proportional(before.targets, dict.fromkeys(energies, 1.0), budget, limits)
    else:
        costs = {target.name: target.rank_cost for target in before.targets}
        gains = {
            name: energy if rule == "energy" else np.sqrt(energy) * costs[name] for name, energy in energies.items()
        }
        allocation = allocate_marginal(before.targets, gains, budget, limits)
    return allocation.renamed(rule)


class _Weighted(NamedTuple):
    """Factors whose product has the singular values of a module's weighted update, and what takes cut ones back."""

    a: Tensor  # (m, n) with m the rank
    b: Tensor  # (p, m)
    to_rows: Tensor | None = None  # (n, inputs): rows of `a` to rows of A; None: they are
    to_columns: Tensor | None = None  # (outputs, p): columns of `b` to columns of B; None: they are


def _weighted(saved: SavedAdapter, name: str, moments: Mapping[str, Moments] | None) -> _Weighted:
    """In float64. A C^(1/2) = M^(1/2) Q with Q = M^(-1/2) A C^(1/2), whose rows are orthonormal; G^(1/2) B likewise."""
    a, b = (factor.double() for factor in saved.factors(name))
    if moments is None:
        return _Weighted(a, b)
    root_a, inverse_a = _roots(moments[name].inputs)
    if (gradients := moments[name].gradients) is None:
        return _Weighted(root_a, b, to_rows=inverse_a @ a)
    root_b, inverse_b = _roots(gradients)
    return _Weighted(root_a, root_b, to_rows=inverse_a @ a, to_columns=b @ inverse_b)


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a positive semidefinite matrix, and the pseudoinverse of the root."""
    values, vectors = torch.linalg.eigh(moment.double().cpu())
    root = values.clamp(min=0.0).sqrt()
    there = root > 1e-7 * root.max()  # half the digits of the moment
    inverse = torch.where(there, 1.0 / torch.where(there, root, 1.0), 0.0)
    return (vectors * root) @ vectors.T, (vectors * inverse) @ vectors.T


def _energy(saved: SavedAdapter, name: str, moments: Mapping[str, Moments] | None) -> NDArray[np.float64]:
    """The squared singular values of a module's update, scaled and weighted; one for each rank up to the full one."""
    a, b, *_ = _weighted(saved, name, moments)
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ModelError(f"the factors of `{name}` must be finite to be shrunk, but are not; go back to a checkpoint.")
    energy: NDArray[np.float64] = (saved.scalings[name] * singular_values(a, b)).square().numpy()
    return energy


def _cut(
    saved: SavedAdapter, tensors: dict[str, Tensor], name: str, rank: int, moments: Mapping[str, Moments] | None
) -> None:
    """Put a module's factors of this rank in place of its present ones; those that keep their rank stay to the bit."""
    key_a, key_b = saved.keys[name]
    old_a, old_b = tensors[key_a], tensors[key_b]
    if rank == len(old_a):
        return
    if rank == 0:
        del tensors[key_a], tensors[key_b]
        return
    a, b, to_rows, to_columns = _weighted(saved, name, moments)
    new = truncate_svd(a, b, rank)
    rows = new.a if to_rows is None else new.a @ to_rows
    columns = new.b if to_columns is None else to_columns @ new.b
    tensors[key_a] = rows.to(old_a).reshape(rank, *old_a.shape[1:])
    tensors[key_b] = columns.to(old_b).reshape(len(old_b), rank, *old_b.shape[2:])


def _check_moments(saved: SavedAdapter, moments: Mapping[str, Moments]) -> None:
    for name, rank in saved.ranks.items():
        if name not in moments:
            raise ModelError(
                f"`moments` must hold every module of the adapter, but lack `{name}`; measure them on this adapter."
            )
        for moment in (each for each in moments[name] if each is not None):
            if (shape := tuple(moment.shape)) != (rank, rank):
                what = f"of shape {(rank, rank)}, but are of shape {shape}"
                raise ModelError(f"the moments of `{name}` must be {what}; measure them on this adapter.")
            if not torch.isfinite(moment).all():
                raise ModelError(f"the moments of `{name}` must be finite, but are not; use other batches.")


# --- the moments ----------------------------------------------------------------------------------------------------


@checked
def measure_moments(
    model: PeftModel,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    gradients: bool = True,
    adapter_name: str | None = None,
) -> dict[str, Moments]:
    """The moments of each adapted module over batches of data, by which `shrink` weighs what it cuts.

    Means and sums are over all positions and patches; padding of an `attention_mask` is left out. The model is in evaluation
    mode meanwhile; nothing of it is changed. A ModelError if no batch reaches a module.

    Args:
        model: A PEFT model with the adapter that is to be shrunk.
        batches: Some hundred examples are enough: a moment has rank * rank entries.
        loss: Returns the scalar loss of a batch, `loss(model, batch)`.
        gradients: Whether to measure those of the outputs, which takes a backward pass.
        adapter_name: The adapter; by default the only one.
    """
    adapter = LiveAdapter(model, adapter_name)
    sums = _Sums(adapter, gradients)
    training, owned = model.training, [factor for module in adapter.modules.values() for factor in module.factors]
    before = [(factor, factor.requires_grad, factor.grad) for factor in owned]
    model.eval()
    with ExitStack() as handles:
        handles.callback(model.train, training)
        for name, module in adapter.modules.items():
            handles.callback(module.layer.register_forward_hook(partial(sums.see, name), with_kwargs=True).remove)
        for factor in owned:
            factor.requires_grad_(gradients)
        try:
            for batch in batches:
                mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                sums.mask = mask if isinstance(mask, Tensor) else None
                sums.batches += 1
                with torch.set_grad_enabled(gradients):
                    value = loss(model, batch)
                if gradients:
                    torch.autograd.backward(value, inputs=owned)
        finally:
            for factor, required, gradient in before:
                factor.requires_grad_(required)
                factor.grad = gradient
    return sums.moments()


class _Sums:
    """What the hooks add up."""

    def __init__(self, adapter: LiveAdapter, gradients: bool) -> None:
        self.adapter, self.mask, self.batches = adapter, cast(Tensor | None, None), 0
        self.of_inputs: dict[str, Tensor] = {}
        self.of_gradients: dict[str, Tensor] | None = {} if gradients else None
        self.counts = dict.fromkeys(adapter.modules, 0)

    def see(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Follow a call of a module."""
        inputs: Tensor = args[0] if args else next(iter(kwargs.values()))
        kept = None
        if self.mask is not None and inputs.shape[:2] == self.mask.shape:
            kept = self.mask.flatten().bool()
        with torch.no_grad():
            rows = _chosen(self._projected(name, inputs.detach()), kept)
        self.of_inputs[name] = self.of_inputs.get(name, 0.0) + rows.T @ rows
        self.counts[name] += len(rows)
        if self.of_gradients is not None and output.requires_grad:
            output.register_hook(partial(self._receive, name, kept))

    def _projected(self, name: str, inputs: Tensor) -> Tensor:
        """(n, rank) in float64: A x at every position."""
        module = self.adapter.modules[name]
        a = module.factors[0].detach()
        if module.parts == EMBEDDING_FACTORS:
            found = a.T[inputs.flatten()]
        elif a.ndim > 2:
            found = module.entry("lora_A")(inputs.to(a.dtype)).movedim(1, -1).reshape(-1, len(a))
        else:
            found = inputs.reshape(-1, inputs.shape[-1]).to(a.dtype) @ a.T
        return found.double()

    def _receive(self, name: str, kept: Tensor | None, gradient: Tensor) -> None:
        b = self.adapter.modules[name].factors[1].detach().flatten(1).double()
        deltas = (gradient.movedim(1, -1) if self.adapter.modules[name].factors[1].ndim > 2 else gradient).detach()
        columns = _chosen(deltas.reshape(-1, len(b)).double() @ b, kept)
        assert self.of_gradients is not None
        self.of_gradients[name] = self.of_gradients.get(name, 0.0) + columns.T @ columns

    def moments(self) -> dict[str, Moments]:
        """Means over positions of inputs, and over batches of gradients."""
        if unseen := [name for name, count in self.counts.items() if not count]:
            what = f"but none reaches `{unseen[0]}` ({len(unseen)} such)"
            raise ModelError(f"the batches must reach every adapted module, {what}; use others.")
        if self.of_gradients is not None and (unmoved := sorted(self.counts.keys() - self.of_gradients.keys())):
            what = f"but not on that of `{unmoved[0]}` ({len(unmoved)} such)"
            raise ModelError(f"the loss must depend on every adapted module's output, {what}; pass `gradients=False`.")
        return {
            name: Moments(
                total / self.counts[name],
                None if self.of_gradients is None else self.of_gradients[name] / self.batches,
            )
            for name, total in self.of_inputs.items()
        }


def _chosen(rows: Tensor, kept: Tensor | None) -> Tensor:
    return rows if kept is None else rows[kept.to(rows.device)]
