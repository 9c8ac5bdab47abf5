"""Rows of data files: JSON Lines, JSON arrays and Parquet, with checked columns; every error names file and row.

Columns are declared as `name -> kind`. A file with a column that its layout does not have is refused: it is another variant
of the data set, and its numbers would not be comparable.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ...errors import RemaskError
from ...facts import read_jsonl

ColumnKind = Literal["text", "blank", "texts", "integer", "object", "flag"]
Row = tuple[str, dict[str, Any]]
SUFFIXES = (".json", ".jsonl", ".parquet", "-00000-of-00001.parquet")
_WORDS = {
    "text": "a text",
    "blank": "a text",
    "texts": "a list of texts",
    "integer": "an integer",
    "object": "an object",
    "flag": "true or false",
}


def find_file(folder: Path, stems: Sequence[str]) -> Path | None:
    """The first of `folder/stem` with a suffix of SUFFIXES that is a file; earlier stems win."""
    for stem in stems:
        for suffix in SUFFIXES:
            path = folder / f"{stem}{suffix}"
            if path.is_file():
                return path
    return None


def need_file(folder: Path, stems: Sequence[str], what: str) -> Path:
    """As `find_file`.

    Raises:
        RemaskError: none of the files exists.
    """
    path = find_file(folder, stems)
    if path is None:
        others = f" (nor {', '.join(stems[1:])})" if len(stems) > 1 else ""
        raise RemaskError(f"{folder / stems[0]}.json: no such file{others}; point --data at a folder with the {what} files")
    return path


def read_rows(
    path: Path,
    required: Mapping[str, ColumnKind],
    optional: Mapping[str, ColumnKind] | None = None,
    *,
    bare: str | None = None,
    extra: bool = False,
) -> list[Row]:
    """(place, row) of every row; place is `<path>, line <n>`, with the row's number where rows share lines.

    Args:
        required: columns that every row has. Kind `text` is not empty, `blank` may be.
        optional: columns that a row may have.
        bare: rows may be plain texts instead of objects; they become this column.
        extra: accept columns that are not declared.

    Raises:
        RemaskError: missing, cut or otherwise unreadable file; missing, unknown or wrongly typed column; no rows.
    """
    optional = optional or {}
    kinds = {**required, **optional}
    rows: list[Row] = []
    for place, value in _values(path):
        row = {bare: value} if bare is not None and isinstance(value, str) else value
        if not isinstance(row, dict):
            raise RemaskError(f"{place}: expected a JSON object, found {type(value).__name__}")
        for name, kind in kinds.items():
            if name in required and row.get(name) in (None, ""):
                if kind != "blank" or row.get(name) is None:
                    raise RemaskError(f"{place}: column {name!r} is missing or empty; a row has {', '.join(required)}")
            elif row.get(name) is not None and not _is(row[name], kind):
                empty = kind == "text" and isinstance(row[name], str)
                problem = "is missing or empty" if empty else f"must be {_WORDS[kind]}"
                raise RemaskError(f"{place}: column {name!r} {problem}; a row has {', '.join(required)}")
        unknown = sorted(set(row) - set(kinds))
        if unknown and not extra:
            raise RemaskError(f"{place}: unknown column {unknown[0]!r}; this layout has the columns {', '.join(kinds)}")
        rows.append((place, row))
    if not rows:
        raise RemaskError(f"{path}: holds no rows; fetch the file again")
    return rows


def check_count(path: Path, count: int, expected: int, what: str) -> None:
    """Raise RemaskError where a published set does not have its published number of rows."""
    if count != expected:
        raise RemaskError(f"{path}: {count} rows, expected {expected} for {what}; fetch the file again")


def sample_note(path: Path, count: int, complete: Mapping[str, int]) -> str:
    """A sentence that says which complete set (name -> rows) the file is, or that it is a sample.

    Raises:
        RemaskError: more rows than any complete set has.
    """
    names = [name for name, size in complete.items() if size == count]
    if names:
        return f"{path.name}: all {count} rows of {names[0]}"
    if count > max(complete.values()):
        raise RemaskError(f"{path}: {count} rows, more than the {max(complete.values())} that were published; use the original")
    return f"{path.name}: a sample of {count} rows; complete sets: " + ", ".join(f"{n} {size}" for n, size in complete.items())


def _is(value: object, kind: ColumnKind) -> bool:
    if kind == "texts":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind == "text":
        return isinstance(value, str) and bool(value.strip())
    if kind == "integer":
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, {"blank": str, "object": dict, "flag": bool}[kind])


def _values(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise RemaskError(f"{path}: no such file; point --data at a folder with the benchmark's files")
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    with path.open("rb") as stream:
        start = stream.read(256).lstrip()
    if start.startswith(b"version https://git-lfs"):
        raise RemaskError(f"{path}: a Git LFS pointer, not the data; fetch the file itself")
    if start.startswith(b"["):
        yield from _arrays(path)
        return
    try:
        yield from ((f"{path}, line {number}", row) for number, row in read_jsonl(path))
    except RemaskError as error:
        if "not JSON" not in str(error):
            raise
        raise RemaskError(f"{error}, and fetch the file again if it was cut off") from None


def _arrays(path: Path) -> Iterator[tuple[str, Any]]:
    """Items of one JSON array, or of several one after the other."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RemaskError(f"{path}: not a UTF-8 text file; expected JSON") from None
    decoder = json.JSONDecoder()
    at, line, number, inside = 0, 1, 0, False

    def skip(characters: str) -> None:
        nonlocal at, line
        while at < len(text) and text[at] in characters:
            line += text[at] == "\n"
            at += 1

    while True:
        skip(" \t\r\n")
        if at == len(text):
            if inside:
                raise RemaskError(f"{path}, line {line}: the file ends inside its JSON array; it was cut off, fetch it again")
            return
        if not inside:
            if text[at] != "[":
                raise RemaskError(f"{path}, line {line}: expected a JSON array; fetch the file again")
            at, inside = at + 1, True
            skip(" \t\r\n")
        if text[at : at + 1] == "]":
            at, inside = at + 1, False
            continue
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            where = line + text.count("\n", at, error.pos)
            raise RemaskError(
                f"{path}, line {where}, row {number + 1}: not JSON ({error.msg}); if the file was cut off, fetch it again"
            ) from None
        number += 1
        yield f"{path}, line {line}, row {number}", value
        line += text.count("\n", at, end)
        at = end
        skip(" \t\r\n")
        if text[at : at + 1] == ",":
            at += 1
        elif text[at : at + 1] not in ("]", ""):
            raise RemaskError(f"{path}, line {line}, row {number}: expected a comma after the row; fetch the file again")


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise RemaskError(f"{path}: Parquet needs pyarrow; install remask[bench]") from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        reason = str(error).splitlines()[0]
        raise RemaskError(f"{path}: not a Parquet file ({reason}); fetch the file again") from None
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
