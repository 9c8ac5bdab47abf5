"""What a benchmark is: named groups of facts, and probes that score rows in a benchmark's own way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from ...errors import RemaskError
from ...facts import Fact
from ...random import numpy_generator

Kind = Literal["question", "cloze", "attack", "completion", "choice", "membership", "text"]
Side = Literal["forget", "retain", "holdout"]


@dataclass(frozen=True)
class Text:
    """A passage that is scored as a whole, without a prompt.

    Attributes:
        id: unique in its benchmark.
        text: the passage.
        group: entity or source the passage belongs to; "" when unknown.
    """

    id: str
    text: str
    group: str = ""


@dataclass(frozen=True)
class Choice:
    """A multiple-choice question whose options have an order (letters A, B, ...).

    Attributes:
        id: unique in its benchmark.
        question: without its options.
        options: at least two texts, in the order of the letters.
        answer: index of the right option.

    Raises:
        RemaskError: fewer than two options, or an index outside them.
    """

    id: str
    question: str
    options: tuple[str, ...]
    answer: int
    group: str = ""

    def __post_init__(self) -> None:
        if len(self.options) < 2 or not 0 <= self.answer < len(self.options):
            raise RemaskError(f"choice {self.id!r}: answer {self.answer} is not one of its {len(self.options)} options")


@dataclass(frozen=True)
class Probe:
    """Rows of one benchmark that are scored together and in one way.

    Attributes:
        kind: how to score: `question` and `cloze` (greedy answer or likelihood of the answer), `attack` (the same, the prompt
            is an attack of the family that the probe's name ends with), `completion` (likelihood or continuation of a text),
            `choice` (likelihood of the options), `membership` (scores of a membership-inference attack), `text` (corpus; for
            training or for likelihood).
        side: `forget` (lower is better after forgetting), `retain` (must stay), `holdout` (no model saw it).
        facts: rows of the kinds question, cloze, attack, completion.
        choices: rows of the kind choice.
        texts: rows of the kinds membership, text.
        context: worked examples that the published protocol puts before each prompt, in order.
        template: the published wording around a prompt, with one `{prompt}`; no chat template.

    Raises:
        RemaskError: no rows, rows that do not go with the kind, or a template without `{prompt}`.
    """

    kind: Kind
    side: Side
    facts: list[Fact] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    context: list[Fact] = field(default_factory=list)
    template: str = "{prompt}"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind) or self.side not in get_args(Side):
            raise RemaskError(
                f"a probe's kind is one of {', '.join(get_args(Kind))} and its side of {', '.join(get_args(Side))}"
            )
        place = {"choice": "choices", "membership": "texts", "text": "texts"}.get(self.kind, "facts")
        filled = [name for name in ("facts", "choices", "texts") if getattr(self, name)]
        if filled != [place]:
            raise RemaskError(f"a probe of kind {self.kind} holds {place}, found {' and '.join(filled) or 'no rows'}")
        if self.template.count("{prompt}") != 1:
            raise RemaskError(f"a probe's template holds {{prompt}} once, found {self.template!r}")

    def __len__(self) -> int:
        return len(self.facts) + len(self.choices) + len(self.texts)

    def wrap(self, prompt: str) -> str:
        """`prompt` in the published wording."""
        return self.template.replace("{prompt}", prompt)


@dataclass(frozen=True)
class Benchmark:
    """Groups of one benchmark.

    Attributes:
        name: e.g. `tofu:forget01`.
        forget: facts to forget or, where they have a `target`, to rewrite.
        fit: retain facts that a retain-aware edit may read; never scored.
        scored: groups that are scored and that no edit read, by name; `retain` is among them, unless a note says why not.
        validation: forget facts of other people, for choosing hyper-parameters; empty where there are none.
        validation_retain: retain facts for the same purpose; disjoint from `fit` and `scored`.
        probes: rows of the benchmark's published protocol, by name; they repeat rows of `forget` and `scored`, never of `fit`.
        licence: of the data, in a sentence.
        notes: what a reader of the numbers has to know: a sample instead of the whole set, a probe whose files are absent.
    """

    name: str
    forget: list[Fact]
    fit: list[Fact]
    scored: dict[str, list[Fact]]
    validation: list[Fact]
    validation_retain: list[Fact]
    probes: dict[str, Probe] = field(default_factory=dict)
    licence: str = ""
    notes: tuple[str, ...] = ()

    def side(self, group: str) -> Side:
        """Side of a scored group: that of the probe that holds its rows, `retain` where none does."""
        rows = {fact.id for fact in self.scored[group]}
        sides = [probe.side for probe in self.probes.values() if rows & {fact.id for fact in probe.facts}]
        return sides[0] if sides else "retain"


def split_groups(facts: Sequence[Fact], shares: Sequence[int], purpose: str) -> list[list[Fact]]:
    """Deal whole groups (authors, people) into parts of `shares` groups each; no entity is in two parts."""
    names = sorted({fact.group for fact in facts})
    order = [names[i] for i in numpy_generator(0, "split", purpose).permutation(len(names))]
    parts, start = [], 0
    for share in shares:
        chosen = set(order[start : start + share])
        parts.append([fact for fact in facts if fact.group in chosen])
        start += share
    return parts


def find_subject(prompt: str, name: str) -> str:
    """`name` or its longest run of words that the prompt contains; the whole prompt where it contains none."""
    words = name.split()
    for size in range(len(words), 0, -1):
        for start in range(len(words) - size + 1):
            part = " ".join(words[start : start + size])
            if part and part in prompt:
                return part
    return prompt
