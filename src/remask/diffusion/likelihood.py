"""Answer log-probability of a masked diffusion model: the evidence lower bound over a shared mask bank.

For an answer a of L tokens,  log p(a|q) >= E_{l ~ U{1..L}} E_{|M| = l} [ (L / l) sum_{i in M} log p(a_i | q, a without M) ].
Counts are exact and stratified, masks come from a `MaskBank`, and the standard error from its independent replicates. No end
token belongs to the answer, and none is left visible behind it. Values are sums over tokens, in nats.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..backbones.model import Encoded, MaskedDiffusionLM
from ..errors import RemaskError
from .canvas import canvas_batches
from .masks import MaskBank

EXACT_LIMIT = 12  # 2^12 - 1 canvases


@dataclass(frozen=True)
class Likelihood:
    """One row's score.

    Attributes:
        id: row id.
        tokens: answer tokens L.
        logprob: estimate of the bound, nats, summed over tokens.
        stderr: Monte-Carlo standard error from replicates; 0 for exact values, NaN with a single replicate.
        replicates: the estimate of each replicate.
    """

    id: str
    tokens: int
    logprob: float
    stderr: float
    replicates: tuple[float, ...]


@torch.inference_mode()
def elbo(
    lm: MaskedDiffusionLM,
    rows: Sequence[Encoded],
    bank: MaskBank,
    *,
    hide_prompt: bool = False,
    keys: Sequence[str] | None = None,
) -> list[Likelihood]:
    """Stratified exact-count estimate of the bound for every row, under the shared bank.

    Args:
        hide_prompt: mask every prompt token: the unconditional ("anchor") level.
        keys: bank keys, row ids by default; give equal keys to rows that must share their randomness.
    """
    names = list(keys) if keys is not None else [row.id for row in rows]
    masks = [bank.masks(name, len(row.answer_ids)) for name, row in zip(names, rows, strict=True)]
    sums = _masked_logprobs(lm, rows, masks, hide_prompt)
    results = []
    for row, mask, value in zip(rows, masks, sums, strict=True):
        length = len(row.answer_ids)
        weighted = value * length / mask.sum(axis=1)
        means = weighted.reshape(bank.replicates, bank.draws).mean(axis=1)
        stderr = float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.nan
        results.append(Likelihood(row.id, length, float(means.mean()), stderr, tuple(map(float, means))))
    return results


@torch.inference_mode()
def elbo_exact(lm: MaskedDiffusionLM, rows: Sequence[Encoded], *, hide_prompt: bool = False) -> list[Likelihood]:
    """The bound itself, by enumerating all 2^L - 1 masks; for answers of at most 12 tokens.

    Equals the chain-rule log-likelihood averaged over all L! orders.
    """
    for row in rows:
        if len(row.answer_ids) > EXACT_LIMIT:
            raise RemaskError(
                f"fact {row.id!r}: {len(row.answer_ids)} answer tokens, elbo_exact takes at most {EXACT_LIMIT}; use elbo"
            )
    masks = [np.array(list(itertools.product([False, True], repeat=len(row.answer_ids)))[1:]) for row in rows]
    sums = _masked_logprobs(lm, rows, masks, hide_prompt)
    results = []
    for row, mask, value in zip(rows, masks, sums, strict=True):
        length = len(row.answer_ids)
        counts = mask.sum(axis=1)
        weight = np.array([1.0 / (count * math.comb(length, int(count))) for count in counts])
        total = float((weight * value).sum())
        results.append(Likelihood(row.id, length, total, 0.0, (total,)))
    return results


def _masked_logprobs(
    lm: MaskedDiffusionLM, rows: Sequence[Encoded], masks: Sequence[np.ndarray], hide_prompt: bool
) -> list[np.ndarray]:
    """For each row, the summed log-probability of the masked tokens under each of its masks: fp64 [draws]."""
    results = [np.zeros(len(mask)) for mask in masks]
    for batch in canvas_batches(lm, rows, masks):
        hidden = batch.masked | batch.prompt if hide_prompt else batch.masked
        canvas = batch.clean.masked_fill(hidden, lm.spec.mask_id)
        picked = target_logprobs(lm.logits(canvas, positions=batch.masked), batch.clean[batch.masked])
        owner = batch.masked.nonzero()[:, 0]
        sums = torch.zeros(len(canvas), dtype=torch.float64, device=lm.device).index_add_(0, owner, picked.double())
        for row, draws, value in zip(batch.rows, batch.draws, sums.tolist(), strict=True):
            results[row][draws] = value
    return results


def target_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log softmax of [n, V] logits at [n] target ids, fp32 or wider."""
    return logits.float().log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)
