"""Profile files: they come back equal, read without rankscope, and bad ones are named."""

import json
import re
from pathlib import Path

import duckdb
import pandas as pd
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import rankscope as rs
from rankscope.errors import FileError, ModelError
from rankscope.profiling.table import METADATA, SCHEMA

LISTS = [
    "singular_values",
    "activation_values",
    "left_directions",
    "right_directions",
]


@pytest.fixture(scope="module")
def profile() -> rs.Profile:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    batches = [{"x": torch.randn(5, 6)} for _ in range(4)]
    return rs.profile(model, batches, loss_fn=lambda m, b: m(b["x"]).square().mean(), seed=3)


def test_round_trip(profile: rs.Profile, tmp_path: Path) -> None:
    path = profile.to_parquet(tmp_path / "deep" / "profile.parquet")
    again = rs.read_profile(path)
    pd.testing.assert_frame_equal(
        again.table.drop(columns=LISTS),
        profile.table[again.table.columns].drop(columns=LISTS),
        check_dtype=False,
    )
    assert again.metadata == profile.metadata
    assert again.targets == profile.targets
    for name, values in profile.spectra().items():
        assert again.spectra()[name].tolist() == values.tolist()
    assert [p.name for p in path.parent.iterdir()] == ["profile.parquet"]


def test_plain_pandas_reads_it(profile: rs.Profile, tmp_path: Path) -> None:
    table = pd.read_parquet(profile.to_parquet(tmp_path / "profile.parquet"))
    assert table["module"].tolist() == ["0", "2"]
    assert [len(values) for values in table["singular_values"]] == [6, 3]
    assert table["block"].isna().all()


def test_polars_and_duckdb_read_it_without_rankscope(profile: rs.Profile, tmp_path: Path) -> None:
    path = profile.to_parquet(tmp_path / "profile.parquet")
    table = polars.read_parquet(path)
    assert table["module"].to_list() == ["0", "2"]
    assert table["singular_values"].to_list()[0] == profile.spectra(signal=False)["0"].tolist()
    query = f"SELECT module, list_sum(list_transform(singular_values, lambda v: v * v)) FROM '{path}' ORDER BY module"
    energies = dict(duckdb.sql(query).fetchall())
    assert energies["2"] == pytest.approx(profile.column("gradient_norm")["2"] ** 2, rel=1e-4)


def test_files_have_the_columns_and_metadata_of_the_schema(profile: rs.Profile, tmp_path: Path) -> None:
    table = pq.read_table(profile.to_parquet(tmp_path / "profile.parquet"))
    assert table.column_names == SCHEMA.names
    assert set(profile.metadata) == set(METADATA)


def with_metadata(table: pa.Table, **changes: object) -> pa.Table:
    metadata = json.loads(table.schema.metadata[b"rankscope"]) | changes
    kept = {key: value for key, value in metadata.items() if value != "gone"}
    return table.replace_schema_metadata({b"rankscope": json.dumps(kept).encode()})


def with_column(table: pa.Table, name: str, values: list, kind: pa.DataType | None = None) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, pa.array(values, type=kind))


BROKEN = {
    "metadata that are no JSON": lambda t: t.replace_schema_metadata({b"rankscope": b"{"}),
    "metadata that are a list": lambda t: t.replace_schema_metadata({b"rankscope": b"[]"}),
    **{f"no {key} in the metadata": lambda t, key=key: with_metadata(t, **{key: "gone"}) for key in METADATA},
    "skipped as a list": lambda t: with_metadata(t, skipped=[]),
    "batches as a flag": lambda t: with_metadata(t, batches=True),
    "a huge schema": lambda t: with_metadata(t, schema=10**300),
    **{f"no column {name}": lambda t, name=name: t.drop_columns([name]) for name in SCHEMA.names},
    **{f"texts in column {name}": lambda t, name=name: with_column(t, name, ["x", "y"])
       for name in SCHEMA.names if SCHEMA.field(name).type != pa.string()},
    "a null among norms": lambda t: with_column(t, "gradient_norm", [1.0, None]),
    "a null among values": lambda t: with_column(t, "singular_values", [[1.0, None], [1.0]]),
    "an infinite norm": lambda t: with_column(t, "gradient_norm", [1.0, float("inf")]),
    "a negative norm": lambda t: with_column(t, "gradient_norm", [1.0, -1.0]),
    "NaN among values": lambda t: with_column(t, "singular_values", [[1.0, float("nan")], [1.0]]),
    "more values than full rank": lambda t: with_column(t, "singular_values", [[1.0] * 7, [1.0]]),
    "a module twice": lambda t: with_column(t, "module", ["0", "0"]),
    "a side of 0": lambda t: with_column(t, "in_features", [0, 8]),
    "a column twice": lambda t: t.append_column("module", pa.array(["0", "2"])),
    "no rows": lambda t: t.slice(0, 0),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files_are_one_line_when_they_are_read(profile: rs.Profile, tmp_path: Path, what: str) -> None:
    path = profile.to_parquet(tmp_path / "profile.parquet")
    pq.write_table(BROKEN[what](pq.read_table(path)), path)
    with pytest.raises(FileError) as caught:
        rs.read_profile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_metadata_says_where_it_comes_from(profile: rs.Profile) -> None:
    assert profile.metadata["batches"] == 4
    assert profile.metadata["seed"] == 3
    assert set(profile.metadata["versions"]) == {"rankscope", "torch", "transformers"}


def test_bad_files_are_named(profile: rs.Profile, tmp_path: Path) -> None:
    path = profile.to_parquet(tmp_path / "profile.parquet")
    missing = tmp_path / "nowhere.parquet"
    with pytest.raises(
        FileError,
        match=f"^{re.escape(f'`{missing}` must hold a profile, but there is no such file; check the path.')}$",
    ):
        rs.read_profile(missing)
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(path.read_bytes()[:500])
    with pytest.raises(FileError, match=r"cut\.parquet` must hold a profile as Parquet, but it cannot be parsed"):
        rs.read_profile(cut)
    other = tmp_path / "other.parquet"
    pd.DataFrame({"a": [1]}).to_parquet(other)
    with pytest.raises(FileError, match=r"but is a Parquet file of something else; check the path\.$"):
        rs.read_profile(other)
    old = tmp_path / "old.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({b"rankscope": b'{"schema": 0}'}), old)
    with pytest.raises(
        FileError,
        match=r"must have profile schema 4, but has 0: it is of another version of rankscope; take the profile again",
    ):
        rs.read_profile(old)
    edited = tmp_path / "edited.parquet"
    renamed = table.set_column(0, "module", pa.array(["0", "1"]))
    pq.write_table(renamed.replace_schema_metadata(table.schema.metadata), edited)
    with pytest.raises(FileError, match=r"must match its own model fingerprint, but was edited"):
        rs.read_profile(edited)


def test_missing_targets_are_named(profile: rs.Profile) -> None:
    wanted = (rs.TargetModule(name="7", in_features=6, out_features=8),)
    message = (
        "`profile` must cover every target module, but 1 of 1 are missing, as `7`; "
        "take it again on this model and these targets."
    )
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        profile.require(wanted)
