"""rankscope: which LoRA rank where, for your parameter budget.

The public names below load on first use: `import rankscope` itself imports no torch, transformers, optuna or sklearn.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from rankscope.errors import RankscopeError

if TYPE_CHECKING:
    from rankscope.allocation import RankAllocation as RankAllocation
    from rankscope.budget import ParameterBudget as ParameterBudget
    from rankscope.comparison import BudgetPlan as BudgetPlan
    from rankscope.comparison import Comparison as Comparison
    from rankscope.comparison import compare as compare
    from rankscope.comparison import plan_budget as plan_budget
    from rankscope.control import RankController as RankController
    from rankscope.control import RankControllerCallback as RankControllerCallback
    from rankscope.lora import export as export
    from rankscope.lora import measure_moments as measure_moments
    from rankscope.lora import pad_adapter as pad_adapter
    from rankscope.lora import shrink as shrink
    from rankscope.performance import PerformanceModel as PerformanceModel
    from rankscope.performance import rank_features as rank_features
    from rankscope.profiling import Profile as Profile
    from rankscope.profiling import profile as profile
    from rankscope.profiling import read_profile as read_profile
    from rankscope.searching import HierarchicalSpace as HierarchicalSpace
    from rankscope.searching import PerformanceModelSampler as PerformanceModelSampler
    from rankscope.searching import SearchResult as SearchResult
    from rankscope.searching import hp_space as hp_space
    from rankscope.searching import search as search
    from rankscope.searching import suggest_allocation as suggest_allocation
    from rankscope.settings import AllocationSettings as AllocationSettings
    from rankscope.settings import BudgetSettings as BudgetSettings
    from rankscope.settings import CompareSettings as CompareSettings
    from rankscope.settings import ControllerSettings as ControllerSettings
    from rankscope.settings import PlanSettings as PlanSettings
    from rankscope.settings import ProfileSettings as ProfileSettings
    from rankscope.settings import SearchSettings as SearchSettings
    from rankscope.settings import StudySettings as StudySettings
    from rankscope.settings import TrainingSettings as TrainingSettings
    from rankscope.settings import read_study as read_study
    from rankscope.strategies import allocate as allocate
    from rankscope.targets import TargetModule as TargetModule
    from rankscope.targets import find_targets as find_targets
    from rankscope.tasks import Task as Task
    from rankscope.tasks import load_task as load_task
    from rankscope.training import train as train

__version__ = "0.1.0"

# peft imports bitsandbytes, also in workers: it advises to install a kernel on import, and whenever a product casts.
for _adviser in ("backends.cpu.ops", "autograd._functions"):
    logging.getLogger(f"bitsandbytes.{_adviser}").setLevel(logging.ERROR)

_NAMES = {
    "allocation": ["RankAllocation"],
    "budget": ["ParameterBudget"],
    "comparison": ["BudgetPlan", "Comparison", "compare", "plan_budget"],
    "control": ["RankController", "RankControllerCallback"],
    "lora": ["export", "measure_moments", "pad_adapter", "shrink"],
    "performance": ["PerformanceModel", "rank_features"],
    "profiling": ["Profile", "profile", "read_profile"],
    "searching": [
        "HierarchicalSpace", "PerformanceModelSampler", "SearchResult", "hp_space", "search", "suggest_allocation",
    ],
    "settings": [
        "AllocationSettings", "BudgetSettings", "CompareSettings", "ControllerSettings", "PlanSettings", "ProfileSettings",
        "SearchSettings", "StudySettings", "TrainingSettings", "read_study",
    ],
    "strategies": ["allocate"],
    "targets": ["TargetModule", "find_targets"],
    "tasks": ["Task", "load_task"],
    "training": ["train"],
}  # fmt: skip

_HOMES = {name: f"rankscope.{module}" for module, names in _NAMES.items() for name in names}
__all__ = ["RankscopeError", "__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rankscope' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
