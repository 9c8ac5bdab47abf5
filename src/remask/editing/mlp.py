"""MLP output matrices as key-value stores: W [d, m] maps a key k (the MLP's inner activation) to the value that it writes.

ROME, MEMIT and AlphaEdit read keys at the last token of a subject and change W by a matrix of low rank.

Shapes: d hidden size, m MLP size, n facts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..backbones.model import MaskedDiffusionLM
from ..backbones.weight_edit import Change, LowRank, WeightEdit
from ..errors import RemaskError
from ..facts import Fact, check_unique_ids


def require_editable(lm: MaskedDiffusionLM, facts: Sequence[Fact], layers: Sequence[int], method: str) -> None:
    """Refuse what cannot be edited before anything is computed.

    Raises:
        RemaskError: no facts or an id twice, something attached to the model, a layer twice or outside of the model, a
            mixture of experts, or quantised weights.
    """
    if not facts:
        raise RemaskError(f"{method} needs at least one fact; the file holds none")
    check_unique_ids(facts, method)
    if lm.attached:
        raise RemaskError(f"{lm.name} has a {lm.attached[0].kind} attached; detach it before {method}")
    if not layers or list(layers) != sorted(set(layers)):
        raise RemaskError(f"{method} needs layers in increasing order, each once, not {list(layers)}")
    for layer in layers:
        output_matrix(lm, layer)


def output_matrix(lm: MaskedDiffusionLM, layer: int) -> tuple[str, bool]:
    """Name of the MLP's output matrix at `layer` in `named_parameters`, and whether it is stored as [m, d] (GPT-2).

    Raises:
        RemaskError: layer outside of the model, a mixture of experts, or quantised weights.
    """
    module: Any = lm.mlp_key_module(layer)
    name = next((name for name, parameter in lm.model.named_parameters() if parameter is module.weight), None)
    if name is None or not module.weight.is_floating_point():
        raise RemaskError(f"the MLP of layer {layer} of {lm.name} is quantised; load the model without quantisation")
    return name, isinstance(module, Conv1D)


@contextlib.contextmanager
def mlp_keys(lm: MaskedDiffusionLM, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Record the MLP keys [B, L, m] of `layers` during the forwards inside the block (the last forward wins)."""
    store: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            store[layer] = inputs[0]

        return hook

    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.callback(lm.mlp_key_module(layer).register_forward_pre_hook(keep(layer)).remove)
        yield store


@dataclass
class Changes:
    """The changes of MLP output matrices that an edit consists of, as they grow."""

    lm: MaskedDiffusionLM
    preset: str
    factors: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._model = self.lm.fingerprint()

    def add(self, layer: int, left: Tensor, right: Tensor) -> None:
        """W <- W + left [d, r] @ right [r, m] at `layer`."""
        self.factors.setdefault(layer, []).append((left.cpu(), right.cpu()))

    def edit(self, **details: Any) -> WeightEdit:
        """All changes so far, each in its smaller form: as factors, or as a matrix where the rank is high."""
        changes: dict[str, Change] = {}
        for layer, factors in self.factors.items():
            name, transposed = output_matrix(self.lm, layer)
            left, right = (torch.cat(parts, dim=1 - i) for i, parts in enumerate(zip(*factors, strict=True)))
            change = LowRank(right.T, left.T) if transposed else LowRank(left, right)
            changes[name] = change.dense() if left.numel() + right.numel() > change.shape.numel() else change
        return WeightEdit(changes, self._model, self.preset, details=details)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the changes so far within the block."""
        with self.edit().attached(self.lm) if self.factors else contextlib.nullcontext():
            yield
