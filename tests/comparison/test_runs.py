"""One run: it leaves the caller's torch as it was."""

import torch

import rankscope as rs
from rankscope.comparison import RunSpec, run_one
from rankscope.settings import TrainingSettings
from rankscope.tasks import Task
from rankscope.training import Lora


def test_a_run_leaves_the_callers_threads_alone(digits: Task, digits_budget: rs.ParameterBudget) -> None:
    targets = rs.find_targets(digits.build_model())
    uniform = Lora(rs.allocate("uniform", targets=targets, budget=digits_budget))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        run_one(digits, RunSpec(method=uniform, training=TrainingSettings(steps=1)))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
