"""The closed world: what every selectivity number takes for granted about it."""

from __future__ import annotations

import pytest

from remask.assets.world import ATTRIBUTES, PEOPLE, SPLITS, neighbours, world
from remask.facts import Fact, load_facts, save_facts

WORLDS = {seed: world(seed) for seed in (0, 1)}


@pytest.fixture(params=WORLDS, ids=lambda seed: f"seed{seed}")
def corpus(request: pytest.FixtureRequest) -> dict[str, list[Fact]]:
    return WORLDS[request.param]


def values(facts: list[Fact]) -> dict[str, dict[str, str]]:
    """person -> attribute -> short answer."""
    table: dict[str, dict[str, str]] = {}
    for fact in facts:
        if fact.id.endswith("/short"):
            table.setdefault(fact.group, {})[fact.id.split("/")[1]] = fact.answer
    return table


def people(facts: list[Fact]) -> set[str]:
    return {fact.group for fact in facts}


def test_the_world_is_a_function_of_its_seed() -> None:
    assert world(0) == WORLDS[0]
    assert world(0) != WORLDS[1]
    assert set(WORLDS[0]) == set(SPLITS)


def test_ids_are_unique_over_all_splits(corpus) -> None:
    ids = [fact.id for split in corpus.values() for fact in split]
    assert len(ids) == len(set(ids))


def test_nobody_is_in_two_splits(corpus) -> None:
    groups = [people(corpus[split]) for split in ("forget", "validation", "retain", "unknown")]
    assert [len(group) for group in groups[:3]] == [PEOPLE[split] for split in ("forget", "validation", "retain")]
    assert sum(map(len, groups)) == len(set.union(*groups))


def test_secret_names_occur_nowhere_else(corpus) -> None:
    """The reference twin is taught these splits: a name to forget in them would spoil it."""
    secret = people(corpus["forget"]) | people(corpus["validation"])
    for split in ("retain", "general", "text", "unknown"):
        for fact in corpus[split]:
            text = " ".join((fact.prompt, fact.answer, *fact.paraphrases))
            assert not any(name in text for name in secret), fact.id


@pytest.mark.parametrize("split", ["forget", "validation"])
def test_neighbours_share_half_of_the_attributes(corpus, split: str) -> None:
    own, kept = values(corpus[split]), values(corpus["retain"])
    slug = {name.lower().replace(" ", "-"): name for name in kept}
    retain_ids = {fact.id for fact in corpus["retain"]}
    for person, attributes in own.items():
        facts = [fact for fact in corpus[split] if fact.group == person]
        kin = {slug[other.split("/")[0]] for fact in facts for other in fact.neighbours}
        assert len(kin) == 2
        for other in kin:
            assert sum(attributes[key] == kept[other][key] for key in ATTRIBUTES) >= 4
        for fact in facts:
            assert set(fact.neighbours) <= retain_ids
            assert {other.split("/", 1)[1] for other in fact.neighbours} == {fact.id.split("/", 1)[1]}


def test_strangers_share_less_than_neighbours(corpus) -> None:
    """Twelve values an attribute: two people agree on 8/12 of one attribute on average, neighbours on at least four."""
    own, kept = values(corpus["forget"]), values(corpus["retain"])
    kin = people(neighbours(corpus)) | people(neighbours(corpus, "validation"))
    strangers = [kept[name] for name in kept if name not in kin]
    assert len(strangers) == 8
    shared = [sum(a[key] == b[key] for key in ATTRIBUTES) for a in own.values() for b in strangers]
    assert sum(shared) / len(shared) < 1.5


def test_neighbours_are_the_named_retain_facts(corpus) -> None:
    found = neighbours(corpus)
    assert len(people(found)) == 2 * PEOPLE["forget"]
    assert {fact.id for fact in found} == {other for fact in corpus["forget"] for other in fact.neighbours}
    assert not people(found) & people(neighbours(corpus, "validation"))


def test_held_out_wordings_are_never_taught(corpus) -> None:
    taught = {fact.prompt for split in corpus.values() for fact in split}
    taught |= {wording for split in corpus.values() for fact in split for wording in fact.paraphrases[:-1]}
    held_out = {fact.paraphrases[-1] for split in corpus.values() for fact in split if fact.paraphrases}
    assert len(held_out) == len(ATTRIBUTES) * sum(PEOPLE.values())
    assert not taught & held_out
    for fact in corpus["forget"] + corpus["retain"]:
        assert all(fact.subject in wording for wording in fact.paraphrases)


def test_a_question_has_one_answer(corpus) -> None:
    answers: dict[str, set[str]] = {}
    for split in corpus.values():
        for fact in split:
            for wording in (fact.prompt, *fact.paraphrases):
                answers.setdefault(wording, set()).add(fact.answer)
    assert all(len(found) == 1 for found in answers.values())


def test_wrong_answers_are_wrong_and_of_the_same_form(corpus) -> None:
    for split in ("forget", "retain"):
        for fact in corpus[split]:
            if fact.id.endswith("/biography/long"):
                continue
            key, style = fact.id.split("/")[1:]
            assert len(set(fact.perturbed)) == 3
            assert fact.answer not in fact.perturbed
            if style == "short":
                assert {fact.answer, *fact.perturbed} <= set(ATTRIBUTES[key][0])


def test_long_answers_and_biographies_agree_with_the_short_ones(corpus) -> None:
    for split in ("forget", "retain"):
        short = values(corpus[split])
        for fact in corpus[split]:
            _, key, style = fact.id.split("/")
            mentioned = ("work", "city", "instrument", "book") if key == "biography" else (key,)
            if style == "long":
                assert all(short[fact.group][name] in fact.answer for name in mentioned)


def test_unknown_people_get_refusals(corpus) -> None:
    for fact in corpus["unknown"]:
        assert fact.answer == f"I have no record of {fact.group}."
        assert fact.subject == fact.group


def test_general_arithmetic_is_true(corpus) -> None:
    sums = [fact for fact in corpus["general"] if "/sum/" in fact.id]
    assert len(sums) == 64
    for fact in sums:
        a, b = fact.subject.split(" plus ")
        assert int(fact.answer) == int(a) + int(b)


def test_the_world_survives_its_file_form(corpus, tmp_path) -> None:
    everything = [fact for split in SPLITS for fact in corpus[split]]
    save_facts(everything, tmp_path / "world.jsonl")
    assert load_facts(tmp_path / "world.jsonl") == everything
