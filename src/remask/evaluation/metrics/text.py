"""Metrics on generated text: exact match, ROUGE-L, junk."""

from __future__ import annotations

import functools
import re

from rouge_score.rouge_scorer import RougeScorer

_WORD = re.compile(r"\w+(?:['’-]\w+)*")


def exact_match(output: str, reference: str) -> bool:
    """Whether the texts are equal up to surrounding white space."""
    return output.strip() == reference.strip()


def rouge_l_recall(output: str, reference: str) -> float:
    """ROUGE-L recall with stemming (TOFU's ROUGE), 0..1; rises with output length, so read it beside the junk rate."""
    return float(_scorer().score(reference, output)["rougeL"].recall)


@functools.cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)


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
