"""Edited weights as an intervention: what a trained method, ROME, MEMIT and AlphaEdit return.

W <- W + alpha * change for some parameters of one model. The sum is taken in fp32 and rounded once to the parameter's dtype;
detaching puts back the very tensors that were there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..editfile import read_edit, rebuilt, write_edit
from ..errors import RemaskError
from ..tensorfile import canonical_json
from .intervention import Intervention, require_finite
from .model import MaskedDiffusionLM


@dataclass(frozen=True)
class LowRank:
    """A change of rank r in the parameter's own layout: left [..., out, r] @ right [..., r, in], experts leading.

    Raises:
        RemaskError: shapes that do not multiply.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        left, right = self.left.shape, self.right.shape
        if len(left) < 2 or left[:-2] != right[:-2] or left[-1] != right[-2]:
            raise RemaskError(f"a low-rank change cannot have factors {list(left)} and {list(right)}; build it again")

    @property
    def shape(self) -> torch.Size:
        """Shape of the parameter."""
        return torch.Size([*self.left.shape[:-1], self.right.shape[-1]])

    def dense(self) -> Tensor:
        """The product."""
        return self.left @ self.right


Change = LowRank | Tensor


@dataclass
class WeightEdit(Intervention):
    """W + alpha * change for every parameter in `changes`.

    Args:
        changes: fp32, by name in `lm.model.named_parameters()`, each in its parameter's layout; other dtypes are converted.
        model: fingerprint of the model that it was built on.
        preset: name of the method.
        details: anything that JSON holds: options, training, `cost`.

    Raises:
        RemaskError: no changes, or numbers that are not finite.
    """

    changes: Mapping[str, Change]
    model: str
    preset: str
    alpha: float = 1.0
    details: dict[str, Any] = field(default_factory=dict)
    kind = "weight edit"

    def __post_init__(self) -> None:
        if not self.changes:
            raise RemaskError(f"this {self.preset} edit changes no parameter; give it changes")
        require_finite(self.alpha)
        self.changes = {name: _wide(change) for name, change in self.changes.items()}
        self.details = json.loads(canonical_json(self.details))  # as a file gives it back: part of the fingerprint
        for name, change in self.changes.items():
            if not all(part.isfinite().all() for part in _parts(change)):
                raise RemaskError(f"the change of {name} holds numbers that are not finite; build the {self.preset} edit again")

    def with_alpha(self, alpha: float) -> WeightEdit:
        """The same changes at another strength."""
        return replace(self, alpha=alpha)

    def describe(self) -> dict[str, Any]:
        """Preset, strength, size and details; not what building it cost, so that equal edits have equal fingerprints."""
        ranks = {change.left.shape[-1] for change in self.changes.values() if isinstance(change, LowRank)}
        return {
            "preset": self.preset,
            "alpha": self.alpha,
            "parameters": len(self.changes),
            "numbers": sum(tensor.numel() for tensor in self._tensors()),
            "rank": max(ranks, default=None),
            "model": self.model,
            "details": {key: value for key, value in self.details.items() if key != "cost"},
        }

    def _tensors(self) -> list[Tensor]:
        return [part for name in sorted(self.changes) for part in _parts(self.changes[name])]

    def _install(self, lm: MaskedDiffusionLM) -> Callable[[], None]:
        if other := next((edit for edit in lm.attached if isinstance(edit, WeightEdit)), None):
            raise RemaskError(f"{lm.name} has the weights of a {other.preset} edit already; detach it first")
        if self.model != (found := lm.fingerprint()):
            raise RemaskError(
                f"this {self.kind} was built on model {self.model} and does not fit {lm.name} ({found}); build it again"
            )
        parameters = dict(lm.model.named_parameters())
        for name, change in self.changes.items():
            self._check(parameters, name, change)
        if self.alpha == 0:
            return lambda: None
        before = {name: parameters[name].data for name in self.changes}
        with torch.inference_mode(False), torch.no_grad():
            after = {name: self._edited(before[name], change) for name, change in self.changes.items()}
        _swap(parameters, after)
        return lambda: _swap(parameters, before)

    def _check(self, parameters: Mapping[str, nn.Parameter], name: str, change: Change) -> None:
        if name not in parameters:
            raise RemaskError(f"this {self.kind} changes {name!r}, which the model does not have; build it again")
        parameter = parameters[name]
        if not parameter.is_floating_point():
            raise RemaskError(
                f"{name} is quantised ({parameter.dtype}); load the model without quantisation to edit its weights"
            )
        if parameter.shape != change.shape:
            raise RemaskError(
                f"the change of {name} is {list(change.shape)} and the parameter {list(parameter.shape)}; build it again"
            )

    def _edited(self, weight: Tensor, change: Change) -> Tensor:
        """The sum in fp32 (fp64 for fp64 weights), rounded once."""
        wide = weight if weight.dtype == torch.float64 else weight.float()
        moved = LowRank(change.left.to(wide), change.right.to(wide)).dense() if isinstance(change, LowRank) else change.to(wide)
        return torch.add(wide, moved, alpha=self.alpha).to(weight.dtype)

    def save(self, path: str | Path) -> None:
        """Write an edit file, atomically."""
        header = {"preset": self.preset, "alpha": self.alpha, "model": self.model, "details": self.details}
        tensors: dict[str, Tensor] = {}
        for name, change in self.changes.items():
            places = ("left", "right") if isinstance(change, LowRank) else ("dense",)
            tensors |= {f"{place}:{name}": part for place, part in zip(places, _parts(change), strict=True)}
        write_edit(path, self.kind, header, tensors)

    @classmethod
    def load(cls, path: str | Path) -> WeightEdit:
        """Read a file of edited weights.

        Raises:
            RemaskError: missing, unreadable or damaged file, other format version, another kind of edit.
        """
        header, tensors = read_edit(path, cls.kind)
        changes: dict[str, Change] = {}
        with rebuilt(path):
            for key, tensor in tensors.items():
                place, name = key.split(":", 1)
                if place == "dense":
                    changes[name] = tensor
                elif place == "left":
                    changes[name] = LowRank(tensor, tensors[f"right:{name}"])
            return cls(changes, header["model"], header["preset"], float(header["alpha"]), dict(header["details"]))


def opposite(change: Change) -> Change:
    """Minus the change."""
    return LowRank(-change.left, change.right) if isinstance(change, LowRank) else -change


def _parts(change: Change) -> tuple[Tensor, ...]:
    return (change.left, change.right) if isinstance(change, LowRank) else (change,)


def _wide(change: Change) -> Change:
    """In fp32 and outside of any graph."""
    if isinstance(change, LowRank):
        return LowRank(change.left.detach().float(), change.right.detach().float())
    return change.detach().float()


def _swap(parameters: Mapping[str, nn.Parameter], data: Mapping[str, Tensor]) -> None:
    for name, tensor in data.items():
        parameters[name].data = tensor
