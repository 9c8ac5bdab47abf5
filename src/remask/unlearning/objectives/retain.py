"""Retain terms: what holds the rows that must stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .base import Loss, Need, Quantities, needed
from .distillation import fit
from .divergence import divergence
from .representation import hold


@dataclass(frozen=True)
class Retain:
    """A term on retain rows.

    Attributes:
        loss: of a batch of retain rows; minimised.
        needs: what `Quantities` must hold beside the policy; `hidden` and `reference` together mean `hidden_reference` too.
        summary: one line.
    """

    loss: Callable[[Quantities], Loss]
    needs: frozenset[Need]
    summary: str


def kl(quantities: Quantities) -> Loss:
    """KL(reference || policy) at the hidden positions, under the same states."""
    with torch.no_grad():
        target = needed(quantities.reference, "reference").log_softmax(dim=-1, dtype=quantities.logits.dtype)
    rows = quantities.per_token(divergence(quantities.logits, target, "reverse"))
    return Loss(rows, {"divergence": rows.detach()})


RETAIN: dict[str, Retain] = {
    "mask-loss": Retain(fit, frozenset(), "the mask loss of the retain rows, nats a token"),
    "kl": Retain(kl, frozenset({"reference"}), "KL(start model || model), nats a token"),
    "hidden": Retain(hold, frozenset({"hidden", "reference"}), "mean square of the change of hidden states (RMU)"),
}
