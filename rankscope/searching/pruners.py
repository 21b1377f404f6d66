"""The pruners that a search can be asked for by name, and what a pruner needs to judge by."""

from __future__ import annotations

from typing import Literal, get_args

import optuna

from rankscope.exceptions import StudyError
from rankscope.training import TrainingConfig

PrunerName = Literal["none", "median", "hyperband"]


def make_pruner(pruner: PrunerName | optuna.pruners.BasePruner, training: TrainingConfig) -> optuna.pruners.BasePruner:
    """The pruner of a name; a pruner object is passed through.

    Pruners judge a trial by evaluations on its way (of the first seed); Optuna's `WilcoxonPruner` by its seeds, one after the
    other, against those of the best trial.

    Args:
        pruner: Name or pruner.
        training: The schedule of a trial.

    Raises:
        StudyError: There is none of that name, or trials give it nothing to judge by.
    """
    made = pruner if isinstance(pruner, optuna.pruners.BasePruner) else _named(pruner)
    if isinstance(made, optuna.pruners.NopPruner) or judges_seeds(made):
        return made
    if training.evaluate_every is None or training.evaluate_every >= training.steps:
        raise StudyError(
            f"`evaluate_every` must be below the {training.steps} steps of a trial, for a pruner to judge by, "
            f"but is {training.evaluate_every}; lower it, or prune nothing."
        )
    return made


def judges_seeds(pruner: optuna.pruners.BasePruner) -> bool:
    """Whether a pruner compares repeats, and not evaluations on the way."""
    return isinstance(pruner, optuna.pruners.WilcoxonPruner)


def _named(pruner: str) -> optuna.pruners.BasePruner:
    match pruner:
        case "none":
            return optuna.pruners.NopPruner()
        case "median":
            return optuna.pruners.MedianPruner()
        case "hyperband":
            return optuna.pruners.HyperbandPruner()
    raise StudyError(
        f"`pruner` must be one of {', '.join(get_args(PrunerName))} or an Optuna pruner, but got {pruner!r}."
    )
