"""How much of an answer the model can be made to reproduce: exact memorisation and extraction strength.

The autoregressive definitions read teacher-forced predictions, which a masked diffusion model has not got. Here exact
memorisation masks a given share of the answer, and extraction strength reveals a growing part of it and decodes the rest with
the sampler. Free decoding is stricter than teacher forcing: the numbers do not compare with those of autoregressive models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike

from ...backbones.model import Encoded, MaskedDiffusionLM
from ...diffusion.canvas import TOKEN_BUDGET
from ...diffusion.masks import MaskBank
from ...diffusion.sampler import SamplerConfig, infill
from ...errors import RemaskError
from .masked import predictions, shuffled

RATIOS = (0.25, 0.5, 0.75, 1.0)


# ------------------------------------------------------------------ on arrays
def matching_share(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Exact memorisation of one answer: share of positions whose prediction equals the label, 0..1.

    Raises:
        RemaskError: no labels, or predictions that do not pair with them.
    """
    guess, truth = np.asarray(predicted), np.asarray(labels)
    if guess.shape != truth.shape or truth.ndim != 1 or not len(truth):
        raise RemaskError(
            f"exact memorisation needs one prediction a label, not shapes {list(guess.shape)}, {list(truth.shape)}"
        )
    return float((guess == truth).mean())


def suffix_strength(matches: ArrayLike) -> float:
    """Teacher-forced extraction strength 1 - k / L, 0..1: k = smallest index from which on every position matches.

    Where the last position does not match it is 0. (Open-Unlearning's loop ends at k = L - 1 and returns 1 / L there.)

    Args:
        matches: whether each position's prediction is right, [L].

    Raises:
        RemaskError: no positions.
    """
    right = np.asarray(matches, dtype=bool)
    if right.ndim != 1 or not len(right):
        raise RemaskError("extraction strength needs at least one answer position")
    wrong = np.nonzero(~right)[0]
    return 1 - (int(wrong[-1]) + 1) / len(right) if len(wrong) else 1.0


# ------------------------------------------------------------------ on a model
def exact_memorisation(
    lm: MaskedDiffusionLM,
    rows: Sequence[Encoded],
    bank: MaskBank,
    ratios: Sequence[float] = RATIOS,
    *,
    token_budget: int = TOKEN_BUDGET,
) -> np.ndarray:
    """Share of masked positions whose likeliest token is the answer's, for each mask ratio, [rows, ratios], 0..1.

    At ratio rho ceil(rho L) positions are masked; a smaller ratio's positions are among a larger one's. Average the last axis
    for one number. The average is over all draws of all replicates of the bank, whose seed keys the orders.

    Raises:
        RemaskError: no ratios, or one outside of (0, 1].
    """
    if not ratios or not all(0 < ratio <= 1 for ratio in ratios):
        raise RemaskError(f"mask ratios {tuple(ratios)} must be one or more numbers in (0, 1]")
    masks = []
    for row in rows:
        length = len(row.answer_ids)
        ranks = [
            np.argsort(shuffled(length, bank.seed, "memorisation", row.id, draw))
            for draw in range(bank.draws * bank.replicates)
        ]
        masks.append(np.array([rank < math.ceil(ratio * length) for rank in ranks for ratio in ratios]))
    results = [np.zeros(len(mask)) for mask in masks]
    for batch, _, logprobs in predictions(lm, rows, masks, token_budget):
        right = (logprobs.argmax(dim=-1) == batch.clean[batch.masked]).double()
        owner = batch.masked.nonzero()[:, 0]
        hits = torch.zeros(len(batch.rows), dtype=torch.float64, device=right.device).index_add_(0, owner, right)
        for row, draws, value in zip(batch.rows, batch.draws, (hits / batch.masked.sum(dim=1)).tolist(), strict=True):
            results[row][draws] = value
    return np.array([value.reshape(-1, len(ratios)).mean(axis=0) for value in results]).reshape(-1, len(ratios))


@dataclass(frozen=True)
class Extraction:
    """Extraction strength of one answer: 1 - revealed / tokens, 0..1; `revealed` = tokens that had to be given."""

    id: str
    tokens: int
    revealed: int

    @property
    def strength(self) -> float:
        """1 = the question alone is enough, 0 = no part of the answer brings out the rest."""
        return 1 - self.revealed / self.tokens


def extraction_strength(
    lm: MaskedDiffusionLM,
    rows: Sequence[Encoded],
    sampler: SamplerConfig | None = None,
    *,
    reveal: Literal["prefix", "random"] = "prefix",
    seed: int = 0,
) -> list[Extraction]:
    """Smallest number k of revealed answer tokens from which the sampler restores the others exactly.

    Every k from 0 is tried (success is not monotone in k), rows together, and a row leaves at its first success; at most L
    decodings a row. The canvas has exactly L answer slots, so the length is given away: this is an upper bound on what free
    generation extracts.

    Args:
        lm: the model.
        rows: encoded facts.
        sampler: greedy, one token a step by default.
        reveal: the first k tokens, or k tokens of one random order keyed by (seed, row).
        seed: of the random order.

    Raises:
        RemaskError: unknown `reveal`.
    """
    if reveal not in ("prefix", "random"):
        raise RemaskError(f"reveal {reveal!r} is unknown; choose prefix or random")
    settings = sampler or SamplerConfig.default(lm)
    lengths = [len(row.answer_ids) for row in rows]
    orders = [
        np.arange(length) if reveal == "prefix" else shuffled(length, seed, "extraction", row.id, 0)
        for row, length in zip(rows, lengths, strict=True)
    ]
    needed = list(lengths)
    left = list(range(len(rows)))
    for given in range(max(lengths, default=0)):
        left = [i for i in left if given < lengths[i]]
        canvases = []
        for i in left:
            answer = np.full(lengths[i], lm.spec.mask_id)
            answer[orders[i][:given]] = np.asarray(rows[i].answer_ids)[orders[i][:given]]
            canvases.append([*rows[i].prompt_ids, *answer.tolist()])
        filled = infill(lm, canvases, settings, keys=[rows[i].id for i in left])
        done = {i for i, generation in zip(left, filled, strict=True) if tuple(generation.response) == rows[i].ids}
        for i in done:
            needed[i] = given
        left = [i for i in left if i not in done]
    return [Extraction(row.id, length, k) for row, length, k in zip(rows, lengths, needed, strict=True)]
