"""Saving a figure as PNG, atomically."""

from __future__ import annotations

import os
from pathlib import Path

from matplotlib.figure import Figure

from rankscope.files import replacing


def save_figure(figure: Figure, path: str | os.PathLike[str], *, dpi: int = 150) -> Path:
    """Writes the figure; returns the path."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi, bbox_inches="tight")
    return Path(path)
