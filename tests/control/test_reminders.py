"""Warnings for controllers that are not told of steps, or see nothing: once each, and never in a run that is as it should be."""

import logging

import pytest
import torch

from tests.control.small_models import adamw, batch, control, net, run


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("rankscope")]


def test_a_controller_that_is_never_told_of_steps(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    optimizer = adamw(model)
    control(model, optimizer)
    model.train()
    for step in range(12):
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert len(warnings(caplog)) == (
            step >= 4
        )  # every 4 steps: at `every=1`, the first step is still to be told of
    assert warnings(caplog) == [
        "the optimizer has stepped, but `RankController.step` was never called, so no rank can move; call it after each "
        "`optimizer.step()` and before `zero_grad()`"
    ]
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("finite", [True, False])
def test_a_controller_that_never_has_a_gradient(caplog: pytest.LogCaptureFixture, finite: bool) -> None:
    """Another model is trained than the one that was passed, or the loss is not finite; later losses do not matter."""
    model = net()
    optimizer = adamw(model)
    controller = control(model, optimizer)
    trained = model.get_base_model() if finite else model
    trained.train()
    for step in range(40):
        (trained(**batch(step)).loss * (1.0 if finite else torch.inf)).backward()
        if finite:
            optimizer.step()
        controller.step()
        optimizer.zero_grad()
    cause = (
        "no training forward pass of the PEFT model was seen, or none with gradients; train the model that was passed, and with "
        "reentrant checkpointing call its `enable_input_require_grads()`"
        if finite
        else "the gradients of 15 sampled steps were not finite; lower the learning rate or the loss scale"
    )
    assert warnings(caplog) == [f"no rank was moved, for none of the 5 decisions had gradients to rest on: {cause}"]
    assert set(controller.decisions["action"]) == {"skipped"}


def test_a_run_that_is_as_it_should_be(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    optimizer = adamw(model)
    controller = control(model, optimizer)
    run(model, optimizer, controller, range(40))
    controller.close()
    assert warnings(caplog) == []
