"""CounterFact (Meng et al., 2022): statements whose object is to be rewritten, 21,919 cases.

Two layouts, told apart by their columns:

- original (`counterfact.json`): case_id, pararel_idx, requested_rewrite {prompt with `{}`, relation_id, subject, target_new and
  target_true {str, id}}, paraphrase_prompts, neighborhood_prompts, attribute_prompts, generation_prompts (lists);
- EasyEdit's (`counterfact-edit.json` 10,000 cases, `-train` 10,000, `-val` 1,919): case_id, prompt, subject, ground_truth,
  target_new, one rephrase_prompt, one locality_prompt with locality_ground_truth. Attribute and generation prompts are missing
  there, and ROME's paraphrase and neighbourhood scores rest on one prompt a case.

`known_1000.json` beside it (Meng et al., 2022: statements that GPT-2 XL knows; 1,209 in the file) is what a retain-aware edit
may read, less the statements about a subject of a case and those that are scored.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import RemaskError
from ...facts import Fact
from .base import Benchmark, Probe, Side, find_subject
from .rows import ColumnKind, find_file, need_file, read_rows, sample_note

SPLITS = {"edit": 10_000, "train": 10_000, "val": 1_919}
CASES = 21_919
LICENCE = "MIT (ROME, Copyright (c) 2022 Kevin Meng; EasyEdit)."
EASYEDIT: dict[str, ColumnKind] = {
    "case_id": "integer",
    "prompt": "text",
    "subject": "text",
    "ground_truth": "text",
    "target_new": "text",
    "rephrase_prompt": "text",
    "locality_prompt": "text",
    "locality_ground_truth": "text",
}
ORIGINAL: dict[str, ColumnKind] = {
    "case_id": "integer",
    "requested_rewrite": "object",
    "paraphrase_prompts": "texts",
    "neighborhood_prompts": "texts",
}
REST: dict[str, ColumnKind] = {"pararel_idx": "integer", "attribute_prompts": "texts", "generation_prompts": "texts"}
KNOWN: dict[str, ColumnKind] = {"known_id": "integer", "subject": "text", "attribute": "text", "prompt": "text"}


@dataclass(frozen=True)
class _Case:
    rewrite: Fact
    paraphrases: list[Fact]
    neighbours: list[Fact]
    attributes: list[Fact]


def load_benchmark(split: str, folder: Path) -> Benchmark:
    """`""` (the original file), `edit`, `train` or `val`.

    A fact's answer is the true object and its target the new one. Scored: paraphrases (same answer and target), and as
    `retain` the neighbourhood prompts, whose true object must stay. `attributes` (original layout) are other subjects that
    do have the new object. Generation prompts are not read: their scores need reference texts that the set does not hold.

    Raises:
        RemaskError: missing file, malformed row, a subject that its prompt lacks, more rows than were published.
    """
    path = need_file(folder, [f"counterfact-{split}" if split else "counterfact"], "CounterFact")
    cases = [_easyedit(where, row) for where, row in read_rows(path, EASYEDIT)] if split else _original(path)
    complete = {f"split {split}": SPLITS[split]} if split else {"CounterFact": CASES}
    notes = [sample_note(path, len(cases), complete)]
    forget = [case.rewrite for case in cases]
    scored = {
        "paraphrase": [fact for case in cases for fact in case.paraphrases],
        "retain": [fact for case in cases for fact in case.neighbours],
    }
    attributes = [fact for case in cases for fact in case.attributes]
    if attributes:
        scored["attributes"] = attributes
    else:
        notes.append("one paraphrase and one neighbourhood prompt a case, no attribute or generation prompts")
    prompts = {fact.prompt for facts in [forget, *scored.values()] for fact in facts}
    fit = _known(folder, {fact.subject for fact in forget}, prompts)
    if not fit:
        notes.append("known_1000.json is not in the folder: a retain-aware edit has nothing to read")
    plan: list[tuple[str, Side, list[Fact]]] = [
        ("rewrite", "forget", forget),
        ("paraphrase", "forget", scored["paraphrase"]),
        ("neighbourhood", "retain", scored["retain"]),
        ("attributes", "retain", attributes),
    ]
    return Benchmark(
        name=f"counterfact:{split}" if split else "counterfact",
        forget=forget,
        fit=fit,
        scored=scored,
        validation=[],
        validation_retain=[],
        probes={name: Probe("completion", side, facts) for name, side, facts in plan if facts},
        licence=LICENCE,
        notes=tuple(notes),
    )


def _easyedit(where: str, row: dict[str, Any]) -> _Case:
    near = [(row["locality_prompt"], row["locality_ground_truth"])]
    objects = row["ground_truth"], row["target_new"]
    return _case(where, row["case_id"], row["prompt"], row["subject"], objects, [row["rephrase_prompt"]], near, [])


def _original(path: Path) -> list[_Case]:
    cases = []
    for where, row in read_rows(path, ORIGINAL, REST):
        rewrite = row["requested_rewrite"]
        try:
            prompt, subject = rewrite["prompt"].format(rewrite["subject"]), rewrite["subject"]
            true, new = rewrite["target_true"]["str"], rewrite["target_new"]["str"]
        except (KeyError, TypeError, AttributeError, IndexError, ValueError):
            raise RemaskError(
                f"{where}: requested_rewrite needs prompt (with {{}}), subject, target_true.str and target_new.str"
            ) from None
        near = [(text, true) for text in row["neighborhood_prompts"]]
        other = [(text, new) for text in row.get("attribute_prompts") or []]
        cases.append(_case(where, row["case_id"], prompt, subject, (true, new), row["paraphrase_prompts"], near, other))
    return cases


def _case(
    where: str,
    number: int,
    prompt: str,
    subject: str,
    objects: tuple[str, str],
    paraphrases: list[str],
    near: list[tuple[str, str]],
    other: list[tuple[str, str]],
) -> _Case:
    name, (true, new) = f"counterfact/{number}", objects
    try:
        neighbours = [
            Fact(f"{name}/neighbour/{index}", text, text, answer, group=name) for index, (text, answer) in enumerate(near)
        ]
        return _Case(
            rewrite=Fact(
                name,
                prompt,
                subject,
                true,
                target=new,
                group=subject,
                paraphrases=tuple(paraphrases),
                neighbours=tuple(fact.id for fact in neighbours),
                perturbed=(new,),
            ),
            paraphrases=[
                Fact(f"{name}/paraphrase/{index}", text, find_subject(text, subject), true, target=new, group=subject)
                for index, text in enumerate(paraphrases)
            ],
            neighbours=neighbours,
            attributes=[
                Fact(f"{name}/attribute/{index}", text, text, answer, group=name) for index, (text, answer) in enumerate(other)
            ],
        )
    except RemaskError as error:
        raise RemaskError(f"{where}: {error}") from None


def load_known(folder: Path) -> list[Fact]:
    """Statements of ROME's known_1000 that hold their subject; none where the file is missing.

    Columns that other projects added to the file are left alone.
    """
    path = find_file(folder, ["known_1000"])
    return [
        Fact(f"known/{row['known_id']}", row["prompt"], row["subject"], row["attribute"], group=row["subject"])
        for _, row in (read_rows(path, KNOWN, extra=True) if path is not None else ())
        if row["subject"] in row["prompt"]
    ]


def _known(folder: Path, edited: set[str], scored: set[str]) -> list[Fact]:
    """Those that neither speak of an edited subject nor are scored otherwise."""
    return [fact for fact in load_known(folder) if fact.subject not in edited and fact.prompt not in scored]
