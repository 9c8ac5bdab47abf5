"""Choosing among given answers: multiple-choice accuracy, and the success of a rewrite (efficacy, paraphrase, neighbourhood).

All options of a question share their masks' randomness. An option of one token has one possible mask, hence one forward and no
Monte-Carlo error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ...backbones.model import Encoded, MaskedDiffusionLM
from ...diffusion.likelihood import elbo
from ...diffusion.masks import MaskBank
from ...errors import RemaskError
from ...facts import Fact


# ------------------------------------------------------------------ on arrays
def choice_credit(scores: ArrayLike, correct: int = 0) -> float:
    """1 where option `correct` scores highest, 1 / k where it ties with k - 1 others at the top, else 0.

    The share for ties keeps a model that cannot tell the options apart at chance, wherever the right one stands.

    Raises:
        RemaskError: fewer than two options, or `correct` is none of them.
    """
    values = np.asarray(scores, dtype=float)
    if values.ndim != 1 or len(values) < 2 or not 0 <= correct < len(values):
        raise RemaskError(f"a choice needs two or more option scores and the index of the right one, not {list(values.shape)}")
    best = values == values.max()
    return float(best[correct] / best.sum())


def success(new: ArrayLike, old: ArrayLike) -> np.ndarray:
    """Whether the new answer's loss is below the old one's (ROME's efficacy and paraphrase success), bool [...]."""
    return np.asarray(new, dtype=float) < np.asarray(old, dtype=float)


def magnitude(new: ArrayLike, old: ArrayLike) -> np.ndarray:
    """P(new) - P(old) = exp(-loss of new) - exp(-loss of old), -1..1 (ROME's magnitudes), [...]."""
    return np.exp(-np.asarray(new, dtype=float)) - np.exp(-np.asarray(old, dtype=float))


# ------------------------------------------------------------------ on a model
@dataclass(frozen=True)
class Choice:
    """One question answered by likelihood: credit 0..1 by summed log-probability, and by log-probability per token.

    Attributes:
        id: the fact's.
        logprobs: of the options, nats summed over tokens; the right one first.
        tokens: of each option.
    """

    id: str
    logprobs: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def raw(self) -> float:
        """Credit by summed log-probability; favours short options."""
        return choice_credit(self.logprobs)

    @property
    def normalised(self) -> float:
        """Credit by log-probability per token."""
        return choice_credit(np.array(self.logprobs) / np.array(self.tokens))


def multiple_choice(lm: MaskedDiffusionLM, facts: Sequence[Fact], bank: MaskBank) -> list[Choice]:
    """Choose between each fact's answer and its `perturbed` answers; accuracy is the mean credit.

    For lettered questions (WMDP, MMLU) the prompt lists the options and the answers are the letters.

    Raises:
        RemaskError: a fact without wrong answers; names it.
    """
    for fact in facts:
        if not fact.perturbed:
            raise RemaskError(f"fact {fact.id!r} has no wrong answers to choose from; fill its field 'perturbed'")
    rows = [lm.encode(fact, answer=option) for fact in facts for option in (fact.answer, *fact.perturbed)]
    scores = iter(elbo(lm, rows, bank))
    results = []
    for fact in facts:
        options = [next(scores) for _ in range(1 + len(fact.perturbed))]
        results.append(Choice(fact.id, tuple(option.logprob for option in options), tuple(option.tokens for option in options)))
    return results


@dataclass(frozen=True)
class RewriteScores:
    """One rewrite, `answer` to `target`: shares of prompts where it holds, 0..1, and mean magnitudes, -1..1; higher is better.

    Attributes:
        id: the fact's.
        efficacy: on its own prompt the target is likelier than the old answer.
        paraphrase: the same over its other wordings; NaN where it has none.
        neighbourhood: over its neighbours, their own answer is still likelier than the target; NaN where it has none.
        efficacy_magnitude, paraphrase_magnitude: P(target) - P(answer).
        neighbourhood_magnitude: P(the neighbour's answer) - P(target).
    """

    id: str
    efficacy: float
    paraphrase: float
    neighbourhood: float
    efficacy_magnitude: float
    paraphrase_magnitude: float
    neighbourhood_magnitude: float


def rewrite_scores(
    lm: MaskedDiffusionLM, facts: Sequence[Fact], bank: MaskBank, known: Mapping[str, Fact] | None = None
) -> list[RewriteScores]:
    """CounterFact's efficacy, paraphrase and neighbourhood scores, by length-normalised probability under the stratified bound.

    Args:
        lm: the model, edited.
        facts: with targets.
        bank: masks; the two answers of a prompt share them.
        known: facts by id, which `Fact.neighbours` names.

    Raises:
        RemaskError: a fact without target, or a neighbour that `known` lacks; names the fact.
    """
    pairs: list[tuple[Encoded, Encoded]] = []  # (what should win, what should lose)
    places: list[list[list[int]]] = []  # of every fact: its pairs of efficacy, of paraphrase, of neighbourhood
    for fact in facts:
        if fact.target is None:
            raise RemaskError(f"fact {fact.id!r} has no target; efficacy is of rewrites, see forget metrics for forgetting")
        start = len(pairs)
        pairs += [
            (lm.encode(fact, prompt, fact.target), lm.encode(fact, prompt)) for prompt in (fact.prompt, *fact.paraphrases)
        ]
        middle = len(pairs)
        for name in fact.neighbours:
            if known is None or name not in known:
                raise RemaskError(f"fact {fact.id!r}: its neighbour {name!r} is not among the known facts; pass it in `known`")
            pairs.append((lm.encode(known[name]), lm.encode(known[name], answer=fact.target)))
        places.append([[start], list(range(start + 1, middle)), list(range(middle, len(pairs)))])
    scores = elbo(lm, [row for pair in pairs for row in pair], bank)
    loss = np.array([-score.logprob / score.tokens for score in scores]).reshape(-1, 2)
    wins, gains = success(loss[:, 0], loss[:, 1]), magnitude(loss[:, 0], loss[:, 1])
    return [
        RewriteScores(fact.id, *(_mean(wins[place]) for place in mine), *(_mean(gains[place]) for place in mine))
        for fact, mine in zip(facts, places, strict=True)
    ]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
