"""Steering: one vector added at a site, at every position. The control that a memory has to beat.

A plain memory whose keys share a large common component adds about the *mean* of its deltas to every token. `mean_delta` is
that vector without any memory; a memory is worth its name only as far as it is more selective than this at equal strength.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbones.intervention import Intervention, add_shift
from ..backbones.model import MaskedDiffusionLM, Site
from ..errors import RemaskError
from .files import read_edit, write_edit
from .memory import EditMemory


@dataclass
class SteeringVector(Intervention):
    """h <- h + alpha * vector at the site, all positions, every step; `vector` is [d].

    `model` is the fingerprint of the model that it was captured on; "" fits any.
    """

    vector: Tensor
    site: Site
    alpha: float = 1.0
    preset: str = "steering"
    model: str = ""
    kind = "steering vector"

    def _install(self, lm: MaskedDiffusionLM) -> Callable[[], None]:
        if self.model not in ("", lm.fingerprint()):
            raise RemaskError(
                f"this vector was built on model {self.model} and does not fit {lm.name} ({lm.fingerprint()}); build it again"
            )
        if self.alpha == 0:
            return lambda: None
        shift = (self.vector * self.alpha).to(lm.device)
        return add_shift(lm, self.site, lambda hidden: shift.to(hidden.dtype).expand_as(hidden))

    def _tensors(self) -> list[Tensor]:
        return [self.vector]

    def with_alpha(self, alpha: float) -> SteeringVector:
        """The same direction at another strength."""
        return replace(self, alpha=alpha)

    def describe(self) -> dict[str, Any]:
        """Preset, site, strength and norm."""
        return {
            "preset": self.preset,
            "alpha": self.alpha,
            "site": self.site.to_dict(),
            "norm": float(self.vector.norm()),
        }

    def save(self, path: str | Path) -> None:
        """Write an edit file, atomically."""
        header = {"preset": self.preset, "alpha": self.alpha, "site": self.site.to_dict(), "model": self.model}
        write_edit(path, self.kind, header, {"vector": self.vector})

    @classmethod
    def load(cls, path: str | Path) -> SteeringVector:
        """Read a steering file.

        Raises:
            RemaskError: missing, unreadable or damaged file, other format version, another kind of edit.
        """
        header, tensors = read_edit(path)
        if header["kind"] != cls.kind:
            raise RemaskError(f"{path}: holds a {header['kind']}, not a steering vector")
        try:
            site = Site.from_dict(header["site"])
            return cls(tensors["vector"], site, header["alpha"], header["preset"], header["model"])
        except (KeyError, TypeError, ValueError) as error:
            raise RemaskError(f"{path}: damaged edit file ({error}); build it again") from None


def mean_delta(memory: EditMemory) -> SteeringVector:
    """The control at equal strength: the memory's mean delta, scaled to the memory's root-mean-square shift on its own keys."""
    vector = memory.deltas.mean(dim=0)
    shift = memory.alpha * (memory.coefficients(memory.keys) @ memory.deltas)
    strength = shift.square().sum(dim=1).mean().sqrt() / vector.norm().clamp_min(torch.finfo(torch.float32).tiny)
    return SteeringVector(vector, memory.site, float(strength), preset="mean-delta", model=memory.model)
