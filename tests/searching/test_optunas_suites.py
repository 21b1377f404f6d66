"""Optuna's own test suites of samplers, on ours: as a sampler of any study, of relative parameters, of one objective.

Nothing is excepted. `MultiObjectiveSamplerTestCase` is for the other kind: ours is for one objective.
"""

from collections.abc import Callable

import numpy as np
import pytest
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase

import rankscope as rs


def make_sampler() -> BaseSampler:
    targets = tuple(rs.TargetModule(name=f"h.{i}.fc1", in_features=8, out_features=8, block=i) for i in range(4))
    space = rs.HierarchicalSpace(
        targets=targets,
        gains={t.name: 1.0 / np.arange(1, 9) for t in targets},
        budget=rs.ParameterBudget.uniform(targets, 2),
        groups={t.name: f"model/{t.block // 2}" for t in targets},
    )
    return rs.PerformanceModelSampler(space, seed=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # Optuna's, of its own inconsistent ranges
class TestPerformanceModelSampler(BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return make_sampler
