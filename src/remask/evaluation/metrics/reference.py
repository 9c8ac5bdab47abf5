"""Metrics that measure against a model that never saw the forget set. Without one they refuse: no default stands in for it.

The reference must be a masked diffusion model of the same backbone, trained alike on everything but the forget set, and scored
on the same questions under the same bank. Published retain values of autoregressive models do not serve.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.stats import iqr, ks_2samp

from ...backbones.model import Encoded, MaskedDiffusionLM
from ...diffusion.canvas import TOKEN_BUDGET
from ...diffusion.masks import MaskBank
from ...errors import RemaskError
from .masked import predictions

NOISE_LIMIT = 0.1  # standard error of log R as a share of its interquartile range

T = TypeVar("T")


def require_reference(reference: T | None, metric: str) -> T:
    """The reference, or a refusal.

    Raises:
        RemaskError: None.
    """
    if reference is None:
        raise RemaskError(
            f"{metric} compares with a model that never saw the forget set; give one of the same backbone, there is no default"
        )
    return reference


# ------------------------------------------------------------------ forget quality
@dataclass(frozen=True)
class ForgetQuality:
    """Kolmogorov-Smirnov test of two models' truth ratios on the same n questions.

    Attributes:
        pvalue: two-sided, exact where scipy's is: the forget quality, 0..1, higher = not told from the reference.
        log10: of it; -inf for 0.
        statistic: D, the largest distance of the two distribution functions, 0..1.
        critical: smallest D that n questions can reject at 5 %; a smaller difference is invisible at this n.
        n: questions in each sample.
        replicates: p-value of every mask replicate alone; empty where only one value a question was given.
        noise: median standard error of log R over its interquartile range, the larger of the two models'; NaN without
            replicates. Above 0.1 the estimator's noise can decide the test.
    """

    pvalue: float
    log10: float
    statistic: float
    critical: float
    n: int
    replicates: tuple[float, ...] = ()
    noise: float = math.nan

    @property
    def reliable(self) -> bool | None:
        """Whether noise is at most 0.1; None where it was not measured."""
        return None if math.isnan(self.noise) else self.noise <= NOISE_LIMIT


def forget_quality(unlearned: ArrayLike, reference: ArrayLike | None) -> ForgetQuality:
    """TOFU's forget quality from truth ratios R of the forget questions.

    Invariant under monotone maps, R -> 1 / R and R -> log R among them. With several splits correct by `holm`. Its noise floor
    is the same test of one model under two bank seeds.

    Args:
        unlearned: R of the unlearned model, [n], or [n, replicates] from `exp(AnswerScores.log_truth_ratios())`; the test is
            then of the geometric mean over replicates.
        reference: R of the never-trained model on the same questions, of the same shape.

    Raises:
        RemaskError: no reference, other shapes, not positive and finite, or fewer than two questions.
    """
    samples = [np.asarray(x, dtype=float) for x in (unlearned, require_reference(reference, "forget quality"))]
    if samples[0].shape != samples[1].shape or samples[0].ndim not in (1, 2) or len(samples[0]) < 2:
        shapes = " and ".join(str(list(sample.shape)) for sample in samples)
        raise RemaskError(f"forget quality needs the same two or more questions from both models, not shapes {shapes}")
    if not all((np.isfinite(sample) & (sample > 0)).all() for sample in samples):
        raise RemaskError("forget quality needs positive finite truth ratios; look for empty or overlong answers")
    logs = [np.log(sample).reshape(len(sample), -1) for sample in samples]
    one = samples[0].ndim == 1
    test = ks_2samp(*(samples if one else (log.mean(axis=1) for log in logs)))
    pvalue = float(test.pvalue)
    count = logs[0].shape[1]
    return ForgetQuality(
        pvalue,
        math.log10(pvalue) if pvalue else -math.inf,
        float(test.statistic),
        critical_difference(len(samples[0])),
        len(samples[0]),
        () if one else tuple(float(ks_2samp(logs[0][:, i], logs[1][:, i]).pvalue) for i in range(count)),
        max(map(_noise, logs)) if count > 1 else math.nan,
    )


def _noise(logs: np.ndarray) -> float:
    """Median standard error over interquartile range of log R, [n, replicates]."""
    errors = logs.std(axis=1, ddof=1) / math.sqrt(logs.shape[1])
    spread = float(iqr(logs.mean(axis=1)))
    return float(np.median(errors)) / spread if spread else math.inf


@functools.cache
def critical_difference(n: int, alpha: float = 0.05) -> float:
    """Smallest D = k / n whose exact two-sided KS p-value at n against n is at most alpha; inf where even D = 1 is not.

    For large n about sqrt(-log(alpha / 2) / n), e.g. 0.304 for n = 40, where D moves in steps of 0.025 and the answer is 0.325.

    Raises:
        RemaskError: n below 1 or alpha outside of (0, 1).
    """
    if n < 1 or not 0 < alpha < 1:
        raise RemaskError(f"a critical difference needs n >= 1 and alpha in (0, 1), not {n} and {alpha}")
    ranks = np.arange(n)
    low, high = 0, n + 1  # p is above alpha at low and, if high <= n, not above it at high
    while high - low > 1:
        middle = (low + high) // 2
        if ks_2samp(ranks, ranks + middle - 0.5, method="exact").pvalue <= alpha:
            high = middle
        else:
            low = middle
    return high / n if high <= n else math.inf


# ------------------------------------------------------------------ distance to the never-trained model
def distance(logprob: ArrayLike, reference: ArrayLike | None) -> np.ndarray:
    """Log-probability of each row above (+) or below (-) the never-trained model's, nats, [n]; 0 is the goal.

    Average the absolute value for a distance, the signed one for a direction: on the forget set a negative mean is
    over-forgetting, which gives away that there was something to forget.

    Raises:
        RemaskError: no reference, or lists that do not pair.
    """
    values, level = np.asarray(logprob, dtype=float), np.asarray(require_reference(reference, "distance"), dtype=float)
    if values.shape != level.shape:
        raise RemaskError(f"distance needs the same rows from both models, not {list(values.shape)} and {list(level.shape)}")
    return values - level


def prediction_divergence(
    lm: MaskedDiffusionLM,
    reference: MaskedDiffusionLM | None,
    rows: Sequence[Encoded],
    bank: MaskBank,
    *,
    token_budget: int = TOKEN_BUDGET,
) -> np.ndarray:
    """KL(reference || model) at masked answer positions, nats a masked token, [rows]; >= 0, and 0 for equal predictions.

    The mean over the bank's masks of the mean over masked positions. Unlike `distance` it sees the whole distribution: a model
    that says something else than the reference at the same log-probability of the truth is found out.

    Raises:
        RemaskError: no reference, or one of another vocabulary or mask token.
    """
    other = require_reference(reference, "prediction divergence")
    if (lm.embedding.num_embeddings, lm.spec.mask_id) != (other.embedding.num_embeddings, other.spec.mask_id):
        raise RemaskError(
            f"{lm.name} and {other.name} differ in vocabulary or mask token; give a reference of the same backbone"
        )
    masks = [bank.masks(row.id, len(row.answer_ids)) for row in rows]
    results = [np.zeros(len(mask)) for mask in masks]
    pairs = zip(predictions(lm, rows, masks, token_budget), predictions(other, rows, masks, token_budget), strict=True)
    for (batch, _, ours), (_, _, theirs) in pairs:
        target = theirs.to(ours.device).double()
        terms = (target.exp() * (target - ours.double()).nan_to_num()).sum(dim=-1)
        owner = batch.masked.nonzero()[:, 0]
        sums = torch.zeros(len(batch.rows), dtype=torch.float64, device=terms.device).index_add_(0, owner, terms)
        for row, draws, value in zip(batch.rows, batch.draws, (sums / batch.masked.sum(dim=1)).tolist(), strict=True):
            results[row][draws] = value
    return np.array([value.mean() for value in results])
