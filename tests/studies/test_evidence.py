"""The study files, and the pieces in which `studies/evidence.py` runs those of the second round."""

from pathlib import Path

import pytest

from rankscope.comparison import find_methods
from rankscope.settings import read_study
from studies import evidence

FOUND = sorted(Path("studies").rglob("*.yaml"))
STUDIES = [path for path in FOUND if path.parent.name != "cluster"]  # that has files of Kubernetes and compose


@pytest.mark.parametrize("path", STUDIES, ids=str)
def test_study_files_are_valid(path: Path) -> None:
    assert find_methods(read_study(path).compare.methods)


def test_a_tasks_first_piece_comes_before_any_second() -> None:
    found = list(evidence.pieces(["digits-shift", "glosses"]))
    assert found[:3] == [
        ("digits-shift", ("uniform", "one-shot")),
        ("glosses", ("uniform", "one-shot")),
        ("digits-shift", ("uniform", "one-shot", "qv-only")),
    ]
    assert found[-1] == ("digits-shift", read_study("studies/compare/budgets/digits-shift.yaml").compare.methods)


def test_another_clone_resumes_from_packed_runs(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "runs").mkdir(parents=True)
    (there / "runs").mkdir(parents=True)
    for name in ("profile.parquet", "runs/a.json", "runs/a.parquet", "comparison.parquet"):
        (here / name).write_text(name)
    (there / "runs/a.json").write_text("newer")
    evidence.pack(here)
    (here / evidence.PACKED).rename(there / evidence.PACKED)
    evidence.unpack(there)
    held = {name: (there / name).read_text() for name in ("profile.parquet", "runs/a.json", "runs/a.parquet")}
    assert held == {"profile.parquet": "profile.parquet", "runs/a.json": "newer", "runs/a.parquet": "runs/a.parquet"}
    assert not (there / "comparison.parquet").exists()
