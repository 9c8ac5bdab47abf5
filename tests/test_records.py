"""Records: what is written is what is read, and a file that was cut anywhere is found out."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path

import pytest

from remask.errors import RemaskError
from remask.evaluation.records import SCHEMA, Record, Source, read_records, write_records

LIKELIHOOD = Source("m0", "e1", "default", 3, "bf16 autocast", "elbo", 8, "b2")
TEXT = Source("m0", sampler={"gen_length": 16, "steps": None})
RECORDS = [
    Record("whp", "after", "forget", "whp/0", "answer log-probability", -1.5, 0.25, 7, (-1.25, -1.75), "", LIKELIHOOD),
    Record("whp", "before", "retain", "whp/ü", "output", 'He said "no"\nand left.', None, None, None, "prefill", TEXT),
    Record("whp", "before", "retain", "whp/1", "exact match", 0.0, None, None, None, "", TEXT),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_records(tmp_path / "records.jsonl", RECORDS)
    return tmp_path / "records.jsonl"


def test_round_trip(path: Path) -> None:
    assert read_records(path) == RECORDS


def test_every_line_stands_for_itself(path: Path) -> None:
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert lines[-1] == {"records": 3}
    for line in lines[:-1]:
        assert {"schema", "benchmark", "state", "group", "id", "metric", "value", "model", "intervention", "preset"} <= set(
            line
        )
        assert line["schema"] == SCHEMA
        assert set(line["versions"]) >= {"remask", "torch", "transformers"}
    assert (lines[0]["estimator"], lines[0]["draws"], lines[0]["bank"]) == ("elbo", 8, "b2")
    assert lines[1]["sampler"] == {"gen_length": 16, "steps": None}


def test_a_file_cut_at_any_byte_is_refused_with_its_line(path: Path, tmp_path: Path) -> None:
    data = path.read_bytes()
    for size in range(len(data) - 1):  # the last byte is the closing newline, without which the file is still whole
        (tmp_path / "cut.jsonl").write_bytes(data[:size])
        with pytest.raises(RemaskError, match=r"cut\.jsonl, line \d+"):
            read_records(tmp_path / "cut.jsonl")


@pytest.mark.parametrize(
    "line",
    [
        {"schema": SCHEMA + 1},
        {"colour": "red"},
        {"model": None},
        {"id": None},
    ],
)
def test_other_fields_are_refused(path: Path, line: dict[str, object]) -> None:
    rows = path.read_text("utf-8").splitlines()
    changed = {key: value for key, value in {**json.loads(rows[1]), **line}.items() if value is not None}
    path.write_text("\n".join([rows[0], json.dumps(changed), *rows[2:]]) + "\n", "utf-8")
    with pytest.raises(RemaskError, match="line 2"):
        read_records(path)


def test_a_line_lost_from_the_middle_is_found(path: Path) -> None:
    rows = path.read_text("utf-8").splitlines()
    path.write_text("\n".join([rows[0], *rows[2:]]) + "\n", "utf-8")
    with pytest.raises(RemaskError, match="2 records where 3 were written"):
        read_records(path)


def test_numbers_that_json_lacks_are_refused(tmp_path: Path) -> None:
    broken = Record("whp", "after", "forget", "x", "truth ratio", math.inf, None, None, None, "", LIKELIHOOD)
    with pytest.raises(ValueError, match="JSON"):
        write_records(tmp_path / "r.jsonl", [broken])
    assert not (tmp_path / "r.jsonl").exists()


def test_missing_file_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(RemaskError, match="no such record file"):
        read_records(tmp_path / "none.jsonl")


def test_record_and_source_share_no_field() -> None:
    """They stand side by side in a line."""
    assert not {item.name for item in fields(Record)} & {item.name for item in fields(Source)}
