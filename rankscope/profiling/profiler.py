"""`profile`: forward and backward passes over batches, with hooks on the target modules."""

from __future__ import annotations

import hashlib
import logging
import math
import signal
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from importlib.metadata import version
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import align_module_device, send_to_device
from torch import Tensor, nn

import rankscope
from rankscope.budget import ParameterBudget
from rankscope.distributed import batch_device, gathered, n_processes, sum_over_processes, whole
from rankscope.errors import ModelError
from rankscope.profiling import statistics
from rankscope.profiling.hooks import SUPPORTED, GradientHooks, dense_weight, in_range, is_compiled
from rankscope.profiling.sketch import ExactGradient, RandomMatrices, bytes_of_weights, choose_sketch_size
from rankscope.profiling.table import SCHEMA_VERSION, Metadata, ModuleFeatures, Profile
from rankscope.settings import ProfileSettings
from rankscope.targets import TargetModule, base_modules, find_targets, fingerprint_targets, fused_experts, unwrapped

LossFunction = Callable[[nn.Module, Any], Tensor]
LEADING = 8  # singular values that have to converge
logger = logging.getLogger(__name__)


def profile(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    targets: Sequence[TargetModule] | None = None,
    loss_fn: LossFunction | None = None,
    budget: ParameterBudget | None = None,
    head: Sequence[str] = (),
    head_batches: Iterable[Any] | None = None,
    seed: int = 0,
    on_batch: Callable[[int, float], None] | None = None,
    settings: ProfileSettings | None = None,
    **overrides: Any,
) -> Profile:
    """Profile the gradient of the loss, and the inputs, at every target module.

    The model runs frozen and in evaluation mode, and is left as it was. Memory does not grow with the number of batches.
    Under torch.distributed each process passes its own batches, and all get the profile of all of them.

    Args:
        model: Any torch module: quantised, offloaded, compiled, wrapped by PEFT or DistributedDataParallel.
        batches: At least two. A batch counts by its number of examples, the length of its first tensor.
        targets: Default: `find_targets(model)`. Modules that cannot be profiled are skipped with a warning, and recorded.
        loss_fn: `loss_fn(model, batch)`, a scalar; default: `model(**batch).loss`.
        budget: The budget that allocations will have: the sketches grow with it.
        head: Names of freshly initialised modules, as a new classifier: trained first, alone, and restored at the end.
        head_batches: Train the head on these. Default: each half of `batches`, held in memory, is profiled behind a head that
            was trained on the other half, since a head that has fitted a batch leaves only noise in its gradient.
        seed: Seed of the sketches.
        on_batch: Called after each batch with its index and loss.
        settings: How to profile.
        **overrides: Single settings, as in `n_batches=8`.

    Raises:
        ModelError: Too few batches or finite losses; targets without a gradient, or with one that is not finite.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    >>> found = profile(model, [torch.ones(2, 4)] * 2, loss_fn=lambda model, batch: model(batch).square().mean())
    >>> {name: len(values) for name, values in found.spectra().items()}
    {'0': 3, '2': 1}
    """
    settings = ProfileSettings.of(settings, **overrides)
    if budget is not None and not isinstance(budget, ParameterBudget):
        raise ModelError(f"`budget` must be a ParameterBudget, but got {budget!r}; pass `ParameterBudget({budget!r})`.")
    run = _Run(unwrapped(model), targets, loss_fn or _model_loss, budget, settings.sketch_size, seed)
    stream = _behind_heads(run, islice(batches, settings.n_batches), head, head_batches, settings.head_steps)
    converged = _Convergence(settings.tolerance)
    with _frozen(run.model), closing(stream), run.hooks.hooked(), _interrupt(settings.keep_partial) as interrupt:
        for index, batch in enumerate(stream):
            run.see(batch)
            if on_batch and run.seen:
                on_batch(index, run.seen[-1].loss)
            if interrupt.is_set() or converged(run):
                break
    run.sum_over_processes()
    silent = run.check(settings.max_skipped)
    rows = run.features(settings.keep_directions)
    head_steps = settings.head_steps if head else 0
    return Profile.of(rows, run.metadata(silent, head_steps=head_steps, interrupted=interrupt.is_set()))


class SeenBatch(NamedTuple):
    """What is noted of a batch that counts."""

    size: int
    loss: float
    tokens: int
    digest: str


class _Run:
    """A profile in the making."""

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[TargetModule] | None,
        loss_fn: LossFunction,
        budget: ParameterBudget | None,
        sketch_size: int | None,
        seed: int,
    ) -> None:
        _check_weights(model)
        self.model, self.loss_fn, self.seed, self.device = model, loss_fn, seed, batch_device(model)
        self.modules, self.skipped_modules = _profiled(model, targets)
        limit = budget.limit if budget else None
        self.wanted, self.size = (
            (sketch_size, sketch_size)
            if sketch_size
            else choose_sketch_size(tuple(self.modules), limit, bytes_of_weights(model))
        )
        self.hooks = GradientHooks(self.modules, RandomMatrices(k=self.size, seed=seed))
        self.seen: list[SeenBatch] = []
        self.skipped = 0  # batches without a finite loss
        self.unit = 0  # examples in the first batch; a batch weighs its own over these
        self.scale = 1.0  # the factor on every loss; see `in_range`

    @property
    def weight(self) -> float:
        """The sum of the batches' weights."""
        return sum(batch.size / self.unit for batch in self.seen)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch that may lie on another device."""
        return _check_loss(self.loss_fn(model, send_to_device(batch, self.device)))

    def see(self, batch: Any) -> None:
        """Forward and backward of one batch; an empty one, or one without a finite loss, does not count."""
        size = _size(batch)
        if not size:
            return
        self.unit = self.unit or size
        loss = self._backward(batch, size / self.unit)
        if loss is None:
            self.skipped += 1
            return
        if not self.seen and (scale := in_range(self.hooks.peak())) != 1.0:
            self.scale = scale
            self.hooks.clear()
            self._backward(batch, size / self.unit)
        self.seen.append(SeenBatch(size, loss, _count_tokens(batch), _digest(batch)))

    def _backward(self, batch: Any, weight: float) -> float | None:
        """The loss, None if it is not finite; the hooks see its backward pass."""
        mask = _attention_mask(batch)
        self.hooks.begin_batch(weight, None if mask is None else mask.to(self.device))
        loss = self.loss(self.model, batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            self.hooks.drop_batch()
            return None
        (loss * (weight * self.scale)).backward()
        self.hooks.end_batch()
        return value

    def sum_over_processes(self) -> None:
        """Sum up in units of the first process that has a batch: its first batch's size, and its scale."""
        if n_processes() == 1:
            return
        everyone = gathered((self.seen, self.skipped, self.unit, self.scale))
        _, _, unit, scale = next((each for each in everyone if each[0]), everyone[0])
        if self.seen:
            for accumulator in self.hooks.accumulators.values():
                accumulator.scale(gradient=scale / self.scale, weight=self.unit / unit)
        self.hooks.sum_over_processes()
        self.seen = [batch for seen, *_ in everyone for batch in seen]
        self.skipped, self.unit, self.scale = sum(each[1] for each in everyone), unit, scale

    def check(self, max_skipped: float) -> list[str]:
        """Modules without a gradient. Asked in the end: a look at each gradient on the way would make a GPU wait.

        Raises:
            ModelError: Too many batches were skipped, or a sum is unusable.
        """
        total, n = self.skipped + len(self.seen), len(self.seen)
        if self.skipped > max_skipped * total:
            raise ModelError(
                f"the loss must be finite, but is not in {self.skipped} of {total} batches (at most {max_skipped:.0%} "
                "are skipped); look at these batches, or use float32 or bfloat16."
            )
        if n < 2:
            raise ModelError(
                "`batches` must hold at least 2 batches, so that signal can be told from noise, but held "
                f"{n}; pass more, or smaller ones."
            )
        sums = self.hooks.accumulators
        silent = [name for name, accumulator in sums.items() if not accumulator.batches]
        if len(silent) == len(sums):
            raise ModelError(
                f"`{silent[0]}` and every other target must get a gradient from the loss, but none does; check `targets`."
            )
        if silent:
            logger.warning(
                "%d of %d modules got no gradient and count as zero, as `%s`", len(silent), len(sums), silent[0]
            )
        for name, accumulator in sums.items():
            if not all(tensor.isfinite().all() for tensor in accumulator.tensors()):
                raise ModelError(
                    f"the gradient at `{name}` must be finite, but is not; check the loss, or use float32 or bfloat16."
                )
        for name, inputs in self.hooks.inputs.items():
            if not inputs.squares.isfinite():
                raise ModelError(
                    f"the inputs of `{name}` must be finite and below 1e18, but are not; check the data and the weights."
                )
        return silent

    def features(self, keep_directions: int) -> list[ModuleFeatures]:
        """The rows of the profile.

        Raises:
            ModelError: The gradient is zero everywhere, or too large.
        """
        rows = [self._features(target, keep_directions) for target in self.modules]
        norms = np.array([row.gradient_norm for row in rows])
        if not norms.any():
            raise ModelError(
                "the gradient must not be zero at every target module, but is; check the loss and the labels."
            )
        signal = np.array([row.signal_energy for row in rows])
        for row, share in zip(rows, statistics.signal_shares(signal, norms**2, len(self.seen)).tolist(), strict=True):
            row.signal_share = share
            row.signal_values = [value * math.sqrt(share) for value in row.singular_values]
            row.scale(1.0 / self.scale)
            if not math.isfinite(row.fisher_trace):
                raise ModelError(
                    f"squared gradients must be below 1e308, but the gradient at `{row.module}` is about "
                    f"{row.gradient_norm:.0e}; scale the loss down."
                )
        return rows

    def _features(self, target: TargetModule, keep_directions: int) -> ModuleFeatures:
        sums, inputs, total = self.hooks.accumulators[target.name], self.hooks.inputs.get(target.name), self.weight
        found = sums.decompose()
        energy = max(found.energy, 0.0) / total**2
        split = statistics.split_energy(
            energy,
            float(sums.squares) * self.unit,
            [batch.size for batch in self.seen],
            measured=float(sums.measure(sums.kept)) / total**2,
        )
        weight, kept = dense_weight(self.modules[target]), slice(0, keep_directions)
        features = ModuleFeatures(
            module=target.name,
            tower=target.tower,
            block=target.block,
            role=target.role,
            kind=target.kind,
            in_features=target.in_features,
            out_features=target.out_features,
            rank_cost=target.rank_cost,
            gradient_norm=math.sqrt(energy),
            signal_energy=split.signal,
            noise_energy=split.noise,
            fisher_trace=split.fisher_trace,
            gradient_rank=statistics.effective_rank(found.values),
            singular_values=(found.values / total).tolist(),
            singular_error=found.error / total,
            exact=isinstance(sums, ExactGradient),
            left_directions=found.left[:, kept].T.flatten().float().cpu().numpy() if keep_directions else None,
            right_directions=found.right[kept].flatten().float().cpu().numpy() if keep_directions else None,
        )
        if weight is not None:
            left, core = found.left.to(weight.device), (found.values[:, None] * found.right).to(weight.device)
            features.sensitivity = statistics.sensitivity(weight, left, core) / total
            features.weight_norm, features.weight_rank = (
                statistics.frobenius_norm(weight),
                statistics.stable_rank(weight),
            )
        if inputs is not None:
            features.activation_moment, features.activation_variance = inputs.second_moment(), inputs.variance()
            features.activation_rank, features.activation_values = inputs.effective_rank(), inputs.variances().tolist()
        return features

    def metadata(self, silent: list[str], *, head_steps: int, interrupted: bool) -> Metadata:
        """Where the profile comes from."""
        digests = "".join(sorted(batch.digest for batch in self.seen))  # whichever process saw them
        return {
            "schema": SCHEMA_VERSION,
            "model": fingerprint_targets(tuple(self.modules)),
            "weights": _fingerprint_weights(self.model),
            "data": hashlib.sha256(digests.encode()).hexdigest()[:16],
            "targets": len(self.modules),
            "skipped": self.skipped_modules,
            "without_gradient": silent,
            "batches": len(self.seen),
            "skipped_batches": self.skipped,
            "interrupted": interrupted,
            "tokens": sum(batch.tokens for batch in self.seen),
            "loss": sum(batch.size * batch.loss for batch in self.seen) / sum(batch.size for batch in self.seen),
            "seed": self.seed,
            "head_steps": head_steps,
            "sketch_size": self.size,
            "sketch_wanted": self.wanted,
            "versions": {
                "rankscope": rankscope.__version__,
                **{name: version(name) for name in ("torch", "transformers")},
            },
        }


class _Convergence:
    """Whether the leading singular values of all mean gradients have stopped moving.

    It looks after 4 batches, and again after half as many more each time.
    """

    def __init__(self, tolerance: float | None) -> None:
        if tolerance is not None and n_processes() > 1:
            raise ModelError("`tolerance` must be None under torch.distributed; give `n_batches` instead.")
        self._tolerance, self._next_look = tolerance, 4
        self._last: dict[str, Tensor] = {}

    def __call__(self, run: _Run) -> bool:
        if self._tolerance is None or len(run.seen) < self._next_look:
            return False
        self._next_look = int(len(run.seen) * 1.5) + 1
        unit = 1.0 / run.weight
        now = {name: sums.decompose().values[:LEADING] * unit for name, sums in run.hooks.accumulators.items()}
        last, self._last = self._last, now
        moved = [(now[name] - last[name]).norm() / now[name].norm() for name in last if now[name].any()]
        return bool(moved) and float(torch.stack(moved).mean()) <= self._tolerance


# --- the model ---------------------------------------------------------------------------------------------------


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Run the model frozen, in evaluation mode and not compiled; restore its training modes and `requires_grad` flags."""
    training = {name: module.training for name, module in model.named_modules()}
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    eager = (
        torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()
    )  # else new hooks are ignored
    model.eval().requires_grad_(False)
    try:
        with eager, torch.enable_grad():  # a caller may be inside no_grad
            yield
    finally:
        for name, module in model.named_modules():
            module.training = training[name]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])


def _behind_heads(
    run: _Run, batches: Iterable[Any], head: Sequence[str], head_batches: Iterable[Any] | None, steps: int
) -> Generator[Any]:
    """Yield the batches behind a head that was trained on others: on `head_batches`, or each half on the other half."""
    if not (head and steps):
        rounds: Iterable[tuple[Iterable[Any], Iterable[Any]]] = [(batches, ())]
    elif head_batches is not None:
        rounds = [(batches, head_batches)]
    else:
        held = list(batches)
        rounds = [(held[0::2], held[1::2]), (held[1::2], held[0::2])] if len(held) > 1 else []
    for mine, others in rounds:
        with head_warmed(run.model, head, others, run.loss, steps=steps) if head and steps else nullcontext():
            yield from mine


@contextmanager
def head_warmed(
    model: nn.Module, head: Sequence[str], batches: Iterable[Any], loss_fn: LossFunction, *, steps: int
) -> Iterator[None]:
    """Train the named modules of a frozen model alone, by AdamW; restore them on exit.

    Raises:
        ModelError: A name is not a module of the model, or there are no batches.
    """
    present = dict(model.named_modules())
    if missing := [name for name in head if name not in present]:
        raise ModelError(f"`head` must name modules of this model, but it has no `{missing[0]}`; check the name.")
    parameters = [parameter for name in head for parameter in present[name].parameters()]
    if any(parameter.is_meta for parameter in parameters):
        raise ModelError(f"`head` must name modules in memory, but `{head[0]}` is offloaded; keep it on a device.")
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        for batch in islice(_endless(batches), steps):
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            sum_over_processes(gradients)  # so that all processes have one head
            for gradient in gradients:
                gradient /= n_processes()
            optimizer.step()
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ModelError("the batches that train the head must not be empty, but are; check `head_batches`.")


@contextmanager
def _interrupt(enabled: bool) -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, to be looked at after each batch; the second interrupts at once."""
    event = threading.Event()
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.getsignal(signal.SIGINT)

    def request(_number: int, _frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, request)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def _profiled(
    model: nn.Module, targets: Sequence[TargetModule] | None
) -> tuple[dict[TargetModule, nn.Module], dict[str, str]]:
    """The modules that can be profiled, and why other targets, and the model's fused experts, cannot."""
    targets = find_targets(model) if targets is None else targets
    skipped = {t.name: f"{t.kind} modules cannot be profiled" for t in targets if t.kind not in SUPPORTED}
    skipped |= {t.name: "modules without inputs or outputs have no rank" for t in targets if not t.full_rank}
    if len(skipped) == len(targets):
        raise ModelError(f"`targets` must hold a module of kind {', '.join(SUPPORTED)}, but hold none; find others.")
    skipped |= dict.fromkeys(fused_experts(model), "experts fused into one 3-D weight cannot be profiled")
    for reason, count in Counter(skipped.values()).items():
        first = next(name for name in skipped if skipped[name] == reason)
        logger.warning("`%s` is left out: %s (%d such)", first, reason, count)
    present, wanted = dict(base_modules(model)), [target for target in targets if target.name not in skipped]
    if missing := [target.name for target in wanted if target.name not in present]:
        raise ModelError(f"`targets` must be modules of this model, but it has no `{missing[0]}`; find them again.")
    return {target: present[target.name] for target in wanted}, skipped


def _check_weights(model: nn.Module) -> None:
    if fixed := [name for name, parameter in model.named_parameters() if parameter.is_inference()]:
        raise ModelError(
            f"the model's weights must take part in a backward pass, but `{fixed[0]}` was made in torch.inference_mode; load "
            "the model outside it."
        )
    meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if meta and not any(
        hasattr(module, "_hf_hook") for module in model.modules()
    ):  # accelerate loads what is offloaded
        raise ModelError(f"the model's weights must be loaded, but `{meta[0]}` is on the meta device; load them first.")


def _fingerprint_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, _ in model.named_parameters():
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        with align_module_device(module):
            parameter = getattr(module, attribute)
            corner = whole(parameter.detach()).flatten()[:16].tolist()
            digest.update(repr((name, tuple(parameter.shape), corner)).encode())
    return digest.hexdigest()[:16]


# --- losses and batches ------------------------------------------------------------------------------------------


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


def _check_loss(loss: Any) -> Tensor:
    """The loss, if it is one that can be differentiated; it may not be finite."""
    if not isinstance(loss, Tensor) or loss.ndim:
        found = f"{type(loss).__name__}; return the loss alone."
        if loss is None:
            found = "None; do the batches have labels?"
        elif isinstance(loss, Tensor):
            found = f"a tensor of shape {tuple(loss.shape)}; take its mean or sum."
        raise ModelError(f"`loss_fn` must return a scalar tensor, but returned {found}")
    if not loss.requires_grad and bool(loss.isfinite()):
        raise ModelError("the loss must depend on a target module, but depends on none; check `targets` and `loss_fn`.")
    return loss


def _leaves(batch: Any, name: Any = None) -> Iterator[tuple[Any, Tensor]]:
    """The tensors of a batch of nested mappings and sequences, in order, each with the key above it."""
    if isinstance(batch, Tensor):
        yield name, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from _leaves(value, key)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _leaves(value, name)


def _entry(batch: Any, key: str) -> Tensor | None:
    """The first tensor under a key, at any depth."""
    return next((tensor for name, tensor in _leaves(batch) if name == key), None)


def _size(batch: Any) -> int:
    """Examples: the length of the first tensor that has one; 1 without."""
    return next((len(tensor) for _, tensor in _leaves(batch) if tensor.ndim), 1)


def _attention_mask(batch: Any) -> Tensor | None:
    """Tokens against padding, (batch, length)."""
    mask = _entry(batch, "attention_mask")
    return mask if mask is not None and mask.ndim == 2 else None


def _count_tokens(batch: Any) -> int:
    ids, mask = _entry(batch, "input_ids"), _attention_mask(batch)
    if ids is None:
        return 0
    return ids.numel() if mask is None else int(mask.sum())


def _digest(batch: Any) -> str:
    """A hash of the shapes and sums of all tensors; on the CPU, since MPS has no doubles."""
    facts = (repr((tuple(tensor.shape), float(tensor.cpu().double().sum()))) for _, tensor in _leaves(batch))
    return hashlib.sha256("".join(facts).encode()).hexdigest()
