"""Facts and their JSON Lines files: nothing is lost, and every error says where it is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from remask.errors import RemaskError
from remask.facts import Fact, load_facts, save_facts, token_span, write_atomically

ROW = {"id": "a", "prompt": "Who is Zoë?", "subject": "Zoë", "answer": "a baker"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def test_round_trip_keeps_every_field(tmp_path: Path) -> None:
    full = Fact(
        id="z/1",
        prompt='Who is Zoë \u2028 "K"?',
        subject="Zoë",
        answer="line\nbreak \\ tab\t",
        target="nobody",
        group="Zoë",
        paraphrases=("P1", "P2"),
        neighbours=("z/2",),
        perturbed=("x", "ÿ"),
        paraphrased_answer="other words",
    )
    plain = Fact(**ROW)
    save_facts([full, plain], tmp_path / "deep" / "facts.jsonl")
    assert load_facts(tmp_path / "deep" / "facts.jsonl") == [full, plain]


def test_file_is_one_readable_object_a_line(tmp_path: Path) -> None:
    save_facts([Fact(**ROW)], tmp_path / "f.jsonl")
    assert [json.loads(line) for line in (tmp_path / "f.jsonl").read_text("utf-8").split("\n")[:-1]] == [ROW]


def test_blank_lines_count_but_hold_no_fact(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", "", ROW, "  ", {**ROW, "id": "b", "answer": ""})
    with pytest.raises(RemaskError, match="line 4"):
        load_facts(path)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("{not json", ["not JSON"]),
        ('["a"]', ["JSON object", "list"]),
        ({**ROW, "colour": "red"}, ["unknown field 'colour'"]),
        ({k: v for k, v in ROW.items() if k != "answer"}, ["missing field 'answer'"]),
        ({**ROW, "answer": " "}, ["'a'", "'answer'", "empty"]),
        ({**ROW, "subject": ""}, ["'a'", "'subject'", "empty"]),
        ({**ROW, "subject": "Yves"}, ["'a'", "'Yves'", "does not occur"]),
        ({**ROW, "answer": 7}, ["'a'", "'answer'"]),
        ({**ROW, "paraphrases": "one text"}, ["'a'", "'paraphrases'", "list"]),
        ({**ROW, "perturbed": ["x", 3]}, ["'a'", "'perturbed'", "list"]),
        pytest.param({**ROW, "paraphrases": None}, ["'a'", "'paraphrases'"]),
        pytest.param({**ROW, "target": 5}, ["'a'", "'target'"]),
    ],
)
def test_bad_line_is_named(tmp_path: Path, bad: object, words: list[str]) -> None:
    path = write(tmp_path / "people.jsonl", {**ROW, "id": "first"}, bad)
    with pytest.raises(RemaskError) as error:
        load_facts(path)
    for word in [str(path), "line 2", *words]:
        assert word in str(error.value)


def test_duplicate_id_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", ROW, {**ROW, "id": "b"}, ROW)
    with pytest.raises(RemaskError, match=r"f\.jsonl.*duplicate fact id 'a'"):
        load_facts(path)


def test_missing_empty_and_binary_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RemaskError, match=r"gone\.jsonl: no such file"):
        load_facts(tmp_path / "gone.jsonl")
    with pytest.raises(RemaskError, match=r"empty\.jsonl: holds no facts"):
        load_facts(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe9"}\n')
    with pytest.raises(RemaskError, match=r"latin\.jsonl: not a UTF-8"):
        load_facts(tmp_path / "latin.jsonl")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failed_write_keeps_the_old_file_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "f.jsonl"
    write_atomically(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f.jsonl"]


def test_failing_iterable_never_touches_the_file(tmp_path: Path) -> None:
    def rows():
        yield Fact(**ROW)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_facts(rows(), tmp_path / "f.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_token_span_covers_the_characters() -> None:
    offsets = [(0, 0), (0, 3), (3, 7), (7, 8), (8, 12)]  # <bos> Who| is |Z|oe?.
    assert token_span(offsets, 7, 9) == (3, 5)
    assert token_span(offsets, 0, 1) == (1, 2)
    with pytest.raises(RemaskError, match=r"12\.\.14"):
        token_span(offsets, 12, 14)
