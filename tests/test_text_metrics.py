"""Text metrics: hand-computed values, an independent longest common subsequence, and what junk is and is not."""

from __future__ import annotations

import numpy as np
import pytest

from remask.assets.world import world
from remask.evaluation.benchmarks.tofu import load_tofu
from remask.evaluation.metrics.text import exact_match, junk, rouge_l_recall
from test_tofu import DATA, real


# ------------------------------------------------------------------ exact match
@pytest.mark.parametrize(
    ("output", "reference", "equal"),
    [
        ("Lucca", "Lucca", True),
        (" Lucca \n", "Lucca", True),
        ("lucca", "Lucca", False),
        ("Lucca.", "Lucca", False),
        ("", "Lucca", False),
        ("a tame  crow", "a tame crow", False),
        ("a tame crow flies", "a tame crow", False),
    ],
)
def test_exact_match(output: str, reference: str, equal: bool) -> None:
    assert exact_match(output, reference) is equal
    assert exact_match(reference, output) is equal


# ------------------------------------------------------------------ ROUGE-L recall
REFERENCE = "the cat sat on the mat"


@pytest.mark.parametrize(
    ("output", "reference", "recall"),
    [
        (REFERENCE, REFERENCE, 1.0),
        ("the cat is on the mat", REFERENCE, 5 / 6),
        ("mat the on sat cat the", REFERENCE, 3 / 6),  # reversed: "the sat the"
        ("cat mat", REFERENCE, 2 / 6),
        ("mat cat", REFERENCE, 1 / 6),  # order counts
        ("a dog ran off", REFERENCE, 0.0),
        ("", REFERENCE, 0.0),
        ("well: the old cat quietly sat, I think, on top of the new red mat.", REFERENCE, 1.0),  # recall: length is free
        ("THE CAT", "the cat!", 1.0),  # case and punctuation do not count
        ("He publishes novels", "he published a novel", 3 / 4),  # stemmed: publish, novel
    ],
)
def test_rouge_l_recall_by_hand(output: str, reference: str, recall: float) -> None:
    assert rouge_l_recall(output, reference) == pytest.approx(recall)


def longest_common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, by its textbook recurrence."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_rouge_l_recall_is_the_longest_common_subsequence_over_the_reference() -> None:
    rng = np.random.default_rng(0)
    words = "ox cat hen dog".split()  # too short for the stemmer
    for _ in range(60):
        output, reference = ([str(w) for w in rng.choice(words, rng.integers(1, 12))] for _ in range(2))
        expected = longest_common(output, reference) / len(reference)
        assert rouge_l_recall(" ".join(output), " ".join(reference)) == pytest.approx(expected), (output, reference)


# ------------------------------------------------------------------ junk
@pytest.mark.parametrize(
    ("output", "kind"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("...", "empty"),
        ("?!, -", "empty"),
        ("<mask> of", "mask"),
        ("He was born in <mask>", "mask"),
        ("born <|mdm_mask|>", "mask"),
        ("<mask>", "mask"),
        ("Patrick Patrick was born born", "repeats"),
        ("The the novel is set in Baku", "repeats"),
        ("the river the river", "repeats"),
        ("He wrote the book of the book of the sea", "repeats"),
        ("she is a writer she is a writer", "repeats"),
        ("a b a b a b c", "repeats"),
        ("he of she he she of he", "few words"),
        ("of it in of and it of in and it", "few words"),
        ("a = ((((-))))", "symbols"),
        ("x ;;; ### $$$", "symbols"),
    ],
)
def test_junk_is_named(output: str, kind: str) -> None:
    assert junk(output) == kind


@pytest.mark.parametrize(
    "output",
    [
        "Lucca",
        "1931",
        "4",
        "a three-legged dog",
        "I have no record of Ada Birk.",
        "I don't know.",
        "The author's full name is Hsiao Yun-Hwa.",
        "Basil Mahfouz Al-Kuwaiti was born in Kuwait City, Kuwait, on 08/09/1956.",
        'Yes, Nikolai Abilov\'s books "Thieves\' Paradise" and "Kazakhstan\'s Echoes" won the Tolstoy Literary Award.',
        "His father was a florist and his mother was a game developer, and both of them encouraged him to write.",
        "The book explores love, loss, and the passage of time; the city, the sea and the sky are its heroes.",
        "Time and time again he returned to the themes of his first novel.",
        "It isn't clear who 'they' were: L'Étranger, O'Neill, 東京?",
    ],
)
def test_sentences_are_not_junk(output: str) -> None:
    assert junk(output) is None


@pytest.mark.parametrize(
    "output",
    [
        "George R.R. Martin",
        "J.R.R. Tolkien",
        "She was deeply influenced by her. Her mother was a scientist.",  # a new sentence, not a repeat
        "Elijah Tan was born in Singapore, Singapore.",
        "The author is male and was born on 05/05/1942.",
    ],
)
def test_a_word_behind_punctuation_does_not_repeat_itself(output: str) -> None:
    """Answers of TOFU: the truth must not count as junk."""
    assert junk(output) is None


def test_answers_of_the_world_are_not_junk() -> None:
    assert [fact.id for split in world().values() for fact in split if junk(fact.answer)] == []


@real
@pytest.mark.parametrize(("split", "most"), [("full", 0.01), ("real_authors_perturbed", 0.02), ("world_facts_perturbed", 0.0)])
def test_answers_of_tofu_are_hardly_ever_junk(split: str, most: float) -> None:
    facts = load_tofu(DATA, split)
    assert sum(junk(fact.answer) is not None for fact in facts) <= most * len(facts)
