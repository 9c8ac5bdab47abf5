"""Choices among answers: ties, chance, success of rewrites, and the table of all metrics against its page."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import FACTS, build_toy
from remask.diffusion.likelihood import elbo
from remask.diffusion.masks import MaskBank
from remask.errors import RemaskError
from remask.evaluation.metrics.choice import choice_credit, magnitude, multiple_choice, rewrite_scores, success
from remask.evaluation.metrics.registry import METRICS

BANK = MaskBank(draws=2, replicates=2, seed=1)
PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"


# ------------------------------------------------------------------ on arrays
@pytest.mark.parametrize(
    ("scores", "credit"),
    [([-1, -2, -3], 1), ([-2, -1, -3], 0), ([-1, -1, -3], 1 / 2), ([-1, -1, -1, -1], 1 / 4), ([-2, -1, -1], 0)],
)
def test_choice_credit_shares_ties(scores: list, credit: float) -> None:
    assert choice_credit(scores) == pytest.approx(credit)
    assert choice_credit(scores[::-1], len(scores) - 1) == pytest.approx(credit)


def test_random_scores_are_at_chance() -> None:
    rng = np.random.default_rng(0)
    credits = [choice_credit(row) for row in rng.integers(0, 3, (4000, 4))]  # many ties
    assert np.mean(credits) == pytest.approx(0.25, abs=0.02)


def test_success_and_magnitude() -> None:
    assert list(success([1.0, 2.0, 1.0], [2.0, 1.0, 1.0])) == [True, False, False]
    assert magnitude(0.0, math.inf) == 1.0
    assert magnitude(1.0, 2.0) == pytest.approx(math.exp(-1) - math.exp(-2))
    for scores, correct in (([1.0], 0), ([1.0, 2.0], 2)):
        with pytest.raises(RemaskError, match="two or more"):
            choice_credit(scores, correct)


# ------------------------------------------------------------------ on models
def test_choices_are_elbo_scores_of_the_options() -> None:
    lm = build_toy()
    fact = replace(FACTS[1], perturbed=("Lucca", "a blind cat", "rye"))
    (choice,) = multiple_choice(lm, [fact], BANK)
    want = elbo(lm, [lm.encode(fact, answer=a) for a in (fact.answer, *fact.perturbed)], BANK)
    assert choice.logprobs == tuple(score.logprob for score in want)
    assert choice.tokens == tuple(score.tokens for score in want)
    assert choice.raw == choice_credit([score.logprob for score in want])
    assert choice.normalised == choice_credit([score.logprob / score.tokens for score in want])


def test_letters_cost_one_forward_and_have_no_noise() -> None:
    lm = build_toy()
    fact = replace(FACTS[0], prompt=f"{FACTS[0].prompt} A. Lucca B. Varna Answer:", answer="A", perturbed=("B", "C", "D"))
    assert {len(lm.encode(fact, answer=x).answer_ids) for x in "ABCD"} == {1}
    before = lm.counters.tokens
    (choice,) = multiple_choice(lm, [fact], BANK)
    assert lm.counters.tokens - before == 4 * len(lm.encode(fact).ids)
    other = multiple_choice(lm, [fact], MaskBank(draws=1, replicates=1, seed=9))[0]
    assert choice.logprobs == pytest.approx(other.logprobs)


def test_a_taught_model_chooses_right(taught) -> None:
    answers = [fact.answer for fact in FACTS]
    facts = [replace(fact, perturbed=tuple(a for a in answers if a != fact.answer)[:3]) for fact in FACTS]
    assert np.mean([choice.raw for choice in multiple_choice(taught, facts, BANK)]) > 0.9
    with pytest.raises(RemaskError, match=r"ada/city.*perturbed"):
        multiple_choice(taught, FACTS[:1], BANK)


def test_rewrite_scores_by_their_definitions(taught) -> None:
    """A model that knows the old answers: no efficacy, full neighbourhood, and a loss for every prompt by hand."""
    known = {fact.id: fact for fact in FACTS}
    fact = replace(FACTS[0], target="Varna", neighbours=("bruno/pet", "cleo/city"))
    (scores,) = rewrite_scores(taught, [fact], BANK, known)

    def probability(fact, prompt, answer) -> float:
        (score,) = elbo(taught, [taught.encode(fact, prompt, answer)], BANK)
        return math.exp(score.logprob / score.tokens)

    def gain(prompt) -> float:
        return probability(fact, prompt, "Varna") - probability(fact, prompt, "Lucca")

    around = [probability(known[n], None, known[n].answer) - probability(known[n], None, "Varna") for n in fact.neighbours]
    assert scores.efficacy_magnitude == pytest.approx(gain(fact.prompt), rel=1e-4)
    assert scores.paraphrase_magnitude == pytest.approx(gain(fact.paraphrases[0]), rel=1e-4)
    assert scores.neighbourhood_magnitude == pytest.approx(np.mean(around), rel=1e-4)
    assert (scores.efficacy, scores.neighbourhood) == (0.0, 1.0)
    assert scores.paraphrase == float(gain(fact.paraphrases[0]) > 0)


def test_a_rewrite_towards_what_the_model_knows_succeeds(taught) -> None:
    """The old answer is wrong, the target is what was taught."""
    fact = replace(FACTS[1], answer="Sligo", target=FACTS[1].answer)
    (scores,) = rewrite_scores(taught, [fact], BANK)
    assert scores.efficacy == 1.0
    assert scores.efficacy_magnitude > 0.5
    assert math.isnan(scores.paraphrase)
    assert math.isnan(scores.neighbourhood)


def test_bad_rewrites_are_named(taught) -> None:
    with pytest.raises(RemaskError, match=r"ada/city.*no target"):
        rewrite_scores(taught, FACTS[:1], BANK)
    with pytest.raises(RemaskError, match="nobody"):
        rewrite_scores(taught, [replace(FACTS[0], target="Varna", neighbours=("nobody",))], BANK)


# ------------------------------------------------------------------ the table
def entries() -> dict[str, dict[str, str]]:
    """Heading -> {"Formula": ..., "Direction": ..., ...} of docs/metrics.md."""
    page = {}
    for part in re.split(r"^### ", PAGE.read_text("utf-8"), flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        page[name.strip()] = dict(re.findall(r"^- \*\*(\w+)\*\*: (.+)$", body, flags=re.MULTILINE))
    return page


def test_every_metric_has_its_entry_and_every_entry_its_metric() -> None:
    assert sorted(entries()) == sorted(METRICS)


@pytest.mark.parametrize("name", METRICS)
def test_the_page_says_what_the_table_says(name: str) -> None:
    metric, entry = METRICS[name], entries()[name]
    assert set(entry) >= {"Formula", "Direction", "Estimator", "Range"}
    assert entry["Direction"].startswith(f"forget {metric.forget}, retain {metric.retain}")
    assert entry["Range"].startswith(f"{metric.low:g} to {metric.high:g}, {metric.unit}")
    assert ("Reference" in entry) == metric.needs_reference
    assert f"`{metric.function.__module__.rpartition('.')[2]}.{metric.function.__name__}" in entry["Formula"]


def test_ranges_are_ordered() -> None:
    assert all(metric.low < metric.high for metric in METRICS.values())
