"""Metrics on generated text: exact match, ROUGE-L, n-gram entropy, junk. An empty generation is a text like any other."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import entropy

_PIECE = re.compile(r"\w+|[^\w\s]+")
_WORD = re.compile(r"\w+(?:['’-]\w+)*")


def exact_match(output: str, reference: str) -> bool:
    """Whether the texts are equal up to surrounding white space."""
    return output.strip() == reference.strip()


def rouge_l_recall(output: str, reference: str) -> float:
    """ROUGE-L recall with stemming (TOFU's ROUGE), 0..1; rises with output length, so read it beside the junk rate."""
    return rouge_l(output, reference).recall


@dataclass(frozen=True)
class Rouge:
    """ROUGE-L of one output: common subsequence over output words, over reference words, and their harmonic mean; 0..1."""

    precision: float
    recall: float
    f1: float


def rouge_l(output: str, reference: str, *, stem: bool = True) -> Rouge:
    """ROUGE-L by the rouge-score package (Lin, 2004); 0 for an empty output.

    Args:
        output: generated text.
        reference: true text.
        stem: Porter stemming, as TOFU does; MUSE does not.
    """
    score = _scorer(stem).score(reference, output)["rougeL"]
    return Rouge(float(score.precision), float(score.recall), float(score.fmeasure))


@functools.cache
def _scorer(stem: bool) -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=stem)


def n_gram_entropy(output: str) -> float:
    """Fluency: (2/3 H_2 + 4/3 H_3) / 2 with H_n the entropy in bits of the text's n-grams (ROME's and RWKU's weights).

    Low for loops, and for short texts too: H_n is at most log2 of the number of n-grams, so only texts of like length compare.
    Tokens are runs of word characters or of punctuation; the originals' tokenizer needs a download. No n-grams, no entropy: 0.
    """
    pieces = _PIECE.findall(output)
    total = 0.0
    for size, weight in ((2, 2 / 3), (3, 4 / 3)):
        counts = Counter(zip(*(pieces[i:] for i in range(size)), strict=False))
        if counts:
            total += weight * float(entropy(list(counts.values()), base=2))
    return total / 2


def junk_rate(outputs: Sequence[str]) -> float:
    """Share of outputs that `junk` names, 0..1; NaN for none."""
    return float(np.mean([junk(output) is not None for output in outputs])) if outputs else float("nan")


def junk(output: str) -> str | None:
    """Why an output is not an answer at all, or None. A low ROUGE from junk is not forgetting.

    - `empty`: no letter or digit;
    - `mask`: a mask token is left;
    - `repeats`: a word follows itself with nothing but white space between, or a run of 2-4 words does;
    - `few words`: six or more words, fewer than half of them distinct;
    - `symbols`: fewer than 60 % of the characters are letters, digits or spaces.

    Word salad without repetition passes: read some outputs.
    """
    if "<mask>" in output or "<|mdm_mask|>" in output:
        return "mask"
    found = list(_WORD.finditer(output))
    words = [match.group().lower() for match in found]
    if not words:
        return "empty"
    if sum(char.isalnum() or char.isspace() for char in output) < 0.6 * len(output):
        return "symbols"
    for size in range(1, 5):
        for i in range(len(words) - 2 * size + 1):
            if words[i : i + size] != words[i + size : i + 2 * size]:
                continue
            # A single word repeats itself only across white space: "J.R.R.", "Singapore, Singapore", "her. Her" are language.
            if size > 1 or output[found[i].end() : found[i + 1].start()].isspace():
                return "repeats"
    if len(words) >= 6 and len(set(words)) < len(words) / 2:
        return "few words"
    return None
