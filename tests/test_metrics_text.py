"""ROUGE against the rouge-score package, n-gram entropy against its definition, MUSE's scores, empty generations."""

from __future__ import annotations

import math

import nltk
import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats

from conftest import FACTS, build_toy
from remask.diffusion.sampler import SamplerConfig, generate
from remask.errors import RemaskError
from remask.evaluation.generation import answers
from remask.evaluation.metrics.muse import (
    first_answer,
    knowledge_memorisation,
    muse_rouge,
    verbatim_memorisation,
)
from remask.evaluation.metrics.text import exact_match, junk, junk_rate, n_gram_entropy, rouge_l, rouge_l_recall
from remask.facts import knowledge_prompt

WORDS = "the novels published novel of crowing cats running ran quickly's city, 東京 1931 O'Neill".split()


# ------------------------------------------------------------------ ROUGE
@pytest.mark.parametrize("stem", [True, False])
def test_rouge_is_rouge_score(stem: bool) -> None:
    peer = RougeScorer(["rougeL"], use_stemmer=stem)
    rng = np.random.default_rng(0)
    for _ in range(80):
        output, reference = (" ".join(rng.choice(WORDS, rng.integers(0, 15))) for _ in range(2))
        want = peer.score(reference, output)["rougeL"]  # rouge-score takes the truth first
        score = rouge_l(output, reference, stem=stem)
        assert (score.precision, score.recall, score.f1) == (want.precision, want.recall, want.fmeasure)
        if stem:
            assert rouge_l_recall(output, reference) == want.recall


def test_rouge_by_hand() -> None:
    score = rouge_l("the old cat sat", "the cat sat on the mat")
    assert (score.precision, score.recall) == pytest.approx((3 / 4, 3 / 6))
    assert score.f1 == pytest.approx(2 * 0.75 * 0.5 / 1.25)


def test_stemming_is_the_difference_between_tofu_and_muse() -> None:
    assert rouge_l("He publishes novels", "he published a novel").recall == pytest.approx(3 / 4)
    assert rouge_l("He publishes novels", "he published a novel", stem=False).recall == pytest.approx(1 / 4)


@pytest.mark.parametrize("output", ["", "   ", "...", "\n\n"])
def test_empty_generations_have_every_text_metric(output: str) -> None:
    score = rouge_l(output, "Lucca")
    assert (score.precision, score.recall, score.f1) == (0, 0, 0)
    assert muse_rouge([output], ["Lucca"]) == pytest.approx([0.0])
    assert n_gram_entropy(output) == 0.0
    assert not exact_match(output, "Lucca")
    assert junk(output) == "empty"
    assert first_answer(output) in ("", "...")


# ------------------------------------------------------------------ fluency and junk
def test_entropy_by_hand() -> None:
    """Three bigrams, one of them twice: 4 in all; three trigrams, all different."""
    bigrams = -(0.5 * math.log2(0.5) + 2 * 0.25 * math.log2(0.25))
    assert n_gram_entropy("a b a b c") == pytest.approx((2 / 3 * bigrams + 4 / 3 * math.log2(3)) / 2)
    assert n_gram_entropy("a b a b a b a") == pytest.approx((2 / 3 * 1 + 4 / 3 * stats.entropy([3, 2], base=2)) / 2)
    assert n_gram_entropy("no no no no no no") == 0.0
    assert n_gram_entropy("word") == 0.0
    assert n_gram_entropy("two words") == 0.0


def test_entropy_is_romes_formula() -> None:
    """NLTK's n-grams and counts, as ROME and RWKU take them, on pieces that its data-free tokenizer gives."""
    rng = np.random.default_rng(1)
    for _ in range(30):
        text = " ".join(rng.choice([*WORDS, ".", "!?"], 40))
        pieces = nltk.wordpunct_tokenize(text)
        want = []
        for size, weight in ((2, 2 / 3), (3, 4 / 3)):
            counts = np.array(list(nltk.FreqDist(nltk.ngrams(pieces, size)).values()))
            share = counts / counts.sum()
            want.append(weight * -(share * np.log2(share)).sum())
        assert n_gram_entropy(text) == pytest.approx(np.mean(want))


def test_loops_are_less_fluent_than_sentences() -> None:
    assert n_gram_entropy("the cat sat on the mat and ate") > n_gram_entropy("the cat the cat the cat the cat")


def test_junk_rate_counts_what_junk_names() -> None:
    assert junk_rate(["Lucca", "", "born born", "a tame crow"]) == 0.5
    assert math.isnan(junk_rate([]))


# ------------------------------------------------------------------ MUSE
def test_muse_scores_are_percent_of_unstemmed_f1() -> None:
    peer = RougeScorer(["rougeL"], use_stemmer=False)
    outputs, references = ["He publishes novels", "", "the cat"], ["he published a novel", "x", "the cat"]
    want = [100 * peer.score(r, o)["rougeL"].fmeasure for o, r in zip(outputs, references, strict=True)]
    assert muse_rouge(outputs, references) == pytest.approx(want)
    assert want[2] == 100
    with pytest.raises(RemaskError, match="pair"):
        muse_rouge(["a"], [])


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        (" Lucca\n\nQuestion: Who?", "Lucca"),
        ("Lucca Question: Who?", "Lucca"),
        ("Lucca\nin Italy", "Lucca\nin Italy"),
        ("Lucca\n  \nmore", "Lucca"),
        ("Question: Who?", ""),
    ],
)
def test_a_knowledge_answer_is_cut_where_the_next_question_starts(output: str, answer: str) -> None:
    assert first_answer(output) == answer


def test_knowledge_prompt_puts_examples_first() -> None:
    prompt = knowledge_prompt("Who?", [("Where?", "Here."), ("When?", "Now.")])
    assert prompt == "Question: Where?\nAnswer: Here.\n\nQuestion: When?\nAnswer: Now.\n\nQuestion: Who?\nAnswer:"
    assert knowledge_prompt("Who?", []) == "Question: Who?\nAnswer:"


def test_verbatim_memorisation_compares_with_the_cut_continuation() -> None:
    lm = build_toy()
    sampler = SamplerConfig.default(lm, gen_length=8)
    scores = verbatim_memorisation(lm, FACTS[:3], sampler, tokens=2)
    rows = [lm.encode(fact) for fact in FACTS[:3]]
    want = muse_rouge(answers(lm, rows, sampler), [lm.decode(row.answer_ids[:2]) for row in rows])
    assert scores == pytest.approx(want)


def test_a_taught_model_remembers(taught) -> None:
    assert verbatim_memorisation(taught, FACTS, tokens=16).mean() > 90


def test_knowledge_memorisation_asks_after_the_examples() -> None:
    lm = build_toy()
    sampler = SamplerConfig.default(lm, gen_length=8)
    scores = knowledge_memorisation(lm, FACTS[1:2], [("Who?", "Me.")], sampler)
    ids = lm.encode_prompt(knowledge_prompt(FACTS[1].prompt, [("Who?", "Me.")]))
    output = lm.decode(generate(lm, [ids], sampler, keys=[FACTS[1].id])[0].response)
    assert scores == pytest.approx(muse_rouge([first_answer(output)], [FACTS[1].answer]))
