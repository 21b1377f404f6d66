"""`Profile`: per-module features of one model on one data set. Its schema, its file and its summaries."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, TypedDict, get_args, get_origin, get_type_hints

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rankscope.errors import FileError, ModelError, shown
from rankscope.files import parse_json, read_parquet, replacing, with_checked_columns
from rankscope.profiling.statistics import Floats, energy_tail
from rankscope.targets import TargetModule, fingerprint_targets

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 4
Vectors = NDArray[np.float32]


@dataclass(slots=True, kw_only=True)
class ModuleFeatures:
    """One row of a profile's table: the features of one target module. G is the mean gradient of the loss over examples."""

    module: str  # full dotted name
    tower: str  # see `rankscope.TargetModule`
    block: int | None  # inside the tower; null outside blocks
    role: str
    kind: str
    in_features: int
    out_features: int
    rank_cost: int  # parameters that one more rank adds
    gradient_norm: float  # ||G||_F
    signal_energy: float  # squared norm of the expected gradient, unbiased (may be slightly negative)
    noise_energy: float  # of gradient_norm squared, what is noise of this many batches
    signal_share: float = 0.0  # of signal in the gradient's energy, shrunk towards that of all modules, in [0, 1]
    fisher_trace: float  # trace of the empirical Fisher matrix: mean squared gradient norm of single examples
    gradient_rank: float  # effective rank of G (participation ratio of its leading singular values)
    singular_values: list[float]  # leading ones of G, descending; `Profile.spectra` estimates the others
    singular_error: float  # standard error of each leading singular value, from the sketch; 0 if exact
    signal_values: list[float] = field(default_factory=list)  # singular_values times the root of signal_share
    exact: bool  # whether the gradient was kept whole (small modules) or sketched
    sensitivity: float | None = None  # sum of |w g| over the weight's elements; null if the weight cannot be read
    weight_norm: float | None = None  # Frobenius norm of the frozen weight, dequantised
    weight_rank: float | None = None  # its stable rank
    activation_moment: float = 0.0  # mean squared norm of an input row
    activation_variance: float = 0.0  # trace of the inputs' covariance
    activation_rank: float = 0.0  # its effective rank (participation ratio)
    activation_values: list[float] = field(default_factory=list)  # its leading eigenvalues, descending
    left_directions: Vectors | None = None  # leading left singular vectors of G, one after the other; null unless kept
    right_directions: Vectors | None = None  # leading right ones

    def scale(self, factor: float) -> None:
        """Multiply the gradient, which is linear in the loss, by a factor."""
        self.gradient_norm *= factor
        self.singular_error *= factor
        self.sensitivity = None if self.sensitivity is None else self.sensitivity * factor
        self.singular_values = [value * factor for value in self.singular_values]
        self.signal_values = [value * factor for value in self.signal_values]
        self.signal_energy *= factor * factor
        self.noise_energy *= factor * factor
        self.fisher_trace *= factor * factor


class Metadata(TypedDict):
    """Where a profile comes from: a JSON object under the key `rankscope` of the Parquet file's metadata."""

    schema: int  # version of the columns
    model: str  # fingerprint of the target modules
    weights: str  # fingerprint of the model's weights
    data: str  # fingerprint of the batches
    targets: int
    skipped: dict[str, str]  # modules that cannot be profiled, and why
    without_gradient: list[str]  # modules that the loss does not depend on
    batches: int
    skipped_batches: int  # whose loss was not finite
    interrupted: bool  # by Ctrl-C
    tokens: int
    loss: float  # mean over examples
    seed: int
    head_steps: int
    sketch_size: int  # columns of the gradient sketches
    sketch_wanted: int  # what `sketch_size` would be if memory allowed
    versions: dict[str, str]  # of packages


def _field(name: str, hint: Any) -> pa.Field:
    kinds: dict[Any, pa.DataType] = {
        str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_(),
        list[float]: pa.list_(pa.float64()), Vectors: pa.list_(pa.float32()),
    }  # fmt: skip
    nullable = isinstance(hint, UnionType)
    return pa.field(name, kinds[get_args(hint)[0] if nullable else hint], nullable=nullable)


SCHEMA = pa.schema([_field(name, hint) for name, hint in get_type_hints(ModuleFeatures).items()])


@dataclass(frozen=True, eq=False)
class Profile:
    """The features of every target module, and how they were measured.

    Attributes:
        table: One row a target module, in the model's order, with the columns of `ModuleFeatures`.
        metadata: The keys of `Metadata`, and any others.
    """

    table: pd.DataFrame
    metadata: Mapping[str, Any]

    @classmethod
    def of(cls, rows: Sequence[ModuleFeatures], metadata: Metadata) -> Profile:
        """The profile of these rows."""
        frame = pd.DataFrame([{name: getattr(row, name) for name in SCHEMA.names} for row in rows])
        return cls(frame.astype({"block": "Int64"}), metadata)

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
        return dict(zip(self.table["module"], map(float, self.table[name]), strict=True))

    def lists(self, name: str) -> dict[str, Floats]:
        """One list column by module name."""
        lists = (np.asarray(values, dtype=np.float64) for values in self.table[name])
        return dict(zip(self.table["module"], lists, strict=True))

    def spectra(self, *, signal: bool = True, length: int | None = None) -> dict[str, Floats]:
        """Singular values of each module's gradient by name, descending, up to full rank.

        The leading ones were measured. Those beyond (`sketch_size` of the metadata, in large modules) are estimated from the
        energy that is left; see `energy_tail`.

        Args:
            signal: The part that the batches agree on; False: raw, inflated by noise. If the batches agree on nothing in any
                module, a warning is logged and the raw values are returned.
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

    def input_variances(self, *, length: int | None = None) -> dict[str, Floats]:
        """Eigenvalues of the covariance of each module's inputs by name, descending, up to full rank.

        The leading half of `sketch_size` was measured; those beyond are estimated from what they leave of the trace.

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
        """The share of signal in each module's gradient energy by name; 1, with a warning, if no module has any."""
        if self.has_signal:
            return self.column("signal_share")
        logger.warning(
            "the %s batches of the profile agree on nothing: the estimated signal is 0 in every module, and the raw gradient "
            "stands in for it; profile more batches",
            self.metadata.get("batches", ""),
        )
        return dict.fromkeys(self.table["module"], 1.0)

    def directions(self, module: str) -> tuple[Vectors, Vectors]:
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

    def require(self, targets: tuple[TargetModule, ...]) -> None:
        """Check that every target module was profiled, with the same shape.

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
        """Write the profile, atomically; returns the path."""
        table = pa.Table.from_pandas(self.table, schema=SCHEMA, preserve_index=False)
        metadata = {**(table.schema.metadata or {}), b"rankscope": json.dumps(dict(self.metadata)).encode()}
        with replacing(path) as temporary:
            pq.write_table(table.replace_schema_metadata(metadata), temporary, compression="zstd")
        return Path(path)


def read_profile(path: str | os.PathLike[str]) -> Profile:
    """Read what `Profile.to_parquet` wrote.

    Raises:
        FileError: The file is missing, truncated, no profile, or of another schema.

    >>> read_profile("nowhere.parquet")
    Traceback (most recent call last):
    ...
    rankscope.errors.FileError: `nowhere.parquet` must hold a profile, but there is no such file; check the path.
    """
    table = read_parquet(path, what="a profile")
    stored = (table.schema.metadata or {}).get(b"rankscope")
    if stored is None:
        raise FileError(f"`{path}` must hold a profile, but is a Parquet file of something else; check the path.")
    metadata = parse_json(stored, where=f"`{path}`", what="a profile's metadata")
    found = metadata.get("schema") if isinstance(metadata, dict) else metadata
    if found != SCHEMA_VERSION:
        raise FileError(
            f"`{path}` must have profile schema {SCHEMA_VERSION}, but has {shown(found)}: it is of another version of "
            "rankscope; take the profile again, or read its columns with pandas."
        )
    frame = with_checked_columns(table, SCHEMA, path, what="a profile").select(SCHEMA.names).to_pandas()
    if problem := _problem(metadata, frame):
        raise FileError(f"`{path}` must hold a profile, but {problem}; take the profile again.")
    profile = Profile(frame.astype({"block": "Int64"}), metadata)
    if metadata["model"] != fingerprint_targets(profile.targets):
        raise FileError(f"`{path}` must match its own model fingerprint, but was edited; take the profile again.")
    return profile


def _problem(metadata: Mapping[str, Any], frame: pd.DataFrame) -> str | None:
    """What is wrong with metadata, or with values of the right types."""
    for key, hint in get_type_hints(Metadata).items():
        value, kind = metadata.get(key), get_origin(hint) or hint
        if type(value) is not kind and (kind, type(value)) != (float, int):
            return f"its metadata have {shown(value)} under `{key}`"
    if frame.empty:
        return "it has no modules"
    sides = frame[["in_features", "out_features"]]
    costs_fit = (sides >= 1).all(axis=None) and (frame["rank_cost"] == sides.sum(axis=1)).all()
    if frame["module"].duplicated().any() or not costs_fit:
        return "its modules are named twice or have wrong shapes"
    for column in SCHEMA:
        values = frame[column.name].dropna() if column.nullable else frame[column.name]
        if column.type == pa.float64():
            lowest = -math.inf if column.name in ("signal_energy", "noise_energy") else 0.0
            fits = (np.isfinite(values) & (values >= lowest)).all()
        elif column.type == pa.list_(pa.float64()):
            most = frame["in_features"] if column.name == "activation_values" else sides.min(axis=1)
            fits = (values.map(len) <= most).all() and all(
                (np.isfinite(each) & (each >= 0) & (each <= each[:1])).all() for each in values
            )
        else:
            continue
        if not fits:
            return f"column `{column.name}` has values that cannot be"
    lengths = frame["signal_values"].map(len)
    if lengths.any() and (frame["singular_values"].map(len) != lengths).any():
        return "`signal_values` and `singular_values` differ in length"
    return None


# --- summaries ---------------------------------------------------------------------------------------------------


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


def cumulative_energy(profile: Profile) -> tuple[Floats, Floats]:
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
