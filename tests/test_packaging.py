"""What a wheel holds, and the page of keys."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from rankscope.settings import read_study


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder that holds what the wheel would install: built by hatchling where it is there, else by its list of files."""
    site = tmp_path / "site"
    try:
        from hatchling.build import build_wheel
    except ImportError:
        listed = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
        for source, place in {"rankscope": "rankscope", **listed["force-include"]}.items():
            (site / place).parent.mkdir(parents=True, exist_ok=True)
            if Path(source).is_dir():
                shutil.copytree(source, site / place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, site / place)
    else:
        zipfile.ZipFile(tmp_path / build_wheel(str(tmp_path))).extractall(site)
    return site


def test_a_wheel_holds_what_an_example_study_needs(installed: Path, tmp_path: Path) -> None:
    code = """
import rankscope, sys
from rankscope.cli import app
assert rankscope.__file__.startswith(sys.argv[1]), rankscope.__file__
app(["init", "mine"], standalone_mode=False)
task = rankscope.load_task(rankscope.read_study("mine.yaml").task)
print(sum(p.numel() for p in task.build_model().parameters()), len(list(task.train_batches(0))))
rankscope.tasks.data.data_folder("wordnet")
"""
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(installed)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    wrote, found = done.stdout.splitlines()
    assert wrote == "wrote mine.yaml; next: rankscope profile mine.yaml"
    assert found == "301829 7"
    assert read_study(tmp_path / "mine.yaml").name == "mine"


def test_the_page_of_keys_is_current() -> None:
    page = runpy.run_path("docs/build.py")
    assert page["PAGE"].read_text(encoding="utf-8") == page["reference"](), "run python docs/build.py"


def test_an_index_shows_the_readme_without_dead_links(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    from hatchling.build import build_wheel

    wheel = zipfile.ZipFile(tmp_path / build_wheel(str(tmp_path)))
    name = next(name for name in wheel.namelist() if name.endswith("/METADATA"))
    shown = wheel.read(name).decode()
    assert "Description-Content-Type: text/markdown" in shown
    assert shown.rstrip().endswith("Apache-2.0; data under `data/` has notices of its own.")
    readme, for_index = Path("README.md").read_text(), runpy.run_path("hatch_build.py")["for_index"]
    links = [link for link in re.findall(r"\]\(([^)]+)\)", readme) if not link.startswith("http")]
    assert len(links) > 10
    urls = re.findall(r"^Project-URL: Source, (\S+)$", shown, flags=re.MULTILINE)
    assert shown.endswith(for_index(readme, urls[0] if urls else None))
    assert not re.findall(r"\]\((?!https?:)", for_index(readme, None) + for_index(readme, "https://github.com/a/b"))
    absolute = for_index(readme, "https://github.com/a/b/")
    assert "](https://github.com/a/b/raw/HEAD/studies/results/digits_ranks.png)" in absolute
    assert "](https://github.com/a/b/blob/HEAD/docs/evidence.md)" in absolute
    assert "digits_ranks.png" not in for_index(readme, None)
