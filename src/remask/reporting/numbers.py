"""Numbers as texts, one way for the whole page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NONE = "–"


def number(value: float | None, digits: int | None, sign: bool = False) -> str:
    """`digits` after the point, or three significant ones; a dash where there is no number."""
    if value is None or value != value:
        return NONE
    plus = "+" if sign else ""
    text = f"{value:{plus}#.3g}".rstrip(".") if digits is None else f"{value:{plus}.{digits}f}"
    return text if float(text) else text.lstrip("+-")


def percent(share: float) -> str:
    """A share as whole per cent."""
    return f"{100 * share:.0f} %"


def interval(e: Mapping[str, Any], digits: int, sign: bool = False, unit: str = "") -> str:
    """An estimate as mean [low, high]."""
    low, high = (number(e[key], digits, sign) for key in ("low", "high"))
    return f"{number(e['mean'], digits, sign)}{unit} [{low}, {high}]"


def p_value(change: Mapping[str, Any] | None) -> str:
    """Holm-corrected p-value of a change; a dash where it was not tested."""
    value = None if change is None else change.get("p_holm")
    return NONE if value is None else "<0.0001" if value < 1e-4 else f"{value:.2g}"


def with_p(change: Mapping[str, Any]) -> str:
    """The same in brackets, to stand behind a number."""
    p = p_value(change)
    return "" if p == NONE else f" (p {p})" if p.startswith("<") else f" (p = {p})"
