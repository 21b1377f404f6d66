"""Every notebook runs from top to bottom, and is committed with its outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FETCHING = ("03_mobile_vlm",)  # weights inside packages
NOTEBOOKS = [
    pytest.param(path, marks=[pytest.mark.slow] * (path.stem in FETCHING), id=path.stem)
    for path in sorted(Path("notebooks").glob("*.ipynb"))
]


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_notebook_runs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    printing = [cell for cell in notebook.cells if cell.cell_type == "code" and "print(" in cell.source]
    assert all(cell.outputs for cell in printing)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
