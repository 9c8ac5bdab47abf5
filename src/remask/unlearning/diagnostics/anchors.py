"""Policy against anchor at masked positions: the numbers that every diagnostic is made of.

Shapes: B canvases, L positions, n masked positions of all canvases in row-major order, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ...backbones.model import Encoded, MaskedDiffusionLM
from ...diffusion.likelihood import target_logprobs
from ...errors import RemaskError
from ..objectives.divergence import divergence

Anchor: TypeAlias = MaskedDiffusionLM | Callable[[Tensor, Tensor], Tensor] | None
"""Who predicts with the prompt masked.

A model; or a function (ids [B, L], positions [B, L] bool) -> position-aligned logits [n, V], for the same weights with
something switched off (adapters during training); or None: the policy's own model as it stands, with whatever is attached.
"""

POSITIONS = 512  # compared at once: some six fp32 copies of so many rows of logits, 1.5 GB at V = 126k


def compare(
    lm: MaskedDiffusionLM, anchor: Anchor, canvas: Tensor, masked: Tensor, prompt: Tensor, gold: Tensor, tau: float
) -> Tensor:
    """Policy and anchor at the masked positions of a batch, fp32 [n, 4]: one forward each.

    The columns are KL(p_c || p*) with p* = softmax(tau z_u), log p_c(gold), log p_u(gold) under the plain anchor
    p_u = softmax(z_u), and the entropy of p_c; all in nats. At tau = 0 p* is uniform and the KL is log V - H(p_c).

    Args:
        canvas: [B, L] ids, already masked at `masked` [B, L] bool.
        prompt: [B, L] bool, the positions that the anchor does not see.
        gold: [n] ids.
    """
    logits = lm.logits(canvas, positions=masked)
    blind = _anchor_logits(lm, anchor, canvas.masked_fill(prompt, lm.spec.mask_id), masked).to(logits.device)
    parts = (x.split(POSITIONS) for x in (logits, blind, gold.to(logits.device)))
    return torch.cat([_readings(ours, theirs, ids, tau) for ours, theirs, ids in zip(*parts, strict=True)])


def _anchor_logits(lm: MaskedDiffusionLM, anchor: Anchor, canvas: Tensor, masked: Tensor) -> Tensor:
    if anchor is None or isinstance(anchor, MaskedDiffusionLM):
        other = lm if anchor is None else anchor
        return other.logits(canvas.to(other.device), positions=masked.to(other.device))
    return anchor(canvas, masked)


def _readings(logits: Tensor, blind: Tensor, gold: Tensor, tau: float) -> Tensor:
    """[n, 4], see `compare`."""
    logits, blind = logits.float(), blind.float()
    kl = divergence(logits, (tau * blind).log_softmax(dim=-1), "forward")
    policy = logits.log_softmax(dim=-1)
    entropy = -(policy.exp() * policy).nan_to_num(0.0).sum(dim=-1)
    return torch.stack([kl, target_logprobs(logits, gold), target_logprobs(blind, gold), entropy], dim=1)


def check(lm: MaskedDiffusionLM, anchor: Anchor, rows: Sequence[Encoded], tau: float) -> None:
    """Refuse what cannot be measured.

    Raises:
        RemaskError: no rows, an id twice, an empty answer, one that starts at position 0 of a family with shifted logits, an
            anchor of another vocabulary or mask token, or a tau that is negative or not finite.
    """
    if not rows:
        raise RemaskError("nothing to diagnose: no rows")
    if not (math.isfinite(tau) and tau >= 0):
        raise RemaskError(f"tau {tau} must be a finite number of at least 0; 1 is the plain anchor")
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise RemaskError(f"row {row.id!r} is given twice; ids must be unique")
        if not row.answer_ids:
            raise RemaskError(f"row {row.id!r} has no answer tokens; give it an answer")
        if not row.prompt_ids and lm.spec.shift:
            raise RemaskError(
                f"row {row.id!r} has no prompt, and {lm.name} never predicts position 0; start it with a BOS token"
            )
        seen.add(row.id)
    if isinstance(anchor, MaskedDiffusionLM):
        kinds = [(one.embedding.num_embeddings, one.spec.mask_id) for one in (lm, anchor)]
        if kinds[0] != kinds[1]:
            raise RemaskError(
                f"the anchor {anchor.name} and {lm.name} differ in vocabulary or mask token; give one of the same backbone"
            )
