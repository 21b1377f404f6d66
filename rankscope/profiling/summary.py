"""What a profile says in short: where the gradient's energy is, by module, tower and role, and how concentrated."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rankscope.profiling.store import Profile


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
