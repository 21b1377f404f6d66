"""A profile's spectra, and how much gradient energy a parameter budget can capture."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from rankscope.profiling import Profile
from rankscope.profiling.summary import cumulative_energy


def plot_spectra(profile: Profile) -> Figure:
    """Left: singular values of every module over its first, coloured by role. Right: energy captured against parameters."""
    figure = Figure(figsize=(10, 3.8))
    figure.set_layout_engine("constrained")
    left, right = figure.subplots(1, 2)
    roles = list(dict.fromkeys(profile.table["role"]))
    colours = dict(zip(roles, colormaps["tab10"](np.linspace(0, 1, max(len(roles), 2), endpoint=False)), strict=False))
    named: set[str] = set()
    spectra = profile.spectra(signal=False)
    for module, role in zip(profile.table["module"], profile.table["role"], strict=True):
        values = spectra[module]
        if len(values) and values[0] > 0:
            kept = values[values > 1e-4 * values[0]]
            label = None if role in named else role
            left.plot(np.arange(1, len(kept) + 1), kept / values[0], color=colours[role], alpha=0.6, lw=1, label=label)
            named.add(role)
    left.set_yscale("log")
    left.set_xlabel("index", fontsize=8)
    left.set_ylabel("singular value / first", fontsize=8)
    left.set_title("gradient spectra, one line a module", loc="left", fontsize=9)
    left.legend(fontsize=7, frameon=False)
    parameters, captured = cumulative_energy(profile)
    right.plot(parameters, captured, color="tab:blue")
    uniform = float(profile.table["rank_cost"].sum())
    for rank in (1, 2, 4, 8):
        at = float(np.interp(rank * uniform, parameters, captured))
        right.plot([rank * uniform], [at], "o", color="tab:orange", ms=4)
        right.annotate(
            f"rank {rank}: {at:.0%}", (rank * uniform, at), xytext=(6, -11), textcoords="offset points", fontsize=7
        )
    right.set_xlim(0, min(10 * uniform, float(parameters[-1])))
    right.set_ylim(0, 1.02)
    right.set_xlabel("adapter parameters (dots: what uniform LoRA of that rank has)", fontsize=8)
    right.set_ylabel("share of gradient energy", fontsize=8)
    right.set_title("energy captured, best ranks first", loc="left", fontsize=9)
    for axis in (left, right):
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return figure
