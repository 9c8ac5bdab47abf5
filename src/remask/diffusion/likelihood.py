"""Log-probability of a text under a masked diffusion model: four estimators, one result type.

For an answer a of L tokens after a prompt q, in nats and summed over tokens, M the masked positions:

- `elbo`: the evidence lower bound  E_{l ~ U{1..L}} E_{|M| = l} [ (L / l) sum_{i in M} log p(a_i | q, a without M) ], with exact
  counts that are stratified (LLaDA's estimator). `elbo_exact` enumerates it; it is the mean of `chain` over all L! orders.
- `bernoulli`: the same bound with every token masked with probability p ~ U(0, 1) and weight 1 / p (Dream's estimator).
- `chain`: sum_k log p(a_{o(k)} | q, a_{o(1)} .. a_{o(k-1)}) along one order o; the exact likelihood of decoding in that order.
- `pll`: sum_i log p(a_i | q, a without i), every token masked alone. No bound: it over-rates names of several tokens.

All four agree on one token. Masks come from a `MaskBank`, and the standard error from its independent replicates. No end token
belongs to the answer, and none is left visible behind it. Rows are batched by exact length, so there is no padding.

Families whose logits are shifted predict position i at position i-1, hence position 0 never: an answer that starts there is
refused. Block-causal families learned with all earlier blocks clean; of these estimators only `chain` forward asks them for
nothing else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..backbones.model import Encoded, MaskedDiffusionLM
from ..errors import RemaskError
from .canvas import TOKEN_BUDGET, canvas_batches
from .masks import MaskBank

EXACT_LIMIT = 12  # 2^12 - 1 canvases

Order = Literal["forward", "backward"]
Part = Literal["answer", "prompt", "all"]


@dataclass(frozen=True)
class Likelihood:
    """One row's score.

    Attributes:
        id: row id.
        tokens: tokens that are scored, L.
        logprob: estimate in nats, summed over tokens.
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
    cfg_scale: float = 0.0,
    keys: Sequence[str] | None = None,
    token_budget: int = TOKEN_BUDGET,
) -> list[Likelihood]:
    """Stratified exact-count estimate of the bound for every row, under the shared bank.

    Args:
        hide_prompt: mask every prompt token: the unconditional ("anchor") level.
        cfg_scale: classifier-free guidance, `u + (cfg_scale + 1) (c - u)` with u the prompt-masked logits (LLaDA's form).
        keys: bank keys, row ids by default; give equal keys to rows that must share their randomness.
        token_budget: tokens a forward.

    Raises:
        RemaskError: an answer starts at position 0 of a family with shifted logits, or is longer than the bank's masks.
    """
    masks = [bank.masks(key, len(row.answer_ids)) for key, row in zip(_keys(rows, keys), rows, strict=True)]
    sums = _masked_logprobs(lm, rows, masks, hide_given=hide_prompt, cfg_scale=cfg_scale, token_budget=token_budget)
    return [
        _replicated(row.id, len(row.answer_ids), value * len(row.answer_ids) / mask.sum(axis=1), bank)
        for row, mask, value in zip(rows, masks, sums, strict=True)
    ]


@torch.inference_mode()
def elbo_exact(
    lm: MaskedDiffusionLM,
    rows: Sequence[Encoded],
    *,
    hide_prompt: bool = False,
    cfg_scale: float = 0.0,
    token_budget: int = TOKEN_BUDGET,
) -> list[Likelihood]:
    """The bound itself, by enumerating all 2^L - 1 masks; for answers of at most 12 tokens.

    Arguments are those of `elbo`.

    Raises:
        RemaskError: a longer answer, or one that starts at position 0 of a family with shifted logits.
    """
    for row in rows:
        if len(row.answer_ids) > EXACT_LIMIT:
            raise RemaskError(
                f"fact {row.id!r}: {len(row.answer_ids)} answer tokens, elbo_exact takes at most {EXACT_LIMIT}; use elbo"
            )
    masks = [np.array(list(itertools.product([False, True], repeat=len(row.answer_ids)))[1:]) for row in rows]
    sums = _masked_logprobs(lm, rows, masks, hide_given=hide_prompt, cfg_scale=cfg_scale, token_budget=token_budget)
    results = []
    for row, mask, value in zip(rows, masks, sums, strict=True):
        length = len(row.answer_ids)
        counts = mask.sum(axis=1)
        weight = np.array([1.0 / (count * math.comb(length, int(count))) for count in counts])
        results.append(_exact(row.id, length, weight * value))
    return results


@torch.inference_mode()
def bernoulli(
    lm: MaskedDiffusionLM,
    rows: Sequence[Encoded],
    bank: MaskBank,
    *,
    part: Part = "answer",
    cfg_scale: float = 0.0,
    keys: Sequence[str] | None = None,
    token_budget: int = TOKEN_BUDGET,
) -> list[Likelihood]:
    """Dream's estimate of the bound (eval.py, `nll_type=mc`): Bernoulli masks of stratified probability p, weights 1 / p.

    Of higher variance than `elbo`. Unlike the original it masks the last token too, so a one-token answer has a score.

    Args:
        part: what is masked and scored, the rest being given: the answer (Dream's `ftb`), the prompt given the answer (`btf`),
            or both (`union`; Dream divides that one by its length). Where the part holds position 0 of a family with shifted
            logits, that token is masked like the others but not scored.
        cfg_scale: as in `elbo`; the unconditional branch masks what is given.
        keys: as in `elbo`.
        token_budget: tokens a forward.

    Raises:
        RemaskError: as `elbo`, or an empty part.
    """
    spans = [_span(lm, row, part) for row in rows]
    drawn = [bank.bernoulli(key, stop - start) for key, (start, stop) in zip(_keys(rows, keys), spans, strict=True)]
    sums = _masked_logprobs(lm, rows, [masks for masks, _ in drawn], part=part, cfg_scale=cfg_scale, token_budget=token_budget)
    return [
        _replicated(row.id, _scored(lm, span), value / shares, bank)
        for row, span, (_, shares), value in zip(rows, spans, drawn, sums, strict=True)
    ]


@torch.inference_mode()
def chain(
    lm: MaskedDiffusionLM,
    rows: Sequence[Encoded],
    *,
    order: Order | Sequence[Sequence[int]] = "forward",
    part: Part = "answer",
    cfg_scale: float = 0.0,
    token_budget: int = TOKEN_BUDGET,
) -> list[Likelihood]:
    """Chain rule along one order: each token given what is given and the tokens before it in the order. L canvases a row.

    Args:
        order: "forward" or "backward" through the part, or for each row a permutation of 0..L-1, first revealed first. Dream's
            `ar_ftb` is forward and `ar_btf` backward.
        part: as in `bernoulli`.
        cfg_scale: as in `bernoulli`.
        token_budget: tokens a forward.

    Raises:
        RemaskError: an order that is no permutation, an empty part, or an answer at position 0 under shifted logits.
    """
    spans = [_span(lm, row, part) for row in rows]
    masks, targets = [], []
    for i, (row, (start, stop)) in enumerate(zip(rows, spans, strict=True)):
        places = np.arange(stop - start)
        taken = {"forward": places, "backward": places[::-1]}.get(order) if isinstance(order, str) else np.asarray(order[i])
        if taken is None or not np.array_equal(np.sort(taken), places):
            shown = repr(order) if isinstance(order, str) else list(order[i])
            raise RemaskError(
                f"row {row.id!r}: order {shown} is not forward, backward or a permutation of 0..{stop - start - 1}"
            )
        masks.append(np.argsort(taken)[None, :] >= places[:, None])
        targets.append(taken)
    sums = _masked_logprobs(lm, rows, masks, targets, part=part, cfg_scale=cfg_scale, token_budget=token_budget)
    return [_exact(row.id, _scored(lm, span), value) for row, span, value in zip(rows, spans, sums, strict=True)]


@torch.inference_mode()
def pll(
    lm: MaskedDiffusionLM, rows: Sequence[Encoded], *, cfg_scale: float = 0.0, token_budget: int = TOKEN_BUDGET
) -> list[Likelihood]:
    """Pseudo-log-likelihood (Salazar et al., 2020): every answer token masked alone. L canvases a row; arguments as in `elbo`.

    Raises:
        RemaskError: an answer starts at position 0 of a family with shifted logits.
    """
    masks = [np.eye(len(row.answer_ids), dtype=bool) for row in rows]
    sums = _masked_logprobs(lm, rows, masks, cfg_scale=cfg_scale, token_budget=token_budget)
    return [_exact(row.id, len(row.answer_ids), value) for row, value in zip(rows, sums, strict=True)]


def target_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log softmax of [n, V] logits at [n] target ids, fp32 or wider."""
    return logits.float().log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)


def _keys(rows: Sequence[Encoded], keys: Sequence[str] | None) -> list[str]:
    return list(keys) if keys is not None else [row.id for row in rows]


def _span(lm: MaskedDiffusionLM, row: Encoded, part: Part) -> tuple[int, int]:
    """The part's span on the canvas (half-open)."""
    start, stop = {"answer": row.answer, "prompt": (0, len(row.prompt_ids)), "all": (0, len(row.ids))}[part]
    if start == stop:
        raise RemaskError(f"row {row.id!r} has no {part} tokens to score")
    if part == "answer" and start == 0 and lm.spec.shift:
        raise RemaskError(f"row {row.id!r} has no prompt, and {lm.name} never predicts position 0; start it with a BOS token")
    return start, stop


def _scored(lm: MaskedDiffusionLM, span: tuple[int, int]) -> int:
    """Tokens of a span that the model predicts."""
    return span[1] - span[0] - int(lm.spec.shift and span[0] == 0)


def _replicated(name: str, tokens: int, weighted: np.ndarray, bank: MaskBank) -> Likelihood:
    """Mean and spread of the bank's replicates; `weighted` holds one estimate a draw, fp64 [replicates * draws]."""
    means = weighted.reshape(bank.replicates, bank.draws).mean(axis=1)
    stderr = float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.nan
    return Likelihood(name, tokens, float(means.mean()), stderr, tuple(map(float, means)))


def _exact(name: str, tokens: int, terms: np.ndarray) -> Likelihood:
    total = float(terms.sum())
    return Likelihood(name, tokens, total, 0.0, (total,))


def _masked_logprobs(
    lm: MaskedDiffusionLM,
    rows: Sequence[Encoded],
    masks: Sequence[np.ndarray],
    targets: Sequence[np.ndarray] | None = None,
    *,
    part: Part = "answer",
    hide_given: bool = False,
    cfg_scale: float = 0.0,
    token_budget: int = TOKEN_BUDGET,
) -> list[np.ndarray]:
    """For each row, the summed log-probability of the scored tokens under each of its masks: fp64 [draws].

    Args:
        masks: bool [draws, part length] for each row.
        targets: for each row the one position of the part that each mask scores, int [draws]; the masks then differ from one
            another. None scores every masked position.
        hide_given: mask everything outside of the part.
    """
    spans = [_span(lm, row, part) for row in rows]
    canvases = [Encoded(row.id, (), row.ids, row.subject) for row in rows]  # a canvas is all answer: any of it can be masked
    wide = [
        np.pad(mask, ((0, 0), (start, len(row.ids) - stop)))
        for row, (start, stop), mask in zip(rows, spans, masks, strict=True)
    ]
    results = [np.zeros(len(mask)) for mask in masks]
    for batch in canvas_batches(lm, canvases, wide, token_budget):
        outside = np.ones(tuple(batch.clean.shape), dtype=bool)
        for i, row in enumerate(batch.rows):
            outside[i, slice(*spans[row])] = False
        given = torch.from_numpy(outside).to(lm.device)
        scored = batch.masked.clone()
        if targets is not None:
            places = [spans[row][0] + targets[row][draws[0]] for row, draws in zip(batch.rows, batch.draws, strict=True)]
            scored.zero_()[range(len(places)), places] = True
        if lm.spec.shift:
            scored[:, 0] = False
        canvas = batch.clean.masked_fill(batch.masked | given if hide_given else batch.masked, lm.spec.mask_id)
        logits = lm.logits(canvas, positions=scored)
        if cfg_scale:
            blind = lm.logits(canvas.masked_fill(given, lm.spec.mask_id), positions=scored).float()
            logits = blind + (cfg_scale + 1) * (logits.float() - blind)
        picked = target_logprobs(logits, batch.clean[scored])
        owner = scored.nonzero()[:, 0]
        sums = torch.zeros(len(canvas), dtype=torch.float64, device=lm.device).index_add_(0, owner, picked.double())
        for row, draws, value in zip(batch.rows, batch.draws, sums.tolist(), strict=True):
            results[row][draws] = value
    return results
