"""The pruners that a search can be asked for by name, and what each needs to judge by."""

from __future__ import annotations

from typing import Literal, get_args

import optuna

from rankscope.exceptions import StudyError
from rankscope.training import TrainingConfig

PrunerName = Literal["none", "median", "hyperband", "wilcoxon"]
WILCOXON_SEEDS = (
    5  # the signed-rank test's least p-value over four pairs is 1/16; over three it is above the pruner's 0.1
)


def make_pruner(
    pruner: PrunerName | optuna.pruners.BasePruner, training: TrainingConfig, n_seeds: int
) -> optuna.pruners.BasePruner:
    """The pruner of a name; one that is a pruner already is passed through.

    `"median"` and `"hyperband"` judge a trial by evaluations on its way (of the first seed), `"wilcoxon"` by its seeds, one after
    the other, against those of the best trial.

    Args:
        pruner: Name or pruner.
        training: The schedule of a trial.
        n_seeds: Of a trial.

    Raises:
        StudyError: There is none of that name, or trials give it nothing to judge by.
    """
    made = pruner if isinstance(pruner, optuna.pruners.BasePruner) else _named(pruner)
    if isinstance(made, optuna.pruners.NopPruner):
        return made
    if not judges_seeds(made):
        if training.evaluate_every is None or training.evaluate_every >= training.steps:
            raise StudyError(
                f"`evaluate_every` must be below the {training.steps} steps of a trial, for a pruner to judge by, "
                f"but is {training.evaluate_every}; lower it, or prune nothing."
            )
    elif n_seeds < WILCOXON_SEEDS and pruner == "wilcoxon":
        raise StudyError(
            f"`n_seeds` must be at least {WILCOXON_SEEDS} for the pruner 'wilcoxon', since fewer cannot be significant, "
            f"but is {n_seeds}; raise it, or prune nothing."
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
        case "wilcoxon":
            return optuna.pruners.WilcoxonPruner()
    raise StudyError(f"`pruner` must be one of {', '.join(get_args(PrunerName))}, but got {pruner!r}.")
