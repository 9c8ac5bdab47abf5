"""How well facts were rewritten: CounterFact's and zsRE's scores, locality, and what the model says, all with intervals.

`rewrite_scores` gives each rewrite its efficacy, paraphrase and neighbourhood; here they become means over rewrites with
bootstrap intervals (whole rewrites are resampled), CounterFact's score S, and beside them what likelihoods do not show: the
share of generated answers that hold the new object, and what happened to rows that were to stay as they are.

ROME scores with probabilities of autoregressive models, EasyEdit with teacher-forced tokens; a masked model has neither. Here
probabilities come from the stratified bound, and zsRE's accuracy from one forward with the whole answer masked: numbers compare
between edits of one model, not with the papers'.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..backbones.model import Encoded, MaskedDiffusionLM
from ..errors import RemaskError
from ..random import numpy_generator
from .metrics.choice import RewriteScores
from .metrics.masked import predictions
from .metrics.text import exact_match, junk
from .statistics import RESAMPLES, Estimate, mean_interval

PARTS = ("efficacy", "paraphrase", "neighbourhood")


# ------------------------------------------------------------------ CounterFact
def counterfact_score(efficacy: float, paraphrase: float, neighbourhood: float) -> float:
    """ROME's S: harmonic mean of the three success rates, 0..1; one zero makes it 0, a missing one NaN."""
    parts = (efficacy, paraphrase, neighbourhood)
    if any(math.isnan(part) for part in parts):
        return math.nan
    return 0.0 if min(parts) <= 0 else len(parts) / sum(1 / part for part in parts)


def rewrite_summary(scores: Sequence[RewriteScores], seed: int = 0) -> dict[str, Estimate]:
    """Mean of each success and magnitude over rewrites, and `score`, CounterFact's S of the three success rates.

    A rewrite without paraphrases or neighbours counts only where it has them. The interval of S resamples rewrites, so the
    dependence of its three parts is kept.

    Raises:
        RemaskError: no rewrites.
    """
    if not scores:
        raise RemaskError("there are no rewrites to summarise; score at least one")
    result = {}
    for name in [part + kind for kind in ("", "_magnitude") for part in PARTS]:
        values = np.array([getattr(score, name) for score in scores])
        result[name] = mean_interval(values[~np.isnan(values)].tolist(), seed)
    result["score"] = score_interval([[getattr(score, part) for part in PARTS] for score in scores], seed)
    return result


def score_interval(parts: ArrayLike, seed: int = 0) -> Estimate:
    """CounterFact's S of rewrites [n, 3] with its 95 % percentile bootstrap interval.

    Args:
        parts: efficacy, paraphrase and neighbourhood of every rewrite, NaN where it has none.
        seed: of the resampling.

    Raises:
        RemaskError: another shape.
    """
    table = np.asarray(parts, dtype=float)
    if table.ndim != 2 or table.shape[1] != len(PARTS) or not len(table):
        raise RemaskError(f"the score needs a filled table [rewrites, {len(PARTS)}], not shape {list(table.shape)}")
    value = counterfact_score(*_means(table))
    if len(table) == 1 or math.isnan(value):
        return Estimate(value, value, value, len(table))
    rng = numpy_generator(seed, "bootstrap score", len(table))
    drawn = [counterfact_score(*_means(table[rng.integers(len(table), size=len(table))])) for _ in range(RESAMPLES)]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Estimate(value, float(low), float(high), len(table))


def _means(table: np.ndarray) -> list[float]:
    """Column means over what is there."""
    return [float(np.mean(column[~np.isnan(column)])) if not np.isnan(column).all() else math.nan for column in table.T]


# ------------------------------------------------------------------ zsRE
def answer_accuracy(lm: MaskedDiffusionLM, rows: Sequence[Encoded]) -> list[float]:
    """Share of each answer's tokens that are the likeliest ones when all of it is masked, 0..1; zsRE's accuracy.

    The answer's length is given away, its tokens are not, and no token sees another: stricter than teacher forcing.

    Raises:
        RemaskError: an answer that starts at position 0 of a family with shifted logits.
    """
    masks = [np.ones((1, len(row.answer_ids)), dtype=bool) for row in rows]
    shares = [0.0] * len(rows)
    for batch, _, logprobs in predictions(lm, rows, masks):
        right = (logprobs.argmax(dim=-1) == batch.clean[batch.masked]).float()
        for row, own in zip(batch.rows, right.split(batch.masked.sum(dim=1).tolist()), strict=True):
            shares[row] = float(own.mean())
    return shares


# ------------------------------------------------------------------ what is said
def contains(output: str, phrase: str) -> bool:
    """Whether `phrase` occurs in `output` as whole words, whatever the case and the white space."""
    text, wanted = (" ".join(part.lower().split()) for part in (output, phrase))
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text) is not None


@dataclass(frozen=True)
class Said:
    """Checks of one generated answer after a rewrite.

    Attributes:
        exact: it is the new object and nothing else.
        new, old: it holds the new object, the old one, as whole words.
        junk: it is no answer at all.
    """

    exact: bool
    new: bool
    old: bool
    junk: bool

    @classmethod
    def of(cls, output: str, new: str, old: str) -> Said:
        """From a generation and the two objects."""
        return cls(exact_match(output, new), contains(output, new), contains(output, old), junk(output) is not None)


def said_summary(checks: Sequence[Said], seed: int = 0) -> dict[str, Estimate]:
    """Share of answers under each check."""
    return {
        name: mean_interval([float(getattr(check, name)) for check in checks], seed) for name in ("exact", "new", "old", "junk")
    }


# ------------------------------------------------------------------ what had to stay
def locality(
    before: Sequence[float],
    after: Sequence[float],
    outputs_before: Sequence[str],
    outputs_after: Sequence[str],
    seed: int = 0,
) -> dict[str, Estimate]:
    """Rows that were to stay: `change` of their log-probability, nats a row, and the share of `unchanged` generations.

    Args:
        before, after: log-probabilities of the same rows under the same masks, [n].
        outputs_before, outputs_after: their greedy answers, [m].
        seed: of the resampling.

    Raises:
        RemaskError: lists that do not pair.
    """
    if len(before) != len(after) or len(outputs_before) != len(outputs_after):
        raise RemaskError("locality compares the same rows before and after; the lists differ in length")
    change = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    same = [float(one == other) for one, other in zip(outputs_before, outputs_after, strict=True)]
    return {"change": mean_interval(change.tolist(), seed), "unchanged": mean_interval(same, seed)}
