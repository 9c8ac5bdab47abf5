"""TOFU (Maini et al., 2024): questions and answers about fictitious authors, from a local folder.

The folder holds the files of `locuslab/TOFU` as JSON Lines (or one JSON array): full.json, forget01.json, ... Row counts are
checked. Columns: question, answer; `_perturbed` files add paraphrased_answer, paraphrased_question and perturbed_answer (a list
of three or five wrong answers); real_authors and world_facts add option1 to option4. A `Fact` needs a subject; TOFU has none,
so the author's name is recovered from the 20 rows of each author.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import RemaskError
from ...facts import Fact
from .base import Benchmark, Probe, find_subject, split_groups
from .rows import ColumnKind, check_count, read_rows

FORGET = ("forget01", "forget05", "forget10")
HUB: dict[str, str | None] = {"locuslab/TOFU": None}
FILES = ("*.json", "*.jsonl")
LICENCE = "MIT (data card of locuslab/TOFU; Copyright (c) 2024 CMU Locus Lab)."
COLUMNS: dict[str, ColumnKind] = {"question": "text", "answer": "text"}
PERTURBED: dict[str, ColumnKind] = {
    "paraphrased_answer": "blank",
    "perturbed_answer": "texts",
    "paraphrased_question": "blank",
    **{f"option{number}": "blank" for number in range(1, 5)},
}

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
    "real_authors": 100,
    "real_authors_perturbed": 100,
    "world_facts": 117,
    "world_facts_perturbed": 117,
    "holdout01": 40,
    "holdout05": 200,
    "holdout10": 400,
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
    check_count(path, len(rows), ROWS[split], f"TOFU {split}")
    authors = [""] * len(rows) if split.startswith(("real", "world")) else _authors(rows)
    base = split.removesuffix("_perturbed")
    return [
        Fact(
            id=f"tofu/{base}/{index:04d}",
            prompt=row["question"],
            subject=find_subject(row["question"], author),
            answer=row["answer"],
            group=author,
            paraphrases=(row["paraphrased_question"],) if row.get("paraphrased_question") else (),
            perturbed=tuple(row.get("perturbed_answer") or ()),
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


def load_benchmark(split: str, folder: Path) -> Benchmark:
    """The groups around one forget set.

    The retain authors of `retain_perturbed` are dealt into fit (10), validation (5) and scored (5). Probes: the forget set,
    the scored retain authors, real authors, world facts and, where its file is there, the holdout set of the same size.
    Truth ratios need wrong answers: three or five a row, published files hold both.

    Raises:
        RemaskError: as `load_tofu`, or a row of a `_perturbed` file without wrong answers.
    """
    forget = load_forget(folder, split)
    authors = {fact.group for fact in forget}
    fit, validation_retain, held = split_groups(load_tofu(folder, "retain_perturbed"), (10, 5, 5), "tofu retain")
    scored = {
        "retain": held,
        "real_authors": load_tofu(folder, "real_authors_perturbed"),
        "world_facts": load_tofu(folder, "world_facts_perturbed"),
    }
    for fact in [*forget, *(fact for facts in scored.values() for fact in facts)]:
        if not fact.perturbed:
            raise RemaskError(f"{folder}: {fact.id} has no perturbed_answer; use the _perturbed files as published")
    probes = {"forget": Probe("question", "forget", forget)}
    probes |= {name: Probe("question", "retain", facts) for name, facts in scored.items()}
    holdout = split.replace("forget", "holdout")
    notes: tuple[str, ...] = ()
    if (folder / f"{holdout}.json").is_file():
        probes["holdout"] = Probe("question", "holdout", load_tofu(folder, holdout))
    else:
        notes = (f"{holdout}.json is not in the folder: no fresh authors for membership inference",)
    return Benchmark(
        name=f"tofu:{split}",
        forget=forget,
        fit=fit,
        scored=scored,
        validation=[fact for fact in load_forget(folder, "forget10") if fact.group not in authors],
        validation_retain=validation_retain,
        probes=probes,
        licence=LICENCE,
        notes=notes,
    )


def _read(path: Path) -> list[dict[str, Any]]:
    """JSON Lines, or one JSON array as the holdout files are."""
    return [row for _, row in read_rows(path, COLUMNS, PERTURBED)]


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
