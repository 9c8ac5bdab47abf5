"""One self-contained HTML page per run: pictures and tables, no outside resource."""

from .html import render
from .levels import levels

__all__ = ["levels", "render"]
