"""zsRE (Levy et al., 2017) as prepared by MEND (Mitchell et al., 2022): questions whose answer is to be rewritten.

Files `zsre_mend_eval` (19,086 rows), `zsre_mend_train`, or the first rows of the training set, `zsre_mend_train-1k` (1,000),
as one JSON array. Columns: subject, src (the question), pred (a model's answer), rephrase, alt (the new answer; empty in some
rows), answers (accepted answers), loc (an unrelated Natural Questions query, prefixed "nq question: "), loc_ans, cond.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import RemaskError
from ...facts import Fact
from .base import Benchmark, Probe, find_subject
from .rows import ColumnKind, need_file, read_rows, sample_note

SPLITS = {"eval": "zsre_mend_eval", "train": "zsre_mend_train", "train-1k": "zsre_mend_train-1k"}
COMPLETE = {"eval": 19_086, "train-1k": 1_000}
LICENCE = "MIT (MEND, EasyEdit); derived from zsRE and Natural Questions (CC BY-SA 3.0)."
COLUMNS: dict[str, ColumnKind] = {
    "subject": "text",
    "src": "text",
    "pred": "blank",
    "rephrase": "text",
    "alt": "blank",
    "answers": "texts",
    "loc": "text",
    "loc_ans": "text",
    "cond": "blank",
}
FIT_SHARE = 10


def load_benchmark(split: str, folder: Path) -> Benchmark:
    """`eval`, `train` or `train-1k`.

    A fact's answer is the first accepted one, its target `alt` (None where that is empty). Scored: the rephrased questions,
    and as `retain` the unrelated ones with a question mark, as ROME asks them; every tenth of these is left to `fit`.

    Raises:
        RemaskError: missing file, malformed row, a row without answers, a subject that its question lacks.
    """
    path = need_file(folder, [SPLITS[split]], "zsRE")
    forget, rephrased, unrelated = [], [], []
    for index, (where, row) in enumerate(read_rows(path, COLUMNS)):
        fact, other = _facts(where, f"zsre/{split}/{index:05d}", row)
        forget.append(fact)
        rephrased.append(
            Fact(
                f"{fact.id}/rephrase",
                row["rephrase"],
                find_subject(row["rephrase"], fact.subject),
                fact.answer,
                target=fact.target,
                group=fact.group,
            )
        )
        unrelated.append(other)
    fit = unrelated[FIT_SHARE - 1 :: FIT_SHARE]
    read = {fact.prompt for fact in fit}
    retain = [fact for fact in unrelated if fact.prompt not in read]
    notes = [sample_note(path, len(forget), {split: COMPLETE[split]})] if split in COMPLETE else []
    notes.append(f"retain: the unrelated questions less the {len(unrelated) - len(retain)} whose text `fit` holds")
    return Benchmark(
        name=f"zsre:{split}",
        forget=forget,
        fit=fit,
        scored={"paraphrase": rephrased, "retain": retain},
        validation=[],
        validation_retain=[],
        probes={
            "rewrite": Probe("question", "forget", forget),
            "paraphrase": Probe("question", "forget", rephrased),
            "unrelated": Probe("question", "retain", retain),
        },
        licence=LICENCE,
        notes=tuple(notes),
    )


def _facts(where: str, name: str, row: dict[str, Any]) -> tuple[Fact, Fact]:
    """The fact to rewrite, and the unrelated one that must stay."""
    answers = [answer for answer in row["answers"] if answer.strip()]
    if not answers:
        raise RemaskError(f"{where}: column 'answers' holds no answer; give at least one")
    new = row["alt"] if row["alt"].strip() else None
    try:
        question = f"{row['loc']}?"
        other = Fact(f"{name}/unrelated", question, question, row["loc_ans"])
        fact = Fact(
            name,
            row["src"],
            row["subject"],
            answers[0],
            target=new,
            group=row["subject"],
            paraphrases=(row["rephrase"],),
            neighbours=(other.id,),
            perturbed=(new,) if new else (),
        )
    except RemaskError as error:
        raise RemaskError(f"{where}: {error}") from None
    return fact, other
