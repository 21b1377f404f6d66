"""`profile`: runs a model over batches and turns each target module's gradient and inputs into features.

Hooks (`observer.py`) see the input x and the output gradient delta of every target module; no weight needs
`requires_grad`, so the base may be frozen or quantised, and no full gradient is ever kept (`sketch.py`). What the batches'
gradients agree on is signal, their scatter is noise (`features.py`).
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from importlib.metadata import version
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

import rankscope
from rankscope.budget import ParameterBudget
from rankscope.exceptions import ProfileError
from rankscope.profiling.batches import Tally, attention_mask, check_loss
from rankscope.profiling.convergence import Convergence
from rankscope.profiling.head import head_warmed
from rankscope.profiling.interrupt import stop_on_interrupt
from rankscope.profiling.layers import SUPPORTED
from rankscope.profiling.observer import Observer, module_device
from rankscope.profiling.processes import gathered, several, sum_over_processes
from rankscope.profiling.restoring import frozen
from rankscope.profiling.sketch import RandomMatrices, choose_sketch_size, is_finite
from rankscope.profiling.store import SCHEMA, Profile
from rankscope.profiling.table import tabulate
from rankscope.targets import TargetModule, base_modules, find_targets, fingerprint_targets, fused_experts, unwrapped

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
    model = unwrapped(model)
    targets = tuple(targets) if targets is not None else find_targets(model)
    loss_fn = loss_fn or _model_loss
    if tolerance is not None and several():
        raise ProfileError("`tolerance` must be None under torch.distributed; give `n_batches` instead.")
    targets, skipped = _profiled(model, targets)
    modules = _modules(model, targets)
    wanted, size = (sketch_size, sketch_size) if sketch_size else _sketch_size(model, targets, budget)
    matrices = RandomMatrices(k=size, seed=seed)
    observer = Observer(targets, modules, matrices)
    tally, convergence = Tally(), Convergence(tolerance) if tolerance is not None else None
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        stream: Iterator[Any] = islice(batches, n_batches)
        if head and head_steps:
            stream = _behind_heads(model, stream, head, head_batches, loss_fn, head_steps)
            stack.enter_context(closing(stream))
        stack.enter_context(observer.hooked())
        stop = stack.enter_context(stop_on_interrupt(enabled=keep_partial))
        device = module_device(model)
        for index, batch in enumerate(stream):
            _see(model, batch, loss_fn, observer, tally, device)
            if on_batch and tally.losses:
                on_batch(index, tally.losses[-1])
            if stop.requested or (convergence and _converged(convergence, observer, tally)):
                break
    tally = _sum_up(observer, tally)
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


def _see(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFunction,
    observer: Observer,
    tally: Tally,
    device: torch.device,
) -> None:
    """Forward and backward of one batch; one without a finite loss is passed over."""
    from accelerate.utils import send_to_device

    weight, batch = tally.weigh(batch), send_to_device(batch, device)
    observer.begin_batch(weight, attention_mask(batch))
    loss = loss_fn(model, batch)
    if not math.isfinite(value := check_loss(loss)):
        tally.skipped += 1
        observer.drop_batch()
        return
    (loss * observer.weight).backward()
    observer.end_batch()
    tally.count(batch, value)


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
    """The sums of all processes, in units of the first one's first batch."""
    tallies: list[Tally] = gathered(tally)
    scale = tally.first_size / tallies[0].first_size if tallies[0].first_size else 1.0
    sums = [tensor for seen in observer.observed.values() for tensor in seen.tensors()]
    for tensor in sums if several() else ():
        tensor.mul_(scale)
    sum_over_processes(sums)
    sum_over_processes(tensor for sketch in observer.activations() for tensor in sketch.tensors())
    counts = gathered([seen.batches for seen in observer.observed.values()])
    for seen, each in zip(observer.observed.values(), zip(*counts, strict=True), strict=True):
        seen.batches = sum(each)
    return Tally.together(tallies)


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
    if broken := [name for name, seen in observed.items() if not is_finite(seen.store.tensors())]:
        raise ProfileError(
            f"the gradient at `{broken[0]}` must be finite, but is not; check the loss, or use float32 or bfloat16."
        )
    return silent


def _sketch_size(model: nn.Module, targets: Sequence[TargetModule], budget: ParameterBudget | None) -> tuple[int, int]:
    """The sketch size that a budget asks for, and what of it the memory bound leaves."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    wanted, size = choose_sketch_size(targets, budget.limit if budget else None, weights)
    if size < wanted:
        logger.warning(
            "the gradient sketches have %d columns instead of %d, so as to take no more than a quarter of the memory of the "
            "model's weights; singular values beyond are estimated",
            size,
            wanted,
        )
    return wanted, size


# --- the model ---------------------------------------------------------------------------------------------------


def _profiled(model: nn.Module, targets: Sequence[TargetModule]) -> tuple[tuple[TargetModule, ...], dict[str, str]]:
    """The targets that can be profiled, and why the others, and the model's fused experts, cannot."""
    skipped = {t.name: f"{t.kind} modules cannot be profiled" for t in targets if t.kind not in SUPPORTED}
    if len(skipped) == len(targets):
        raise ProfileError(f"`targets` must hold a module of kind {', '.join(SUPPORTED)}, but hold none; find others.")
    skipped |= dict.fromkeys(fused_experts(model), "experts fused into one 3-D weight cannot be profiled")
    for name, reason in skipped.items():
        logger.warning("`%s` is left out: %s", name, reason)
    return tuple(target for target in targets if target.name not in skipped), skipped


def _modules(model: nn.Module, targets: Sequence[TargetModule]) -> dict[str, nn.Module]:
    present = dict(base_modules(model))
    for target in targets:
        if target.name not in present:
            raise ProfileError(
                f"`targets` must be modules of this model, but it has no `{target.name}`; find them again."
            )
    return {target.name: present[target.name] for target in targets}


def _model_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    return model(**batch).loss  # type: ignore[no-any-return]


def _fingerprint_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        corner = parameter.detach().flatten()[:16].tolist()
        digest.update(repr((name, tuple(parameter.shape), corner)).encode())
    return digest.hexdigest()[:16]
