"""Effects of moves on the loss, and the model of them, against closed forms."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import rankscope as rs
from rankscope.control.decisions import Decision, effect_of_move, predict_effect
from rankscope.control.signals import LossHistory
from tests.control.small_models import batch, net

TARGETS = [
    rs.TargetModule(name=f"h.{i}.fc{j}", in_features=32, out_features=32, block=i, role=f"fc{j}")
    for i in (0, 1)
    for j in (1, 2)
]


def test_a_steady_decline_is_no_effect() -> None:
    found = effect_of_move(np.linspace(3.0, 1.0, 20).tolist())
    assert found.mean == pytest.approx(0.0, abs=1e-12)


def test_a_slowing_decline_is_nearly_none_and_a_jump_is_found() -> None:
    losses = 2.0 * 0.97 ** np.arange(40)
    smooth = effect_of_move(losses.tolist())
    jumped = effect_of_move((losses - 0.5 * (np.arange(40) >= 20)).tolist())
    assert abs(smooth.mean) < 0.02
    assert jumped.mean == pytest.approx(0.5 + smooth.mean)


def test_its_error_is_that_of_repeated_noise() -> None:
    rng = np.random.default_rng(0)
    found = [effect_of_move(rng.normal(1.0, 0.2, 40).tolist()) for _ in range(2000)]
    means = [f.mean for f in found]
    errors = [f.error for f in found]
    assert np.std(means) == pytest.approx(math.sqrt(5 * 0.2**2 / 10), rel=0.05)
    assert math.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.05)


@pytest.mark.parametrize("losses", [[1.0] * 7, [1.0] * 7 + [math.nan]])
def test_too_few_or_unknown_losses_say_nothing(losses: list[float]) -> None:
    assert np.isnan(effect_of_move(losses)).all()


def moved(before: tuple[int, ...], after: tuple[int, ...], realised: float, error: float) -> Decision:
    """A move, as far as its effect matters."""
    unknown = {name: None for name in Decision.__slots__ if not name.startswith("realised")}
    known = {"action": "moved", "ranks_before": before, "ranks_after": after}
    return Decision(**(unknown | known), realised=realised, realised_error=error)


def test_the_model_learns_what_moves_do() -> None:
    features = rs.rank_features(TARGETS, rs.ParameterBudget.uniform(TARGETS, 2))
    uniform, early, late = (2, 2, 2, 2), (3, 3, 1, 1), (1, 1, 3, 3)
    assert np.isnan(predict_effect(features, [], uniform, early)).all()
    moves = [moved(uniform, early, -0.4, 0.1)] * 8
    again, opposite = (predict_effect(features, moves, uniform, after) for after in (early, late))
    assert again.mean == pytest.approx(-0.4, abs=0.06)
    assert again.mean + again.error < 0 < opposite.mean - opposite.error


def test_one_observation_is_the_textbook_posterior() -> None:
    """Prior variance of the effect and error variance are equal, so the posterior mean is half of what was seen."""
    features = rs.rank_features(TARGETS, rs.ParameterBudget.uniform(TARGETS, 2))
    before, after = (2, 2, 2, 2), (3, 2, 2, 1)
    found = predict_effect(features, [moved(before, after, 0.3, 0.2)], before, after)
    assert found.mean == pytest.approx(0.15, rel=1e-6)
    assert found.error == pytest.approx(0.2 / math.sqrt(2), rel=1e-6)


def test_the_history_sees_training_losses_only() -> None:
    model = net()
    history = LossHistory(model)
    model.train()
    first, second = model(**batch(0)).loss, model(**batch(1)).loss
    (first + second).backward()
    model(**batch(4))  # another loss is minimised
    model.eval()
    model(**batch(2))
    model.train()
    with torch.no_grad():
        model(**batch(3))
    history.end_step(None)
    history.end_step(None)
    history.end_step(0.25)
    assert history.values() == pytest.approx([float((first + second).detach()) / 2, math.nan, 0.25], nan_ok=True)
    history.close()
    model(**batch(0))
    history.end_step(None)
    assert math.isnan(history.values()[-1])


def test_models_that_return_no_loss() -> None:
    plain = nn.Linear(2, 2)
    history = LossHistory(plain)
    plain(torch.ones(1, 2))
    history.end_step(None)
    assert math.isnan(history.values()[0])
