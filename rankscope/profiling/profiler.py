"""`profile`: runs a model over batches and turns each target module's gradient and inputs into features.

Hooks (`observer.py`) see the input x and the output gradient delta of every target module; no weight needs
`requires_grad`, so the base may be frozen or quantised, and no full gradient is ever kept (`sketch.py`). What the batches'
gradients agree on is signal, their scatter is noise (`features.py`).
"""

from __future__ import annotations

import hashlib
import logging
import math
import signal
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from numbers import Integral, Real
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import rankscope
from rankscope.budget import ParameterBudget
from rankscope.distributed import batch_device, gathered, n_processes, sum_over_processes, whole
from rankscope.errors import ModelError
from rankscope.profiling.hooks import Observed, Observer, in_range
from rankscope.profiling.sketch import (
    SUPPORTED,
    Decomposition,
    ExactGradient,
    RandomMatrices,
    bytes_of_weights,
    choose_sketch_size,
    dense_weight,
    eager,
    is_finite,
)
from rankscope.profiling.statistics import (
    effective_rank,
    frobenius_norm,
    sensitivity,
    signal_shares,
    split_energy,
    stable_rank,
)
from rankscope.profiling.table import SCHEMA, Profile
from rankscope.targets import (
    TargetModule,
    base_layer,
    base_modules,
    find_targets,
    fingerprint_targets,
    fused_experts,
    unwrapped,
)

logger = logging.getLogger(__name__)


LEADING = 8
GROWTH = 1.5  # the next look comes after half as many batches again


class Convergence:
    """Compares leading singular values now with those at the last look, which was two thirds as many batches ago.

    Args:
        tolerance: The largest mean relative movement, over modules, of the leading 8 singular values of the mean gradient.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.next_look = 4
        self._last: dict[str, Tensor] = {}

    def due(self, batches: int) -> bool:
        """Whether to look after so many batches."""
        return batches >= self.next_look

    def reached(self, batches: int, values: Mapping[str, Tensor]) -> bool:
        """Takes a look; `values` are the singular values of the mean gradients by module."""
        self.next_look = int(batches * GROWTH) + 1
        now = {name: value[:LEADING] for name, value in values.items()}
        last, self._last = self._last, now
        if not last:
            return False
        moved = [(now[name] - last[name]).norm() / now[name].norm() for name in now if now[name].any()]
        return bool(moved) and float(torch.stack(moved).mean()) <= self.tolerance


class Stop:
    """Whether to stop.

    Attributes:
        requested: After the present batch.
    """

    requested = False


@contextmanager
def stop_on_interrupt(*, enabled: bool) -> Iterator[Stop]:
    """Turns the first SIGINT into a request; in other threads than the main one signals stay as they are."""
    stop = Stop()
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def request(_number: int, _frame: Any) -> None:
        stop.requested = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def values_restored(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """On leaving, the parameters have the values that they had."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freezes the model in evaluation mode; on leaving, training modes and `requires_grad` flags are as they were."""
    training = {name: module.training for name, module in model.named_modules()}
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = training[name]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])


@dataclass
class Tally:
    """Batch by batch; a batch weighs its number of examples over that of the first.

    Attributes:
        losses: Of the batches that counted.
        sizes: Their numbers of examples.
        tokens: That they hold.
        skipped: Batches whose loss was not finite.
        first_size: Of the first batch.
        digests: One hash a batch.
        scale: The factor on every loss; see `observer.in_range`.
    """

    losses: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    tokens: int = 0
    skipped: int = 0
    first_size: int = 0
    digests: list[str] = field(default_factory=list)
    scale: float = 1.0

    def weigh(self, batch: Any) -> float:
        """The batch's weight; 0 for an empty one."""
        size = _size(batch)
        if not size:
            return 0.0
        self.first_size = self.first_size or size
        return size / self.first_size

    def count(self, batch: Any, loss: float) -> None:
        """Takes note of a batch that counts."""
        self.losses.append(loss)
        self.sizes.append(_size(batch))
        if (ids := _entry(batch, "input_ids")) is not None:
            mask = attention_mask(batch)
            self.tokens += int(mask.sum()) if mask is not None else ids.numel()
        shapes_and_sums = ((tuple(tensor.shape), float(tensor.cpu().double().sum())) for tensor in _tensors(batch))
        text = "".join(repr(each) for each in shapes_and_sums)  # on the CPU, since MPS has no doubles
        self.digests.append(hashlib.sha256(text.encode()).hexdigest())

    @classmethod
    def together(cls, tallies: Sequence[Tally]) -> Tally:
        """One tally of all processes, in units of the first that has a batch."""
        first = next((tally for tally in tallies if tally.losses), tallies[0])
        return cls(
            losses=[loss for tally in tallies for loss in tally.losses],
            sizes=[size for tally in tallies for size in tally.sizes],
            tokens=sum(tally.tokens for tally in tallies),
            skipped=sum(tally.skipped for tally in tallies),
            first_size=first.first_size,
            digests=[digest for tally in tallies for digest in tally.digests],
            scale=first.scale,
        )

    @property
    def weights(self) -> list[float]:
        """Sizes over the first size."""
        return [size / self.first_size for size in self.sizes]

    @property
    def loss(self) -> float:
        """The mean loss over examples."""
        return sum(size * loss for size, loss in zip(self.sizes, self.losses, strict=True)) / sum(self.sizes)

    @property
    def fingerprint(self) -> str:
        """A short hash of shapes and sums of all tensors, whichever process saw them."""
        return hashlib.sha256("".join(sorted(self.digests)).encode()).hexdigest()[:16]

    def check(self, max_skipped: float) -> None:
        """Checks that enough batches counted.

        Raises:
            ModelError: Fewer than two did, or more than the stated share were skipped.
        """
        total = self.skipped + len(self.losses)
        if self.skipped > max_skipped * total:
            raise ModelError(
                f"the loss must be finite, but is not in {self.skipped} of {total} batches (at most {max_skipped:.0%} "
                "are skipped); look at these batches, or use float32 or bfloat16."
            )
        if len(self.losses) < 2:
            raise ModelError(
                f"`batches` must hold at least 2 batches, so that signal can be told from noise, but held "
                f"{len(self.losses)}; pass more, or smaller ones."
            )


def check_loss(loss: Any) -> Tensor:
    """The loss, if it is one that can be differentiated; it may not be finite.

    Raises:
        ModelError: It is no scalar tensor, or needs no gradient.
    """
    if not isinstance(loss, Tensor) or loss.ndim:
        raise ModelError(f"`loss_fn` must return a scalar tensor, but returned {_describe(loss)}")
    if not loss.requires_grad and bool(loss.isfinite()):
        raise ModelError("the loss must depend on a target module, but depends on none; check `targets` and `loss_fn`.")
    return loss


def _describe(loss: Any) -> str:
    if loss is None:
        return "None; do the batches have labels?"
    if isinstance(loss, Tensor):
        return f"a tensor of shape {tuple(loss.shape)}; take its mean or sum."
    return f"{type(loss).__name__}; return the loss alone."


def attention_mask(batch: Any) -> Tensor | None:
    """The batch's mask of tokens against padding, (batch, length), if it has one of that shape."""
    mask = _entry(batch, "attention_mask")
    return mask if mask is not None and mask.ndim == 2 else None


def _leaves(batch: Any, name: Any = None) -> Iterator[tuple[Any, Tensor]]:
    """The tensors of a batch of nested mappings and sequences in their order, each with the key that it stands under."""
    if isinstance(batch, Tensor):
        yield name, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from _leaves(value, key)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _leaves(value, name)


def _tensors(batch: Any) -> list[Tensor]:
    return [tensor for _, tensor in _leaves(batch)]


def _entry(batch: Any, key: str) -> Tensor | None:
    """The first tensor under a key, at any depth."""
    return next((tensor for name, tensor in _leaves(batch) if name == key), None)


def _size(batch: Any) -> int:
    """Examples: the first dimension of the first tensor that has one; 1 without."""
    return next((len(tensor) for tensor in _tensors(batch) if tensor.ndim), 1)


def tabulate(
    targets: Sequence[TargetModule],
    modules: Mapping[str, nn.Module],
    observed: Mapping[str, Observed],
    tally: Tally,
    keep_directions: int,
) -> pd.DataFrame:
    """The profile's table: one row a module, with the columns that `store.py` documents.

    Raises:
        ModelError: The gradient is zero everywhere.
    """
    rows = [_row(t, modules[t.name], observed[t.name], tally, keep_directions) for t in targets]
    frame = pd.DataFrame(rows)
    if not (frame["gradient_norm"] > 0).any():
        raise ModelError("the gradient must not be zero at every target module, but is; check the loss and the labels.")
    energy = frame["gradient_norm"].to_numpy() ** 2
    shares = signal_shares(frame["signal_energy"].to_numpy(), energy, len(tally.losses))
    frame["signal_share"] = shares
    frame["signal_values"] = [
        [value * math.sqrt(share) for value in values]
        for share, values in zip(shares, frame["singular_values"], strict=True)
    ]
    frame["block"] = frame["block"].astype("Int64")
    return frame if tally.scale == 1.0 else _unscaled(frame, tally.scale)


def _unscaled(frame: pd.DataFrame, scale: float) -> pd.DataFrame:
    """The table of gradients that were multiplied by `scale`, in the loss's own units."""
    unit = np.float64(1.0 / scale)
    for column in ("gradient_norm", "singular_error", "sensitivity"):
        frame[column] = frame[column].astype(np.float64) * unit
    for column in ("singular_values", "signal_values"):
        frame[column] = [(np.array(values) * unit).tolist() for values in frame[column]]
    for column in ("signal_energy", "noise_energy", "fisher_trace"):
        with np.errstate(over="ignore"):
            frame[column] *= unit**2
    if not np.isfinite(frame["fisher_trace"]).all():
        raise ModelError(
            f"squared gradients must be below 1e308, but the gradient is about {frame['gradient_norm'].max():.0e}; scale "
            "the loss down."
        )
    return frame


def _row(target: TargetModule, module: nn.Module, seen: Observed, tally: Tally, keep_directions: int) -> dict[str, Any]:
    total = sum(tally.weights)
    found = seen.store.decompose()
    energy = max(found.energy, 0.0) / total**2
    measured = float(seen.store.measure(seen.store.tensors())) / total**2
    split = split_energy(energy, float(seen.squares) * tally.first_size, tally.sizes, measured=measured)
    activations, kept = seen.activations, slice(0, keep_directions)
    return {
        "module": target.name,
        "tower": target.tower,
        "block": target.block,
        "role": target.role,
        "kind": target.kind,
        "in_features": target.in_features,
        "out_features": target.out_features,
        "rank_cost": target.rank_cost,
        "gradient_norm": math.sqrt(energy),
        "signal_energy": split.signal,
        "noise_energy": split.noise,
        "fisher_trace": split.fisher_trace,
        "gradient_rank": effective_rank(found.values),
        "singular_values": (found.values / total).tolist(),
        "singular_error": found.error / total,
        "exact": isinstance(seen.store, ExactGradient),
        **_weight_features(module, found, total),
        "activation_moment": activations.second_moment() if activations else 0.0,
        "activation_rank": activations.effective_rank() if activations else 0.0,
        "activation_variance": activations.variance() if activations else 0.0,
        "activation_values": activations.variances().tolist() if activations else [],
        "left_directions": found.left[:, kept].T.flatten().tolist() if keep_directions else None,
        "right_directions": found.right[kept].flatten().tolist() if keep_directions else None,
    }


def _weight_features(module: nn.Module, found: Decomposition, total: float) -> dict[str, float | None]:
    """Features of the frozen weight, which is loaded for them where it is offloaded; None where it cannot be read."""
    from accelerate.utils import align_module_device

    with align_module_device(base_layer(module)):
        weight = dense_weight(module)
        if weight is None:
            return dict.fromkeys(("sensitivity", "weight_norm", "weight_rank"))
        left, core = found.left.to(weight.device), (found.values[:, None] * found.right).to(weight.device)
        return {
            "sensitivity": sensitivity(weight, left, core) / total,
            "weight_norm": frobenius_norm(weight),
            "weight_rank": stable_rank(weight),
        }


LEARNING_RATE = 1e-2


@contextmanager
def head_warmed(
    model: nn.Module,
    head: Sequence[str],
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    *,
    steps: int,
) -> Iterator[None]:
    """Trains the named modules alone, everything else frozen; on leaving, they are as they were before.

    Args:
        model: The frozen model.
        head: Full names of the modules to train.
        batches: Gone through again and again.
        loss_fn: `loss_fn(model, batch)`, a scalar; it places the batch.
        steps: AdamW steps at a learning rate of 0.01.

    Raises:
        ModelError: A name is not a module of the model.
    """
    present = dict(model.named_modules())
    if missing := [name for name in head if name not in present]:
        raise ModelError(f"`head` must name modules of this model, but it has no `{missing[0]}`; check the name.")
    parameters = [parameter for name in head for parameter in present[name].parameters()]
    if any(parameter.is_meta for parameter in parameters):
        raise ModelError(f"`head` must name modules in memory, but `{head[0]}` is offloaded; keep it on a device.")
    with values_restored(parameters):
        _train(model, parameters, islice(_endless(batches), steps), loss_fn)
        yield


def _train(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
) -> None:
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    for batch in batches:
        loss = loss_fn(model, batch)
        optimizer.zero_grad()
        loss.backward()
        _average_gradients(parameters)
        optimizer.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None


def _average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Over processes, so that all have one head."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    sum_over_processes(gradients)
    for gradient in gradients:
        gradient /= n_processes()


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ModelError("the batches that train the head must not be empty, but are; check `head_batches`.")


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
        ModelError: Fewer than two batches, too many without a finite loss, a gradient that is not finite, or none at all.

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
            ModelError: It is no scalar tensor.
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
            raise ModelError(f"`{name}` must be {number} {bounds}, but got {value!r}.")
    if budget is not None and not isinstance(budget, ParameterBudget):
        raise ModelError(f"`budget` must be a ParameterBudget, but got {budget!r}; pass `ParameterBudget({budget!r})`.")
    if options["tolerance"] is not None and n_processes() > 1:
        raise ModelError("`tolerance` must be None under torch.distributed; give `n_batches` instead.")


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
    if n_processes() > 1 and tally.losses:
        unit, scale = tally.first_size / together.first_size, together.scale / tally.scale
        for seen in observer.observed.values():
            for tensor in seen.store.tensors():
                tensor.mul_(unit * scale)
            seen.squares.mul_(unit * scale**2)
    if n_processes() > 1:
        observer.sum_over_processes()
    return together


def _check_taken(observer: Observer) -> list[str]:
    """What can only be told in the end: looking at each gradient on the way would make a GPU wait each time."""
    observed = observer.observed
    silent = [name for name, seen in observed.items() if not seen.batches]
    if len(silent) == len(observed):
        raise ModelError(
            f"`{silent[0]}` and every other target must get a gradient from the loss, but none does; check `targets`."
        )
    if silent:
        logger.warning(
            "%d of %d modules got no gradient and count as zero, as `%s`", len(silent), len(observed), silent[0]
        )
    if broken := [name for name, seen in observed.items() if not is_finite(seen.tensors())]:
        raise ModelError(
            f"the gradient at `{broken[0]}` must be finite, but is not; check the loss, or use float32 or bfloat16."
        )
    inputs = [name for name, seen in observed.items() if seen.activations and not is_finite([seen.activations.squares])]
    if inputs:
        raise ModelError(
            f"the inputs of `{inputs[0]}` must be finite and below 1e18, but are not; check the data and the weights."
        )
    return silent


# --- the model ---------------------------------------------------------------------------------------------------


def _profiled(model: nn.Module, targets: Sequence[TargetModule]) -> tuple[tuple[TargetModule, ...], dict[str, str]]:
    """The targets that can be profiled, and why the others, and the model's fused experts, cannot."""
    skipped = {t.name: f"{t.kind} modules cannot be profiled" for t in targets if t.kind not in SUPPORTED}
    skipped |= {t.name: "modules without inputs or outputs have no rank" for t in targets if not t.full_rank}
    if len(skipped) == len(targets):
        raise ModelError(f"`targets` must hold a module of kind {', '.join(SUPPORTED)}, but hold none; find others.")
    skipped |= dict.fromkeys(fused_experts(model), "experts fused into one 3-D weight cannot be profiled")
    for reason, count in Counter(skipped.values()).items():
        first = next(name for name in skipped if skipped[name] == reason)
        logger.warning("`%s` is left out: %s (%d such)", first, reason, count)
    return tuple(target for target in targets if target.name not in skipped), skipped


def _modules(model: nn.Module, targets: Sequence[TargetModule]) -> dict[str, nn.Module]:
    present = dict(base_modules(model))
    for target in targets:
        if target.name not in present:
            raise ModelError(
                f"`targets` must be modules of this model, but it has no `{target.name}`; find them again."
            )
    return {target.name: present[target.name] for target in targets}


def _check_loaded(model: nn.Module) -> None:
    if fixed := [name for name, parameter in model.named_parameters() if parameter.is_inference()]:
        raise ModelError(
            f"the model's weights must take part in a backward pass, but `{fixed[0]}` was made in torch.inference_mode; load "
            "the model outside it."
        )
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return  # accelerate loads what is offloaded
    if meta := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ModelError(f"the model's weights must be loaded, but `{meta[0]}` is on the meta device; load them first.")


def _model_loss(model: nn.Module, batch: Any) -> Any:
    if not isinstance(batch, Mapping):
        raise ModelError(
            f"batches must be mappings of the model's inputs, but got a {type(batch).__name__}; pass `loss_fn`."
        )
    outputs = model(**batch)
    if not hasattr(outputs, "loss"):
        raise ModelError(
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
