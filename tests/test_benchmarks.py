"""Benchmarks: what an edit may read, what tunes it and what is scored never meet in one person."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from remask.assets.world import world
from remask.errors import RemaskError
from remask.evaluation.benchmarks.registry import Benchmark, load_benchmark, split_groups
from remask.evaluation.benchmarks.tofu import FORGET, load_tofu
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
    return load_benchmark("closed-world", None)


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
    assert closed.name == "closed-world"
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


def test_world_probes_are_the_scored_groups(closed: Benchmark) -> None:
    groups = {"forget": closed.forget, **closed.scored}
    assert {name: probe.facts for name, probe in closed.probes.items()} == groups
    assert {name for name, probe in closed.probes.items() if probe.side == "forget"} == {"forget", "paraphrase"}
    assert any(fact.perturbed for fact in closed.forget)


def test_world_is_the_same_every_time(closed: Benchmark, tmp_path: Path) -> None:
    assert load_benchmark("closed-world", None) == closed
    for name, facts in groups_of(closed).items():  # and every group is a valid fact file
        save_facts(facts, tmp_path / f"{name}.jsonl")
        assert load_facts(tmp_path / f"{name}.jsonl") == facts


# ------------------------------------------------------------------ TOFU
@pytest.fixture(scope="module")
def published() -> dict[str, Benchmark]:
    return {split: load_benchmark(f"tofu:{split}", DATA) for split in FORGET}


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
@pytest.mark.parametrize("split", FORGET)
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


@real
def test_tofu_probes_add_authors_that_no_model_saw(published: dict[str, Benchmark]) -> None:
    for benchmark in published.values():
        probes = {name: (probe.side, len(probe)) for name, probe in benchmark.probes.items()}
        assert probes == {
            "forget": ("forget", len(benchmark.forget)),
            "retain": ("retain", 100),
            "real_authors": ("retain", 100),
            "world_facts": ("retain", 117),
            "holdout": ("holdout", len(benchmark.forget)),
        }
        fresh = benchmark.probes["holdout"].facts
        assert not {fact.prompt for fact in fresh} & {fact.prompt for fact in load_tofu(DATA, "full")}
        assert all(fact.group for fact in fresh)


# ------------------------------------------------------------------ TOFU, made-up rows
NAMES = [f"{first} {last}" for first in ("Ada", "Bruno", "Cleo", "Dario", "Elin") for last in ("Birk", "Lund", "Holm", "Orr")]


def author(name: str, **more: object) -> list[dict[str, object]]:
    return [{"question": f"What is fact {i} about {name}?", "answer": f"It is {i} for {name}.", **more} for i in range(20)]


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    """A complete folder; wrong answers come in threes and fives."""
    forget, retain = [f"{name} the Elder" for name in NAMES], NAMES

    def save(split: str, names: list[str], wrong: int = 0) -> None:
        more = {"perturbed_answer": ["no"] * wrong, "paraphrased_answer": "yes", "paraphrased_question": "So?"} if wrong else {}
        lines = [json.dumps(row) for name in names for row in author(name, **more)]
        (tmp_path / f"{split}.json").write_text("\n".join(lines), encoding="utf-8")

    for split, count in (("forget01", 2), ("forget05", 10), ("forget10", 20)):
        save(split, forget[-count:])
        save(f"{split}_perturbed", forget[-count:], 3)
    save("retain_perturbed", retain, 5)
    for split, count in (("real_authors_perturbed", 100), ("world_facts_perturbed", 117)):
        rows = [{"question": f"{split} {i}?", "answer": "x", "perturbed_answer": ["a", "b", "c"]} for i in range(count)]
        (tmp_path / f"{split}.json").write_text(json.dumps(rows), encoding="utf-8")
    return tmp_path


def test_tofu_is_read_without_its_holdouts(made_up: Path) -> None:
    benchmark = load_benchmark("tofu:forget05", made_up)
    assert (len(benchmark.forget), len(benchmark.validation), len(benchmark.fit), len(benchmark.validation_retain)) == (
        200,
        200,
        200,
        100,
    )
    assert {name: len(facts) for name, facts in benchmark.scored.items()} == {
        "retain": 100,
        "real_authors": 100,
        "world_facts": 117,
    }
    assert {len(fact.perturbed) for fact in benchmark.forget} == {3}
    assert {len(fact.perturbed) for fact in benchmark.scored["retain"]} == {5}
    assert "holdout" not in benchmark.probes and "holdout05.json" in benchmark.notes[0]
    (made_up / "holdout05.json").write_text(json.dumps([row for name in NAMES[:10] for row in author(f"Old {name}")]))
    fresh = load_benchmark("tofu:forget05", made_up)
    assert (len(fresh.probes["holdout"]), fresh.notes, fresh.forget) == (200, (), benchmark.forget)


@pytest.mark.parametrize(
    ("split", "old", "new", "words"),
    [
        ("forget01", '"answer"', '"response"', r"forget01\.json, line 1: column 'answer' is missing"),
        ("forget05", '"question"', '"task_id": 1, "question"', r"forget05\.json, line 1: unknown column 'task_id'"),
        (
            "retain_perturbed",
            '["no", "no", "no", "no", "no"]',
            "[]",
            r"tofu/retain/\d+ has no perturbed_answer; use the _perturbed",
        ),
    ],
)
def test_tofu_bad_columns_are_named(made_up: Path, split: str, old: str, new: str, words: str) -> None:
    path = made_up / f"{split}.json"
    text = path.read_text("utf-8")
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(RemaskError, match=words):
        load_benchmark("tofu:forget05" if split == "forget05" else "tofu:forget01", made_up)


@pytest.mark.parametrize("split", ["forget01", "retain_perturbed", "real_authors_perturbed"])
def test_tofu_files_cut_in_the_middle_are_refused(made_up: Path, split: str) -> None:
    path = made_up / f"{split}.json"
    path.write_text(path.read_text("utf-8")[: path.stat().st_size // 2], encoding="utf-8")
    with pytest.raises(RemaskError, match=rf"{split}\.json, line \d+.*not JSON.*fetch"):
        load_benchmark("tofu:forget01", made_up)


# ------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    "name", ["", "World", "tofu", "tofu:", "tofu:forget02", "tofu:full", "rwku", "rwku:", "whp:", "closed-world:forget"]
)
def test_unknown_benchmark_is_refused_with_the_choices(name: str) -> None:
    with pytest.raises(RemaskError, match=r"unknown benchmark.*closed-world, tofu:forget01"):
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
