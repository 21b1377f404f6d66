"""Warming a fresh head: a gradient through an untrained classifier says little about the body below it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from rankscope.exceptions import ProfileError
from rankscope.profiling.processes import process_count, sum_over_processes
from rankscope.profiling.restoring import values_restored

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
        ProfileError: A name is not a module of the model.
    """
    present = dict(model.named_modules())
    if missing := [name for name in head if name not in present]:
        raise ProfileError(f"`head` must name modules of this model, but it has no `{missing[0]}`; check the name.")
    parameters = [parameter for name in head for parameter in present[name].parameters()]
    if any(parameter.is_meta for parameter in parameters):
        raise ProfileError(f"`head` must name modules in memory, but `{head[0]}` is offloaded; keep it on a device.")
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
        gradient /= process_count()


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ProfileError("the batches that train the head must not be empty, but are; check `head_batches`.")
