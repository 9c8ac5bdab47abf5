"""Figures as files."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from .errors import RemaskError
from .facts import write_atomically

matplotlib.use("Agg", force=False)


def png(figure: Figure, dpi: int = 130) -> bytes:
    """The figure as PNG bytes."""
    return _render(figure, "png", dpi)


def save_figure(figure: Figure, path: str | Path, dpi: int = 130) -> None:
    """Write the figure atomically, as PNG or SVG by the path's ending.

    Raises:
        RemaskError: another ending.
    """
    kind = Path(path).suffix.lstrip(".")
    if kind not in ("png", "svg"):
        raise RemaskError(f"{path}: a figure is written as .png or .svg")
    write_atomically(path, _render(figure, kind, dpi))


def _render(figure: Figure, kind: str, dpi: int) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "remask"}):  # the same figure gives the same file
        figure.savefig(buffer, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()
