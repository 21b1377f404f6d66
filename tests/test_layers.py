"""The architecture: who may import whom (lower layers, or an earlier row of its own), and how large files and functions may be."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import rankscope

PACKAGE = Path(rankscope.__file__).parent

# One list a layer, its rows in order.
LAYERS = [
    ["errors", "plugins", "files", "settings", "columns", "early", "units"],
    ["naming", "targets", "maps", "allocation", "budget"],
    ["distributed"],
    ["profiling", "lora"],
    ["performance"],
    ["strategies", "tasks", "control", "training", "searching"],
    ["plotting", "comparison", "integrations"],
    ["cli"],
]
ORDER = {name: (layer, row) for layer, rows in enumerate(LAYERS) for row, name in enumerate(rows)}

# What the public contract puts on RankAllocation and find_targets but PEFT decides: done in lora, imported when called.
FACADES = {("allocation", "lora"), ("targets", "lora")}


# The lazy facade and `python -m rankscope` stand outside the layers.
ENTRANCES = {PACKAGE / "__init__.py", PACKAGE / "__main__.py"}


def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path not in ENTRANCES)


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> set[str]:
    """Dotted names of every module that is imported anywhere in the file."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add(node.module or "")
    return names


def run_time_nodes(tree: ast.Module) -> list[ast.stmt]:
    """The module's statements without those under `if TYPE_CHECKING`."""
    return [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_lower_layers(path: Path) -> None:
    own = part(path)
    assert own in ORDER, f"`{own}` has no layer yet; add it to LAYERS"
    for name in imported(ast.parse(path.read_text())):
        if name.startswith("rankscope."):
            other = name.split(".")[1]
            assert other in ORDER, f"`{other}` has no layer yet; add it to LAYERS"
            allowed = other == own or (own, other) in FACADES or (ORDER[other] < ORDER[own])
            assert allowed, f"{own} may not import {other}"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_stop_at_the_face_of_another_package(path: Path) -> None:
    for name in imported(ast.parse(path.read_text())):
        if name.startswith("rankscope.") and name.count(".") > 1:
            assert name.split(".")[1] == part(path), (
                f"{part(path)} must import from {name.rpartition('.')[0]}, not {name}"
            )


def test_modules_import_each_other_in_no_circle() -> None:
    def name(path: Path) -> str:
        return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")

    files = {name(path): path for path in sources()}
    graph = {}
    for module, path in files.items():
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
        found = {(f"{node.module}.{alias.name}", node.module) for node in top for alias in node.names}
        graph[module] = {part if part in files else whole for part, whole in found} & files.keys()
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_fit_a_screen(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            named = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            named = [arg for arg in named if arg not in ("self", "cls")]
            assert lines <= 60, f"{node.name} has {lines} lines; split it"
            assert len(named) <= 10, f"{node.name} has {len(named)} parameters; group them in settings"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_lora_imports_peft(path: Path) -> None:
    tree = ast.parse(path.read_text())
    names = {name.split(".")[0] for node in run_time_nodes(tree) for name in imported(node)}
    assert "peft" not in names or part(path) == "lora"


@pytest.mark.parametrize("name", LAYERS[0] + LAYERS[1])
def test_lowest_layers_import_no_torch_at_module_level(name: str) -> None:
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    top = [n for n in run_time_nodes(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert not {"torch", "transformers", "peft"} & {m.split(".")[0] for node in top for m in imported(node)}


@pytest.mark.parametrize("statement", ["import rankscope", "import rankscope.cli"])
def test_import_is_light(statement: str) -> None:
    heavy = "torch transformers peft optuna sklearn pandas accelerate matplotlib".split()  # noqa: SIM905
    code = f"{statement}\nimport sys\nprint([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_loads() -> None:
    for name in rankscope.__all__:
        assert getattr(rankscope, name).__doc__ or name == "__version__"
    with pytest.raises(AttributeError, match="module 'rankscope' has no attribute 'nonsense'"):
        _ = rankscope.nonsense
