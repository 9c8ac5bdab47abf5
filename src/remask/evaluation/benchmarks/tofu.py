"""TOFU (Maini et al., 2024): questions and answers about fictitious authors, from a local folder.

The folder holds the files of `locuslab/TOFU` as JSON Lines (or one JSON array): full.json, forget01.json, ... Row counts are
checked. A `Fact` needs a subject; TOFU has none, so the author's name is recovered from the 20 rows of each author.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import RemaskError
from ...facts import Fact, read_jsonl

ROWS = {
    "full": 4000,
    "forget01": 40,
    "forget05": 200,
    "forget10": 400,
    "retain99": 3960,
    "retain95": 3800,
    "retain90": 3600,
    "forget01_perturbed": 40,
    "forget05_perturbed": 200,
    "forget10_perturbed": 400,
    "retain_perturbed": 400,
    "real_authors_perturbed": 100,
    "world_facts_perturbed": 117,
}
ROWS_PER_AUTHOR = 20
_NAME = re.compile(r"(?:[^\W\d_][\w.'’-]* ){1,3}[^\W\d_][\w.'’-]*")


def load_tofu(folder: str | Path, split: str) -> list[Fact]:
    """Facts of one split; `group` is the author's name, ids are `tofu/<split without _perturbed>/<row>`.

    Raises:
        RemaskError: unknown split, missing file, malformed row (file and line), wrong row count.
    """
    if split not in ROWS:
        raise RemaskError(f"TOFU has no split {split!r}; choose one of {', '.join(ROWS)}")
    path = Path(folder) / f"{split}.json"
    rows = _read(path)
    if len(rows) != ROWS[split]:
        raise RemaskError(f"{path}: {len(rows)} rows, expected {ROWS[split]} for TOFU {split}")
    authors = _authors(rows) if split.startswith(("full", "forget", "retain")) else [""] * len(rows)
    base = split.removesuffix("_perturbed")
    return [
        Fact(
            id=f"tofu/{base}/{index:04d}",
            prompt=row["question"],
            subject=_subject(row["question"], author),
            answer=row["answer"],
            group=author,
            paraphrases=(row["paraphrased_question"],) if row.get("paraphrased_question") else (),
            perturbed=tuple(row.get("perturbed_answer", ())),
            paraphrased_answer=row.get("paraphrased_answer"),
        )
        for index, (row, author) in enumerate(zip(rows, authors, strict=True))
    ]


def load_forget(folder: str | Path, split: str) -> list[Fact]:
    """A forget split with its paraphrases and wrong answers (the `_perturbed` file holds the same rows, in order)."""
    plain, rich = load_tofu(folder, split), load_tofu(folder, f"{split}_perturbed")
    if [fact.prompt for fact in plain] != [fact.prompt for fact in rich]:
        raise RemaskError(f"{folder}: {split}_perturbed.json does not hold the questions of {split}.json in order")
    return [replace(fact, group=other.group, subject=other.subject) for fact, other in zip(rich, plain, strict=True)]


def _read(path: Path) -> list[dict[str, Any]]:
    """JSON Lines, or one JSON array as the holdout files are."""
    if not path.is_file():
        raise RemaskError(f"{path}: no such file; point --data at a folder with the TOFU files")
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        try:
            rows = list(enumerate(json.loads(text), 1))
        except json.JSONDecodeError as error:
            raise RemaskError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    else:
        rows = list(read_jsonl(path))
    for number, row in rows:
        if not isinstance(row, dict):
            raise RemaskError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
        for name in ("question", "answer"):
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise RemaskError(f"{path}, line {number}: column {name!r} is missing or empty")
        wrong = row.get("perturbed_answer", [])
        if not isinstance(wrong, list) or not all(isinstance(answer, str) for answer in wrong):
            raise RemaskError(f"{path}, line {number}: column 'perturbed_answer' must be a list of texts")
        for name in ("paraphrased_answer", "paraphrased_question"):
            if not isinstance(row.get(name, ""), str):
                raise RemaskError(f"{path}, line {number}: column {name!r} must be a text")
    return [row for _, row in rows]


def _authors(rows: list[dict[str, Any]]) -> list[str]:
    """The name that most of an author's 20 rows contain, repeated per row."""
    names: list[str] = []
    for start in range(0, len(rows), ROWS_PER_AUTHOR):
        block = rows[start : start + ROWS_PER_AUTHOR]
        counts: Counter[str] = Counter()
        for row in block:
            found: set[str] = set()
            for match in _NAME.findall(f"{row['question']} {row['answer']}"):
                words = [re.sub(r"['’]s?$", "", word).rstrip(".") for word in match.split()]
                found |= {
                    " ".join(words[i:j])
                    for i in range(len(words))
                    for j in range(i + 2, len(words) + 1)
                    if all(word[:1].isupper() for word in words[i:j])
                }
            counts.update(found)
        best = max(counts, key=lambda name: (counts[name] >= max(counts.values()) - 2, len(name.split()), counts[name]))
        names += [best] * len(block)
    return names


def _subject(question: str, author: str) -> str:
    """The author's name or its longest part that the question contains; the whole question where it names nobody."""
    words = author.split()
    for size in range(len(words), 0, -1):
        for start in range(len(words) - size + 1):
            part = " ".join(words[start : start + size])
            if part and part in question:
                return part
    return question
