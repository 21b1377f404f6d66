"""Profile files: they come back equal, read without rankscope, and bad ones are named."""

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
from rankscope.exceptions import FileFormatError, ProfileError
from rankscope.profiling import store

LISTS = [
    "singular_values",
    "signal_values",
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


def test_every_column_is_documented_and_present(profile: rs.Profile, tmp_path: Path) -> None:
    documented = {
        name.strip()
        for line in (store.__doc__ or "").splitlines()
        if line.startswith("| ") and "---" not in line and not line.startswith("| column")
        for name in line.split("|")[1].split(",")
    }
    assert set(pq.read_table(profile.to_parquet(tmp_path / "profile.parquet")).column_names) == documented


def test_metadata_says_where_it_comes_from(profile: rs.Profile) -> None:
    assert profile.metadata["batches"] == 4
    assert profile.metadata["seed"] == 3
    assert set(profile.metadata["versions"]) == {"rankscope", "torch", "transformers"}


def test_bad_files_are_named(profile: rs.Profile, tmp_path: Path) -> None:
    path = profile.to_parquet(tmp_path / "profile.parquet")
    missing = tmp_path / "nowhere.parquet"
    with pytest.raises(
        FileFormatError,
        match=f"^{re.escape(f'`{missing}` must hold a profile, but there is no such file; check the path.')}$",
    ):
        rs.read_profile(missing)
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(path.read_bytes()[:500])
    with pytest.raises(FileFormatError, match=r"cut\.parquet` must hold a profile as Parquet, but it cannot be read"):
        rs.read_profile(cut)
    other = tmp_path / "other.parquet"
    pd.DataFrame({"a": [1]}).to_parquet(other)
    with pytest.raises(FileFormatError, match=r"but is a Parquet file of something else; check the path\.$"):
        rs.read_profile(other)
    old = tmp_path / "old.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({b"rankscope": b'{"schema": 0}'}), old)
    with pytest.raises(
        FileFormatError,
        match=r"must have profile schema 4, but has 0: it is of another version of rankscope; take the profile again",
    ):
        rs.read_profile(old)
    edited = tmp_path / "edited.parquet"
    renamed = table.set_column(0, "module", pa.array(["0", "1"]))
    pq.write_table(renamed.replace_schema_metadata(table.schema.metadata), edited)
    with pytest.raises(FileFormatError, match=r"must match its own model fingerprint, but was edited"):
        rs.read_profile(edited)


def test_missing_targets_are_named(profile: rs.Profile) -> None:
    wanted = (rs.TargetModule(name="7", in_features=6, out_features=8),)
    message = (
        "`profile` must cover every target module, but 1 of 1 are missing, as `7`; "
        "take it again on this model and these targets."
    )
    with pytest.raises(ProfileError, match=f"^{re.escape(message)}$"):
        profile.require(wanted)
