"""`profile`: runs a model over batches and turns each target module's gradient into features.

Hooks see the input x and the output gradient delta of every target module; no weight needs `requires_grad`, so the
base may be frozen or quantised, and no full gradient is ever kept (`sketch.py`). Even and odd batches feed two
sketches: what both halves agree on is signal.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from itertools import islice
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from rankscope.exceptions import ProfileError
from rankscope.profiling.head import head_warmed
from rankscope.profiling.sketch import (
    ExactGradient,
    GradientAccumulator,
    RandomMatrices,
    cross_values,
    new_gradient_store,
    signal_energy,
    singular_values,
)
from rankscope.profiling.store import SCHEMA, Profile
from rankscope.targets import TargetModule, find_targets, fingerprint_targets

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
    sketch_size: int = 32,
    seed: int = 0,
    on_batch: Callable[[int, float], None] | None = None,
) -> Profile:
    """Profiles the gradient of the loss at every target module.

    The model is left as it was: its weights, its `requires_grad` flags, its training mode and its hooks. It is run in
    evaluation mode, so that dropout adds no noise.

    Args:
        model: Any torch module, on any device; frozen and quantised bases included.
        batches: Batches of the training data, iterable more than once where `head` is given (a list, a DataLoader).
            Each counts by its number of examples (the first dimension of its first tensor). At least two.
        targets: Which modules; default: `find_targets(model)`.
        loss_fn: `loss_fn(model, batch)`, a scalar; default: `model(**batch).loss`.
        n_batches: Use this many batches only.
        head: Full names of freshly initialised modules (a new classifier). A gradient through an untrained head says
            little, so they are trained first, alone, for `head_steps` steps, and restored afterwards.
        head_steps: AdamW steps on the head.
        sketch_size: Columns k of the narrow sketch; the wide one has 4 k rows. So many singular values are found.
        seed: Seeds the sketches.
        on_batch: Called after each batch with its index and loss.

    Raises:
        ProfileError: Fewer than two batches, a loss that is not a finite scalar, or a module that got no gradient.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    >>> batches = [torch.ones(2, 4), -torch.ones(2, 4)]
    >>> taken = profile(model, batches, loss_fn=lambda model, batch: model(batch).square().mean())
    >>> {name: len(values) for name, values in taken.spectra().items()}
    {'0': 3, '2': 1}
    """
    targets = tuple(targets) if targets is not None else find_targets(model)
    loss_fn = loss_fn or _model_loss
    modules = _modules(model, targets)
    device = _device(model)
    matrices = RandomMatrices(k=sketch_size, l=4 * sketch_size, seed=seed)
    halves = tuple(
        {t.name: new_gradient_store(t.in_features, t.out_features, matrices, _device(modules[t.name])) for t in targets}
        for _ in range(2)
    )
    tally = _Tally()
    with ExitStack() as stack:
        stack.enter_context(_as_it_was(model))
        if head and head_steps:
            batches = batches if not isinstance(batches, Iterator) else list(batches)
            stack.enter_context(head_warmed(model, head, batches, loss_fn, steps=head_steps))
        hooks = stack.enter_context(_hooked(modules))
        for index, batch in enumerate(islice(batches, n_batches)):
            hooks.stores = halves[index % 2]
            weight = tally.weigh(batch)
            loss = loss_fn(model, _to_device(batch, device))
            tally.losses.append(_checked_loss(loss, index))
            _backward(loss * weight)
            if on_batch:
                on_batch(index, tally.losses[-1])
    _check_taken(targets, tally, hooks, halves)
    frame = _table(targets, modules, halves, tally)
    steps = head_steps if head else 0
    return Profile(frame, _metadata(model, targets, tally, seed=seed, head_steps=steps, sketch_size=sketch_size))


def _check_taken(
    targets: Sequence[TargetModule],
    tally: _Tally,
    hooks: _Hooks,
    halves: Sequence[Mapping[str, GradientAccumulator]],
) -> None:
    """What can only be told in the end: looking at each gradient on the way would make a GPU wait each time."""
    if len(tally.losses) < 2:
        raise ProfileError(
            f"`batches` must hold at least 2 batches, so that signal can be told from noise, but held {len(tally.losses)}; "
            "pass more, or smaller ones."
        )
    if unseen := [target.name for target in targets if target.name not in hooks.seen]:
        raise ProfileError(f"`{unseen[0]}` must get a gradient from the loss, but got none; drop it from `targets`.")
    stores = [(target.name, half[target.name]) for target in targets for half in halves]
    if broken := [name for name, store in stores if not store.is_finite()]:
        raise ProfileError(f"the gradient at `{broken[0]}` must be finite, but is not; check the loss, or use float32.")


# --- hooks -------------------------------------------------------------------------------------------------------


class _Hooks:
    """Where the hooks put what they see: the stores of the present half, and the modules seen so far."""

    def __init__(self) -> None:
        self.stores: Mapping[str, GradientAccumulator] = {}
        self.seen: set[str] = set()

    def forward(self, name: str) -> Callable[..., None]:
        """A forward hook that waits for the gradient of the module's output, at every call of the module."""

        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not torch.is_grad_enabled():
                return
            if not output.requires_grad:  # the first modules: nothing before them needs a gradient
                output.requires_grad_()
            inputs = args[0].detach()

            def receive(gradient: Tensor) -> None:
                flat_inputs = inputs.reshape(-1, inputs.shape[-1])
                flat_gradient = gradient.detach().reshape(-1, gradient.shape[-1])
                self.stores[name].add(flat_inputs.to(flat_gradient.dtype), flat_gradient)
                self.seen.add(name)

            output.register_hook(receive)

        return hook


@contextmanager
def _hooked(modules: Mapping[str, nn.Module]) -> Iterator[_Hooks]:
    hooks = _Hooks()
    handles = [module.register_forward_hook(hooks.forward(name)) for name, module in modules.items()]
    try:
        yield hooks
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Freezes the model in evaluation mode, and gives both back."""
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


def _modules(model: nn.Module, targets: Sequence[TargetModule]) -> dict[str, nn.Module]:
    present = dict(model.named_modules())
    for target in targets:
        if target.name not in present:
            raise ProfileError(
                f"`targets` must be modules of this model, but it has no `{target.name}`; find them again."
            )
        if target.kind not in ("linear", "conv1d"):
            raise ProfileError(
                f"`{target.name}` must be a linear module to be profiled, but is a {target.kind}; drop it."
            )
    return {target.name: present[target.name] for target in targets}


# --- loss and batches --------------------------------------------------------------------------------------------


def _model_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    return model(**batch).loss  # type: ignore[no-any-return]


def _checked_loss(loss: Any, index: int) -> float:
    if not isinstance(loss, Tensor) or loss.ndim:
        raise ProfileError(
            f"`loss_fn` must return a scalar tensor, but returned {type(loss).__name__}; do the batches have labels?"
        )
    if not math.isfinite(value := float(loss.detach())):
        raise ProfileError(
            f"the loss must be finite, but is {value} on batch {index}; look at that batch, or use float32."
        )
    return value


def _backward(loss: Tensor) -> None:
    if not loss.requires_grad:
        raise ProfileError(
            "the loss must depend on a target module, but depends on none; check `targets` and `loss_fn`."
        )
    loss.backward()


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _to_device(batch: Any, device: torch.device) -> Any:
    from accelerate.utils import send_to_device

    return send_to_device(batch, device)


class _Tally:
    """Losses, weights, tokens and the data's fingerprint, batch by batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.weights: list[float] = []
        self.tokens = 0
        self._first_size = 0
        self._digest = hashlib.sha256()

    def weigh(self, batch: Any) -> float:
        """Takes note of a batch, where it lies; returns its weight: its size, where the first batch's is 1."""
        tensors = [t for t in (batch.values() if isinstance(batch, Mapping) else [batch]) if isinstance(t, Tensor)]
        for tensor in tensors:
            self._digest.update(repr((tuple(tensor.shape), float(tensor.double().sum()))).encode())
        if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
            mask = batch.get("attention_mask")
            self.tokens += int(mask.sum()) if isinstance(mask, Tensor) else batch["input_ids"].numel()
        size = tensors[0].shape[0] if tensors and tensors[0].ndim else 1
        self._first_size = self._first_size or size
        self.weights.append(size / self._first_size)
        return self.weights[-1]

    @property
    def loss(self) -> float:
        """The mean loss over examples."""
        return sum(w * loss for w, loss in zip(self.weights, self.losses, strict=True)) / sum(self.weights)

    @property
    def fingerprint(self) -> str:
        """A short hash of shapes and sums of all tensors."""
        return self._digest.hexdigest()[:16]


# --- features ----------------------------------------------------------------------------------------------------


def _table(
    targets: Sequence[TargetModule],
    modules: Mapping[str, nn.Module],
    halves: Sequence[Mapping[str, GradientAccumulator]],
    tally: _Tally,
) -> pd.DataFrame:
    frame = pd.DataFrame([_row(t, modules[t.name], halves[0][t.name], halves[1][t.name], tally) for t in targets])
    if not (frame["gradient_norm"] > 0).any():
        raise ProfileError(
            "the gradient must not be zero at every target module, but is; check the loss and the labels."
        )
    frame["block"] = frame["block"].astype("Int64")
    return frame


def _row(
    target: TargetModule, module: nn.Module, even: GradientAccumulator, odd: GradientAccumulator, tally: _Tally
) -> dict[str, Any]:
    n_even, n_odd = sum(tally.weights[0::2]), sum(tally.weights[1::2])
    mean = even.combine(1.0 / (n_even + n_odd), odd, 1.0 / (n_even + n_odd))
    first, second = even.combine(1.0 / n_even, odd, 0.0), even.combine(0.0, odd, 1.0 / n_odd)
    energy = mean.energy()
    signal = signal_energy(first, second)
    agreed = cross_values(first, second).clamp_min(0.0).sort(descending=True).values
    return {
        "module": target.name,
        "tower": target.tower,
        "block": target.block,
        "role": target.role,
        "kind": target.kind,
        "in_features": target.in_features,
        "out_features": target.out_features,
        "rank_cost": target.rank_cost,
        "gradient_norm": math.sqrt(max(energy, 0.0)),
        "signal_energy": signal,
        "noise_energy": energy - signal,
        "singular_values": singular_values(mean).tolist(),
        "signal_values": agreed.tolist(),
        "exact": isinstance(mean, ExactGradient),
        "weight_norm": _weight_norm(module),
    }


def _weight_norm(module: nn.Module) -> float | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return None
    return float(weight.detach().float().norm())


def _metadata(
    model: nn.Module, targets: Sequence[TargetModule], tally: _Tally, *, seed: int, head_steps: int, sketch_size: int
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "model": fingerprint_targets(targets),
        "weights": _fingerprint_weights(model),
        "data": tally.fingerprint,
        "targets": len(targets),
        "batches": len(tally.losses),
        "tokens": tally.tokens,
        "loss": tally.loss,
        "seed": seed,
        "head_steps": head_steps,
        "sketch_size": sketch_size,
        "versions": {name: version(name) for name in ("rankscope", "torch", "transformers")},
    }


def _fingerprint_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        corner = parameter.detach().flatten()[:16].tolist()
        digest.update(repr((name, tuple(parameter.shape), corner)).encode())
    return digest.hexdigest()[:16]
