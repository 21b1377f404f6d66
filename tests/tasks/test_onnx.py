"""ONNX files read without the package `onnx`: a file encoded here by the protobuf specification."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Dinov2Model

from rankscope.tasks.pretrained import dinov2_from_onnx, dinov2_small, read_onnx


def varint(value: int) -> bytes:
    head = [(value >> shift) & 127 for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([byte | 128 for byte in head[:-1]] + head[-1:])


def field(number: int, value: int | bytes | str) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor(name: str, array: np.ndarray, kind: int = 1) -> bytes:
    dims = b"".join(field(1, dim) for dim in array.shape)
    return dims + field(2, kind) + field(8, name) + field(9, array.tobytes())


def test_nodes_and_weights_of_an_onnx_file(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(300, 2)).astype("<f4")  # dims and sizes of more than one byte
    node = field(1, "x") + field(1, "weight") + field(2, "y") + field(3, "/layer/MatMul") + field(4, "MatMul")
    shape = field(1, "x") + field(2, "s") + field(4, "Shape")
    graph = field(1, node) + field(1, shape) + field(2, "graph") + field(5, tensor("weight", weight))
    graph += field(5, tensor("steps", np.arange(3), kind=7))  # int64: not a weight
    version = varint(5 << 3 | 5) + b"\0\0\0\0" + varint(6 << 3 | 1) + bytes(8)  # fields of fixed width
    (tmp_path / "model.onnx").write_bytes(field(1, 8) + version + field(7, graph) + field(14, 1))
    nodes, tensors = read_onnx(tmp_path / "model.onnx")
    assert nodes == [("/layer/MatMul", "MatMul", ["x", "weight"]), ("", "Shape", ["x"])]
    assert list(tensors) == ["weight"]
    assert torch.equal(tensors["weight"], torch.tensor(weight))


def test_a_converted_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "model-plain").mkdir()
    assert dinov2_from_onnx(tmp_path / "model", "small.onnx") == tmp_path / "model-plain"


@pytest.mark.slow
def test_every_weight_of_dinov2_small_is_in_the_file() -> None:
    model, report = Dinov2Model.from_pretrained(dinov2_small(), output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert sum(p.numel() for p in model.parameters()) == 22_056_576
