"""One run: it leaves the caller's torch as it was."""

import torch

import rankscope as rs
from rankscope.comparison.runner import Cell, run_cell
from rankscope.tasks import Task
from rankscope.training import Lora


def test_a_run_leaves_the_callers_threads_alone(digits: Task, digits_budget: rs.ParameterBudget) -> None:
    targets = rs.find_targets(digits.build_model())
    uniform = Lora(rs.allocate("uniform", targets=targets, budget=digits_budget))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        run_cell(digits, Cell(method=uniform, config=rs.TrainingConfig(steps=1), seed=0))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
