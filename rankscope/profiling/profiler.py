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
from copy import deepcopy
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain, islice, repeat
from typing import Any, NamedTuple

import torch
from accelerate.utils import align_module_device, send_to_device
from torch import Tensor, nn

import rankscope
from rankscope.budget import ParameterBudget
from rankscope.distributed import (
    batch_device,
    failing_together,
    gathered,
    n_processes,
    process_index,
    sum_over_processes,
    whole,
)
from rankscope.errors import ModelError, checked
from rankscope.profiling.hooks import SUPPORTED, GradientHooks, Modules, dense_weight, in_range, is_compiled
from rankscope.profiling.sketch import RandomMatrices, bytes_of_weights, choose_sketch_size
from rankscope.profiling.statistics import sensitivity, split_energy
from rankscope.profiling.table import SCHEMA_VERSION, Measured, Profile, tabulate
from rankscope.settings import ProfileSettings
from rankscope.targets import TargetModule, base_modules, find_targets, fingerprint_targets, fused_experts, unwrapped

LossFunction = Callable[[nn.Module, Any], Tensor]
logger = logging.getLogger(__name__)


@checked
def profile(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    targets: Sequence[TargetModule] | None = None,
    loss_fn: LossFunction | None = None,
    budget: ParameterBudget | int | None = None,
    head: Sequence[str] = (),
    head_batches: Iterable[Any] | None = None,
    seed: int = 0,
    on_batch: Callable[[int, float], None] | None = None,
    settings: ProfileSettings | Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Profile:
    """Profile the gradient of the loss, and the inputs, at every target module.

    The model runs frozen and in evaluation mode, and is left as it was. It may be quantised, offloaded, compiled or wrapped.
    Under torch.distributed each process passes its own batches, or all pass the same ones as `Shared`; all get the profile of
    all batches.

    Args:
        model: Any torch module.
        batches: At least two. A batch counts by its number of examples, the length of its first tensor. Where one tells image
            tokens from others, the profile has the columns `image_energy` and `text_energy`; see `image_positions`.
        targets: Default: `find_targets(model)`. Modules that cannot be profiled are skipped with a warning, and recorded.
        loss_fn: `loss_fn(model, batch)`, a scalar; default: `model(**batch).loss`.
        budget: The budget that allocations will have: the sketches grow with it.
        head: Names of freshly initialised modules, as a new classifier: trained first, alone, and restored at the end.
        head_batches: Train the head on these. Default: on the other half of `batches`, since a fitted batch leaves only noise.
        seed: Seed of the sketches.
        on_batch: Called after each batch with its index and loss.
        settings: How to profile.
        **overrides: Single settings, as in `n_batches=8`.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    >>> found = profile(model, [torch.ones(2, 4)] * 2, loss_fn=lambda model, batch: model(batch).square().mean())
    >>> {name: len(values) for name, values in found.spectra().items()}
    {'0': 3, '2': 1}
    """
    settings, model = ProfileSettings.of(settings, **overrides), unwrapped(model)
    modules, skipped = _find_modules(model, targets)
    limit, wanted = None if budget is None else ParameterBudget.of(budget).limit, settings.sketch_size
    wanted, size = (wanted, wanted) if wanted else choose_sketch_size(tuple(modules), limit, bytes_of_weights(model))
    hooks = GradientHooks(modules, RandomMatrices(k=size, seed=seed))
    shared = isinstance(batches, Shared)
    run = _Run(model, loss_fn or _model_loss, modules, hooks, settings, shared=shared)
    together, interruptible = failing_together() if shared else nullcontext(), _interrupt(settings.keep_partial)
    with together, _frozen(model), hooks.hooked(), interruptible as interrupt:
        stream = run.behind_heads(islice(batches, settings.n_batches), head, head_batches, interrupt)
        with closing(stream):
            for index, batch in enumerate(stream):
                run.see(batch)
                if on_batch and run.seen:
                    on_batch(index, run.seen[-1].loss)
                if interrupt.is_set() or run.converged():
                    break
        if interrupt.is_set() and len(run.seen) < 2:
            raise KeyboardInterrupt  # there is nothing to keep
    facts = {"seed": seed, "head_steps": settings.head_steps if head else 0, "interrupted": interrupt.is_set()}
    return run.finish(**facts, sketch_size=size, sketch_wanted=wanted, skipped=skipped)


class Shared(list[Any]):
    """Batches that every process of torch.distributed holds, and of which each profiles its share."""


class SeenBatch(NamedTuple):
    """What is noted of a batch."""

    size: int
    loss: float
    tokens: int
    image_tokens: int
    digest: str


@dataclass
class _Run:
    """A profile in the making."""

    model: nn.Module
    loss_fn: LossFunction
    modules: Modules
    hooks: GradientHooks
    settings: ProfileSettings
    shared: bool = False  # all processes hold all batches
    seen: list[SeenBatch] = field(default_factory=list)
    skipped: int = 0  # batches without a finite loss
    scale: float = 1.0  # the factor on all gradients; see `in_range`
    next_look: int = 4  # in batches; see `converged`
    last_look: dict[str, Tensor] = field(default_factory=dict)

    def behind_heads(
        self, batches: Iterable[Any], head: Sequence[str], others: Iterable[Any] | None, interrupt: threading.Event
    ) -> Generator[Any]:
        """Yield the batches, each behind a head that was trained on others; an interrupt while one is trained ends them."""
        steps = self.settings.head_steps if head else 0
        rounds: list[Any] = [(batches, others)]
        if steps and others is None:
            held = list(batches)
            rounds = [(held[0::2], held[1::2]), (held[1::2], held[0::2])] if len(held) > 1 else []
        first, each = (process_index(), n_processes()) if self.shared else (0, 1)
        for mine, rest in rounds:
            warm: Any = {"interrupt": interrupt, "alone": self.shared}
            with head_warmed(self.model, head, rest, self.loss, steps, **warm) if steps else nullcontext():
                if interrupt.is_set():
                    return
                yield from islice(mine, first, None, each)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch that may lie on another device, if it can be differentiated; it may not be finite."""
        loss: Any = self.loss_fn(model, send_to_device(batch, batch_device(model)))
        if not isinstance(loss, Tensor) or loss.ndim:
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            remedy = "do the batches have labels?" if loss is None else "return one number for the batch."
            raise ModelError(f"`loss_fn` must return a scalar tensor, but returned {found}; {remedy}")
        if not loss.requires_grad and bool(loss.isfinite()):
            must = "the loss must depend on a target module, but depends on none"
            raise ModelError(f"{must}; check `targets` and `loss_fn`.")
        return loss

    def see(self, batch: Any) -> None:
        """Forward and backward of one batch; an empty one, or one without a finite loss, does not count."""
        tensors = list(leaves(batch))
        first = dict(reversed(tensors))  # under each key
        mask, ids = first.get("attention_mask"), first.get("input_ids")
        mask = mask if mask is not None and mask.ndim == 2 else None
        size = next((len(tensor) for _, tensor in tensors if tensor.ndim), 1)
        if not size:
            return
        images = image_positions(self.model, first)
        loss = self._backward(batch, size, mask, images)
        if not math.isfinite(loss):
            self.skipped += 1
            return
        if not self.seen and (scale := in_range(self.hooks.peak())) != 1.0:
            self.scale = scale
            self.hooks.clear()
            self._backward(batch, size, mask, images)
        tokens = 0 if ids is None else ids.numel() if mask is None else int(mask.sum())
        text = "".join(repr((tuple(t.shape), float(t.cpu().double().sum()))) for _, t in tensors)  # MPS has no doubles
        n_images = 0 if images is None else int(images.sum())
        self.seen.append(SeenBatch(size, loss, tokens, n_images, hashlib.sha256(text.encode()).hexdigest()))

    def _backward(self, batch: Any, size: int, mask: Tensor | None, images: Tensor | None) -> float:
        """The loss; if it is finite, the hooks see its backward pass."""
        self.hooks.begin_batch(size, mask, factor=size * self.scale, images=images)
        loss = self.loss(self.model, batch)
        value = float(loss.detach())
        if math.isfinite(value):
            loss.backward()
        self.hooks.end_batch()
        return value

    def converged(self) -> bool:
        """Whether the leading 8 singular values have stopped moving; looks after 4 batches, then after half as many again."""
        if self.settings.tolerance is not None and n_processes() > 1:
            raise ModelError("`tolerance` must be None under torch.distributed; give `n_batches` instead.")
        if self.settings.tolerance is None or len(self.seen) < self.next_look:
            return False
        self.next_look, total = int(len(self.seen) * 1.5) + 1, sum(batch.size for batch in self.seen)
        now = {name: sums.decompose().values[:8] / total for name, sums in self.hooks.accumulators.items()}
        last, self.last_look = self.last_look, now
        moved = [(now[name] - last[name]).norm() / now[name].norm() for name in last if now[name].any()]
        return bool(moved) and float(torch.stack(moved).mean()) <= self.settings.tolerance

    def finish(self, **facts: Any) -> Profile:
        """The profile of all processes' batches; `facts` are further metadata."""
        if n_processes() > 1:
            self._sum_over_processes()
        silent, digests = self._check(), sorted(batch.digest for batch in self.seen)  # whichever process saw them
        table = tabulate(map(self._measure, self.modules), len(self.seen))
        metadata = {
            "schema": SCHEMA_VERSION,
            "model": fingerprint_targets(tuple(self.modules)),
            "weights": _fingerprint_weights(self.model),
            "data": hashlib.sha256("".join(digests).encode()).hexdigest()[:16],
            "targets": len(self.modules),
            "without_gradient": silent,
            "batches": len(self.seen),
            "skipped_batches": self.skipped,
            "tokens": sum(batch.tokens for batch in self.seen),
            "loss": sum(batch.size * batch.loss for batch in self.seen) / sum(batch.size for batch in self.seen),
            "versions": {"rankscope": rankscope.__version__, **{n: version(n) for n in ("torch", "transformers")}},
        }
        n_images = sum(batch.image_tokens for batch in self.seen)
        return Profile(table, {**metadata, **({"image_tokens": n_images} if n_images else {}), **facts})

    def _sum_over_processes(self) -> None:
        """Sum in the scale of the first process that has a batch."""
        everyone = gathered((self.seen, self.skipped, self.scale))
        scale = next((scale for seen, _, scale in everyone if seen), 1.0)
        for sums in self.hooks.accumulators.values():
            sums.rescale(scale / self.scale)
        self.hooks.sum_over_processes()
        self.seen = [batch for seen, *_ in everyone for batch in seen]
        self.skipped, self.scale = sum(skipped for _, skipped, _ in everyone), scale

    def _check(self) -> list[str]:
        """Modules without a gradient. Gradients are looked at in the end: on the way, each look would make a GPU wait."""
        n, total, most = len(self.seen), self.skipped + len(self.seen), self.settings.max_skipped
        if self.skipped > most * total:
            found = (
                f"is not in {self.skipped} of {total} batches (at most {most:.0%} are skipped); look at these batches"
            )
            raise ModelError(f"the loss must be finite, but {found}, or use float32 or bfloat16.")
        if n < 2:
            held = f"so that signal can be told from noise, but held {n}; pass more, or smaller ones"
            raise ModelError(f"`batches` must hold at least 2 batches, {held}.")
        sums, inputs = self.hooks.accumulators, self.hooks.inputs
        silent = [name for name in sums if not sums[name].batches]
        if silent:
            n_silent = f"{len(silent)} of {len(sums)}"
            logger.warning("%s modules got no gradient and count as zero, as `%s`", n_silent, silent[0])
        for name in sums:
            if not all(tensor.isfinite().all() for tensor in sums[name].tensors()):
                must = f"the gradient at `{name}` must be finite, but is not"
                raise ModelError(f"{must}; check the loss, or use float32 or bfloat16.")
            if name in inputs and not inputs[name].squares.isfinite():
                raise ModelError(f"the inputs of `{name}` must be finite and below 1e18, but are not; check the data.")
        return silent

    def _measure(self, target: TargetModule) -> Measured:
        sums, sizes = self.hooks.accumulators[target.name], [batch.size for batch in self.seen]
        found, total, unit = sums.decompose(), sum(sizes), 1.0 / self.scale
        energies = max(found.energy, 0.0) / total**2, float(sums.squares), float(sums.measure(sums.kept)) / total**2
        energy, squares, measured = (each * unit * unit for each in energies)
        values, error = (found.values / total).double() * unit, found.error / total * unit
        inputs, weight = self.hooks.inputs.get(target.name), dense_weight(self.modules[target])
        change = None if weight is None else sensitivity(weight, found.left, found.values[:, None] * found.right)
        gradient = found._replace(values=values, energy=energy, error=error)
        split, change = split_energy(energy, squares, sizes, measured), change and change / total * unit
        parts = None
        if sums.part is not None:
            both = sums.part, sums.kept[-1] - sums.part
            parts = tuple(float(sums.measure((each,))) / total**2 * unit * unit for each in both)
        keep = self.settings.keep_directions
        return Measured(target, sums.exact, gradient, split, inputs, weight, change, keep, parts)


def leaves(batch: Any, name: Any = None) -> Iterator[tuple[Any, Tensor]]:
    """The tensors of a batch of nested mappings and sequences, in order, each with the key above it."""
    if isinstance(batch, Tensor):
        yield name, batch
    elif isinstance(batch, Mapping | list | tuple):
        for key, value in batch.items() if isinstance(batch, Mapping) else zip(repeat(name), batch):
            yield from leaves(value, key)


def image_positions(model: nn.Module, tensors: Mapping[Any, Tensor]) -> Tensor | None:
    """Where a batch has image tokens, (batch, sequence), true there; None without any.

    `tensors` are the batch's by name. The first of these tells: `image_mask`; `mm_token_type_ids`, which transformers' processors
    give (0: text); `input_ids`, where they are the image or video token of the model's configuration.
    """
    config, ids = getattr(model, "config", None), tensors.get("input_ids")
    mask = tensors.get("image_mask", tensors.get("mm_token_type_ids"))
    if mask is not None and (ids is None or mask.shape == ids.shape):
        found = mask != 0
    elif ids is not None:
        names = ("image_token_id", "image_token_index", "video_token_id")
        tokens = {token for name in names if isinstance(token := getattr(config, name, None), int)}
        found = torch.isin(ids, torch.tensor(sorted(tokens), device=ids.device)) if tokens else ids.new_zeros(0)
    else:
        return None
    return found if found.ndim == 2 and bool(found.any()) else None


def _model_loss(model: nn.Module, batch: Any) -> Any:
    if not isinstance(batch, Mapping):
        raise ModelError(
            f"batches must be the model's inputs by name, but got a {type(batch).__name__}; pass `loss_fn`."
        )
    outputs = model(**batch)
    if not hasattr(outputs, "loss"):
        raise ModelError(f"the model must return a `loss`, but returned a {type(outputs).__name__}; pass `loss_fn`.")
    return outputs.loss


@contextmanager
def head_warmed(
    model: nn.Module,
    head: Sequence[str],
    batches: Iterable[Any],
    loss_fn: LossFunction,
    steps: int,
    interrupt: threading.Event | None = None,
    *,
    alone: bool = False,
) -> Iterator[None]:
    """Train the named modules of a frozen model alone, by AdamW, until an interrupt; restore them on exit.

    Processes that pass different batches share each step; `alone`: all do the same steps.
    """
    present = dict(model.named_modules())
    if missing := [name for name in head if name not in present]:
        raise ModelError(f"`head` must name modules of this model, but it has no `{missing[0]}`; check the name.")
    modules = nn.ModuleList(present[name] for name in head)
    parameters = list(modules.parameters())
    if any(parameter.is_meta for parameter in parameters):
        raise ModelError(f"`head` must name modules in memory, but `{head[0]}` is offloaded; keep it on a device.")
    before, done, stopped = deepcopy(modules.state_dict()), 0, False
    try:
        modules.requires_grad_(True)
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        for batch in islice(chain.from_iterable(repeat(batches, steps)), steps):  # again and again
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            gradients = [p.grad for p in parameters if p.grad is not None and not alone]
            sum_over_processes(gradients)  # so that all processes have one head
            for gradient in gradients:
                gradient /= n_processes()
            optimizer.step()
            done += 1
            if stopped := interrupt is not None and interrupt.is_set():
                break
        if done < steps and not stopped:
            raise ModelError("the batches that train the head must not be empty, but are; check `head_batches`.")
        modules.requires_grad_(False).zero_grad()
        yield
    finally:
        modules.load_state_dict(before)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Run the model frozen, in evaluation mode and not compiled; restore its training modes and `requires_grad` flags."""
    training = [(module, module.training) for module in model.modules()]
    required = {name: p.requires_grad for name, p in model.named_parameters()}  # by name: accelerate replaces some
    eager = torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()  # it ignores new hooks
    model.eval().requires_grad_(False)
    try:
        with eager, torch.enable_grad():  # a caller may be inside no_grad
            yield
    finally:
        for module, mode in training:
            module.training = mode
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])


@contextmanager
def _interrupt(enabled: bool) -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, to be looked at after each batch; the second interrupts at once."""
    event, before = threading.Event(), signal.getsignal(signal.SIGINT)
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield event
        return

    def request(*_: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, request)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def _find_modules(model: nn.Module, targets: Sequence[TargetModule] | None) -> tuple[Modules, dict[str, str]]:
    """The modules that can be profiled, and why other targets, and the model's fused experts, cannot."""
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())  # then accelerate loads them
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            found = f"`{name}` was made in torch.inference_mode; load the model outside it"
            raise ModelError(f"the model's weights must take part in a backward pass, but {found}.")
        if parameter.is_meta and not offloaded:
            must = f"the model's weights must be loaded, but `{name}` is on the meta device"
            raise ModelError(f"{must}; load them first.")
    targets = find_targets(model) if targets is None else targets
    skipped = {t.name: f"{t.kind} modules cannot be profiled" for t in targets if t.kind not in SUPPORTED}
    skipped |= {t.name: "modules without inputs or outputs have no rank" for t in targets if not t.full_rank}
    if len(skipped) == len(targets):
        raise ModelError(f"`targets` must hold a module of kind {', '.join(SUPPORTED)}, but hold none; find others.")
    skipped |= dict.fromkeys(fused_experts(model), "experts fused into one 3-D weight cannot be profiled")
    names = {reason: name for name, reason in reversed(skipped.items())}  # the first of each
    for reason, count in Counter(skipped.values()).items():
        logger.warning("`%s` is left out: %s (%d such)", names[reason], reason, count)
    present, wanted = dict(base_modules(model)), [target for target in targets if target.name not in skipped]
    if missing := [target.name for target in wanted if target.name not in present]:
        raise ModelError(f"`targets` must be modules of this model, but it has no `{missing[0]}`; find them again.")
    return {target: present[target.name] for target in wanted}, skipped


def _fingerprint_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, _ in model.named_parameters():
        owner, _, attribute = name.rpartition(".")
        with align_module_device(module := model.get_submodule(owner)):
            parameter = whole(getattr(module, attribute).detach())
            digest.update(repr((name, tuple(parameter.shape), parameter.flatten()[:16].tolist())).encode())
    return digest.hexdigest()[:16]
