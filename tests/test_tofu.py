"""TOFU: the real files where they are at hand, and malformed copies that must be refused with their line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from remask.errors import RemaskError
from remask.evaluation.benchmarks.base import find_subject
from remask.evaluation.benchmarks.tofu import load_forget, load_tofu

DATA = Path(os.environ.get("REMASK_DATA") or Path(__file__).parents[2] / "shared" / "data") / "tofu"
real = pytest.mark.skipif(
    not (DATA / "full.json").is_file(),
    reason=f"no TOFU files at {DATA}: it is not part of the repository; set REMASK_DATA to a folder that holds tofu/full.json",
)


@pytest.fixture(scope="module")
def full() -> list:
    return load_tofu(DATA, "full")


def questions(split: str) -> list[tuple[str, str]]:
    """(question, answer) read without the library."""
    lines = (DATA / f"{split}.json").read_text("utf-8").splitlines()
    return [(row["question"], row["answer"]) for row in map(json.loads, lines)]


# ------------------------------------------------------------------ the real files
@real
@pytest.mark.parametrize(
    ("split", "count"),
    [  # the published sizes (Maini et al., 2024, and the data card)
        ("forget01", 40),
        ("forget05", 200),
        ("forget10", 400),
        ("retain99", 3960),
        ("retain95", 3800),
        ("retain90", 3600),
        ("forget01_perturbed", 40),
        ("forget05_perturbed", 200),
        ("forget10_perturbed", 400),
        ("retain_perturbed", 400),
        ("real_authors_perturbed", 100),
        ("world_facts_perturbed", 117),
    ],
)
def test_rows_are_complete_and_in_order(split: str, count: int) -> None:
    facts = load_tofu(DATA, split)
    assert len(facts) == count
    assert [(fact.prompt, fact.answer) for fact in facts] == questions(split)
    assert len({fact.id for fact in facts}) == count


@real
def test_full_is_retain99_and_then_forget01(full) -> None:
    assert [(fact.prompt, fact.answer) for fact in full] == questions("retain99") + questions("forget01")


@real
@pytest.mark.parametrize("split", ["forget01", "forget05", "forget10"])
def test_forget_sets_are_the_end_of_full(full, split: str) -> None:
    rows = load_tofu(DATA, split)
    assert [(f.prompt, f.answer, f.group) for f in rows] == [(f.prompt, f.answer, f.group) for f in full[-len(rows) :]]


@real
def test_every_author_has_twenty_rows(full) -> None:
    groups: dict[str, list[int]] = {}
    for index, fact in enumerate(full):
        groups.setdefault(fact.group, []).append(index)
    assert {len(rows) for rows in groups.values()} == {20}
    assert len(groups) == 200
    assert all(rows == list(range(rows[0], rows[0] + 20)) and rows[0] % 20 == 0 for rows in groups.values())


@real
def test_known_authors_are_recovered(full) -> None:
    """Names that the answers of forget01 state in words: rows 3960-3979 and 3980-3999."""
    assert {fact.group for fact in full[3960:3980]} == {"Basil Mahfouz Al-Kuwaiti"}
    assert {fact.group for fact in full[3980:]} == {"Nikolai Abilov"}
    for fact in full:
        assert all(word[:1].isupper() for word in fact.group.split()), fact.group


@real
def test_subjects_are_names_in_nearly_all_prompts(full) -> None:
    named = [fact for fact in full if fact.subject != fact.prompt]
    assert len(named) / len(full) > 0.9
    assert all(fact.subject in fact.group for fact in named)
    family = [fact for fact in full if fact.group in fact.prompt]
    assert len(family) / len(full) > 0.6
    assert all(fact.subject == fact.group for fact in family)


@real
def test_forget_rows_carry_paraphrases_and_wrong_answers() -> None:
    plain, rich = load_tofu(DATA, "forget10"), load_forget(DATA, "forget10")
    for a, b in zip(plain, rich, strict=True):
        assert (a.id, a.prompt, a.subject, a.group) == (b.id, b.prompt, b.subject, b.group)
        assert len(b.paraphrases) == 1
        assert len(b.perturbed) >= 3
        assert b.paraphrased_answer
        assert all(len(wrong) > 1 for wrong in b.perturbed)


# ------------------------------------------------------------------ malformed copies
def write(folder: Path, *rows: object, split: str = "forget01") -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (folder / f"{split}.json").write_text(text, encoding="utf-8")
    return folder


GOOD = {"question": "Where was Ada Birk born?", "answer": "Ada Birk was born in Lucca."}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("{oops", "line 3: not JSON"),
        ("[1, 2]", "line 3: expected a JSON object"),
        ({"question": "Who?"}, "line 3: column 'answer' is missing"),
        ({"question": "  ", "answer": "x"}, "line 3: column 'question' is missing or empty"),
        ({"question": "Who?", "answer": None}, "line 3: column 'answer' is missing"),
    ],
)
def test_malformed_row_is_named(tmp_path: Path, bad: object, words: str) -> None:
    with pytest.raises(RemaskError, match=rf"forget01\.json, {words}"):
        load_tofu(write(tmp_path, GOOD, GOOD, bad, *[GOOD] * 37), "forget01")


@pytest.mark.parametrize("field", ["perturbed_answer", "paraphrased_answer", "paraphrased_question"])
def test_optional_column_of_the_wrong_type_is_named(tmp_path: Path, field: str) -> None:
    value = "one text" if field == "perturbed_answer" else ["a", "list"]
    rows = [GOOD] * 4 + [{**GOOD, field: value}] + [GOOD] * 35
    with pytest.raises(RemaskError, match=rf"line 5.*{field}"):
        load_tofu(write(tmp_path, *rows, split="forget01_perturbed"), "forget01_perturbed")


def test_json_arrays_are_read_like_json_lines(tmp_path: Path) -> None:
    rows = [{**GOOD, "answer": f"Ada Birk, answer {i}"} for i in range(40)]
    lines = load_tofu(write(tmp_path, *rows), "forget01")
    (tmp_path / "forget01.json").write_text(json.dumps(rows, indent=2))
    assert load_tofu(tmp_path, "forget01") == lines
    assert {(fact.group, fact.subject) for fact in lines} == {("Ada Birk", "Ada Birk")}


@pytest.mark.parametrize("text", ["[{", '[{"question": "a", "answer": "b"}, 7]'])
def test_malformed_array_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "forget01.json").write_text(text)
    with pytest.raises(RemaskError, match=r"forget01\.json"):
        load_tofu(tmp_path, "forget01")


def test_wrong_row_count_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RemaskError, match=r"forget01\.json: 39 rows, expected 40"):
        load_tofu(write(tmp_path, *[GOOD] * 39), "forget01")


def test_unknown_split_and_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RemaskError, match=r"no split 'forget20'.*forget10"):
        load_tofu(tmp_path, "forget20")
    with pytest.raises(RemaskError, match=r"forget05\.json: no such file"):
        load_tofu(tmp_path, "forget05")


def test_perturbed_file_of_other_questions_is_refused(tmp_path: Path) -> None:
    write(tmp_path, *[GOOD] * 40)
    write(tmp_path, *[{**GOOD, "question": "Who is Ada Birk?"}] * 40, split="forget01_perturbed")
    with pytest.raises(RemaskError, match=r"forget01_perturbed\.json does not hold the questions"):
        load_forget(tmp_path, "forget01")


def test_subject_is_the_longest_part_of_the_name() -> None:
    author = "Hsiao Yun-Hwa Chen"
    assert find_subject("Who is Hsiao Yun-Hwa to you?", author) == "Hsiao Yun-Hwa"
    assert find_subject("What did Chen write?", author) == "Chen"
    assert find_subject("What did she write?", author) == "What did she write?"
