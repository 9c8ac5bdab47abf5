"""All metrics by name: the function, which way is good, its range and unit, and whether it needs a reference model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from . import choice, membership, memorisation, muse, probability, reference, text

Direction = Literal["higher", "lower", "reference", "zero", "none"]


@dataclass(frozen=True)
class Metric:
    """One entry.

    Attributes:
        function: that computes it.
        forget: the good direction on what should go: `reference` = the level of the never-trained model, `zero` = zero from
            either side, `none` = it does not apply.
        retain: the same on what should stay.
        low, high: range; infinite where it has no bound.
        unit: of the number.
        needs_reference: refuses to run without a model (or its scores) that never saw the forget set.
    """

    function: Callable[..., Any]
    forget: Direction
    retain: Direction
    low: float
    high: float
    unit: str = "share"
    needs_reference: bool = False


METRICS: dict[str, Metric] = {
    "answer log-probability": Metric(probability.answer_scores, "reference", "higher", -math.inf, 0, "nats"),
    "length-normalised probability": Metric(probability.length_normalised, "reference", "higher", 0, 1, "probability"),
    "normalised probability": Metric(probability.normalised_probability, "reference", "higher", 0, 1, "probability"),
    "truth ratio": Metric(probability.truth_ratio, "reference", "lower", 0, math.inf, "ratio"),
    "truth ratio, forget aggregate": Metric(probability.closer_to_one, "higher", "none", 0, 1),
    "truth ratio, retain aggregate": Metric(probability.true_better, "none", "higher", 0, 1),
    "truth ratio, preference": Metric(probability.preference, "reference", "higher", 0, 1),
    "model utility": Metric(probability.model_utility, "none", "higher", 0, 1),
    "forget quality": Metric(reference.forget_quality, "higher", "none", 0, 1, "p-value", True),
    "distance to the never-trained model": Metric(reference.distance, "zero", "zero", -math.inf, math.inf, "nats", True),
    "prediction divergence": Metric(reference.prediction_divergence, "lower", "lower", 0, math.inf, "nats per token", True),
    "ROUGE-L recall": Metric(text.rouge_l_recall, "reference", "higher", 0, 1),
    "ROUGE-L F1": Metric(text.rouge_l, "reference", "higher", 0, 1),
    "exact match": Metric(text.exact_match, "reference", "higher", 0, 1),
    "n-gram entropy": Metric(text.n_gram_entropy, "higher", "higher", 0, math.inf, "bits"),
    "junk rate": Metric(text.junk_rate, "lower", "lower", 0, 1),
    "exact memorisation": Metric(memorisation.exact_memorisation, "reference", "higher", 0, 1),
    "extraction strength": Metric(memorisation.extraction_strength, "reference", "higher", 0, 1),
    "MIA loss": Metric(membership.membership_scores, "reference", "none", 0, math.inf, "nats per token"),
    "MIA zlib": Metric(membership.zlib_score, "reference", "none", 0, math.inf, "nats per token and byte"),
    "MIA Min-K": Metric(membership.min_k, "reference", "none", 0, math.inf, "nats"),
    "MIA Min-K++": Metric(membership.min_k, "reference", "none", -math.inf, math.inf, "standard deviations"),
    "MIA reference": Metric(membership.reference_score, "zero", "none", -math.inf, math.inf, "nats per token", True),
    "MIA AUC": Metric(membership.auc, "reference", "none", 0, 1, "probability"),
    "PrivLeak": Metric(membership.privacy_leakage, "zero", "none", -100, math.inf, "percent", True),
    "VerbMem": Metric(muse.verbatim_memorisation, "reference", "higher", 0, 100, "percent"),
    "KnowMem": Metric(muse.knowledge_memorisation, "reference", "higher", 0, 100, "percent"),
    "MCQ accuracy": Metric(choice.multiple_choice, "reference", "higher", 0, 1),
    "efficacy": Metric(choice.rewrite_scores, "higher", "none", 0, 1),
    "paraphrase": Metric(choice.rewrite_scores, "higher", "none", 0, 1),
    "neighbourhood": Metric(choice.rewrite_scores, "none", "higher", 0, 1),
}
