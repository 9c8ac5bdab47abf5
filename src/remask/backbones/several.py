"""Several interventions as one: memories at several sites, an edit on top of edited weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import RemaskError
from .intervention import Intervention
from .model import MaskedDiffusionLM


@dataclass
class Several(Intervention):
    """Interventions that are attached in order and detached in reverse, all of them or none.

    Args:
        parts: at least one, each of them once.

    Raises:
        RemaskError: no parts, or one of them twice.
    """

    parts: tuple[Intervention, ...]
    kind = "several edits"

    def __post_init__(self) -> None:
        self.parts = tuple(self.parts)
        if not self.parts:
            raise RemaskError("several edits need at least one part")
        if len({id(part) for part in self.parts}) < len(self.parts):
            raise RemaskError("one edit cannot be two parts of several; load it twice to add it twice")

    def _install(self, lm: MaskedDiffusionLM) -> Callable[[], None]:
        with contextlib.ExitStack() as stack:
            for part in self.parts:
                stack.callback(part.attach(lm).detach)
            return stack.pop_all().close

    def describe(self) -> dict[str, Any]:
        """The presets joined, and every part's kind and description in their order."""
        parts = [{"kind": part.kind, **part.describe()} for part in self.parts]
        return {"preset": " + ".join(str(part["preset"]) for part in parts), "parts": parts}

    def _tensors(self) -> list[Tensor]:
        return [tensor for part in self.parts for tensor in part._tensors()]

    def with_alpha(self, alpha: float) -> Several:
        """Every part that has a strength at `alpha` times its present one, the others as they are."""
        return Several(tuple(_scaled(part, alpha) for part in self.parts))

    def save(self, path: str | Path) -> None:
        """Refused.

        Raises:
            RemaskError: always; every part has a file of its own.
        """
        raise RemaskError(f"{path}: several edits have no file form; save each of its parts")


def _scaled(part: Intervention, alpha: float) -> Intervention:
    scale = getattr(part, "with_alpha", None)
    if scale is None:
        return part
    scaled: Intervention = scale(alpha if isinstance(part, Several) else part.alpha * alpha)  # type: ignore[attr-defined]
    return scaled
