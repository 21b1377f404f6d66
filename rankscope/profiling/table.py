"""What a profile says in short: where the gradient's energy is, by module, tower and role, and how concentrated."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rankscope.errors import FileError, ModelError, shown
from rankscope.files import parse_json, read_parquet, replacing, with_checked_columns
from rankscope.profiling.statistics import energy_tail
from rankscope.targets import TargetModule, fingerprint_targets

logger = logging.getLogger(__name__)


SCHEMA = 4
_KEY = b"rankscope"
_TEXT, _WHOLE, _NUMBER, _NUMBERS, _VECTORS = (
    pa.string(), pa.int64(), pa.float64(), pa.list_(pa.float64()), pa.list_(pa.float32())
)  # fmt: skip
# Name, type, what it holds; one row a target module, in the model's order.
COLUMNS: tuple[tuple[str, pa.DataType, str], ...] = (
    ("module", _TEXT, "full dotted name"),
    ("tower", _TEXT, "see `rankscope.targets.TargetModule`"),
    ("block", _WHOLE, "block index inside the tower; null outside blocks"),
    ("role", _TEXT, "see `rankscope.targets.TargetModule`"),
    ("kind", _TEXT, "see `rankscope.targets.TargetModule`"),
    ("in_features", _WHOLE, "shape"),
    ("out_features", _WHOLE, "shape"),
    ("rank_cost", _WHOLE, "parameters that one more rank adds"),
    ("gradient_norm", _NUMBER, "Frobenius norm of the mean gradient G of the loss"),
    ("signal_energy", _NUMBER, "squared norm of the expected gradient, without bias (may be slightly negative)"),
    ("noise_energy", _NUMBER, "squared norm of what the mean of this many batches still has of noise"),
    ("signal_share", _NUMBER, "share of signal in the gradient's energy, drawn towards that of all modules, in [0, 1]"),
    ("fisher_trace", _NUMBER, "trace of the empirical Fisher matrix: mean squared gradient norm of single examples"),
    ("gradient_rank", _NUMBER, "effective rank of G (participation ratio of its leading singular values)"),
    ("singular_values", _NUMBERS, "leading singular values of G, descending; `Profile.spectra` goes on to full rank"),
    ("singular_error", _NUMBER, "standard error of each leading singular value, from the sketch; 0 where exact"),
    ("signal_values", _NUMBERS, "singular_values times the root of signal_share"),
    ("exact", pa.bool_(), "whether the gradient was kept whole (small modules) or sketched"),
    ("sensitivity", _NUMBER, "sum of abs(w * g) over the weight's elements; null where the weight cannot be read"),
    ("weight_norm", _NUMBER, "Frobenius norm of the frozen weight, dequantised; null where it cannot be read"),
    ("weight_rank", _NUMBER, "stable rank of the frozen weight; null where it cannot be read"),
    ("activation_moment", _NUMBER, "mean squared norm of an input row"),
    ("activation_variance", _NUMBER, "trace of the inputs' covariance"),
    ("activation_rank", _NUMBER, "effective rank of the inputs' covariance (participation ratio)"),
    ("activation_values", _NUMBERS, "leading eigenvalues of the inputs' covariance, descending"),
    ("left_directions", _VECTORS, "leading left singular vectors of G, one after the other; null unless kept"),
    ("right_directions", _VECTORS, "leading right singular vectors of G, one after the other; null unless kept"),
)
_MAY_BE_NULL = {"block", "sensitivity", "weight_norm", "weight_rank", "left_directions", "right_directions"}
_FIELDS = pa.schema([pa.field(name, kind, nullable=name in _MAY_BE_NULL) for name, kind, _ in COLUMNS])
METADATA: Mapping[str, tuple[type, str]] = {
    "schema": (int, "of the columns"),
    "model": (str, "fingerprint of the target modules"),
    "weights": (str, "fingerprint of the model's weights"),
    "data": (str, "fingerprint of the batches"),
    "targets": (int, "target modules"),
    "skipped": (dict, "modules that cannot be profiled, and why"),
    "without_gradient": (list, "modules that the loss does not depend on"),
    "batches": (int, "batches that count"),
    "skipped_batches": (int, "batches whose loss was not finite"),
    "interrupted": (bool, "whether Ctrl-C ended it"),
    "tokens": (int, "tokens in the batches"),
    "loss": (float, "mean over examples"),
    "seed": (int, "of the sketches"),
    "head_steps": (int, "steps that the head was trained for"),
    "sketch_size": (int, "columns of the gradient sketches"),
    "sketch_wanted": (int, "what `sketch_size` would be if memory allowed"),
    "versions": (dict, "of packages"),
}


@dataclass(frozen=True, eq=False)
class Profile:
    """The features of every target module, and how they were taken.

    Attributes:
        table: One row a target module, with the columns of `COLUMNS`.
        metadata: Where it comes from: the keys of `METADATA`.
    """

    table: pd.DataFrame
    metadata: Mapping[str, Any]

    @property
    def targets(self) -> tuple[TargetModule, ...]:
        """The profiled modules, in the model's order."""
        return tuple(
            TargetModule(
                name=row["module"],
                in_features=int(row["in_features"]),
                out_features=int(row["out_features"]),
                tower=row["tower"],
                block=None if pd.isna(row["block"]) else int(row["block"]),
                role=row["role"],
                kind=row["kind"],
            )
            for row in self.table.to_dict("records")
        )

    def column(self, name: str) -> dict[str, float]:
        """One feature by module name."""
        return {module: float(value) for module, value in zip(self.table["module"], self.table[name], strict=True)}

    def spectra(self, *, signal: bool = True, length: int | None = None) -> dict[str, NDArray[np.float64]]:
        """Singular values of each module's gradient by name, descending, up to full rank.

        The leading ones were measured. Beyond them (`sketch_size` of the metadata, in large modules) stands an estimate from
        the energy that they leave of `gradient_norm` squared; see `rankscope.profiling.statistics.energy_tail`.

        Args:
            signal: The part that the batches agree on; False: raw, inflated by noise. Where the batches agree on nothing in any
                module, a warning is logged and the raw values stand in.
            length: At most so many values of each module; default: all.
        """
        shares = self.signal_shares() if signal else dict.fromkeys(self.table["module"], 1.0)
        measured = self.lists("signal_values" if signal and self.has_signal else "singular_values")
        columns = ("module", "singular_values", "gradient_norm", "in_features", "out_features")
        spectra = {}
        for name, raw, norm, *sides in zip(*(self.table[column] for column in columns), strict=True):
            relative = np.asarray(raw, dtype=np.float64) / (norm or 1.0)
            tail = norm * np.sqrt(energy_tail(relative**2, 1.0, min(sides), length)) * math.sqrt(shares[name])
            spectra[name] = np.concatenate([measured[name][:length], np.minimum(tail, measured[name][-1:])])
        return spectra

    def input_variances(self, *, length: int | None = None) -> dict[str, NDArray[np.float64]]:
        """Eigenvalues of the covariance of each module's inputs by name, descending, up to full rank.

        The leading half of `sketch_size` was measured; those beyond are estimated from what they leave of the trace, as in
        `spectra`.

        Args:
            length: At most so many values of each module; default: all.
        """
        columns = ("module", "activation_values", "activation_variance", "in_features", "out_features")
        found = {}
        for name, values, trace, inputs, outputs in zip(*(self.table[column] for column in columns), strict=True):
            leading = np.asarray(values, dtype=np.float64)
            last = min(outputs, inputs, inputs if length is None else length)
            found[name] = np.concatenate([leading[:last], energy_tail(leading, trace, inputs, last)])
        return found

    @property
    def has_signal(self) -> bool:
        """Whether the batches agree on any part of the gradient in any module; few or noisy ones may not."""
        return bool((self.table["signal_share"] * self.table["gradient_norm"] > 0).any())

    def signal_shares(self) -> dict[str, float]:
        """The share of signal in each module's gradient energy by name; 1, with a warning, where no module has any."""
        if self.has_signal:
            return self.column("signal_share")
        logger.warning(
            "the %s batches of the profile agree on nothing: the estimated signal is 0 in every module, and the raw gradient "
            "stands in for it; profile more batches",
            self.metadata.get("batches", ""),
        )
        return dict.fromkeys(self.table["module"], 1.0)

    def directions(self, module: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Leading left (r, out) and right (r, in) singular vectors of one module's gradient.

        Raises:
            ModelError: They were not kept, or there is no such module.
        """
        row = self.table[self.table["module"] == module]
        if row.empty or row["left_directions"].iloc[0] is None:
            raise ModelError(
                f"the profile must hold directions of `{module}`, but does not; take it with `keep_directions=8`."
            )
        left, right = (np.asarray(row[f"{side}_directions"].iloc[0], dtype=np.float32) for side in ("left", "right"))
        return left.reshape(-1, int(row["out_features"].iloc[0])), right.reshape(-1, int(row["in_features"].iloc[0]))

    def lists(self, column: str) -> dict[str, NDArray[np.float64]]:
        """One list column by module name."""
        return {
            module: np.asarray(values, dtype=np.float64)
            for module, values in zip(self.table["module"], self.table[column], strict=True)
        }

    def require(self, targets: tuple[TargetModule, ...]) -> None:
        """Checks that every target module was profiled, with the same shape.

        Raises:
            ModelError: One was not.
        """
        known = {(t.name, t.in_features, t.out_features) for t in self.targets}
        missing = [t.name for t in targets if (t.name, t.in_features, t.out_features) not in known]
        if missing:
            raise ModelError(
                f"`profile` must cover every target module, but {len(missing)} of {len(targets)} are missing, "
                f"as `{missing[0]}`; take it again on this model and these targets."
            )

    def to_parquet(self, path: str | os.PathLike[str]) -> Path:
        """Writes the profile, atomically; returns the path."""
        table = pa.Table.from_pandas(self.table, schema=_FIELDS, preserve_index=False)
        metadata = {**(table.schema.metadata or {}), _KEY: json.dumps(dict(self.metadata)).encode()}
        with replacing(path) as temporary:
            pq.write_table(table.replace_schema_metadata(metadata), temporary, compression="zstd")
        return Path(path)


def read_profile(path: str | os.PathLike[str]) -> Profile:
    """Reads what `Profile.to_parquet` wrote.

    Raises:
        FileError: The file is missing, truncated, no profile, or of another schema.

    >>> read_profile("nowhere.parquet")
    Traceback (most recent call last):
    ...
    rankscope.errors.FileError: `nowhere.parquet` must hold a profile, but there is no such file; check the path.
    """
    table = read_parquet(path, what="a profile")
    stored = (table.schema.metadata or {}).get(_KEY)
    if stored is None:
        raise FileError(f"`{path}` must hold a profile, but is a Parquet file of something else; check the path.")
    metadata = parse_json(stored, where=f"`{path}`", what="a profile's metadata")
    found = metadata.get("schema") if isinstance(metadata, dict) else metadata
    if found != SCHEMA:
        raise FileError(
            f"`{path}` must have profile schema {SCHEMA}, but has {shown(found)}: it is of another version of "
            "rankscope; take the profile again, or read its columns with pandas."
        )
    frame = with_checked_columns(table, _FIELDS, path, what="a profile").select(_FIELDS.names).to_pandas()
    frame["block"] = frame["block"].astype("Int64")
    if ill := _ill_metadata(metadata) or _ill_values(frame):
        raise FileError(f"`{path}` must hold a profile, but {ill}; take the profile again.")
    profile = Profile(frame, metadata)
    if metadata["model"] != fingerprint_targets(profile.targets):
        raise FileError(f"`{path}` must match its own model fingerprint, but was edited; take the profile again.")
    return profile


def _ill_metadata(metadata: Mapping[str, Any]) -> str | None:
    """What is wrong with the metadata."""
    for key, (kind, _) in METADATA.items():
        value = metadata.get(key)
        if not (type(value) is kind or (kind is float and type(value) is int)):
            return f"its metadata have {shown(value)} under `{key}`"
    return None


def _ill_values(frame: pd.DataFrame) -> str | None:
    """What is wrong with values of the right types."""
    if not len(frame):
        return "it has no modules"
    sides = frame[["in_features", "out_features"]]
    if (
        frame["module"].duplicated().any()
        or (sides < 1).any(axis=None)
        or (frame["rank_cost"] != sides.sum(axis=1)).any()
    ):
        return "its modules are named twice or have wrong shapes"
    for name, kind, _ in COLUMNS:
        if kind == _NUMBER:
            lowest = -math.inf if name in ("signal_energy", "noise_energy") else 0.0
            values = frame[name].dropna().to_numpy() if name in _MAY_BE_NULL else frame[name].to_numpy()
            if not (np.isfinite(values) & (values >= lowest)).all():
                return f"column `{name}` has values that cannot be"
        elif kind == _NUMBERS:
            most = frame["in_features"] if name == "activation_values" else sides.min(axis=1)
            for values, length in zip(frame[name], most, strict=True):
                if len(values) > length or not (np.isfinite(values) & (values >= 0) & (values <= values[:1])).all():
                    return f"column `{name}` has values that cannot be"
    if (
        any(map(len, frame["signal_values"]))
        and (frame["singular_values"].map(len) != frame["signal_values"].map(len)).any()
    ):
        return "`signal_values` and `singular_values` differ in length"
    return None


def rank_modules(profile: Profile) -> pd.DataFrame:
    """Modules by gradient energy per parameter of one rank, densest first.

    Columns: `module`, `rank_cost`, `gradient_norm`, `share` (of all energy), `signal_share`, `first` (share of the module's
    energy that rank 1 captures), `gradient_rank`.
    """
    table = profile.table.assign(energy=profile.table["gradient_norm"] ** 2)
    table = table.assign(
        share=table["energy"] / table["energy"].sum(),
        density=table["energy"] / table["rank_cost"],
        first=[
            min(values[0] ** 2 / energy, 1.0) if energy else 0.0
            for values, energy in zip(table["singular_values"], table["energy"], strict=True)
        ],
    )
    kept = ["module", "rank_cost", "gradient_norm", "share", "signal_share", "first", "gradient_rank"]
    return table.sort_values("density", ascending=False, kind="stable")[kept].reset_index(drop=True)


def group_energy(profile: Profile) -> pd.DataFrame:
    """Shares of energy and of full-rank parameters by tower and role, most energy first.

    Columns: `tower`, `role`, `modules`, `share` (of all gradient energy), `parameters` (share of one rank everywhere).
    """
    table = profile.table.assign(energy=profile.table["gradient_norm"] ** 2)
    groups = table.groupby(["tower", "role"], sort=False).agg(
        modules=("module", "size"), share=("energy", "sum"), parameters=("rank_cost", "sum")
    )
    groups[["share", "parameters"]] /= groups[["share", "parameters"]].sum()
    return groups.sort_values("share", ascending=False, kind="stable").reset_index()


def pooled_signal(profile: Profile) -> float:
    """The share of signal in the gradient energy of all modules together, at least 0."""
    signal, noise = profile.table["signal_energy"].sum(), profile.table["noise_energy"].sum()
    return max(float(signal / (signal + noise)), 0.0)


def cumulative_energy(profile: Profile) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Parameters spent and share of gradient energy captured when ranks are taken by energy per parameter.

    Returns:
        Two arrays of one entry a rank, both starting at 0: adapter parameters, and the share in [0, 1] of all modules' energy.
    """
    spectra, costs = profile.spectra(signal=False), profile.column("rank_cost")
    energies = np.concatenate([spectra[name] ** 2 for name in spectra])
    parameters = np.concatenate([np.full(len(spectra[name]), costs[name]) for name in spectra])
    order = np.argsort(-energies / parameters, kind="stable")
    total = float((profile.table["gradient_norm"] ** 2).sum())
    captured = np.minimum(np.cumsum(energies[order]) / total, 1.0)
    return np.concatenate([[0.0], np.cumsum(parameters[order])]), np.concatenate([[0.0], captured])
