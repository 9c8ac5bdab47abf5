"""RWKU, MUSE, WHP, WMDP, CounterFact, zsRE: real samples where they are at hand, made-up rows of the same layout elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remask.errors import RemaskError
from remask.evaluation.benchmarks import rwku, wmdp
from remask.evaluation.benchmarks.base import Benchmark
from remask.evaluation.benchmarks.registry import BENCHMARKS, load_benchmark, names
from remask.evaluation.benchmarks.rwku import FAMILIES, attack_family
from test_tofu import DATA as TOFU

DATA = TOFU.parent


def real(folder: str, file: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not (DATA / folder / file).is_file(),
        reason=f"no {file} at {DATA / folder}: not part of the repository; set REMASK_DATA to a folder that holds {folder}/",
    )


def dump(path: Path, rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")


def edit(path: Path, change: Callable[[list[Any]], object]) -> None:
    rows = json.loads(path.read_text("utf-8"))
    change(rows)
    dump(path, rows)


def assert_sound(benchmark: Benchmark) -> None:
    """Nothing that an edit may read or that tunes it is scored; ids are unique; probes repeat scored rows."""
    groups = [benchmark.forget, benchmark.fit, benchmark.validation, benchmark.validation_retain, *benchmark.scored.values()]
    ids = [fact.id for facts in groups for fact in facts]
    assert len(ids) == len(set(ids))
    scored = [fact for facts in (benchmark.forget, *benchmark.scored.values()) for fact in facts]
    read = {fact.prompt for fact in benchmark.fit}
    tuned = {fact.prompt for fact in [*benchmark.validation, *benchmark.validation_retain]}
    assert not (read | tuned) & {fact.prompt for fact in scored}
    assert not read & tuned
    known = {fact.id for fact in scored}
    for name, probe in benchmark.probes.items():
        if probe.side != "holdout" and name != "verbmem":
            assert {fact.id for fact in probe.facts} <= known, name
    assert benchmark.licence.endswith(".")


# ------------------------------------------------------------------ names
def test_every_name_says_its_licence_and_is_known() -> None:
    assert all(entry.licence for entry in BENCHMARKS.values())
    assert len(set(names())) == len(names())
    for name in names()[1:]:
        with pytest.raises(RemaskError, match=rf"benchmark {name} needs its files"):
            load_benchmark(name, None)


# ------------------------------------------------------------------ RWKU
LABELS = (
    "Role Play",
    "incontext learning",
    "cross lingual (French)",
    "cross-lingual (German)",
    "cross lingual",
    "reverse  query",
)


def make_rwku(folder: Path, *people: str) -> Path:
    for number, person in enumerate(people, 1):
        place = folder / f"{number}_{person.replace(' ', '_')}"
        row = {"subject": person, "answer": "Lucca"}
        near = {**row, "neighbor": f"The Bell of {person} (film)"}
        for level, kind in (("1", "cloze"), ("2", "simple question")):
            asked = [{**row, "level": level, "type": kind, "query": f"{person}: {kind} {i}?"} for i in range(3)]
            dump(place / f"forget_level{level}.json", asked)
            other = [{**near, "level": level, "type": kind, "query": f"The Bell of {person}: {kind} {i}?"} for i in range(2)]
            dump(place / f"neighbor_level{level}.json", other)
        attacks = [{**row, "level": "3", "type": label, "query": f"Where, {label}, was he born?"} for label in LABELS]
        dump(place / "forget_level3.json", attacks)
        for name in ("forget_mia", "retain_mia"):
            dump(place / f"{name}.json", [{"subject": person, "text": f"{name} of {person} {i}", "ngram": 4} for i in range(2)])
        dump(place / "passage.json", [{"subject": person, "text": f"{person} was born in Lucca."}])
    return folder


def test_rwku_groups(tmp_path: Path) -> None:
    folder = make_rwku(tmp_path, "Ada Birk", "Hugo Lund", "Vera Holm", "Wim Orr")
    benchmark = load_benchmark("rwku:2_Hugo_Lund", folder)
    assert_sound(benchmark)
    assert {name: len(facts) for name, facts in benchmark.scored.items()} == {
        "blanks": 3,
        "attacks": 6,
        "retain": 2,
        "retain_blanks": 2,
    }
    assert {fact.group for fact in benchmark.forget} == {"Hugo Lund"}
    people = {fact.group.removeprefix("The Bell of ") for fact in benchmark.fit}
    assert people == {"Vera Holm", "Wim Orr"}  # the next two in number order; the third tunes
    assert {fact.group for fact in benchmark.validation} == {"Ada Birk"}
    assert {fact.group for fact in benchmark.validation_retain} == {"The Bell of Ada Birk"}
    assert all(fact.subject == "The Bell of Hugo Lund" for fact in benchmark.scored["retain"])
    assert all(fact.subject == fact.prompt for fact in benchmark.scored["attacks"])  # they name nobody
    attacks = {name: len(probe) for name, probe in benchmark.probes.items() if probe.kind == "attack"}
    assert attacks == {
        "forget_level3/cross-lingual": 3,
        "forget_level3/in-context learning": 1,
        "forget_level3/reverse query": 1,
        "forget_level3/role play": 1,
    }
    sides = {name: probe.side for name, probe in benchmark.probes.items() if probe.kind == "membership"}
    assert sides == {"forget_mia": "forget", "retain_mia": "retain"}
    assert benchmark.notes == ("a sample of 4 of 200 targets: totals cannot be checked",)
    assert load_benchmark("rwku:2_Hugo_Lund", folder) == benchmark


def test_rwku_is_read_as_the_hub_lays_it_out(tmp_path: Path) -> None:
    plain = load_benchmark("rwku:1_Ada_Birk", make_rwku(tmp_path / "plain", "Ada Birk", "Hugo Lund"))
    assert load_benchmark("rwku:1_Ada_Birk", make_rwku(tmp_path / "hub" / "Target", "Ada Birk", "Hugo Lund").parent) == plain


def test_rwku_of_one_target_says_that_nothing_may_be_read(tmp_path: Path) -> None:
    benchmark = load_benchmark("rwku:1_Ada_Birk", make_rwku(tmp_path, "Ada Birk"))
    assert benchmark.fit == benchmark.validation == benchmark.validation_retain == []
    assert "nothing to read" in benchmark.notes[1]


def test_rwku_totals_are_checked_where_every_target_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_rwku(tmp_path, "Ada Birk", "Hugo Lund")
    monkeypatch.setattr(rwku, "TARGETS", 2)
    counts = {"forget_level3": 12, "forget_level1": 6, "forget_level2": 6}
    totals = {name: counts.get(name, 4) for name in rwku.TOTALS}
    monkeypatch.setattr(rwku, "TOTALS", totals)
    assert load_benchmark("rwku:1_Ada_Birk", folder).notes[0] == "all 2 targets, totals as published"
    monkeypatch.setattr(rwku, "TOTALS", {**totals, "retain_mia": 5})
    with pytest.raises(RemaskError, match="retain_mia: 4 rows in 2 targets, expected 5"):
        load_benchmark("rwku:1_Ada_Birk", folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_of_attacks_are_normalised(family: str) -> None:
    for label in (family, family.upper(), family.replace("-", " "), family.replace("-", ""), f" {family} (Spanish)"):
        assert attack_family(label) == family
    assert attack_family(f"no {family}") is None


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("forget_level3", lambda rows: rows[2].update(type="riddle"), r"line 1, row 3: unknown attack 'riddle'.*role play"),
        ("forget_level1", lambda rows: rows[1].update(level="2"), r"line 1, row 2: level '2' in a file of level 1"),
        ("forget_level2", lambda rows: rows[1].pop("query"), r"line 1, row 2: column 'query' is missing"),
        ("forget_level2", lambda rows: rows[0].update(neighbor="x"), r"line 1, row 1: unknown column 'neighbor'"),
        ("neighbor_level2", lambda rows: rows[0].pop("neighbor"), r"line 1, row 1: column 'neighbor' is missing"),
        ("forget_mia", lambda rows: rows[1].update(ngram="4"), r"line 1, row 2: column 'ngram' must be an integer"),
        ("retain_mia", lambda rows: rows.clear(), r"holds no rows"),
    ],
)
def test_rwku_bad_rows_are_named(tmp_path: Path, file: str, change: Callable[[list[Any]], object], words: str) -> None:
    path = make_rwku(tmp_path, "Ada Birk", "Hugo Lund") / "1_Ada_Birk" / f"{file}.json"
    edit(path, change)
    with pytest.raises(RemaskError, match=rf"{file}\.json.*{words}"):
        load_benchmark("rwku:1_Ada_Birk", tmp_path)


def test_rwku_unknown_targets_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RemaskError, match=r"no RWKU target '1_Ada_Birk'; point --data"):
        load_benchmark("rwku:1_Ada_Birk", tmp_path)
    make_rwku(tmp_path, "Ada Birk")
    with pytest.raises(RemaskError, match=r"no RWKU target 'Ada Birk'; choose one of 1_Ada_Birk"):
        load_benchmark("rwku:Ada Birk", tmp_path)
    (tmp_path / "1_Ada_Birk" / "forget_mia.json").unlink()
    with pytest.raises(RemaskError, match=r"forget_mia\.json: no such file"):
        load_benchmark("rwku:1_Ada_Birk", tmp_path)


@real("rwku", "1_Stephen_King/forget_level1.json")
@pytest.mark.parametrize(
    ("target", "sizes"),  # forget levels 1-3, neighbours 1-2, texts about the target and about others
    [
        ("1_Stephen_King", (8, 10, 29, 30, 30, 55, 37)),
        ("31_Leonardo_da_Vinci", (20, 17, 40, 30, 18, 16, 38)),
        ("69_John_Candy", (20, 10, 24, 30, 30, 22, 38)),
        ("124_Keanu_Reeves", (17, 15, 40, 30, 30, 53, 29)),
    ],
)
def test_rwku_real_targets(target: str, sizes: tuple[int, ...]) -> None:
    benchmark = load_benchmark(f"rwku:{target}", DATA / "rwku")
    assert_sound(benchmark)
    probes = benchmark.probes
    attacks = sum(len(probe) for name, probe in probes.items() if name.startswith("forget_level3/"))
    plain = ("forget_level1", "forget_level2", "neighbor_level1", "neighbor_level2", "forget_mia", "retain_mia")
    found = [len(probes[name]) for name in plain]
    assert (*found[:2], attacks, *found[2:]) == sizes
    person = target.split("_", 1)[1].replace("_", " ")
    assert {fact.group for fact in benchmark.forget} == {person}
    assert sum(fact.subject != fact.prompt for fact in benchmark.forget) >= 0.8 * len(benchmark.forget)


# ------------------------------------------------------------------ MUSE
def make_muse(folder: Path, pattern: str, retain: str) -> Path:
    """`pattern` says where a file of a kind and name lies."""

    def qa(name: str, count: int) -> list[dict[str, str]]:
        return [{"question": f"What about {name} {i}?", "answer": f"It is {i}."} for i in range(count)]

    for name in ("forget", retain):
        dump(folder / pattern.format("knowmem", f"{name}_qa"), qa(name, 100))
        dump(folder / pattern.format("knowmem", f"{name}_qa_icl"), qa(f"an example of {name}", 10))
    dump(folder / pattern.format("verbmem", "forget"), [{"prompt": f"It was {i}", "gt": "o'clock."} for i in range(100)])
    for name in ("forget", retain, "holdout"):
        texts: list[Any] = [f"A text of {name} {i}." for i in range(100)]
        dump(folder / pattern.format("privleak", name), texts if name == "forget" else [{"text": text} for text in texts])
    return folder


@pytest.mark.parametrize(
    ("pattern", "retain"),
    [
        ("{}/{}.json", "retain"),
        ("books/{}/{}.json", "retain"),
        ("hp/{}/{}.json", "retain2"),
        ("hp_{}_{}.json", "retain2"),
        ("{}/{}.json", "retain2"),
    ],
)
def test_muse_in_every_layout(tmp_path: Path, pattern: str, retain: str) -> None:
    benchmark = load_benchmark("muse:books", make_muse(tmp_path, pattern, retain))
    assert_sound(benchmark)
    assert (len(benchmark.forget), len(benchmark.scored["retain"]), len(benchmark.fit), len(benchmark.validation)) == (
        100,
        100,
        10,
        10,
    )
    assert {name: (probe.kind, probe.side, len(probe)) for name, probe in benchmark.probes.items()} == {
        "knowmem_forget": ("question", "forget", 100),
        "knowmem_retain": ("question", "retain", 100),
        "verbmem": ("completion", "forget", 100),
        "privleak_forget": ("membership", "forget", 100),
        "privleak_retain": ("membership", "retain", 100),
        "privleak_holdout": ("membership", "holdout", 100),
    }
    assert len(benchmark.probes["knowmem_retain"].context) == 10
    assert benchmark.probes["privleak_forget"].texts[3].text == "A text of forget 3."
    assert benchmark.notes == ()


def test_muse_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow comes with remask[bench]")
    parquet = pytest.importorskip("pyarrow.parquet")
    lines = load_benchmark("muse:news", make_muse(tmp_path, "{}/{}.json", "retain"))
    for path in list(tmp_path.glob("*/*.json")):
        rows = [row if isinstance(row, dict) else {"text": row} for row in json.loads(path.read_text())]
        parquet.write_table(arrow.Table.from_pylist(rows), path.with_name(f"{path.stem}-00000-of-00001.parquet"))
        path.unlink()
    assert load_benchmark("muse:news", tmp_path) == lines


def test_muse_examples_that_are_asked_are_not_read(tmp_path: Path) -> None:
    make_muse(tmp_path, "{}/{}.json", "retain")
    asked = json.loads((tmp_path / "knowmem" / "retain_qa.json").read_text())[5]
    edit(tmp_path / "knowmem" / "retain_qa_icl.json", lambda rows: rows.__setitem__(0, asked))
    benchmark = load_benchmark("muse:books", tmp_path)
    assert_sound(benchmark)
    assert (len(benchmark.fit), len(benchmark.probes["knowmem_retain"].context)) == (9, 10)


def test_muse_bad_files_are_named(tmp_path: Path) -> None:
    make_muse(tmp_path, "{}/{}.json", "retain")
    (tmp_path / "verbmem" / "forget.json").unlink()
    (tmp_path / "privleak" / "holdout.json").unlink()
    notes = load_benchmark("muse:books", tmp_path).notes
    assert ["VerbMem" in notes[0], "PrivLeak" in notes[1]] == [True, True]
    edit(tmp_path / "privleak" / "retain.json", lambda rows: rows.__setitem__(2, 5))
    with pytest.raises(RemaskError, match=r"retain\.json, line 1, row 3: expected a JSON object, found int"):
        load_benchmark("muse:books", tmp_path)
    edit(tmp_path / "knowmem" / "forget_qa.json", lambda rows: rows.pop())
    with pytest.raises(RemaskError, match=r"forget_qa\.json: 99 rows, expected 100 for MUSE books forget_qa"):
        load_benchmark("muse:books", tmp_path)
    (tmp_path / "knowmem" / "forget_qa.json").unlink()
    with pytest.raises(RemaskError, match=r"knowmem/forget_qa\.json: no such file"):
        load_benchmark("muse:books", tmp_path)


@real("muse", "hp_knowmem_forget_qa.json")
@pytest.mark.parametrize("corpus", ["books", "news"])
def test_muse_real_questions(corpus: str) -> None:
    benchmark = load_benchmark(f"muse:{corpus}", DATA / "muse")
    assert_sound(benchmark)
    assert [len(benchmark.probes[name]) for name in ("knowmem_forget", "knowmem_retain")] == [100, 100]
    assert all(len(benchmark.probes[name].context) == 10 for name in ("knowmem_forget", "knowmem_retain"))


# ------------------------------------------------------------------ WHP
def test_whp_completions_are_the_users(tmp_path: Path) -> None:
    rows = [{"prompt": f"The boy {i} went to", "completion": "the station", "subject": "The boy"} for i in range(3)]
    dump(tmp_path / "forget.json", rows)
    dump(tmp_path / "retain.json", [{"prompt": "Rain falls on", "completion": "the roof", "group": "weather"}])
    benchmark = load_benchmark("whp", tmp_path)
    assert_sound(benchmark)
    assert [fact.subject for fact in benchmark.forget] == ["The boy"] * 3
    assert benchmark.scored["retain"][0].subject == "Rain falls on"
    assert "not the paper's familiarity" in benchmark.notes[0]
    dump(tmp_path / "fit.json", [{"prompt": "Snow falls on", "completion": "the yard"}])
    assert len(load_benchmark("whp", tmp_path).fit) == 1
    dump(tmp_path / "fit.json", [{"prompt": "Rain falls on", "completion": "the roof"}])
    with pytest.raises(RemaskError, match=r"whp/fit/0000 is also in forget or retain"):
        load_benchmark("whp", tmp_path)
    dump(tmp_path / "forget.json", [{**rows[0], "subject": "The girl"}])
    with pytest.raises(RemaskError, match=r"forget\.json, line 1, row 1: fact 'whp/forget/0000': subject 'The girl'"):
        load_benchmark("whp", tmp_path)


# ------------------------------------------------------------------ WMDP
def make_wmdp(path: Path, count: int, **more: object) -> None:
    row = {"choices": ["north", "east", "south", "west"], **more}
    dump(path, [{**row, "question": f"Where does bird {i} go?", "answer": i % 4} for i in range(count)])


@pytest.mark.parametrize("file", ["wmdp-chem/test.json", "wmdp-chem.json", "chem-questions.json"])
def test_wmdp_with_and_without_its_utility_partner(tmp_path: Path, file: str) -> None:
    make_wmdp(tmp_path / file, 408)
    benchmark = load_benchmark("wmdp:chem", tmp_path)
    assert_sound(benchmark)
    choices = benchmark.probes["questions"].choices
    assert (choices[6].options[choices[6].answer], benchmark.forget[6].answer) == ("south", "south")
    assert benchmark.forget[6].perturbed == ("north", "east", "west")
    assert "chemistry" in benchmark.probes["questions"].wrap("?")
    assert benchmark.scored == {} and "no retain group" in benchmark.notes[1]
    assert benchmark.notes[0].endswith("all 408 rows of April 2024")
    make_wmdp(tmp_path / "mmlu.json", 5, subject="birds")
    assert len(load_benchmark("wmdp:chem", tmp_path).scored["retain"]) == 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[1].update(answer=4), r"row 2: expected 4 non-empty choices and an answer from 0 to 3"),
        (lambda rows: rows[1]["choices"].pop(), r"row 2: expected 4 non-empty choices"),
        (lambda rows: rows[1].update(answer="A"), r"row 2: column 'answer' must be an integer"),
        (lambda rows: rows[1].pop("choices"), r"row 2: column 'choices' is missing"),
        (lambda rows: rows.extend(rows[:1] * 500), r"508 rows, more than the 412"),
    ],
)
def test_wmdp_bad_rows_are_named(tmp_path: Path, change: Callable[[list[Any]], object], words: str) -> None:
    make_wmdp(tmp_path / "wmdp-chem.json", 8)
    assert "a sample of 8 rows" in load_benchmark("wmdp:chem", tmp_path).notes[0]
    edit(tmp_path / "wmdp-chem.json", change)
    with pytest.raises(RemaskError, match=rf"wmdp-chem\.json.*{words}"):
        load_benchmark("wmdp:chem", tmp_path)


def test_wmdp_revision_is_pinned() -> None:
    assert wmdp.HUB == {"cais/wmdp": wmdp.REVISION}
    assert len(wmdp.REVISION) == 40


# ------------------------------------------------------------------ CounterFact
def easyedit(case: int) -> dict[str, Any]:
    return {
        "case_id": case,
        "prompt": f"Ada Birk {case} was born in",
        "subject": f"Ada Birk {case}",
        "ground_truth": "Lucca",
        "target_new": "Tartu",
        "rephrase_prompt": f"It rained. Ada Birk {case} comes from",
        "locality_prompt": f"Hugo Lund {case} was born in",
        "locality_ground_truth": "Lucca",
    }


def original(case: int) -> dict[str, Any]:
    return {
        "case_id": case,
        "pararel_idx": 7,
        "requested_rewrite": {
            "prompt": "{} was born in",
            "relation_id": "P19",
            "subject": f"Ada Birk {case}",
            "target_new": {"str": "Tartu", "id": "Q13972"},
            "target_true": {"str": "Lucca", "id": "Q13373"},
        },
        "paraphrase_prompts": [f"It rained. Ada Birk {case} comes from", f"Ada Birk {case}, a native of"],
        "neighborhood_prompts": [f"Hugo Lund {case}-{i} was born in" for i in range(10)],
        "attribute_prompts": [f"Vera Holm {case}-{i} was born in" for i in range(10)],
        "generation_prompts": [f"Ada Birk {case} lives in"] * 3,
    }


def test_counterfact_in_both_layouts(tmp_path: Path) -> None:
    dump(tmp_path / "counterfact-val.json", [easyedit(case) for case in (10, 42)])
    dump(tmp_path / "counterfact.json", [original(case) for case in (10, 42)])
    flat, full = load_benchmark("counterfact:val", tmp_path), load_benchmark("counterfact", tmp_path)
    for benchmark in (flat, full):
        assert_sound(benchmark)
        fact = benchmark.forget[0]
        assert (fact.id, fact.prompt, fact.answer, fact.target) == (
            "counterfact/10",
            "Ada Birk 10 was born in",
            "Lucca",
            "Tartu",
        )
        assert {fact.id for fact in benchmark.scored["retain"]} == {
            near for fact in benchmark.forget for near in fact.neighbours
        }
        assert all(fact.subject.startswith("Ada Birk") for fact in benchmark.scored["paraphrase"])
        assert "a sample of 2 rows" in benchmark.notes[0]
    assert {name: len(facts) for name, facts in full.scored.items()} == {"paraphrase": 4, "retain": 20, "attributes": 20}
    assert {fact.answer for fact in full.scored["attributes"]} == {"Tartu"}
    assert {name: len(facts) for name, facts in flat.scored.items()} == {"paraphrase": 2, "retain": 2}


def test_counterfact_reads_known_statements_that_are_not_scored(tmp_path: Path) -> None:
    dump(tmp_path / "counterfact-val.json", [easyedit(10)])
    known = [
        ("Ada Birk 10", "Ada Birk 10 lives in"),
        ("Hugo Lund", "Hugo Lund 10 was born in"),
        ("Vera Holm", "Vera Holm was born in"),
    ]
    rows = [
        {"known_id": i, "subject": subject, "attribute": "Lucca", "prompt": prompt, "a/model": True}
        for i, (subject, prompt) in enumerate(known)
    ]
    dump(tmp_path / "known_1000.json", rows)
    benchmark = load_benchmark("counterfact:val", tmp_path)
    assert_sound(benchmark)
    assert [fact.id for fact in benchmark.fit] == ["known/2"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: row["requested_rewrite"].pop("target_new"), r"requested_rewrite needs prompt"),
        (lambda row: row["requested_rewrite"].update(prompt="{} {} was"), r"requested_rewrite needs prompt"),
        (lambda row: row["requested_rewrite"].update(prompt="He was"), r"subject 'Ada Birk 42' does not occur in the prompt"),
        (lambda row: row.update(paraphrase_prompts="one"), r"column 'paraphrase_prompts' must be a list of texts"),
        (lambda row: row.update(locality_prompt="x"), r"unknown column 'locality_prompt'"),
    ],
)
def test_counterfact_bad_rows_are_named(tmp_path: Path, change: Callable[[dict[str, Any]], object], words: str) -> None:
    rows = [original(10), original(42)]
    change(rows[1])
    dump(tmp_path / "counterfact.json", rows)
    with pytest.raises(RemaskError, match=rf"counterfact\.json, line 1, row 2: .*{words}"):
        load_benchmark("counterfact", tmp_path)


@real("counterfact", "counterfact-val.json")
def test_counterfact_real_cases() -> None:
    benchmark = load_benchmark("counterfact:val", DATA / "counterfact")
    assert_sound(benchmark)
    assert len(benchmark.forget) == len(benchmark.scored["retain"]) == 1919
    assert "all 1919 rows" in benchmark.notes[0]
    assert len(benchmark.fit) > 1000


# ------------------------------------------------------------------ zsRE
def mend(index: int) -> dict[str, Any]:
    return {
        "subject": f"Ada Birk {index}",
        "src": f"Where was Ada Birk {index} born?",
        "pred": "Bergen",
        "rephrase": f"What is the birthplace of Ada Birk {index}?",
        "alt": "Tartu" if index else "",
        "answers": ["Lucca", "the town of Lucca"],
        "loc": f"nq question: who sang song {index}",
        "loc_ans": "nobody",
        "cond": "Lucca >> Tartu",
    }


def test_zsre_groups(tmp_path: Path) -> None:
    dump(tmp_path / "zsre_mend_eval.json", [mend(index) for index in range(20)])
    benchmark = load_benchmark("zsre:eval", tmp_path)
    assert_sound(benchmark)
    assert [(fact.answer, fact.target) for fact in benchmark.forget[:2]] == [("Lucca", None), ("Lucca", "Tartu")]
    assert {name: len(facts) for name, facts in benchmark.scored.items()} == {"paraphrase": 20, "retain": 18}
    assert [fact.prompt for fact in benchmark.fit] == [f"nq question: who sang song {index}?" for index in (9, 19)]
    assert "a sample of 20 rows" in benchmark.notes[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answers": [" "]}, "column 'answers' holds no answer"),
        ({"answers": "Lucca"}, "column 'answers' must be a list of texts"),
        ({"subject": "Hugo"}, "subject 'Hugo' does not occur"),
        ({"portability": {}}, "unknown column 'portability'"),
        ({"loc": ""}, "column 'loc' is missing or empty"),
    ],
)
def test_zsre_bad_rows_are_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    dump(tmp_path / "zsre_mend_eval.json", [mend(0), {**mend(1), **change}])
    with pytest.raises(RemaskError, match=rf"zsre_mend_eval\.json, line 1, row 2: .*{words}"):
        load_benchmark("zsre:eval", tmp_path)


@real("zsre", "zsre_mend_train-1k.json")
def test_zsre_real_rows() -> None:
    benchmark = load_benchmark("zsre:train-1k", DATA / "zsre")
    assert_sound(benchmark)
    assert len(benchmark.forget) == 1000
    assert sum(fact.target is None for fact in benchmark.forget) == 2
