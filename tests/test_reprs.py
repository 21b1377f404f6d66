"""What notebooks and terminals show of profiles, allocations and comparisons: one line, and a picture; and that imports are silent."""

import base64
import io
import subprocess
import sys

import pytest
from PIL import Image

import rankscope as rs
from rankscope.comparison import Comparison
from rankscope.maps import html_card, ranks_png, to_png
from tests.architectures import build
from tests.inventories import vit_inventory

TARGETS = vit_inventory()
ALLOCATION = rs.RankAllocation(TARGETS, (7, *[0] * 34, 2), strategy="one-shot", budget=6_912)


def picture_of(html: str) -> Image.Image:
    """The picture in a card."""
    _, _, rest = html.partition('src="data:image/png;base64,')
    return Image.open(io.BytesIO(base64.b64decode(rest.partition('"')[0])))


def test_an_allocation_is_one_line_and_a_map() -> None:
    line = "RankAllocation('one-shot': 1,536 of 6,912 parameters, 2 of 36 modules, ranks 2 to 7)"
    assert repr(ALLOCATION) == line
    html = ALLOCATION._repr_html_()
    assert html.startswith("<div><b>RankAllocation(&#x27;one-shot&#x27;: 1,536 of 6,912")
    shown = base64.b64decode(html.partition("base64,")[2].partition('"')[0])
    assert shown == ranks_png(TARGETS, ALLOCATION.ranks, titles=["one-shot"])
    assert len(html) < 60_000
    assert repr(rs.RankAllocation((), ())) == "RankAllocation('': 0 parameters, 0 of 0 modules, rank 0)"
    assert "<img" not in rs.RankAllocation((), ())._repr_html_()


@pytest.mark.parametrize("name", ["llava", "llama"])
def test_maps_of_ranks_differ_where_ranks_do(name: str) -> None:
    targets = rs.find_targets(build(name))
    plain = {t.name: 1 for t in targets}
    first, again, other = (
        ranks_png(targets, each, titles=["a"]) for each in (plain, plain, {**plain, targets[0].name: 2})
    )
    assert first == again != other


def test_a_profile_is_one_line_and_a_map(digits_profile: rs.Profile) -> None:
    facts = digits_profile.metadata
    assert repr(digits_profile).startswith(f"Profile(36 modules, {facts['batches']} batches")
    assert "\n" not in repr(digits_profile)
    assert picture_of(digits_profile._repr_html_()).width > 300


def test_a_comparison_is_one_line_a_table_and_maps() -> None:
    runs = rs.comparison.read_comparison("studies/results/digits-shift/comparison.parquet")
    found = Comparison(runs, {})
    assert repr(found).startswith("Comparison(digits-shift: uniform, ")
    assert repr(found).endswith(f"; {len(runs)} runs)")
    html = found._repr_html_()
    assert "<img" not in html  # without targets
    names = list(dict.fromkeys(runs["method"]))
    assert all(f"<td>{name}</td>" in html for name in names)
    wrong = Comparison(runs.assign(method=runs["method"].replace("one-shot", "<b>mine</b>")), {})
    assert "<td>&lt;b&gt;mine&lt;/b&gt;</td>" in wrong._repr_html_()


def test_names_are_escaped() -> None:
    allocation = ALLOCATION.renamed("<script>")
    assert "<script>" not in allocation._repr_html_()
    assert html_card('<a href="">', ["<i>"], b"x", "<table></table>") == (
        '<div><b>&lt;a href=&quot;&quot;&gt;</b><br>&lt;i&gt;<table></table><br><img alt="&lt;a href=&quot;&quot;&gt;" '
        'src="data:image/png;base64,eA==" style="max-width: 100%; background: white"></div>'
    )


def test_pictures_are_drawn_without_pyplot() -> None:
    code = (
        "import sys, rankscope as rs; from rankscope.targets import TargetModule as T; "
        "a = rs.RankAllocation((T(name='h.0.fc', in_features=4, out_features=4),), (1,)); a._repr_html_(); "
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert to_png(lambda figure: None).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments",
    [
        ["-W", "error", "-c", "import rankscope"],
        ["-W", "error", "-c", "import rankscope as rs; [getattr(rs, name) for name in rs.__all__]"],
        ["-m", "rankscope", "--help"],
    ],
)
def test_imports_print_nothing(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
