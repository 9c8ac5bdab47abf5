"""One self-contained HTML page per run: pictures and tables, no outside resource."""

from .audit import audit_figures, audit_page
from .html import render
from .levels import levels

__all__ = ["audit_figures", "audit_page", "levels", "render"]
