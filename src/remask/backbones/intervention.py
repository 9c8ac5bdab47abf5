"""An intervention changes what a `MaskedDiffusionLM` computes, and can be undone exactly.

No edit, steering, an edit memory, edited weights, a trained adapter: the evaluation cannot tell them apart.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RemaskError
from ..random import digest
from .model import MaskedDiffusionLM, Site


def require_finite(alpha: float) -> None:
    """Refuse a strength that is no finite number.

    Raises:
        RemaskError: it is infinite or NaN.
    """
    if not math.isfinite(alpha):
        raise RemaskError(f"alpha must be a finite number, not {alpha}")


class Handle:
    """An attached intervention; `detach` removes it and only it, in whatever order handles are detached."""

    def __init__(self, lm: MaskedDiffusionLM, intervention: Intervention, undo: Callable[[], None]) -> None:
        self._lm, self._intervention, self._undo = lm, intervention, undo
        self._live = True
        lm.attached.append(intervention)

    def detach(self) -> None:
        """Undo the attachment.

        Raises:
            RemaskError: it is not attached any more.
        """
        if not self._live:
            raise RemaskError(f"this {self._intervention.kind} is not attached to {self._lm.name} any more")
        self._live = False
        self._undo()
        self._lm.attached = [other for other in self._lm.attached if other is not self._intervention]


class Intervention(ABC):
    """Base class of everything that can be attached to a model."""

    kind: str = "intervention"

    @abstractmethod
    def _install(self, lm: MaskedDiffusionLM) -> Callable[[], None]:
        """Change the model; return the function that undoes exactly that."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Preset, site, strengths and size, as JSON; recorded with every number."""

    def attach(self, lm: MaskedDiffusionLM) -> Handle:
        """Attach to `lm` until `detach`.

        Raises:
            RemaskError: already attached to this model.
        """
        if any(other is self for other in lm.attached):
            raise RemaskError(f"this {self.kind} is already attached to {lm.name}; detach it first")
        return Handle(lm, self, self._install(lm))

    @contextlib.contextmanager
    def attached(self, lm: MaskedDiffusionLM) -> Iterator[MaskedDiffusionLM]:
        """`with intervention.attached(lm):` attaches, and detaches on the way out."""
        handle = self.attach(lm)
        try:
            yield lm
        finally:
            handle.detach()

    def _tensors(self) -> Sequence[Tensor]:
        """The numbers that act; part of the fingerprint."""
        return ()

    def fingerprint(self) -> str:
        """16 hex digits over what the intervention does: its description and every number that acts."""
        data = [hashlib.blake2b(t.detach().cpu().contiguous().numpy().tobytes()).hexdigest() for t in self._tensors()]
        return digest(self.kind, self.describe(), *data)

    def save(self, path: str | Path) -> None:
        """Write to a file, where the kind has one.

        Raises:
            RemaskError: this kind has nothing to save.
        """
        raise RemaskError(f"{self.kind} has no file form")


class NoEdit(Intervention):
    """The unchanged model, as an intervention."""

    kind = "none"

    def _install(self, lm: MaskedDiffusionLM) -> Callable[[], None]:
        return lambda: None

    def describe(self) -> dict[str, Any]:
        """Nothing to say."""
        return {"preset": "none"}


def add_shift(lm: MaskedDiffusionLM, site: Site, shift: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Hook `site` so that its output h [B, L, d] becomes h + shift(h), computed in fp32; returns the undo function.

    A site limited to steps acts only while the sampler is at one of them.
    """
    steps = None if site.steps is None else frozenset(site.steps)

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if steps is not None and lm.clock.step not in steps:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        with torch.autocast(hidden.device.type, enabled=False):  # the shift is computed in fp32 whatever runs around it
            wide = hidden if hidden.dtype == torch.float64 else hidden.float()
            edited = (wide + shift(wide)).to(hidden.dtype)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    return lm.site_module(site).register_forward_hook(hook).remove
