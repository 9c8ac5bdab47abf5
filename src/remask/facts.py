"""Facts: what is traced, edited, forgotten and scored.

A `Fact` is a question with its answer and the span of the question that names the entity. It knows nothing of models;
token spans are computed from a tokenizer's character offsets, so they are right for byte-level pieces too.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import RemaskError


@dataclass(frozen=True)
class Fact:
    """One question-answer pair about one entity.

    Attributes:
        id: unique in its file.
        prompt: the question, as a user would type it (no chat template).
        subject: the span of `prompt` that names the entity, e.g. a person's name.
        answer: the true answer, without end token.
        target: new answer, for rewriting; None when the fact is only to be forgotten.
        group: entity or author the fact belongs to; "" when unknown.
        paraphrases: other wordings of the prompt with the same answer.
        neighbours: ids of facts that must *not* change when this one is edited.
        perturbed: wrong answers of the same form.
        paraphrased_answer: the answer in other words (TOFU's truth ratio reads it).

    Raises:
        RemaskError: empty id, prompt or answer; subject empty or not in the prompt.
    """

    id: str
    prompt: str
    subject: str
    answer: str
    target: str | None = None
    group: str = ""
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()
    perturbed: tuple[str, ...] = ()
    paraphrased_answer: str | None = None

    def __post_init__(self) -> None:
        for name in ("id", "prompt", "subject", "answer"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise RemaskError(f"fact {self.id!r}: field '{name}' is empty; give it a text")
        for name in ("paraphrases", "neighbours", "perturbed"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
                raise RemaskError(f"fact {self.id!r}: field '{name}' must be a list of texts")
            object.__setattr__(self, name, tuple(value))
        for name in ("target", "group", "paraphrased_answer"):
            value = getattr(self, name)
            if not (isinstance(value, str) or (value is None and name != "group")):
                raise RemaskError(f"fact {self.id!r}: field '{name}' must be a text")
        if self.subject not in self.prompt:
            raise RemaskError(
                f"fact {self.id!r}: subject {self.subject!r} does not occur in the prompt {self.prompt!r}; "
                "copy the subject exactly as it stands in the prompt"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain dict with empty optional fields left out."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v not in (None, "", ())}


def knowledge_prompt(question: str, examples: Sequence[tuple[str, str]]) -> str:
    """The question after solved examples (question, answer), one blank line between them."""
    solved = "".join(f"Question: {asked}\nAnswer: {answered}\n\n" for asked, answered in examples)
    return f"{solved}Question: {question}\nAnswer:"


_FIELDS = frozenset(Fact.__dataclass_fields__)


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a JSON Lines file.

    Raises:
        RemaskError: missing file, or a line that is not a JSON object; names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise RemaskError(f"{path}: no such file")
    with path.open(encoding="utf-8") as stream:
        try:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise RemaskError(f"{path}, line {number}: not JSON ({error.msg}); write one JSON object a line") from None
                if not isinstance(row, dict):
                    raise RemaskError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
                yield number, row
        except UnicodeDecodeError:
            raise RemaskError(f"{path}: not a UTF-8 text file; expected JSON Lines") from None


def load_facts(path: str | Path) -> list[Fact]:
    """Read facts from JSON Lines.

    Raises:
        RemaskError: unreadable line, unknown or missing field, duplicate id, empty file; names file and line.
    """
    facts: list[Fact] = []
    for number, row in read_jsonl(path):
        unknown = sorted(set(row) - _FIELDS)
        missing = sorted({"id", "prompt", "subject", "answer"} - set(row))
        if unknown or missing:
            what = f"unknown field {unknown[0]!r}" if unknown else f"missing field {missing[0]!r}"
            raise RemaskError(f"{path}, line {number}: {what}; a fact has the fields {', '.join(sorted(_FIELDS))}")
        try:
            facts.append(Fact(**row))
        except RemaskError as error:
            raise RemaskError(f"{path}, line {number}: {error}") from None
    if not facts:
        raise RemaskError(f"{path}: holds no facts")
    check_unique_ids(facts, str(path))
    return facts


def save_facts(facts: Iterable[Fact], path: str | Path) -> None:
    """Write facts as JSON Lines, atomically."""
    text = "".join(json.dumps(fact.to_dict(), ensure_ascii=False) + "\n" for fact in facts)
    write_atomically(path, text.encode())


def check_unique_ids(facts: Sequence[Fact], where: str) -> None:
    """Raise RemaskError naming the first id that occurs twice."""
    seen: set[str] = set()
    for fact in facts:
        if fact.id in seen:
            raise RemaskError(f"{where}: duplicate fact id {fact.id!r}; ids must be unique")
        seen.add(fact.id)


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write `data` to a temporary file beside `path`, fsync and rename: readers never see a half-written file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")  # not mkstemp: the file keeps the usual permissions
    try:
        with temporary.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, value: Any, *, indent: int | None = 1, allow_nan: bool = True) -> None:
    """Write `value` as JSON in UTF-8 with a newline at its end, atomically.

    Raises:
        ValueError: a number that is not finite, unless they are allowed.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=allow_nan)
    write_atomically(path, f"{text}\n".encode())


def token_span(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """Half-open token range that covers the characters [start, end).

    Args:
        offsets: the tokenizer's (start, end) character offsets, one pair a token; empty pairs are special tokens.

    Raises:
        RemaskError: no token overlaps the characters.
    """
    hit = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
    if not hit:
        raise RemaskError(f"no token covers the characters {start}..{end}")
    return hit[0], hit[-1] + 1
