"""What a locate-then-edit method writes: keys and optimised values at the last token of a subject.

The value is v* = v + delta, v what the site puts out at the last subject token. Adam finds delta on the frozen model, against

    NLL(new object) + kl_factor KL(edited || unedited | "{subject} is a [MASK]") + weight_decay |delta|^2 / |h|^2

(ROME, arXiv 2202.05262, equation 4) with |delta| <= clamp |h|, h the block's output there. What differs in a masked diffusion
model:

- NLL is the masked cross-entropy a token of the object, over partial states: a decoder that has revealed some of the object
  reads it from states that a fully masked canvas says nothing about (arXiv 2606.03924). `full-mask` is the naive transfer.
- KL is read at the mask slot; at the subject, a visible token, logits mean nothing.

Shapes: n facts, d hidden size, m MLP size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ..backbones.intervention import add_shift
from ..backbones.model import MaskedDiffusionLM, Site
from ..diffusion.likelihood import target_logprobs
from ..errors import RemaskError
from ..facts import Fact
from .lookups import LookupBatch, LookupConfig, Lookups, key_states


class ValueConfig(LookupConfig):
    """How values are optimised, with the peers' settings in brackets."""

    # delta is added to the residual stream, wherever the site is, so everything is in units of its norm |h|. The norm grows
    # with depth and differs a hundredfold between models; an MLP's output, ROME's unit, is a small part of it (`tiny`: 4 %).
    steps: int = Field(default=25, ge=1, description="Adam steps of a value [20-25]")
    learning_rate: float = Field(default=0.5, gt=0, description="of Adam, in units of |h| / sqrt(d) [0.5 or 0.1, absolute]")
    weight_decay: float = Field(default=1e-3, ge=0, description="of |delta|^2 / |h|^2 [0.5 of |delta| / |v|^2, EasyEdit 1e-3]")
    clamp: float = Field(default=1.0, gt=0, description="largest |delta| / |h| [ROME 4 |v|, MEMIT and AlphaEdit 0.75]")
    kl_factor: float = Field(default=0.0625, ge=0, description="weight of the KL at '{subject} is a [MASK]' [0.0625]")
    stop: float = Field(default=0.05, ge=0, description="nats a token at which a value is done [0.05]")


@dataclass(frozen=True)
class Values:
    """Optimised changes of values.

    Attributes:
        delta: [n, d], fp32.
        before, after: nats a token of each new object over the states of `key_states`, without and with delta, [n] each.
        relative: |delta| / |h|, [n].
        steps: Adam steps of each fact, [n].
    """

    delta: Tensor
    before: list[float]
    after: list[float]
    relative: list[float]
    steps: list[int]

    def report(self, facts: Sequence[Fact]) -> dict[str, Any]:
        """Plain data for each fact."""
        columns = zip(facts, self.before, self.after, self.relative, self.steps, strict=True)
        return {
            fact.id: {"nats_before": before, "nats_after": after, "relative_norm": relative, "steps": steps}
            for fact, before, after, relative, steps in columns
        }


def optimise_values(
    lm: MaskedDiffusionLM, facts: Sequence[Fact], site: Site, norm: Tensor, lookups: Lookups, config: ValueConfig
) -> Values:
    """The changes at the last subject token of `site`, for all facts at once; each fact's is what it would be alone.

    Args:
        norm: |h| [n], of the block's output there.

    Raises:
        RemaskError: a loss that is not finite; names the fact.
    """
    norm = norm.float()
    essence, fixed = Lookups.essence(lm, facts), key_states(lookups, config)
    unit = torch.zeros(len(facts), lm.hidden_size, device=lm.device)  # delta sqrt(d) / |h|, so that one rate serves all facts
    to_delta = norm[:, None] / lm.hidden_size**0.5
    unedited = _essence_logprobs(lm, essence) if config.kl_factor else None
    before = _object_loss(lm, site, lookups, fixed, unit)[0]
    adam = torch.optim.Adam([unit], lr=config.learning_rate)
    done, steps = [False] * len(facts), [0] * len(facts)
    for step in range(config.steps):
        active = lookups.without(done)
        nats, gradient = _object_loss(lm, site, active, active.states(config, step), unit * to_delta)
        _require_finite(facts, nats, config)
        done = [over or value < config.stop for over, value in zip(done, nats, strict=True)]
        if all(done):
            break
        if unedited is not None:
            gradient += config.kl_factor * _essence_gradient(lm, site, essence.without(done), unedited, unit * to_delta)
        gradient = gradient * to_delta + 2 * config.weight_decay * unit / lm.hidden_size
        _descend(adam, unit, gradient, torch.tensor(done, device=lm.device), config.clamp * lm.hidden_size**0.5)
        steps = [taken + (not over) for taken, over in zip(steps, done, strict=True)]
    after = _object_loss(lm, site, lookups, fixed, unit * to_delta)[0]
    relative = (unit.norm(dim=1) / lm.hidden_size**0.5).tolist()
    return Values(unit * to_delta, before, after, relative, steps)


def _descend(adam: torch.optim.Adam, unit: Tensor, gradient: Tensor, done: Tensor, limit: float) -> None:
    """One step for the facts that are not done, then the projection onto |unit| <= limit."""
    before = unit.clone()
    unit.grad = gradient
    adam.step()
    unit *= (limit / unit.norm(dim=1)).clamp(max=1.0)[:, None]
    unit[done] = before[done]


def _object_loss(
    lm: MaskedDiffusionLM, site: Site, lookups: Lookups, states: Sequence[np.ndarray], delta: Tensor
) -> tuple[list[float], Tensor]:
    """Mean cross-entropy of a hidden token of each new object, nats [n], and the gradient of their sum, [n, d]."""

    def loss(batch: LookupBatch, logits: Tensor) -> Tensor:
        masked = batch.canvas.masked
        owner = masked.nonzero()[:, 0]
        each = -target_logprobs(logits, batch.canvas.clean[masked]) / masked.sum(dim=1)[owner]
        return each.new_zeros(len(masked)).index_add(0, owner, each)

    return _differentiate(lm, site, lookups, states, delta, loss)


def _essence_gradient(lm: MaskedDiffusionLM, site: Site, essence: Lookups, unedited: Tensor, delta: Tensor) -> Tensor:
    """Gradient [n, d] of KL(edited || unedited) at the mask slot, summed over facts."""

    def loss(batch: LookupBatch, logits: Tensor) -> Tensor:
        edited = logits.float().log_softmax(-1)
        return (edited.exp() * (edited - unedited[batch.facts])).sum(dim=-1)

    return _differentiate(lm, site, essence, essence.hidden(), delta, loss)[1]


@torch.no_grad()
def _essence_logprobs(lm: MaskedDiffusionLM, essence: Lookups) -> Tensor:
    """Log-probabilities [n, V] at the mask slot of the model as it is."""
    found: dict[int, Tensor] = {}
    for batch in essence.batches(lm, essence.hidden()):
        logits = lm.logits(batch.ids, positions=batch.canvas.masked).float()
        found |= dict(zip(batch.facts.tolist(), logits.log_softmax(-1), strict=True))
    return torch.stack([found[fact] for fact in range(essence.facts)])


def _differentiate(
    lm: MaskedDiffusionLM,
    site: Site,
    lookups: Lookups,
    states: Sequence[np.ndarray],
    delta: Tensor,
    loss: Callable[[LookupBatch, Tensor], Tensor],
) -> tuple[list[float], Tensor]:
    """Mean loss of each fact [n], and the gradient of their sum with respect to delta [n, d]; weights get no gradient.

    Args:
        loss: of each canvas of a batch, [B], given the logits of its masked positions.
    """
    totals, gradient = torch.zeros(lookups.facts, dtype=torch.float64, device=lm.device), torch.zeros_like(delta)
    delta = delta.detach().requires_grad_()
    for batch in lookups.batches(lm, states):
        with torch.enable_grad(), _added(lm, site, batch.last, delta[batch.facts]):
            each = loss(batch, lm.logits(batch.ids, positions=batch.canvas.masked)) * batch.share.float()
        gradient += torch.autograd.grad(each.sum(), delta)[0]
        totals.index_add_(0, batch.facts, each.detach().double())
    return totals.tolist(), gradient


@contextlib.contextmanager
def _added(lm: MaskedDiffusionLM, site: Site, last: Tensor, rows: Tensor) -> Iterator[None]:
    """Within the block, `rows` [B, d] are added to the output of `site` at the positions `last` [B]."""

    def shift(hidden: Tensor) -> Tensor:
        spread = torch.zeros_like(hidden)
        return spread.index_put((torch.arange(len(last), device=last.device), last), rows.to(hidden.dtype))

    undo = add_shift(lm, site, shift)
    try:
        yield
    finally:
        undo()


def _require_finite(facts: Sequence[Fact], nats: Sequence[float], config: ValueConfig) -> None:
    for fact, value in zip(facts, nats, strict=True):
        if not np.isfinite(value):
            raise RemaskError(
                f"fact {fact.id!r}: the loss of its value is not finite; lower learning_rate ({config.learning_rate}) or clamp"
            )
