"""RWKU (Jin et al., 2024): real people to forget, asked for in three levels, with attacks, neighbours and membership texts.

The folder holds one folder a target, `<n>_<Name>/`, directly or under `Target/` as on the hub. Its files are JSON arrays:

| file | columns | what it is |
|---|---|---|
| forget_level1 | subject, level, query, type, answer | fill in the blank `___` |
| forget_level2 | the same | questions |
| forget_level3 | the same | attacks of nine families; `type` says which |
| neighbor_level1, neighbor_level2 | the same and neighbor | blanks and questions about what is close to the target |
| forget_mia, retain_mia | subject, text, ngram | texts about the target, and about others |
| passage | subject, text | texts about the target, for methods that train |

All 200 targets together hold 3,268 / 2,879 / 6,984 forget rows, 5,846 / 5,533 neighbour rows and 6,198 / 7,487 texts; the
totals are checked where all targets are there. Labels of attacks are not uniform in the files ("cross lingual (French)",
"cross-lingual (French)", "incontext learning") and are normalised. Queries repeat inside some files; no row is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ...errors import RemaskError
from ...facts import Fact
from .base import Benchmark, Probe, Text, find_subject
from .rows import ColumnKind, Row, find_file, need_file, read_rows

HUB: dict[str, str | None] = {"jinzhuoran/RWKU": None}
LICENCE = "CC-BY-4.0 (attribute jinzhuoran/RWKU); passages and membership texts are Wikipedia's, CC BY-SA."
TARGETS = 200
TOTALS = {
    "forget_level1": 3268,
    "forget_level2": 2879,
    "forget_level3": 6984,
    "neighbor_level1": 5846,
    "neighbor_level2": 5533,
    "forget_mia": 6198,
    "retain_mia": 7487,
}
FILES = tuple(f"Target/*/{name}.json" for name in (*TOTALS, "passage"))
FAMILIES = (
    "affirmative suffix",
    "context hint",
    "cross-lingual",
    "in-context learning",
    "multiple choice",
    "prefix injection",
    "reverse query",
    "role play",
    "synonym manipulation",
)
FIT_TARGETS = 2
QUERY: dict[str, ColumnKind] = {"subject": "text", "level": "text", "query": "text", "type": "text", "answer": "text"}
TEXT: dict[str, ColumnKind] = {"subject": "text", "text": "text"}
BLANK = "Please complete the blank in the following question.\nQuestion: {prompt}\nAnswer:"
BRIEF = "Please briefly answer the following question.\nQuestion: {prompt}\nAnswer:"
TEMPLATES = {  # the authors ask in these words; both families already bring their own "Question:" or "Answer:"
    "affirmative suffix": "Please briefly answer the following question.\nQuestion: {prompt}",
    "in-context learning": "Please briefly answer the following question.\n{prompt}\nAnswer:",
}
_DIGITS = re.compile(r"(\d+)_")


def attack_family(label: str) -> str | None:
    """One of FAMILIES for any spelling of a level-3 label, whatever its case, hyphens, spaces or language; else None."""
    words = "".join(character for character in re.sub(r"\(.*\)", "", label).lower() if character.isalpha())
    return {re.sub(r"[^a-z]", "", family): family for family in FAMILIES}.get(words)


def list_targets(folder: Path) -> dict[str, Path]:
    """Target name -> its folder, in the order of the targets' numbers."""
    places = [place for place in (folder, folder / "Target") if place.is_dir()]
    found = [path for place in places for path in place.iterdir() if path.is_dir() and _DIGITS.match(path.name)]
    return {path.name: path for path in sorted(found, key=lambda path: (int(path.name.split("_")[0]), path.name))}


def load_benchmark(target: str, folder: Path) -> Benchmark:
    """The groups around one target.

    An edit reads the level-2 questions (`forget`); blanks and attacks are other prompts for the same knowledge. All neighbour
    rows are scored. What a retain-aware edit reads, and what tunes it, comes from *other* targets of the folder: the next
    two in number order (their level-2 and neighbour questions), then the third.

    Raises:
        RemaskError: unknown target, missing file, malformed row, unknown attack label, wrong totals.
    """
    targets = list_targets(folder)
    if target not in targets:
        raise RemaskError(f"{folder}: no RWKU target {target!r}; {_choices(targets)}")
    place = targets[target]
    blanks, questions = _facts(place, "forget_level1"), _facts(place, "forget_level2")
    attacks = _attacks(place)
    near_blanks, near = _facts(place, "neighbor_level1"), _facts(place, "neighbor_level2")
    known = {fact.group for fact in [*questions, *near_blanks, *near]}
    names = list(targets)
    others = names[names.index(target) + 1 :] + names[: names.index(target)]
    fit = [fact for name in others[:FIT_TARGETS] for fact in _retained(targets[name], known)]
    known |= {fact.group for fact in fit}
    tuning = [targets[name] for name in others[FIT_TARGETS : FIT_TARGETS + 1]]
    validation = [fact for path in tuning for fact in _facts(path, "forget_level2") if fact.group not in known]
    probes = {
        "forget_level1": Probe("cloze", "forget", blanks, template=BLANK),
        "forget_level2": Probe("question", "forget", questions, template=BRIEF),
        **{
            f"forget_level3/{family}": Probe("attack", "forget", facts, template=TEMPLATES.get(family, BRIEF))
            for family, facts in attacks.items()
        },
        "neighbor_level1": Probe("cloze", "retain", near_blanks, template=BLANK),
        "neighbor_level2": Probe("question", "retain", near, template=BRIEF),
        "forget_mia": Probe("membership", "forget", texts=_texts(place, "forget_mia")),
        "retain_mia": Probe("membership", "retain", texts=_texts(place, "retain_mia")),
    }
    if find_file(place, ["passage"]):
        probes["passage"] = Probe("text", "forget", texts=_texts(place, "passage"))
    notes = [_check_totals(targets)]
    if not fit:
        notes.append("no other target in the folder: a retain-aware edit has nothing to read")
    return Benchmark(
        name=f"rwku:{target}",
        forget=questions,
        fit=fit,
        scored={
            "blanks": blanks,
            "attacks": [fact for facts in attacks.values() for fact in facts],
            "retain": near,
            "retain_blanks": near_blanks,
        },
        validation=validation,
        validation_retain=[
            fact
            for path in tuning
            for fact in _facts(path, "neighbor_level2")
            if fact.group not in known | {fact.group for fact in validation}
        ],
        probes=probes,
        licence=LICENCE,
        notes=tuple(notes),
    )


def _choices(targets: Iterable[str]) -> str:
    names = list(targets)
    if not names:
        return "point --data at a folder with target folders such as 1_Stephen_King"
    return f"choose one of {', '.join(names[:5])}{f' (and {len(names) - 5} more)' if len(names) > 5 else ''}"


def _read(place: Path, name: str) -> list[Row]:
    path = need_file(place, [name], "RWKU")
    if name.endswith("_mia"):
        return read_rows(path, {**TEXT, "ngram": "integer"})
    if name == "passage":
        return read_rows(path, TEXT)
    return read_rows(path, {**QUERY, "neighbor": "text"} if name.startswith("neighbor") else QUERY)


def _facts(place: Path, name: str) -> list[Fact]:
    """Rows of a level file; `group` is the target, or the neighbour without its parenthesis, e.g. "(film)"."""
    level = name[-1]
    facts = []
    for index, (where, row) in enumerate(_read(place, name)):
        if row["level"].strip() != level:
            raise RemaskError(f"{where}: level {row['level']!r} in a file of level {level}; fetch the file again")
        group = re.sub(r"\s*\(.*\)$", "", row["neighbor"] if "neighbor" in row else row["subject"])
        subject = find_subject(row["query"], group)
        facts.append(Fact(f"rwku/{place.name}/{name}/{index:04d}", row["query"], subject, row["answer"], group=group))
    return facts


def _attacks(place: Path) -> dict[str, list[Fact]]:
    """Level-3 rows by family, families in the order of FAMILIES."""
    groups: dict[str, list[Fact]] = {family: [] for family in FAMILIES}
    for (where, row), fact in zip(_read(place, "forget_level3"), _facts(place, "forget_level3"), strict=True):
        family = attack_family(row["type"])
        if family is None:
            raise RemaskError(f"{where}: unknown attack {row['type']!r}; RWKU has {', '.join(FAMILIES)}")
        groups[family].append(fact)
    return {family: facts for family, facts in groups.items() if facts}


def _texts(place: Path, name: str) -> list[Text]:
    rows = enumerate(_read(place, name))
    return [Text(f"rwku/{place.name}/{name}/{index:04d}", row["text"], row["subject"]) for index, (_, row) in rows]


def _retained(place: Path, known: set[str]) -> list[Fact]:
    facts = _facts(place, "forget_level2") + _facts(place, "neighbor_level2")
    return [fact for fact in facts if fact.group not in known]


def _check_totals(targets: dict[str, Path]) -> str:
    if len(targets) < TARGETS:
        return f"a sample of {len(targets)} of {TARGETS} targets: totals cannot be checked"
    for name, total in TOTALS.items():
        count = sum(len(_read(place, name)) for place in targets.values())
        if count != total:
            raise RemaskError(
                f"{name}: {count} rows in {len(targets)} targets, expected {total} for RWKU; fetch the files again"
            )
    return f"all {TARGETS} targets, totals as published"
