"""What an earlier search believes, for those who would use its performance model without searching again."""

from __future__ import annotations

import optuna

from rankscope.exceptions import StudyError
from rankscope.performance import PerformanceModel
from rankscope.searching.sampler import PerformanceModelSampler
from rankscope.searching.study import STUDY_KEY
from rankscope.space import HierarchicalSpace
from rankscope.targets import fingerprint_targets


def belief_of(study: optuna.Study, space: HierarchicalSpace) -> PerformanceModel | None:
    """The performance model on a search's trials, or the profile alone where the model does not beat it.

    Args:
        study: rankscope's, as `load_study` gives it.
        space: What was searched.

    Returns:
        None where neither predicts trials that were left out, or where there are too few of them.

    Raises:
        StudyError: The search was of other modules or another budget.
    """
    about = study.user_attrs[STUDY_KEY]
    for key, ours in (("model", fingerprint_targets(space.targets)), ("budget", space.budget.limit)):
        if about[key] != ours:
            raise StudyError(
                f"study `{study.study_name}` must be about {key} {ours!r}, but its trials are about {about[key]!r}; "
                "search again, or use another output folder."
            )
    return PerformanceModelSampler(space).believed(study)
