"""WMDP (Li et al., 2024): multiple-choice questions that stand in for hazardous knowledge.

Columns: question, choices (four texts), answer (index of the right one). Files, tried in this order: the hub's
`wmdp-bio/test-00000-of-00001.parquet`, `wmdp-bio`, `bio-questions` (likewise chem, cyber), as JSON, JSON Lines or Parquet. The
utility partner is MMLU: a file `mmlu` of the same layout (a column `subject` is allowed) becomes the retain group.

The hub set changed: 1,520 / 412 / 2,225 questions in March 2024, 1,273 / 408 / 1,987 since April 2024. The revision is
therefore pinned to the commit of the last upload, and a note states which release was read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import RemaskError
from ...facts import Fact
from .base import Benchmark, Choice, Probe
from .rows import ColumnKind, find_file, need_file, read_rows, sample_note

REVISION = "ef23edde7c8cf8bc53ce769f3faa8ce57499c903"
HUB: dict[str, str | None] = {"cais/wmdp": REVISION}
FILES = ("wmdp-*/*", "wmdp-*")
LICENCE = "MIT (data card of cais/wmdp); hazard proxies, for evaluation only: do not pass on."
ROWS = {
    "bio": {"April 2024": 1273, "March 2024": 1520},
    "chem": {"April 2024": 408, "March 2024": 412},
    "cyber": {"April 2024": 1987, "March 2024": 2225},
}
FIELD = {"bio": "biology", "chem": "chemistry", "cyber": "cybersecurity"}
CHOICES = 4
COLUMNS: dict[str, ColumnKind] = {"question": "text", "choices": "texts", "answer": "integer"}


def load_benchmark(field: str, folder: Path) -> Benchmark:
    """Questions of one field; `forget` holds each right answer with the three others as its `perturbed`.

    Raises:
        RemaskError: missing file, malformed row, more rows than were published.
    """
    path = need_file(folder, [f"wmdp-{field}/test", f"wmdp-{field}", f"{field}-questions"], "WMDP")
    rows = read_rows(path, COLUMNS)
    notes = [sample_note(path, len(rows), ROWS[field])]
    choices = _choices(rows, f"wmdp/{field}")
    probes = {"questions": Probe("choice", "forget", choices=choices, template=_template(FIELD[field]))}
    scored: dict[str, list[Fact]] = {}
    utility = find_file(folder, ["mmlu"])
    if utility:
        kept = _choices(read_rows(utility, COLUMNS, {"subject": "blank"}), "mmlu")
        probes["mmlu"] = Probe("choice", "retain", choices=kept)
        scored["retain"] = [_fact(choice) for choice in kept]
    else:
        notes.append("no mmlu file: there is no retain group, and what forgetting cost cannot be measured")
    return Benchmark(
        name=f"wmdp:{field}",
        forget=[_fact(choice) for choice in choices],
        fit=[],
        scored=scored,
        validation=[],
        validation_retain=[],
        probes=probes,
        licence=LICENCE,
        notes=tuple(notes),
    )


def _template(field: str) -> str:
    return f"The following are multiple choice questions (with answers) about {field}.\n\n{{prompt}}\nAnswer:"


def _choices(rows: list[tuple[str, dict[str, Any]]], prefix: str) -> list[Choice]:
    choices = []
    for index, (where, row) in enumerate(rows):
        options, answer = row["choices"], row["answer"]
        if len(options) != CHOICES or not all(option.strip() for option in options) or not 0 <= answer < CHOICES:
            raise RemaskError(
                f"{where}: expected {CHOICES} non-empty choices and an answer from 0 to {CHOICES - 1}; repair the row"
            )
        choices.append(Choice(f"{prefix}/{index:04d}", row["question"], tuple(options), answer, row.get("subject") or ""))
    return choices


def _fact(choice: Choice) -> Fact:
    wrong = tuple(option for index, option in enumerate(choice.options) if index != choice.answer)
    right = choice.options[choice.answer]
    return Fact(choice.id, choice.question, choice.question, right, group=choice.group, perturbed=wrong)
