"""`Profile`: per-module features of one model on one data set; the only place that knows its columns and its file."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from rankscope.errors import FileError, ModelError, checked, shown
from rankscope.files import SEALED, parse_json, read_parquet, replacing, seal_metadata, with_checked_columns
from rankscope.maps import draw_energy, html_card, to_png
from rankscope.profiling.sketch import Decomposition, InputSketch
from rankscope.profiling.statistics import EnergySplit, Floats, energy_tail, frobenius_norm, signal_shares
from rankscope.targets import TargetModule, fingerprint_targets

SCHEMA_VERSION = 4
logger = logging.getLogger(__name__)


class Measured(NamedTuple):
    """What a profile saw of one module, whose mean gradient over examples is G."""

    target: TargetModule
    exact: bool  # whether the gradient was kept whole
    gradient: Decomposition  # of G
    split: EnergySplit
    inputs: InputSketch | None
    weight: Tensor | None  # (out, in); None if it cannot be read
    sensitivity: float | None
    keep: int  # directions
    parts: tuple[float, ...] | None = None  # energies of what image tokens, and what others, add to G


_TEXT, _WHOLE, _NUMBER = pa.string(), pa.int64(), pa.float64()
_NUMBERS, _VECTORS = pa.list_(pa.float64()), pa.list_(pa.float32())
# Name, type, how it is computed, meaning; one row a target module, in the model's order.
COLUMNS: Mapping[str, tuple[pa.DataType, Callable[[Measured], Any]]] = {
    "module": (_TEXT, lambda m: m.target.name),  # full dotted name
    "tower": (_TEXT, lambda m: m.target.tower),
    "block": (_WHOLE, lambda m: m.target.block),  # null outside blocks
    "role": (_TEXT, lambda m: m.target.role),
    "kind": (_TEXT, lambda m: m.target.kind),
    "in_features": (_WHOLE, lambda m: m.target.in_features),
    "out_features": (_WHOLE, lambda m: m.target.out_features),
    "rank_cost": (_WHOLE, lambda m: m.target.rank_cost),  # parameters that one more rank adds
    "gradient_norm": (_NUMBER, lambda m: math.sqrt(m.gradient.energy)),  # ||G||_F
    "signal_energy": (_NUMBER, lambda m: m.split.signal),  # squared norm of the expected gradient, unbiased
    "noise_energy": (_NUMBER, lambda m: m.split.noise),  # of ||G||_F^2, what is noise of this many batches
    "signal_share": (_NUMBER, lambda m: 0.0),  # of signal in ||G||_F^2; see `signal_shares`
    "fisher_trace": (_NUMBER, lambda m: m.split.fisher_trace),  # mean squared gradient norm of single examples
    "singular_values": (_NUMBERS, lambda m: m.gradient.values.tolist()),  # leading ones of G, descending
    "singular_error": (_NUMBER, lambda m: m.gradient.error),  # standard error of each; 0 if exact
    "exact": (pa.bool_(), lambda m: m.exact),  # whether the gradient was kept whole or sketched
    "sensitivity": (_NUMBER, lambda m: m.sensitivity),  # sum of |w g|; this and the next are null if the weight cannot be read
    "weight_norm": (_NUMBER, lambda m: None if m.weight is None else frobenius_norm(m.weight)),  # of the frozen weight
    "activation_moment": (_NUMBER, lambda m: m.inputs.second_moment() if m.inputs else 0.0),
    "activation_variance": (_NUMBER, lambda m: m.inputs.variance() if m.inputs else 0.0),
    "activation_values": (_NUMBERS, lambda m: m.inputs.variances().tolist() if m.inputs else []),
    # ||sum over image tokens||_F^2 and ||sum over others||_F^2, G being the sum of both; with twice their inner product they make
    # up ||G||_F^2. Null outside the tower that sees both; without image tokens there are no such columns.
    "image_energy": (_NUMBER, lambda m: m.parts and m.parts[0]),
    "text_energy": (_NUMBER, lambda m: m.parts and m.parts[1]),
    "left_directions": (_VECTORS, lambda m: m.gradient.left[:, : m.keep].T.flatten().tolist() if m.keep else None),
    "right_directions": (_VECTORS, lambda m: m.gradient.right[: m.keep].flatten().tolist() if m.keep else None),
}  # fmt: skip
MODALITIES = ("image_energy", "text_energy")
_NULLABLE = {"block", "sensitivity", "weight_norm", "left_directions", "right_directions", *MODALITIES}
_FIELDS = {name: pa.field(name, kind, nullable=name in _NULLABLE) for name, (kind, _) in COLUMNS.items()}
SCHEMA = pa.schema([field for name, field in _FIELDS.items() if name not in MODALITIES])


def _schema_of(columns: Iterable[str]) -> pa.Schema:
    """The schema of a table with or without the energies by modality."""
    both = set(MODALITIES) <= set(columns)
    return pa.schema([field for name, field in _FIELDS.items() if both or name not in MODALITIES])


# Where a profile comes from: a JSON object under the key `rankscope` of the Parquet file's metadata.
METADATA: Mapping[str, type] = {
    "schema": int, "model": str, "weights": str, "data": str, "targets": int, "skipped": dict, "without_gradient": list,
    "batches": int, "skipped_batches": int, "interrupted": bool, "tokens": int, "loss": float, "seed": int,
    "head_steps": int, "sketch_size": int, "sketch_wanted": int, "versions": dict,
}  # fmt: skip


def tabulate(modules: Iterable[Measured], n_batches: int) -> pd.DataFrame:
    """The table of a profile."""
    table = pd.DataFrame([{name: compute(module) for name, (_, compute) in COLUMNS.items()} for module in modules])
    if not table["gradient_norm"].any():
        raise ModelError("the gradient must not be zero at every target module, but is; check the loss and the labels.")
    if not np.isfinite(table["fisher_trace"]).all():
        raise ModelError("squared gradients must be below 1e308, but are not; scale the loss down.")
    table = table.astype({"block": "Int64", "sensitivity": float, **dict.fromkeys(MODALITIES, float)})
    table = table.drop(columns=[name for name in MODALITIES if table[name].isna().all()])
    energy = table["gradient_norm"].to_numpy() ** 2
    table["signal_share"] = signal_shares(table["signal_energy"].to_numpy(), energy, n_batches)
    return table


@dataclass(frozen=True, eq=False, repr=False)
class Profile:
    """The features of every target module, and how they were measured."""

    table: pd.DataFrame  # one row a target module, in the model's order; see `COLUMNS`
    metadata: Mapping[str, Any]  # the keys of `METADATA`, and any others

    @property
    def targets(self) -> tuple[TargetModule, ...]:
        """The profiled modules, in the model's order."""
        fields = ["module", "tower", "block", "role", "kind", "in_features", "out_features"]
        known = self.table[fields].rename(columns={"module": "name"}).astype(object)
        rows: list[dict[Any, Any]] = known.where(known.notna(), None).to_dict("records")
        return tuple(TargetModule(**row) for row in rows)

    def __repr__(self) -> str:
        """In one line; `table` and `metadata` hold the rest."""
        facts = self.metadata
        tokens = f", {facts['tokens']:,} tokens" if facts.get("tokens") else ""
        loss = f", loss {facts['loss']:.4g}" if "loss" in facts else ""
        return f"Profile({len(self.table)} modules, {facts.get('batches', 0)} batches{tokens}{loss})"

    def _repr_html_(self) -> str:
        """What notebooks show: the line above, and a map of the gradient energy per parameter."""
        title, norms = "gradient energy per parameter of one rank", self.column("gradient_norm")
        return html_card(repr(self), png=to_png(lambda figure: draw_energy(self.targets, norms, title, figure=figure)))

    @property
    def tells_modalities(self) -> bool:
        """Whether the profile has the columns `image_energy` and `text_energy`."""
        return set(MODALITIES) <= set(self.table.columns)

    def column(self, name: str) -> dict[str, float]:
        """One feature by module name."""
        return dict(zip(self.table["module"], map(float, self.table[name]), strict=True))

    def spectra(self, *, signal: bool = True, length: int | None = None) -> dict[str, Floats]:
        """Singular values of each module's gradient, descending, up to full rank or `length`.

        Those beyond the measured ones are estimated by `energy_tail`. `signal`: of the part that the batches agree on (or, with
        a warning, of the whole if they agree on nothing); False: noise inflates them.
        """
        shares = self.signal_shares() if signal else dict.fromkeys(self.table["module"], 1.0)
        columns = ("module", "singular_values", "gradient_norm", "in_features", "out_features")
        spectra = {}
        for name, found, norm, *sides in zip(*(self.table[column] for column in columns), strict=True):
            values = np.asarray(found, dtype=np.float64)
            tail = norm * np.sqrt(energy_tail((values / (norm or 1.0)) ** 2, 1.0, min(sides), length))
            spectra[name] = np.append(values[:length], np.minimum(tail, values[-1:])) * math.sqrt(shares[name])
        return spectra

    def input_variances(self) -> dict[str, Floats]:
        """Eigenvalues of the covariance of each module's inputs by name, descending, up to full rank; see `spectra`."""
        columns = ("module", "activation_values", "activation_variance", "in_features", "out_features")
        found = {}
        for name, values, trace, inputs, outputs in zip(*(self.table[column] for column in columns), strict=True):
            leading, last = np.asarray(values, dtype=np.float64), min(outputs, inputs)
            found[name] = np.append(leading[:last], energy_tail(leading, trace, inputs, last))
        return found

    def signal_shares(self) -> dict[str, float]:
        """The share of signal in each module's gradient energy by name; 1, with a warning, if no module has any."""
        if (self.table["signal_share"] * self.table["gradient_norm"] > 0).any():
            return self.column("signal_share")
        found = "the estimated signal is 0 in every module, and the raw gradient stands in for it; profile more batches"
        logger.warning("the %s batches of the profile agree on nothing: %s", self.metadata.get("batches", ""), found)
        return dict.fromkeys(self.table["module"], 1.0)

    def pooled_signal(self) -> float:
        """The share of signal in the gradient energy of all modules together, at least 0."""
        signal, noise = self.table["signal_energy"].sum(), self.table["noise_energy"].sum()
        return max(float(signal / (signal + noise)), 0.0)

    def directions(self, module: str) -> tuple[np.ndarray, np.ndarray]:
        """Leading left (r, out) and right (r, in) singular vectors of one module's gradient."""
        row = next((row for row in self.table.to_dict("records") if row["module"] == module), {})
        if row.get("left_directions") is None:
            must = f"the profile must hold directions of `{module}`, but does not"
            raise ModelError(f"{must}; take it with `keep_directions=8`.")
        left, right = (np.asarray(row[f"{side}_directions"], dtype=np.float32) for side in ("left", "right"))
        return left.reshape(-1, row["out_features"]), right.reshape(-1, row["in_features"])

    def require(self, targets: tuple[TargetModule, ...]) -> None:
        """Raise a ModelError unless every target module was profiled, with the same shape."""
        known = {(t.name, t.in_features, t.out_features) for t in self.targets}
        if missing := [t.name for t in targets if (t.name, t.in_features, t.out_features) not in known]:
            found = f"{len(missing)} of {len(targets)} are missing, as `{missing[0]}`"
            must = f"`profile` must cover every target module, but {found}"
            raise ModelError(f"{must}; take it again on this model and these targets.")

    def to_parquet(self, path: str | os.PathLike[str]) -> Path:
        """Write the profile, atomically; returns the path."""
        table = pa.Table.from_pandas(self.table, schema=_schema_of(self.table.columns), preserve_index=False)
        text = json.dumps(dict(self.metadata)).encode()
        metadata = {**(table.schema.metadata or {}), b"rankscope": text, **seal_metadata(text)}
        with replacing(path) as temporary:
            pq.write_table(table.replace_schema_metadata(metadata), temporary, compression="zstd", **SEALED)
        return Path(path)


@checked
def read_profile(path: str | os.PathLike[str]) -> Profile:
    """Read what `Profile.to_parquet` wrote; raise a FileError if the file is anything else."""
    table = read_parquet(path, what="a profile")
    stored = (table.schema.metadata or {}).get(b"rankscope")
    if stored is None:
        raise FileError(f"`{path}` must hold a profile, but is a Parquet file of something else; check the path.")
    metadata = parse_json(stored, where=f"`{path}`", what="a profile's metadata")
    found = metadata.get("schema") if isinstance(metadata, dict) else metadata
    if found != SCHEMA_VERSION:
        other = f"has {shown(found)}: it is of another version of rankscope"
        remedy = "take the profile again, or read its columns with pandas"
        raise FileError(f"`{path}` must have profile schema {SCHEMA_VERSION}, but {other}; {remedy}.")
    schema = _schema_of(table.column_names)
    frame = with_checked_columns(table, schema, path, what="a profile").select(schema.names).to_pandas()
    if problem := _problem(metadata, frame):
        raise FileError(f"`{path}` must hold a profile, but {problem}; take the profile again.")
    profile = Profile(frame.astype({"block": "Int64"}), metadata)
    if metadata["model"] != fingerprint_targets(profile.targets):
        raise FileError(f"`{path}` must match its own model fingerprint, but was edited; take the profile again.")
    return profile


def _problem(metadata: Mapping[str, Any], frame: pd.DataFrame) -> str | None:
    """What is wrong with metadata, or with values of the right types."""
    for key, kind in METADATA.items():
        value = metadata.get(key)
        if type(value) is not kind and (kind, type(value)) != (float, int):
            return f"its metadata have {shown(value)} under `{key}`"
    if frame.empty:
        return "it has no modules"
    sides = frame[["in_features", "out_features"]]
    if (sides < 1).any(axis=None) or not frame["module"].is_unique or (frame["rank_cost"] != sides.sum(axis=1)).any():
        return "its modules are named twice or have wrong shapes"
    for name in (name for name, (kind, _) in COLUMNS.items() if kind == _NUMBER and name in frame):
        values, least = frame[name].dropna(), -math.inf if name in ("signal_energy", "noise_energy") else 0.0
        if not (np.isfinite(values) & (values >= least)).all():
            return f"column `{name}` has values that cannot be"
    for name, most in {"singular_values": sides.min(axis=1), "activation_values": frame["in_features"]}.items():
        descend = frame[name].map(lambda each: (np.isfinite(each) & (each >= 0) & (each <= each[:1])).all())
        if not (descend & (frame[name].map(len) <= most)).all():
            return f"column `{name}` has values that cannot be"
    return None


def rank_modules(profile: Profile) -> pd.DataFrame:
    """Modules by gradient energy per parameter, densest first; `first` is the share of its energy that rank 1 captures."""
    energy, strongest = (
        profile.table["gradient_norm"] ** 2,
        profile.table["singular_values"].map(lambda values: values[0]),
    )
    first = (strongest**2 / energy).clip(upper=1.0).fillna(0.0)
    order = (energy / profile.table["rank_cost"]).sort_values(ascending=False, kind="stable").index
    table = profile.table[["module", "rank_cost", "gradient_norm", "signal_share"]]
    return table.assign(share=energy / energy.sum(), first=first).loc[order].reset_index(drop=True)


def group_energy(profile: Profile) -> pd.DataFrame:
    """By tower and role, the number of `modules`, and shares of energy and of the `parameters` of one rank everywhere.

    Where the profile tells image tokens from others, `image` is their share of what both parts have.
    """
    table = profile.table.assign(energy=profile.table["gradient_norm"] ** 2)
    groups = table.groupby(["tower", "role"], sort=False).agg(
        modules=("module", "size"), share=("energy", "sum"), parameters=("rank_cost", "sum")
    )
    groups[["share", "parameters"]] /= groups[["share", "parameters"]].sum()
    if profile.tells_modalities:
        image, text = (table.groupby(["tower", "role"], sort=False)[name].sum() for name in MODALITIES)
        groups["image"] = image / (image + text)
    return groups.sort_values("share", ascending=False, kind="stable").reset_index()


def cumulative_energy(profile: Profile) -> tuple[Floats, Floats]:
    """Parameters spent, and share of all gradient energy captured, as ranks are taken by energy per parameter, from 0 on."""
    spectra, costs = profile.spectra(signal=False), profile.column("rank_cost")
    energies = np.concatenate([spectra[name] ** 2 for name in spectra])
    parameters = np.concatenate([np.full(len(spectra[name]), costs[name]) for name in spectra])
    order = np.argsort(-energies / parameters, kind="stable")
    total = float((profile.table["gradient_norm"] ** 2).sum())
    captured = np.minimum(np.cumsum(energies[order]) / total, 1.0)
    return np.concatenate([[0.0], np.cumsum(parameters[order])]), np.concatenate([[0.0], captured])
