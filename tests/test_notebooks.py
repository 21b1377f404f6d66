"""Every notebook runs from top to bottom, and is committed with its outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FETCHING = ("03_mobile_vlm",)  # weights inside packages
# Fewer seeds than are committed, since a test asks whether it runs.
SMALLER = {"01_profile_and_allocate": {"for seed in range(4)]": "for seed in range(1)]", "range(4, 12)": "range(4, 7)"}}
NOTEBOOKS = [
    pytest.param(path, marks=[pytest.mark.slow] * (path.stem in FETCHING), id=path.stem)
    for path in sorted(Path("notebooks").glob("*.ipynb"))
]


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_notebook_runs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    printing = [cell for cell in notebook.cells if cell.cell_type == "code" and "print(" in cell.source]
    assert all(cell.outputs for cell in printing)
    for text, less in SMALLER.get(path.stem, {}).items():
        (cell,) = (cell for cell in notebook.cells if text in cell.source)
        cell.source = cell.source.replace(text, less)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
