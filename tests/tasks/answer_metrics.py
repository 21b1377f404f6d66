"""What loss and metrics of tasks on answers must be."""

from typing import Any

import pytest
import torch

from rankscope.tasks import evaluate


def check_answer_metrics(task: Any) -> None:
    """The loss is the model's own, and metrics of the test split are those of its rows one by one."""
    network = task.build_model().eval()
    right = exact = n_tokens = 0
    losses = []
    with torch.no_grad():
        batch = next(iter(task.train_batches(3)))
        torch.testing.assert_close(task.loss(network, batch), network(**batch).loss)
        for row in task._examples["test"]:
            inputs = task._inputs(row)
            labels = inputs.pop("labels")[0, 1:]
            logits = network(**inputs).logits[0, :-1][labels != -100]
            hits = logits.argmax(-1) == labels[labels != -100]
            right, exact, n_tokens = right + int(hits.sum()), exact + int(hits.all()), n_tokens + len(hits)
            losses.append(torch.nn.functional.cross_entropy(logits, labels[labels != -100], reduction="sum"))
    metrics = evaluate(task, network, "test")
    assert metrics["token_accuracy"] == pytest.approx(right / n_tokens)
    assert metrics["exact_match"] == pytest.approx(exact / len(task._examples["test"]))
    assert metrics["loss"] == pytest.approx(float(sum(losses)) / n_tokens, rel=1e-4)
