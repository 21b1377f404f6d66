"""`Profile`: per-module features of one model on one data set, and the only place that reads or writes its Parquet.

Columns, one row a target module, in the model's order:

| column | type | holds |
| --- | --- | --- |
| module | string | full dotted name |
| tower, role, kind | string | see `rankscope.targets.TargetModule` |
| block | int64, may be null | block index inside the tower |
| in_features, out_features, rank_cost | int64 | shape; parameters that one more rank adds |
| gradient_norm | double | Frobenius norm of the mean gradient G of the loss |
| signal_energy | double | squared norm of the expected gradient, without bias (may be slightly negative) |
| noise_energy | double | squared norm of what the mean of this many batches still has of noise |
| signal_share | double | share of signal in the gradient's energy, drawn towards that of all modules, in [0, 1] |
| fisher_trace | double | trace of the empirical Fisher matrix: mean squared gradient norm of single examples |
| gradient_rank | double | effective rank of G (participation ratio of its leading singular values) |
| singular_values | list of double | leading singular values of G, descending |
| singular_error | double | standard error of each leading singular value, from the sketch; 0 where exact |
| signal_values | list of double | singular_values times the root of signal_share |
| exact | bool | whether the gradient was kept whole (small modules) or sketched |
| sensitivity | double, may be null | sum of abs(w * g) over the weight's elements; null where the weight cannot be read |
| weight_norm | double, may be null | Frobenius norm of the frozen weight, dequantised |
| weight_rank | double, may be null | stable rank of the frozen weight |
| activation_moment | double | mean squared norm of an input row |
| activation_variance | double | trace of the inputs' covariance |
| activation_rank | double | effective rank of the inputs' covariance (participation ratio) |
| activation_values | list of double | leading eigenvalues of the inputs' covariance, descending |
| left_directions | list of float, may be null | leading left singular vectors of G, one after the other; null unless kept |
| right_directions | list of float, may be null | leading right singular vectors of G, one after the other; null unless kept |

Key-value metadata, under `rankscope`: a JSON object with `schema`, `model` (fingerprint of the target modules),
`weights` and `data` (fingerprints), `targets`, `skipped` (modules and reasons), `without_gradient` (modules), `batches`,
`skipped_batches`, `interrupted`, `tokens`, `loss`, `seed`, `head_steps`, `sketch_size`, `sketch_wanted`
(larger where memory did not allow it), `versions`.
"""

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

from rankscope.exceptions import FileFormatError, ProfileError
from rankscope.files import replacing
from rankscope.profiling.features import energy_tail
from rankscope.targets import TargetModule, fingerprint_targets

logger = logging.getLogger(__name__)

SCHEMA = 4
_KEY = b"rankscope"
_FIELDS = pa.schema(
    [
        pa.field("module", pa.string(), nullable=False),
        pa.field("tower", pa.string(), nullable=False),
        pa.field("block", pa.int64()),
        pa.field("role", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("in_features", pa.int64(), nullable=False),
        pa.field("out_features", pa.int64(), nullable=False),
        pa.field("rank_cost", pa.int64(), nullable=False),
        *(
            pa.field(name, pa.float64(), nullable=False)
            for name in (
                "gradient_norm",
                "signal_energy",
                "noise_energy",
                "signal_share",
                "fisher_trace",
                "gradient_rank",
            )
        ),
        pa.field("singular_values", pa.list_(pa.float64()), nullable=False),
        pa.field("singular_error", pa.float64(), nullable=False),
        pa.field("signal_values", pa.list_(pa.float64()), nullable=False),
        pa.field("exact", pa.bool_(), nullable=False),
        *(pa.field(name, pa.float64()) for name in ("sensitivity", "weight_norm", "weight_rank")),
        *(pa.field(f"activation_{name}", pa.float64(), nullable=False) for name in ("moment", "variance", "rank")),
        pa.field("activation_values", pa.list_(pa.float64()), nullable=False),
        pa.field("left_directions", pa.list_(pa.float32())),
        pa.field("right_directions", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True, eq=False)
class Profile:
    """The features of every target module, and how they were taken.

    Attributes:
        table: One row a target module, with the columns of this file's header.
        metadata: Where it comes from: `batches`, `loss`, `seed`, fingerprints, versions.
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
        the energy that they leave of `gradient_norm` squared; see `rankscope.profiling.features.energy_tail`.

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
            ProfileError: They were not kept, or there is no such module.
        """
        row = self.table[self.table["module"] == module]
        if row.empty or row["left_directions"].iloc[0] is None:
            raise ProfileError(
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
            ProfileError: One was not.
        """
        known = {(t.name, t.in_features, t.out_features) for t in self.targets}
        missing = [t.name for t in targets if (t.name, t.in_features, t.out_features) not in known]
        if missing:
            raise ProfileError(
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
        FileFormatError: The file is missing, truncated, no profile, or of another schema.

    >>> read_profile("nowhere.parquet")
    Traceback (most recent call last):
    ...
    rankscope.exceptions.FileFormatError: `nowhere.parquet` must hold a profile, but there is no such file; check the path.
    """
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise FileFormatError(f"`{path}` must hold a profile, but there is no such file; check the path.") from None
    except (pa.ArrowInvalid, pa.ArrowIOError, OSError) as error:
        raise FileFormatError(
            f"`{path}` must hold a profile as Parquet, but it cannot be read "
            f"({str(error).splitlines()[0]}); it may be truncated: take the profile again."
        ) from None
    stored = (table.schema.metadata or {}).get(_KEY)
    if stored is None:
        raise FileFormatError(f"`{path}` must hold a profile, but is a Parquet file of something else; check the path.")
    metadata = json.loads(stored)
    if metadata.get("schema") != SCHEMA:
        raise FileFormatError(
            f"`{path}` must have profile schema {SCHEMA}, but has {metadata.get('schema')!r}: it is of another version of "
            "rankscope; take the profile again, or read its columns with pandas."
        )
    frame = table.to_pandas()
    frame["block"] = frame["block"].astype("Int64")
    profile = Profile(frame, metadata)
    if metadata["model"] != fingerprint_targets(profile.targets):
        raise FileFormatError(f"`{path}` must match its own model fingerprint, but was edited; take the profile again.")
    return profile
