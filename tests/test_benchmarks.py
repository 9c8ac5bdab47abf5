"""Benchmarks: what an edit may read, what tunes it and what is scored never meet in one person."""

from __future__ import annotations

from pathlib import Path

import pytest

from remask.assets.world import world
from remask.errors import RemaskError
from remask.evaluation.benchmarks.registry import FORGET_TOFU, Benchmark, load_benchmark, split_groups
from remask.evaluation.benchmarks.tofu import load_tofu
from remask.facts import Fact, load_facts, save_facts
from test_tofu import DATA, real


def entity(fact: Fact) -> str:
    """Person or author; for facts without one, what the question asks about."""
    return fact.group or fact.subject


def entities(facts: list[Fact]) -> set[str]:
    return {entity(fact) for fact in facts}


def groups_of(benchmark: Benchmark) -> dict[str, list[Fact]]:
    """Every group that must be disjoint from every other one."""
    return {
        "forget": benchmark.forget,
        "fit": benchmark.fit,
        "validation": benchmark.validation,
        "validation_retain": benchmark.validation_retain,
        **benchmark.scored,
    }


def assert_disjoint(groups: dict[str, list[Fact]]) -> None:
    for name, facts in groups.items():
        assert len({fact.id for fact in facts}) == len(facts), name
        for other, others in groups.items():
            if other > name:
                assert not entities(facts) & entities(others), (name, other)


# ------------------------------------------------------------------ the closed world
@pytest.fixture(scope="module")
def closed() -> Benchmark:
    return load_benchmark("world", None)


def test_world_groups_share_nobody(closed: Benchmark) -> None:
    groups = groups_of(closed)
    wordings = groups.pop("paraphrase")  # the forget people again, in other words
    assert all(groups.values())
    assert_disjoint(groups)
    assert entities(wordings) == entities(closed.forget)


def test_world_neighbours_are_scored_and_never_read(closed: Benchmark) -> None:
    near = {other for fact in closed.forget for other in fact.neighbours}
    assert near
    assert {fact.id for fact in closed.scored["neighbours"]} == near
    people = entities(closed.scored["neighbours"])
    for name in ("fit", "validation", "validation_retain"):
        assert not people & entities(getattr(closed, name)), name
    assert not people & entities(closed.scored["retain"])


def test_world_groups_come_from_the_right_splits(closed: Benchmark) -> None:
    facts = world()
    assert closed.name == "world"
    assert closed.forget == facts["forget"]
    assert closed.validation == facts["validation"]
    taught = {fact.id for split in ("retain", "general", "text", "unknown") for fact in facts[split]}
    for name, group in groups_of(closed).items():
        if name not in ("forget", "validation", "paraphrase"):
            assert {fact.id for fact in group} <= taught, name
    for split in ("general", "text", "unknown"):  # each kind of row is read by the edit and scored on others
        assert any(fact in closed.fit for fact in facts[split])
        assert {fact.id for fact in closed.scored[split]} <= {fact.id for fact in facts[split]}
    assert any(fact in closed.fit for fact in facts["retain"])


def test_world_paraphrases_are_wordings_that_were_never_taught(closed: Benchmark) -> None:
    by_id = {fact.id: fact for fact in closed.forget}
    wordings = closed.scored["paraphrase"]
    assert {fact.id.removesuffix("/paraphrase") for fact in wordings} == {f.id for f in closed.forget if f.paraphrases}
    for fact in wordings:
        own = by_id[fact.id.removesuffix("/paraphrase")]
        assert fact.prompt == own.paraphrases[-1] not in (own.prompt, own.paraphrases[0])
        assert (fact.answer, fact.subject, fact.group) == (own.answer, own.subject, own.group)


def test_world_is_the_same_every_time(closed: Benchmark, tmp_path: Path) -> None:
    assert load_benchmark("world", None) == closed
    for name, facts in groups_of(closed).items():  # and every group is a valid fact file
        save_facts(facts, tmp_path / f"{name}.jsonl")
        assert load_facts(tmp_path / f"{name}.jsonl") == facts


# ------------------------------------------------------------------ TOFU
@pytest.fixture(scope="module")
def published() -> dict[str, Benchmark]:
    return {split: load_benchmark(f"tofu:{split}", DATA) for split in FORGET_TOFU}


@pytest.fixture(scope="module")
def block() -> dict[tuple[str, str], int]:
    """(question, answer) -> author number by position in full.json: tells authors apart without their recovered names."""
    return {(fact.prompt, fact.answer): index // 20 for index, fact in enumerate(load_tofu(DATA, "full"))}


@real
@pytest.mark.parametrize(("split", "size"), [("forget01", 40), ("forget05", 200), ("forget10", 400)])
def test_tofu_sizes(published: dict[str, Benchmark], split: str, size: int) -> None:
    benchmark = published[split]
    assert benchmark.name == f"tofu:{split}"
    assert (len(benchmark.forget), len(benchmark.fit), len(benchmark.validation)) == (size, 200, 400 - size)
    assert len(benchmark.validation_retain) == 100
    sizes = {name: len(facts) for name, facts in benchmark.scored.items()}
    assert sizes == {"retain": 100, "real_authors": 100, "world_facts": 117}


@real
@pytest.mark.parametrize("split", FORGET_TOFU)
def test_tofu_groups_share_no_author(published: dict[str, Benchmark], block: dict[tuple[str, str], int], split: str) -> None:
    benchmark = published[split]
    fictitious = {
        "forget": benchmark.forget,
        "fit": benchmark.fit,
        "retain": benchmark.scored["retain"],
        "validation": benchmark.validation,
        "validation_retain": benchmark.validation_retain,
    }
    assert_disjoint(fictitious)
    numbers = {name: {block[fact.prompt, fact.answer] for fact in facts} for name, facts in fictitious.items()}
    assert sum(map(len, numbers.values())) == len(set.union(*numbers.values()))
    assert {name: 20 * len(n) for name, n in numbers.items()} == {name: len(f) for name, f in fictitious.items()}


@real
def test_tofu_retain_groups_do_not_depend_on_the_forget_split(published: dict[str, Benchmark]) -> None:
    """So that numbers of different forget sets can be compared."""
    first, *others = published.values()
    for other in others:
        assert (other.fit, other.validation_retain, other.scored) == (first.fit, first.validation_retain, first.scored)


@real
def test_tofu_forget_rows_carry_their_wrong_answers(published: dict[str, Benchmark]) -> None:
    for benchmark in published.values():
        assert all(fact.perturbed and fact.paraphrases for fact in benchmark.forget)


# ------------------------------------------------------------------ bad input
@pytest.mark.parametrize("name", ["", "World", "tofu", "tofu:", "tofu:forget02", "tofu:full", "rwku", "world:forget01"])
def test_unknown_benchmark_is_refused_with_the_choices(name: str) -> None:
    with pytest.raises(RemaskError, match=r"unknown benchmark.*world, tofu:forget01"):
        load_benchmark(name, DATA)


def test_tofu_without_its_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RemaskError, match=r"tofu:forget01.*--data"):
        load_benchmark("tofu:forget01", None)
    with pytest.raises(RemaskError, match=r"forget01\.json: no such file"):
        load_benchmark("tofu:forget01", tmp_path)


def test_split_groups_deals_whole_groups_once() -> None:
    facts = [Fact(f"{person}/{i}", f"Who is {person}?", person, "x", group=person) for i in range(3) for person in "ABCDEFG"]
    parts = split_groups(facts, (2, 4), "test")
    assert [len(part) for part in parts] == [6, 12]
    assert not entities(parts[0]) & entities(parts[1])
    assert split_groups(list(reversed(facts)), (2, 4), "test")[0] == [fact for fact in reversed(facts) if fact in parts[0]]
    assert [fact for fact in facts if fact in parts[0]] == parts[0]  # order of the input is kept
