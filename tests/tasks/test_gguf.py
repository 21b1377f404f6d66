"""Dequantised GGUF folders: made once, equal at every load, and named errors."""

import re
from pathlib import Path

import pytest
import torch

import rankscope as rs
from rankscope.errors import TaskError
from rankscope.tasks.pretrained import dequantised


def test_folder_that_was_made_before_is_taken(tmp_path: Path) -> None:
    (tmp_path / "model-plain").mkdir()
    assert dequantised(tmp_path / "model", "weights.gguf") == tmp_path / "model-plain"


def test_file_that_is_no_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").write_bytes(b"nothing of the kind")
    with pytest.raises(
        TaskError, match=re.escape(f"`{tmp_path}` must be a model folder or hub id that loads, but does not")
    ):
        dequantised(tmp_path, "weights.gguf")
    assert not tmp_path.with_name(f"{tmp_path.name}-plain").exists()


@pytest.mark.slow
def test_glosses_on_smollm2() -> None:
    task = rs.load_task("glosses")
    model, again = task.build_model(), rs.load_task("glosses").build_model()
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert len(rs.find_targets(model)) == 210
    weights = again.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        losses = [float(task.loss(model, batch)) for _, batch in zip(range(8), task.train_batches(0), strict=False)]
    assert sum(losses) / len(losses) < 5.5  # a uniform guess over the vocabulary has 10.8
