"""Learn something else in the place of the answer: a refusal (IDK) or an altered prediction (UNDIAL, WHP).

The task vector is here too: it learns the answer itself, and the trainer subtracts what was learned.

Altered predictions are fitted by KL(target || policy): the cross-entropy with the target less the target's own entropy, which
no weight changes, so that 0 means that the target is reached.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from .base import Loss, Options, Quantities, needed
from .divergence import divergence


class UndialOptions(Options):
    """Options of `undial`."""

    beta: float = Field(default=10.0, ge=0, description="what the hidden token's logit loses (Open-Unlearning: 10)")


class WhpOptions(Options):
    """Options of `whp`."""

    alpha: float = Field(default=5.0, ge=0, description="how far logits that reinforcing raised are lowered (the authors: 5)")


class TaskVectorOptions(Options):
    """Options of `task-vector`."""

    alpha: float = Field(default=5.0, gt=0, description="multiple of the change that is subtracted (MUSE's scripts: 5)")


def idk(quantities: Quantities, options: Options) -> Loss:
    """The mask loss of the question with a refusal as its answer (arXiv 2401.06121)."""
    return fit(needed(quantities.preferred, "preferred"))


def undial(quantities: Quantities, options: UndialOptions) -> Loss:
    """KL to softmax(z_ref - beta onehot(hidden token)) (arXiv 2402.10052)."""
    return _distil(quantities, _undial_target(quantities, options.beta))


def whp(quantities: Quantities, options: WhpOptions) -> Loss:
    """KL to softmax(z_ref - alpha relu(z_reinforced - z_ref)) (arXiv 2310.02238); `anchor` holds the reinforced logits."""
    return _distil(quantities, _whp_target(quantities, options.alpha))


def task_vector(quantities: Quantities, options: TaskVectorOptions) -> Loss:
    """The mask loss itself: the change that it makes is subtracted, `alpha` times (arXiv 2212.04089)."""
    return fit(quantities)


def fit(quantities: Quantities) -> Loss:
    """The mask loss: each row's bound in nats a token."""
    rows = quantities.per_token(quantities.cross_entropy())
    return Loss(rows, {"nats": rows.detach()})


@torch.no_grad()
def _undial_target(quantities: Quantities, beta: float) -> Tensor:
    lowered = needed(quantities.reference, "reference").to(quantities.logits.dtype, copy=True)
    lowered[torch.arange(len(lowered)), quantities.target] -= beta
    return lowered.log_softmax(dim=-1)


@torch.no_grad()
def _whp_target(quantities: Quantities, alpha: float) -> Tensor:
    reference = needed(quantities.reference, "reference").to(quantities.logits.dtype)
    raised = needed(quantities.anchor, "reinforced").to(reference.dtype) - reference
    raised.nan_to_num_(nan=0.0).relu_()  # -inf on both sides raises nothing
    return raised.mul_(-alpha).add_(reference).log_softmax(dim=-1)


def _distil(quantities: Quantities, log_target: Tensor) -> Loss:
    rows = quantities.per_token(divergence(quantities.logits, log_target, "reverse"))
    return Loss(rows, {"divergence": rows.detach()})
