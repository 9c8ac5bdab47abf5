"""Pull the predictions for forget rows towards ones that do not know the prompt (MDU), or anything (ME)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ...errors import RemaskError
from .base import Loss, Options, Quantities, needed
from .divergence import Direction, divergence


class MeOptions(Options):
    """Options of `me`."""

    exclude_special: tuple[int, ...] = Field(default=(), description="token ids outside of the distribution, on both sides")


class MduOptions(MeOptions):
    """Options of `mdu`; the paper's are tau 0, 0.25, 0.5, 0.75, 1, `forward`, frozen anchor, masked prompt."""

    tau: float = Field(
        default=0.25,
        ge=0,
        description="inverse temperature of the anchor: 0 = uniform, which is `me`; 0.25 is the largest of the paper's values "
        "at which both the paper and an independent run of it forget",
    )
    eta: float = Field(default=0.0, ge=0, description="the target leaves the prediction by that much: z_u - eta (z_c - z_u)")
    direction: Direction = Field(default="forward", description="KL(policy || target), the reverse, or Jensen-Shannon")
    mean: Literal["row", "token"] = Field(
        default="row",
        description="over positions of a state, states and rows in turn (the paper's formula), or over all positions of a "
        "batch at once (its code), where longer answers weigh more",
    )
    anchor: Literal["frozen", "current", "ema", "never-trained"] = Field(
        default="frozen", description="whose prediction: start model, model in training, its moving average, reference model"
    )
    ema: float = Field(default=0.99, ge=0, lt=1, description="decay a step of the anchor `ema`")
    prompt: Literal["mask", "attention", "keep"] = Field(
        default="mask", description="how the anchor loses the prompt; keep leaves it, for a never-trained anchor"
    )
    states: Literal["drawn", "generated"] = Field(
        default="drawn", description="visible response tokens are the row's, or those the current model writes"
    )
    rollout_steps: int = Field(default=16, gt=0, description="denoising steps of generated states (the release: 16)")


def mdu(quantities: Quantities, options: MduOptions) -> Loss:
    """KL(p_c || p*) at every hidden position, p* = softmax(tau z_u) with z_u the anchor's logits; no weight 1 / t.

    Equal to log V - H(p_c) at tau = 0; unaffected by a constant added to z_u; 0 where policy and anchor agree at tau = 1.
    """
    logits = _without(quantities.logits, options.exclude_special)
    with torch.no_grad():
        target = _target(needed(quantities.anchor, "anchor"), quantities.logits, options)
    values = divergence(logits, target, options.direction)
    parts = {"divergence": quantities.per_token(values.detach())}
    if options.mean == "row":
        return Loss(quantities.per_token(values), parts)
    rows = values.new_zeros(len(quantities.length)).index_add(0, quantities.row[quantities.state], values)
    return Loss(rows * len(rows) / len(values), parts)


def me(quantities: Quantities, options: MeOptions) -> Loss:
    """Maximum entropy: log V - H(p) = KL(p || uniform) at every hidden position, V the ids that are not excluded."""
    logits = _without(quantities.logits, options.exclude_special)
    with torch.no_grad():
        uniform = torch.zeros_like(logits).masked_fill_(logits.isneginf(), -torch.inf).log_softmax(dim=-1)
    rows = quantities.per_token(divergence(logits, uniform, "forward"))
    return Loss(rows, {"divergence": rows.detach()})


def _target(anchor: Tensor, policy: Tensor, options: MduOptions) -> Tensor:
    """Log p*, [n, V]; ids that the anchor excludes stay excluded, at tau = 0 as well."""
    wide = anchor.to(policy.dtype)
    tempered = (wide + options.eta * (wide - policy)) * options.tau if options.eta else wide * options.tau
    # The kernel of the policy's own log-softmax: equal logits give exactly 0.
    return _without(tempered.masked_fill_(anchor.isneginf(), -torch.inf), options.exclude_special).log_softmax(dim=-1)


def _without(logits: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Logits with -inf at `ids`; the same tensor when there are none."""
    if not ids:
        return logits
    if strange := [id_ for id_ in ids if not 0 <= id_ < logits.shape[1]]:
        raise RemaskError(f"exclude_special: id {strange[0]} is outside the vocabulary of {logits.shape[1]} ids; leave it out")
    return logits.index_fill(1, torch.tensor(ids, device=logits.device), -torch.inf)
