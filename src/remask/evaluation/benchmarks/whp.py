"""WHP ("Who's Harry Potter", Eldan and Russinovich, 2023): completions of a text that should be forgotten.

There is no published prompt file, so the prompts are the user's: `forget.jsonl`, `retain.jsonl` (completions about anything
else) and optionally `fit.jsonl` (what a retain-aware edit may read), one object a line with the columns

    prompt       how the text starts
    completion   how it goes on
    subject      optional: the span of the prompt that names the entity; by default the whole prompt
    group        optional: entity or chapter

**Definition.** The score is the mean over prompts of log p(completion | prompt) / L, in nats a token, L the tokens of the
completion. It is *not* the paper's familiarity score, for which a GPT-4 judge grades about 300 open completions from 0 to 3.
"""

from __future__ import annotations

from pathlib import Path

from ...errors import RemaskError
from ...facts import Fact
from .base import Benchmark, Probe
from .rows import need_file, read_rows

LICENCE = "The user's own prompts; quotations remain under their authors' copyright."


def load_benchmark(folder: Path) -> Benchmark:
    """The user's completions; every forget prompt is read by the edit and scored.

    Raises:
        RemaskError: missing `forget` or `retain` file, malformed row, or a prompt of `fit` that is also scored.
    """
    forget, retain = _completions(folder, "forget"), _completions(folder, "retain")
    fit = _completions(folder, "fit") if any((folder / f"fit{end}").is_file() for end in (".json", ".jsonl")) else []
    scored = {fact.prompt for fact in [*forget, *retain]}
    for fact in fit:
        if fact.prompt in scored:
            raise RemaskError(
                f"{folder}: {fact.id} is also in forget or retain; an edit may not read what is scored, remove it"
            )
    return Benchmark(
        name="whp",
        forget=forget,
        fit=fit,
        scored={"retain": retain},
        validation=[],
        validation_retain=[],
        probes={
            "completions_forget": Probe("completion", "forget", forget),
            "completions_retain": Probe("completion", "retain", retain),
        },
        licence=LICENCE,
        notes=(
            f"{len(forget)} prompts given by the user: mean log p(completion | prompt) a token, not the paper's familiarity",
        ),
    )


def _completions(folder: Path, name: str) -> list[Fact]:
    path = need_file(folder, [name], "WHP")
    facts = []
    for index, (where, row) in enumerate(
        read_rows(path, {"prompt": "text", "completion": "text"}, {"subject": "text", "group": "blank"})
    ):
        try:
            subject = row.get("subject") or row["prompt"]
            facts.append(
                Fact(f"whp/{name}/{index:04d}", row["prompt"], subject, row["completion"], group=row.get("group") or "")
            )
        except RemaskError as error:
            raise RemaskError(f"{where}: {error}") from None
    return facts
