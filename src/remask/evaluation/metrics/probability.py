"""How likely the right answer is, alone and against wrong answers: probability, truth ratio, model utility (TOFU).

Losses are nats per answer token, l(a) = -log p(a | q) / L, so P(a) = exp(-l(a)) is the geometric mean of token probabilities.
Under a masked diffusion model l comes from the bound that `remask.elbo` estimates: P is then a lower bound, and a truth ratio
is a ratio of two bounds. All answers of a question share their masks' randomness, which removes most of the ratio's noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp
from scipy.stats import hmean

from ...backbones.model import MaskedDiffusionLM
from ...diffusion.likelihood import Likelihood, elbo
from ...diffusion.masks import MaskBank
from ...diffusion.sampler import SamplerConfig
from ...errors import RemaskError
from ...facts import Fact
from ..generation import answers
from .text import rouge_l

Variant = Literal["geometric", "arithmetic"]


# ------------------------------------------------------------------ on arrays
def length_normalised(logprob: ArrayLike, tokens: ArrayLike, stderr: ArrayLike = 0.0) -> np.ndarray:
    """P = exp(log p / L), 0..1: the geometric mean of the answer's token probabilities.

    Args:
        logprob: nats summed over tokens, any shape.
        tokens: L.
        stderr: Monte-Carlo standard error of `logprob`. exp of a noisy value is biased upwards by about half its variance;
            with it that first-order bias is taken off, P (1 - (stderr / L)^2 / 2). The default takes nothing off.
    """
    count = np.asarray(tokens, dtype=float)
    return np.exp(np.asarray(logprob, dtype=float) / count) * (1 - (np.asarray(stderr, dtype=float) / count) ** 2 / 2)


def normalised_probability(right: ArrayLike, wrong: ArrayLike) -> np.ndarray:
    """P(a) / (P(a) + sum_j P(w_j)), 0..1; chance is 1 / (1 + k). TOFU's probability of real authors and world facts.

    Args:
        right: loss of the right answer, nats per token, [...].
        wrong: losses of the k wrong answers, [..., k]; TOFU has three or five.
    """
    truth = np.asarray(right, dtype=float)
    return np.exp(-truth - logsumexp(-np.concatenate([truth[..., None], _wrong(wrong)], axis=-1), axis=-1))


def log_truth_ratio(right: ArrayLike, wrong: ArrayLike, variant: Variant = "geometric") -> np.ndarray:
    """Logarithm of R, log (P_wrong / P_right) of each question, [...]; below 0 where the right answer is the likelier one.

    Args:
        right: loss of the right answer, nats per token, [...]: its paraphrase for TOFU's forget and retain sets.
        wrong: losses of the k wrong answers, [..., k].
        variant: P_wrong is the `geometric` mean of the wrong answers' P (Open-Unlearning, TOFU's aggregate_eval_stat.py) or
            their `arithmetic` mean (TOFU's utils.py), which is never smaller. Name it with every number.

    Raises:
        RemaskError: unknown variant, or no wrong answers.
    """
    truth, lies = np.asarray(right, dtype=float), _wrong(wrong)
    if variant == "geometric":
        return truth - lies.mean(axis=-1)
    if variant == "arithmetic":
        return truth + logsumexp(-lies, axis=-1) - math.log(lies.shape[-1])
    raise RemaskError(f"truth ratio variant {variant!r} is unknown; choose geometric or arithmetic")


def truth_ratio(right: ArrayLike, wrong: ArrayLike, variant: Variant = "geometric") -> np.ndarray:
    """R = P_wrong / P_right, 0..inf; arguments and errors of `log_truth_ratio`."""
    return np.exp(log_truth_ratio(right, wrong, variant))


def closer_to_one(ratio: ArrayLike) -> np.ndarray:
    """min(R, 1 / R), 0..1: TOFU's truth ratio of the forget set; 1 = right and wrong answers are equally likely."""
    values = np.asarray(ratio, dtype=float)
    with np.errstate(divide="ignore"):
        return np.minimum(values, 1 / values)


def true_better(ratio: ArrayLike) -> np.ndarray:
    """max(0, 1 - R), 0..1: TOFU's truth ratio of every set that should stay; higher = the right answer is likelier."""
    return np.maximum(0.0, 1 - np.asarray(ratio, dtype=float))


def preference(ratio: ArrayLike) -> np.ndarray:
    """P_right / (P_right + P_wrong) = 1 / (1 + R), 0..1: Open-Unlearning's `prob_mean`; 1/2 = no preference."""
    return 1 / (1 + np.asarray(ratio, dtype=float))


@dataclass(frozen=True)
class SplitUtility:
    """One set's three parts of model utility, each 0..1, higher is better."""

    probability: float
    rouge: float
    truth_ratio: float


def split_utility(
    answer: ArrayLike,
    right: ArrayLike,
    wrong: ArrayLike,
    rouge: ArrayLike,
    *,
    normalised: bool,
    variant: Variant = "geometric",
) -> SplitUtility:
    """Means over the n questions of one set.

    Args:
        answer: loss of the answer, nats per token, [n].
        right: loss of its paraphrase, or the answer's again where none exists, [n].
        wrong: losses of the wrong answers, [n, k].
        rouge: ROUGE-L recall of the generated answers, [n].
        normalised: the probability is taken against the wrong answers: False for retain, True for the other two sets.
        variant: of the truth ratio.
    """
    probability = normalised_probability(answer, wrong) if normalised else np.exp(-np.asarray(answer, dtype=float))
    truth = true_better(truth_ratio(right, wrong, variant))
    return SplitUtility(float(probability.mean()), float(np.mean(np.asarray(rouge, dtype=float))), float(truth.mean()))


def model_utility(retain: SplitUtility, real_authors: SplitUtility, world_facts: SplitUtility) -> float:
    """TOFU's model utility: harmonic mean of the nine parts, 0..1, higher is better; one zero makes it 0."""
    parts = [x for split in (retain, real_authors, world_facts) for x in (split.probability, split.rouge, split.truth_ratio)]
    return 0.0 if min(parts) <= 0 else float(hmean(parts))


# ------------------------------------------------------------------ on a model
@dataclass(frozen=True)
class AnswerScores:
    """Likelihoods of one question's answers, all under masks of the same randomness.

    Attributes:
        id: the fact's.
        answer: of the answer.
        right: of its paraphrase, or of the answer where the fact has none.
        wrong: of the wrong answers, three or five in TOFU.
    """

    id: str
    answer: Likelihood
    right: Likelihood
    wrong: tuple[Likelihood, ...]

    def normalised_probability(self) -> float:
        """`normalised_probability` of the answer."""
        return float(normalised_probability(_loss(self.answer), [_loss(x) for x in self.wrong]))

    def log_truth_ratio(self, variant: Variant = "geometric") -> float:
        """`log_truth_ratio` of the mean losses."""
        return float(log_truth_ratio(_loss(self.right), [_loss(x) for x in self.wrong], variant))

    def log_truth_ratios(self, variant: Variant = "geometric") -> np.ndarray:
        """The same from each replicate alone, [replicates]; their spread is its Monte-Carlo error."""
        return log_truth_ratio(_losses(self.right), np.stack([_losses(x) for x in self.wrong], axis=-1), variant)


def answer_scores(lm: MaskedDiffusionLM, facts: Sequence[Fact], bank: MaskBank) -> list[AnswerScores]:
    """Likelihoods of each fact's answer, paraphrased answer and wrong answers, by the stratified bound (`remask.elbo`).

    Raises:
        RemaskError: a fact without wrong answers; names it.
    """
    rows = []
    for fact in facts:
        if not fact.perturbed:
            raise RemaskError(f"fact {fact.id!r} has no wrong answers to compare with; fill its field 'perturbed'")
        paraphrase = () if fact.paraphrased_answer is None else (fact.paraphrased_answer,)
        rows += [lm.encode(fact, answer=answer) for answer in (fact.answer, *paraphrase, *fact.perturbed)]
    scores = iter(elbo(lm, rows, bank))
    results = []
    for fact in facts:
        answer = next(scores)
        right = answer if fact.paraphrased_answer is None else next(scores)
        results.append(AnswerScores(fact.id, answer, right, tuple(next(scores) for _ in fact.perturbed)))
    return results


def measure_utility(
    lm: MaskedDiffusionLM,
    facts: Sequence[Fact],
    bank: MaskBank,
    sampler: SamplerConfig | None = None,
    *,
    normalised: bool,
    variant: Variant = "geometric",
) -> SplitUtility:
    """`split_utility` of one set, with greedy generations; facts may differ in the number of their wrong answers.

    Raises:
        RemaskError: no facts, or one without wrong answers.
    """
    if not facts:
        raise RemaskError("model utility needs at least one fact in each of its three sets")
    scores = answer_scores(lm, facts, bank)
    outputs = answers(lm, [lm.encode(fact) for fact in facts], sampler)
    parts = [
        split_utility(
            _loss(score.answer),
            _loss(score.right),
            [_loss(wrong) for wrong in score.wrong],
            rouge_l(output, fact.answer).recall,
            normalised=normalised,
            variant=variant,
        )
        for fact, score, output in zip(facts, scores, outputs, strict=True)
    ]
    return SplitUtility(*np.mean([(part.probability, part.rouge, part.truth_ratio) for part in parts], axis=0).tolist())


def _loss(score: Likelihood) -> float:
    return -score.logprob / score.tokens


def _losses(score: Likelihood) -> np.ndarray:
    return -np.asarray(score.replicates) / score.tokens


def _wrong(losses: ArrayLike) -> np.ndarray:
    values = np.asarray(losses, dtype=float)
    if values.ndim == 0 or not values.shape[-1]:
        raise RemaskError("a truth ratio needs the losses of at least one wrong answer")
    return values
