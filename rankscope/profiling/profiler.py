"""`profile`: runs a model over batches and turns each target module's gradient and inputs into features.

Hooks (`observer.py`) see the input x and the output gradient delta of every target module; no weight needs
`requires_grad`, so the base may be frozen or quantised, and no full gradient is ever kept (`sketch.py`). What the batches'
gradients agree on is signal, their scatter is noise (`features.py`).
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

import rankscope
from rankscope.budget import ParameterBudget
from rankscope.devices import batch_device, whole
from rankscope.exceptions import ProfileError
from rankscope.profiling.batches import Tally, attention_mask, check_loss
from rankscope.profiling.convergence import Convergence
from rankscope.profiling.head import head_warmed
from rankscope.profiling.interrupt import stop_on_interrupt
from rankscope.profiling.layers import SUPPORTED, eager
from rankscope.profiling.observer import Observer, in_range
from rankscope.profiling.processes import gathered, several
from rankscope.profiling.restoring import frozen
from rankscope.profiling.sketch import RandomMatrices, bytes_of_weights, choose_sketch_size, is_finite
from rankscope.profiling.store import SCHEMA, Profile
from rankscope.profiling.table import tabulate
from rankscope.targets import TargetModule, base_modules, find_targets, fingerprint_targets, fused_experts, unwrapped

_OPTIONS: Mapping[str, tuple[Any, float, float]] = {  # type, lowest, highest
    "n_batches": (Integral, 2, math.inf),
    "head_steps": (Integral, 0, math.inf),
    "sketch_size": (Integral, 2, math.inf),
    "tolerance": (Real, 0, math.inf),
    "keep_directions": (Integral, 0, math.inf),
    "max_skipped": (Real, 0, 1),
    "seed": (Integral, 0, 2**32 - 1),
}
LossFunction = Callable[[nn.Module, Any], Tensor]
logger = logging.getLogger(__name__)


def profile(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    targets: Sequence[TargetModule] | None = None,
    loss_fn: LossFunction | None = None,
    n_batches: int | None = None,
    head: Sequence[str] = (),
    head_steps: int = 100,
    head_batches: Iterable[Any] | None = None,
    budget: ParameterBudget | None = None,
    sketch_size: int | None = None,
    tolerance: float | None = None,
    keep_directions: int = 0,
    max_skipped: float = 0.1,
    keep_partial: bool = False,
    seed: int = 0,
    on_batch: Callable[[int, float], None] | None = None,
) -> Profile:
    """Profiles the gradient of the loss, and the inputs, at every target module.

    The model is left as it was: its weights, its `requires_grad` flags, its training mode and its hooks. It is run in
    evaluation mode, so that dropout adds no noise. A model wrapped by PEFT, DistributedDataParallel or torch.compile is taken
    as it is. Memory does not grow with the number of batches. Under torch.distributed, each process passes its own batches
    and all get the profile of all of them.

    Args:
        model: Any torch module, on any device; frozen and quantised bases included.
        batches: Batches of the training data; kept in memory only where `head` is given without `head_batches`. Each counts
            by its number of examples (the first dimension of its first tensor). At least two.
        targets: Which modules; default: `find_targets(model)`. What cannot be profiled (embeddings, experts fused into one
            weight) is named in a warning, skipped, and recorded under `skipped` in the metadata.
        loss_fn: `loss_fn(model, batch)`, a scalar; default: `model(**batch).loss`.
        n_batches: Use this many batches only.
        head: Full names of freshly initialised modules (a new classifier). A gradient through an untrained head says
            little, so they are trained first, alone, and restored afterwards.
        head_steps: AdamW steps on each head.
        head_batches: Batches to train the head on; default: each half of `batches` is profiled behind a head that was
            trained on the other half, since a head that has fitted a batch leaves only noise in its gradient.
        budget: That allocations will have: the sketches grow with it.
        sketch_size: Columns k of the narrow sketch; the wide one has 4 k rows. So many singular values are measured; those
            beyond are estimated (see `Profile.spectra`). Default: twice the mean rank of `budget`, and 56 at least, if all
            sketches together take no more than a quarter of the memory of the model's weights, or 1 GiB; else the largest
            size that does, which a warning says.
        tolerance: Stop once the leading 8 singular values move by no more than this share between looks; default: never.
        keep_directions: Keep so many leading left and right singular vectors of each module, to initialise adapters from.
        max_skipped: The largest share of batches that may be skipped because their loss is NaN or infinite.
        keep_partial: On Ctrl-C, return the profile of the batches so far, as soon as the present one is done.
        seed: Seeds the sketches.
        on_batch: Called after each batch with its index and loss.

    Raises:
        ProfileError: Fewer than two batches, too many without a finite loss, a gradient that is not finite, or none at all.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    >>> batches = [torch.ones(2, 4), -torch.ones(2, 4)]
    >>> taken = profile(model, batches, loss_fn=lambda model, batch: model(batch).square().mean())
    >>> {name: len(values) for name, values in taken.spectra().items()}
    {'0': 3, '2': 1}
    """
    _check_options(
        budget, n_batches=n_batches, head_steps=head_steps, sketch_size=sketch_size, tolerance=tolerance,
        keep_directions=keep_directions, max_skipped=max_skipped, seed=seed,
    )  # fmt: skip
    model = unwrapped(model)
    _check_loaded(model)
    targets, skipped = _profiled(model, tuple(targets) if targets is not None else find_targets(model))
    modules = _modules(model, targets)
    wanted, size = (
        (sketch_size, sketch_size)
        if sketch_size
        else choose_sketch_size(targets, budget.limit if budget else None, bytes_of_weights(model))
    )
    observer = Observer(targets, modules, RandomMatrices(k=size, seed=seed))
    convergence = Convergence(tolerance) if tolerance is not None else None
    run = _Run(
        model=model, loss_fn=loss_fn or _model_loss, observer=observer, device=batch_device(model), tally=Tally()
    )
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())  # a caller may be inside no_grad
        stack.enter_context(eager(model))
        stack.enter_context(frozen(model))
        stream: Iterator[Any] = islice(batches, n_batches)
        if head and head_steps:
            stream = _behind_heads(model, stream, head, head_batches, run.loss, head_steps)
            stack.enter_context(closing(stream))
        stack.enter_context(observer.hooked())
        stop = stack.enter_context(stop_on_interrupt(enabled=keep_partial))
        for index, batch in enumerate(stream):
            run.see(batch)
            if on_batch and run.tally.losses:
                on_batch(index, run.tally.losses[-1])
            if stop.requested or (convergence and _converged(convergence, observer, run.tally)):
                break
    tally = _sum_up(observer, run.tally)
    tally.check(max_skipped)
    silent = _check_taken(observer)
    frame = tabulate(targets, modules, observer.observed, tally, keep_directions)
    metadata = {
        "schema": SCHEMA,
        "model": fingerprint_targets(targets),
        "weights": _fingerprint_weights(model),
        "data": tally.fingerprint,
        "targets": len(targets),
        "skipped": skipped,
        "without_gradient": silent,
        "batches": len(tally.losses),
        "skipped_batches": tally.skipped,
        "interrupted": stop.requested,
        "tokens": tally.tokens,
        "loss": tally.loss,
        "seed": seed,
        "head_steps": head_steps if head else 0,
        "sketch_size": size,
        "sketch_wanted": wanted,
        "versions": {"rankscope": rankscope.__version__, **{name: version(name) for name in ("torch", "transformers")}},
    }
    return Profile(frame, metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """The passes over the batches."""

    model: nn.Module
    loss_fn: LossFunction
    observer: Observer
    device: torch.device
    tally: Tally

    def see(self, batch: Any) -> None:
        """Forward and backward of one batch; an empty one, or one without a finite loss, is passed over."""
        weight = self.tally.weigh(batch)
        if not weight:
            return
        loss = self._backward(batch, weight)
        if loss is None:
            self.tally.skipped += 1
            return
        if not self.tally.losses and (scale := in_range(self.observer.peak())) != 1.0:
            self.tally.scale = scale
            self.observer.reset()
            self._backward(batch, weight)
        self.tally.count(batch, loss)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch that may lie on another device, checked.

        Raises:
            ProfileError: It is no scalar tensor.
        """
        from accelerate.utils import send_to_device

        return check_loss(self.loss_fn(model, send_to_device(batch, self.device)))

    def _backward(self, batch: Any, weight: float) -> float | None:
        """The loss, of which the observer has seen the backward pass; None where it is not finite."""
        mask = attention_mask(batch)
        self.observer.begin_batch(weight, None if mask is None else mask.to(self.device))
        loss = self.loss(self.model, batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            self.observer.drop_batch()
            return None
        (loss * (weight * self.tally.scale)).backward()
        self.observer.end_batch()
        return value


def _check_options(budget: Any, **options: Any) -> None:
    for name, value in options.items():
        kind, low, high = _OPTIONS[name]
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high):
            number = "a whole number" if kind is Integral else "a number"
            bounds = f"from {low} to {high}" if high < math.inf else f"of {low} or more"
            raise ProfileError(f"`{name}` must be {number} {bounds}, but got {value!r}.")
    if budget is not None and not isinstance(budget, ParameterBudget):
        raise ProfileError(
            f"`budget` must be a ParameterBudget, but got {budget!r}; pass `ParameterBudget({budget!r})`."
        )
    if options["tolerance"] is not None and several():
        raise ProfileError("`tolerance` must be None under torch.distributed; give `n_batches` instead.")


def _behind_heads(
    model: nn.Module,
    batches: Iterator[Any],
    head: Sequence[str],
    head_batches: Iterable[Any] | None,
    loss_fn: LossFunction,
    steps: int,
) -> Generator[Any]:
    """Hands batches out while the head is one that was trained on others: cross-fitted, unless there are batches for it.

    A head that has fitted the very batches that are profiled leaves only their noise in the gradient below it.
    """
    if head_batches is not None:
        with head_warmed(model, head, head_batches, loss_fn, steps=steps):
            yield from batches
        return
    held = list(batches)
    for mine, others in ((held[0::2], held[1::2]), (held[1::2], held[0::2])) if len(held) > 1 else ():
        with head_warmed(model, head, others, loss_fn, steps=steps):
            yield from mine


def _converged(convergence: Convergence, observer: Observer, tally: Tally) -> bool:
    if not convergence.due(done := len(tally.losses)):
        return False
    scale = 1.0 / sum(tally.weights)
    values = {name: seen.store.decompose().values * scale for name, seen in observer.observed.items()}
    return convergence.reached(done, values)


def _sum_up(observer: Observer, tally: Tally) -> Tally:
    """Sums over all processes, in units of the first that has a batch: of its first batch's size, and of its scale."""
    tallies: list[Tally] = gathered(tally)
    together = Tally.together(tallies)
    if several() and tally.losses:
        unit, scale = tally.first_size / together.first_size, together.scale / tally.scale
        for seen in observer.observed.values():
            for tensor in seen.store.tensors():
                tensor.mul_(unit * scale)
            seen.squares.mul_(unit * scale**2)
    if several():
        observer.sum_over_processes()
    return together


def _check_taken(observer: Observer) -> list[str]:
    """What can only be told in the end: looking at each gradient on the way would make a GPU wait each time."""
    observed = observer.observed
    silent = [name for name, seen in observed.items() if not seen.batches]
    if len(silent) == len(observed):
        raise ProfileError(
            f"`{silent[0]}` and every other target must get a gradient from the loss, but none does; check `targets`."
        )
    if silent:
        logger.warning(
            "%d of %d modules got no gradient and count as zero, as `%s`", len(silent), len(observed), silent[0]
        )
    if broken := [name for name, seen in observed.items() if not is_finite(seen.tensors())]:
        raise ProfileError(
            f"the gradient at `{broken[0]}` must be finite, but is not; check the loss, or use float32 or bfloat16."
        )
    inputs = [name for name, seen in observed.items() if seen.activations and not is_finite([seen.activations.squares])]
    if inputs:
        raise ProfileError(
            f"the inputs of `{inputs[0]}` must be finite and below 1e18, but are not; check the data and the weights."
        )
    return silent


# --- the model ---------------------------------------------------------------------------------------------------


def _profiled(model: nn.Module, targets: Sequence[TargetModule]) -> tuple[tuple[TargetModule, ...], dict[str, str]]:
    """The targets that can be profiled, and why the others, and the model's fused experts, cannot."""
    skipped = {t.name: f"{t.kind} modules cannot be profiled" for t in targets if t.kind not in SUPPORTED}
    skipped |= {t.name: "modules without inputs or outputs have no rank" for t in targets if not t.full_rank}
    if len(skipped) == len(targets):
        raise ProfileError(f"`targets` must hold a module of kind {', '.join(SUPPORTED)}, but hold none; find others.")
    skipped |= dict.fromkeys(fused_experts(model), "experts fused into one 3-D weight cannot be profiled")
    for reason, count in Counter(skipped.values()).items():
        first = next(name for name in skipped if skipped[name] == reason)
        logger.warning("`%s` is left out: %s (%d such)", first, reason, count)
    return tuple(target for target in targets if target.name not in skipped), skipped


def _modules(model: nn.Module, targets: Sequence[TargetModule]) -> dict[str, nn.Module]:
    present = dict(base_modules(model))
    for target in targets:
        if target.name not in present:
            raise ProfileError(
                f"`targets` must be modules of this model, but it has no `{target.name}`; find them again."
            )
    return {target.name: present[target.name] for target in targets}


def _check_loaded(model: nn.Module) -> None:
    if fixed := [name for name, parameter in model.named_parameters() if parameter.is_inference()]:
        raise ProfileError(
            f"the model's weights must take part in a backward pass, but `{fixed[0]}` was made in torch.inference_mode; load "
            "the model outside it."
        )
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return  # accelerate loads what is offloaded
    if meta := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ProfileError(
            f"the model's weights must be loaded, but `{meta[0]}` is on the meta device; load them first."
        )


def _model_loss(model: nn.Module, batch: Any) -> Any:
    if not isinstance(batch, Mapping):
        raise ProfileError(
            f"batches must be mappings of the model's inputs, but got a {type(batch).__name__}; pass `loss_fn`."
        )
    outputs = model(**batch)
    if not hasattr(outputs, "loss"):
        raise ProfileError(
            f"the model must return an output with `loss`, but returned a {type(outputs).__name__}; pass `loss_fn`."
        )
    return outputs.loss


def _fingerprint_weights(model: nn.Module) -> str:
    from accelerate.utils import align_module_device

    digest = hashlib.sha256()
    for name, _ in model.named_parameters():
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        with align_module_device(module):
            parameter = getattr(module, attribute)
            corner = whole(parameter.detach()).flatten()[:16].tolist()
            digest.update(repr((name, tuple(parameter.shape), corner)).encode())
    return digest.hexdigest()[:16]
