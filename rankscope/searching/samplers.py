"""The samplers a search can be asked for by name: the performance model's, and Optuna's own over the tilts."""

from __future__ import annotations

from typing import Literal, get_args

import optuna

from rankscope.exceptions import StudyError
from rankscope.searching.sampler import PerformanceModelSampler
from rankscope.space import HierarchicalSpace

SamplerName = Literal["performance-model", "tpe", "gp", "cma-es", "qmc", "random"]


def make_sampler(
    sampler: SamplerName | optuna.samplers.BaseSampler, space: HierarchicalSpace, seed: int
) -> optuna.samplers.BaseSampler:
    """The sampler of a name; one that is a sampler already is passed through.

    Raises:
        StudyError: There is none of that name, or a package it needs is missing.
    """
    match sampler:
        case optuna.samplers.BaseSampler():
            return sampler
        case "performance-model":
            return PerformanceModelSampler(space, seed=seed)
        case "tpe":
            return optuna.samplers.TPESampler(seed=seed, multivariate=True)
        case "gp":
            return optuna.samplers.GPSampler(seed=seed)
        case "cma-es":
            try:
                return optuna.samplers.CmaEsSampler(seed=seed)
            except ImportError:
                raise StudyError(
                    "sampler 'cma-es' needs the package cmaes; `pip install 'rankscope[cma-es]'`."
                ) from None
        case "qmc":
            return optuna.samplers.QMCSampler(seed=seed)
        case "random":
            return optuna.samplers.RandomSampler(seed=seed)
    raise StudyError(f"`sampler` must be one of {', '.join(get_args(SamplerName))}, but got {sampler!r}.")
