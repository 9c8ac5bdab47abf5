"""A benchmark is named groups of facts: what to forget, what the memory may read, what must stay, what tunes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...assets.world import neighbours, world
from ...errors import RemaskError
from ...facts import Fact
from ...random import numpy_generator
from . import tofu

FORGET_TOFU = ("forget01", "forget05", "forget10")


@dataclass(frozen=True)
class Benchmark:
    """Groups of one benchmark.

    Attributes:
        name: e.g. `tofu:forget01`.
        forget: facts to forget.
        fit: retain facts that a retain-aware edit may read; never scored.
        scored: groups that are scored and that no edit read, by name; `retain` is always among them.
        validation: forget facts of other people, for choosing hyper-parameters; empty where there are none.
        validation_retain: retain facts for the same purpose; disjoint from `fit` and `scored`.
    """

    name: str
    forget: list[Fact]
    fit: list[Fact]
    scored: dict[str, list[Fact]]
    validation: list[Fact]
    validation_retain: list[Fact]


def load_benchmark(name: str, data: Path | None) -> Benchmark:
    """`world` (built in) or `tofu:forget01|forget05|forget10` (needs `data`).

    Raises:
        RemaskError: unknown benchmark or missing data folder.
    """
    if name == "world":
        return _world()
    kind, _, split = name.partition(":")
    if kind == "tofu" and split in FORGET_TOFU:
        if data is None:
            raise RemaskError(f"benchmark {name} needs its files; point --data at a folder with forget01.json and the rest")
        return _tofu(split, data)
    choices = ", ".join(["world", *(f"tofu:{s}" for s in FORGET_TOFU)])
    raise RemaskError(f"unknown benchmark {name!r}; choose one of {choices}")


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


def _tofu(split: str, data: Path) -> Benchmark:
    forget = tofu.load_forget(data, split)
    authors = {fact.group for fact in forget}
    fit, validation_retain, held = split_groups(tofu.load_tofu(data, "retain_perturbed"), (10, 5, 5), "tofu retain")
    return Benchmark(
        name=f"tofu:{split}",
        forget=forget,
        fit=fit,
        scored={
            "retain": held,
            "real_authors": tofu.load_tofu(data, "real_authors_perturbed"),
            "world_facts": tofu.load_tofu(data, "world_facts_perturbed"),
        },
        validation=[fact for fact in tofu.load_forget(data, "forget10") if fact.group not in authors],
        validation_retain=validation_retain,
    )


def _world() -> Benchmark:
    facts = world()
    near = {fact.group for fact in neighbours(facts)}
    others = [fact for fact in facts["retain"] if fact.group not in near]
    fit, validation_retain, held = split_groups(others, (12, 3, 5), "world retain")
    met, strangers = split_groups(facts["unknown"], (24, 48), "world unknown")
    wordings = [
        replace(fact, prompt=fact.paraphrases[-1], id=f"{fact.id}/paraphrase") for fact in facts["forget"] if fact.paraphrases
    ]
    return Benchmark(
        name="world",
        forget=facts["forget"],
        fit=fit + facts["general"][::2] + facts["text"][::2] + met[::2],
        scored={
            "paraphrase": wordings,
            "neighbours": neighbours(facts),
            "retain": held,
            "general": facts["general"][1::2],
            "text": facts["text"][1::2],
            "unknown": strangers[::3],
        },
        validation=facts["validation"],
        validation_retain=validation_retain,
    )
