"""Warm start: a study describes itself in its database, so that later searches, of other tasks and models, can learn from it.

The attribute `rankscope-space` holds what gives a trial's ranks their meaning: the target modules, the gains of their ranks and
the budget. The attribute `rankscope-prior` holds what a study was started with, so that it goes on with the same.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from rankscope.budget import ParameterBudget
from rankscope.exceptions import StudyError
from rankscope.performance import EarlierStudy, Prior, learn_prior, rank_features
from rankscope.searching.study import STUDY_KEY, storage_errors
from rankscope.searching.trials import RANKS_KEY, TRIAL_KEY, completed
from rankscope.space import HierarchicalSpace, group_by_depth
from rankscope.targets import TargetModule

logger = logging.getLogger(__name__)

Source = str | os.PathLike[str] | optuna.storages.BaseStorage

SPACE_KEY = "rankscope-space"
PRIOR_KEY = "rankscope-prior"
SCHEMA = 1
DIGITS = 4  # of a gain in the database


def settle_prior(
    study: optuna.Study, space: HierarchicalSpace, sources: Sequence[Source], storage: Any
) -> Prior | None:
    """The prior of a search: the one its study was started with, else what the sources give, which the study then keeps.

    Args:
        study: The search's; it gets the description of its space if it has none.
        space: The search's.
        sources: Databases of earlier studies: paths of SQLite files, or storages as Optuna takes them. The study itself is
            passed over.
        storage: Where the study lies.

    Raises:
        StudyError: A source cannot be opened, holds no study of rankscope, or one that does not describe itself.
        PerformanceModelError: An earlier study has too few trials or a constant metric.
    """
    if SPACE_KEY not in study.user_attrs:  # a new study, or one of an earlier version
        study.set_user_attr(SPACE_KEY, describe_space(space))
    if (stored := study.user_attrs.get(PRIOR_KEY)) is not None:
        prior = Prior(
            means=stored["means"],
            deviations=stored["deviations"],
            studies=tuple((name, trials) for name, trials in stored["studies"]),
        )
        logger.info("study `%s` goes on with the prior it was started with: %s", study.study_name, prior)
        return prior
    if not sources:
        return None
    own = (_location(storage), study.study_name)
    prior = learn_prior([earlier for source in sources for earlier in read_earlier(source, own)])
    stored = {"means": prior.means, "deviations": prior.deviations, "studies": prior.studies}
    study.set_user_attr(PRIOR_KEY, stored)
    return prior


def describe_space(space: HierarchicalSpace) -> dict[str, Any]:
    """What `read_earlier` needs of a space, as JSON values; some 800 bytes a module."""
    return {
        "schema": SCHEMA,
        "budget": space.budget.limit,
        "targets": [[t.name, t.in_features, t.out_features, t.tower, t.block, t.role, t.kind] for t in space.targets],
        "gains": [[float(f"{g:.{DIGITS}g}") for g in space.gains[t.name]] for t in space.targets],
    }


def read_earlier(source: Source, own: tuple[object, str] | None = None) -> list[EarlierStudy]:
    """All studies of rankscope in a database, but for the searching one.

    Args:
        source: The database.
        own: Location and name of the study to pass over.

    Raises:
        StudyError: It cannot be opened, holds none, or one that does not describe itself.
    """
    location = _location(source)
    if isinstance(location, Path) and not location.exists():
        raise StudyError(
            f"`warm_start` must name databases of earlier studies, but there is no `{location}`; check the path."
        )
    studies = [study for study in _open_all(source) if own != (location, study.study_name)]
    if not studies:
        raise StudyError(
            f"`warm_start` must name databases of earlier studies, but `{source}` holds none of rankscope's."
        )
    return [_read(study) for study in studies]


def _open_all(source: Source) -> list[optuna.Study]:
    """The studies of rankscope in a database."""
    location = _location(source)
    storage: Any = f"sqlite:///{location}" if isinstance(location, Path) else source
    with storage_errors(f"`warm_start` must name databases that Optuna can open, but `{source}` is not"):
        studies = [optuna.load_study(study_name=n, storage=storage) for n in optuna.get_all_study_names(storage)]
    return [study for study in studies if STUDY_KEY in study.user_attrs]


def _read(study: optuna.Study) -> EarlierStudy:
    name, stored = study.study_name, study.user_attrs.get(SPACE_KEY)
    if stored is None:
        raise StudyError(
            f"study `{name}` must describe its modules for a warm start, but is of an earlier version of rankscope; "
            "resume it once, or leave it out."
        )
    if stored["schema"] != SCHEMA:
        raise StudyError(
            f"study `{name}` must have schema {SCHEMA} for a warm start, but has {stored['schema']!r}: it is of another "
            "version of rankscope; leave it out, or search again."
        )
    targets = tuple(
        TargetModule(name=n, in_features=i, out_features=o, tower=tower, block=block, role=role, kind=kind)
        for n, i, o, tower, block, role, kind in stored["targets"]
    )
    features = rank_features(
        targets,
        ParameterBudget(stored["budget"]),
        gains={t.name: gains for t, gains in zip(targets, stored["gains"], strict=True)},
        groups=group_by_depth(targets),
    )
    trials = [t for t in completed(study) if t.user_attrs.get(TRIAL_KEY, {"reused": 0})["reused"] is None]
    return EarlierStudy(
        name=name,
        task=study.user_attrs[STUDY_KEY]["task"],
        features=features,
        ranks=np.array([t.user_attrs[RANKS_KEY] for t in trials], dtype=np.int64).reshape(-1, len(targets)),
        metric=np.array([t.value for t in trials], dtype=np.float64),
        conditions=[t.user_attrs[TRIAL_KEY]["learning_rate"] for t in trials],
    )


def _location(source: Any) -> object:
    """The path of an SQLite file; else the source itself."""
    if isinstance(source, os.PathLike) or (isinstance(source, str) and "://" not in source):
        return Path(source).resolve()
    if isinstance(source, str) and source.startswith("sqlite:///"):
        return Path(source.removeprefix("sqlite:///").split("?")[0]).resolve()
    return source
