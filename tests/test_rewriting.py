"""Scores of rewrites against hand-computed numbers, and the run that measures them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import remask as library
import remask.backbones as backbones
from conftest import FACTS
from remask.backbones import MaskedDiffusionLM, Site
from remask.diffusion.likelihood import elbo
from remask.editing import EditMemory, preset
from remask.editing.build import fact_hash
from remask.errors import RemaskError
from remask.evaluation.benchmarks.registry import load_benchmark
from remask.evaluation.generation import answers
from remask.evaluation.metrics.choice import RewriteScores, rewrite_scores
from remask.evaluation.rewriting import (
    Said,
    answer_accuracy,
    contains,
    counterfact_score,
    locality,
    rewrite_summary,
    said_summary,
    score_interval,
)
from remask.experiments.edits import build_edit, tuned
from remask.experiments.rewriting import BANK, control, known_rewrites, run_rewrite, with_targets
from remask.facts import Fact, load_facts, save_facts
from test_cli import Remask, remask

__all__ = ["remask"]  # a fixture

NAN = math.nan


# ------------------------------------------------------------------ CounterFact
def test_counterfact_score_is_the_harmonic_mean_of_three() -> None:
    assert counterfact_score(1.0, 0.5, 0.25) == pytest.approx(3 / (1 + 2 + 4))
    assert counterfact_score(0.7, 0.7, 0.7) == pytest.approx(0.7)
    assert counterfact_score(1.0, 0.0, 1.0) == 0.0
    assert math.isnan(counterfact_score(1.0, NAN, 1.0))


def scores() -> list[RewriteScores]:
    return [
        RewriteScores("a", 1.0, 0.5, NAN, 0.4, 0.2, NAN),
        RewriteScores("b", 0.0, 0.5, 0.75, -0.2, 0.0, 0.3),
        RewriteScores("c", 1.0, NAN, 0.25, 0.1, NAN, -0.1),
    ]


def test_a_summary_leaves_out_what_a_rewrite_does_not_have() -> None:
    found = rewrite_summary(scores())
    assert found["efficacy"].mean == pytest.approx(2 / 3)
    assert (found["paraphrase"].mean, found["paraphrase"].n) == (0.5, 2)
    assert (found["neighbourhood"].mean, found["neighbourhood"].n) == (0.5, 2)
    assert found["efficacy_magnitude"].mean == pytest.approx(0.1)
    assert found["neighbourhood_magnitude"].mean == pytest.approx(0.1)
    assert found["score"].mean == pytest.approx(3 / (1.5 + 2 + 2))
    assert found["score"].n == 3


def test_the_interval_of_the_score_is_that_of_all_resamples() -> None:
    table = np.array([[1.0, 1.0, 0.5], [1.0, 0.5, 1.0], [0.5, 1.0, 1.0]])
    exact = [
        counterfact_score(*table[[i, j, k]].mean(axis=0)) for i in range(3) for j in range(3) for k in range(3)
    ]  # 27 resamples, all equally likely
    found = score_interval(table)
    assert found.mean == pytest.approx(5 / 6)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(exact, [0.025, 0.975])), abs=0.02)
    assert found.low < found.mean <= found.high
    assert score_interval(table) == found
    constant = score_interval([[1.0, 0.5, 0.25]] * 4)
    assert constant.low == constant.high == pytest.approx(constant.mean) == pytest.approx(3 / 7)


def test_parts_of_one_rewrite_are_resampled_together() -> None:
    # Rewrites are all good or all bad: S of a resample is the share of good ones, as wide as a binomial of 4.
    found = score_interval([[1.0] * 3, [1.0] * 3, [0.0] * 3, [0.0] * 3])
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)


def test_scores_that_cannot_be_summarised() -> None:
    with pytest.raises(RemaskError, match="no rewrites"):
        rewrite_summary([])
    with pytest.raises(RemaskError, match=r"\[rewrites, 3\]"):
        score_interval([1.0, 1.0, 1.0])
    alone = score_interval([[1.0, NAN, 1.0], [1.0, NAN, 0.0]])
    assert math.isnan(alone.mean) and alone.n == 2


# ------------------------------------------------------------------ zsRE
def test_answer_accuracy_is_one_forward_with_the_answer_masked(taught, monkeypatch) -> None:
    facts = [*FACTS, replace(FACTS[1], answer="a blind crow"), replace(FACTS[0], answer="Lu")]
    rows = [taught.encode(fact) for fact in facts]
    expected = []
    for row in rows:
        canvas = torch.tensor([[*row.prompt_ids, *[taught.spec.mask_id] * len(row.answer_ids)]])
        with torch.inference_mode():
            said = taught.model(input_ids=canvas).logits[0].argmax(dim=-1)[len(row.prompt_ids) :]
        expected.append(sum(int(a) == b for a, b in zip(said, row.answer_ids, strict=True)) / len(row.answer_ids))
    assert answer_accuracy(taught, rows) == pytest.approx(expected)
    assert max(expected[:8]) == 1.0 and min(expected[8:]) < 1.0
    assert any(0 < share < 1 for share in expected)


# ------------------------------------------------------------------ what is said
@pytest.mark.parametrize(
    ("output", "phrase", "found"),
    [
        ("She was born in Lucca.", "Lucca", True),
        ("a  TAME\ncrow, mostly", "a tame crow", True),
        ("Luccas", "Lucca", False),
        ("In 19361 or so", "1936", False),
        ("C++ and Rust", "c++", True),
        ("", "Lucca", False),
    ],
)
def test_contains_looks_for_whole_words(output: str, phrase: str, found: bool) -> None:
    assert contains(output, phrase) is found


def test_what_is_said_of_a_rewrite() -> None:
    assert Said.of("Varna", "Varna", "Lucca") == Said(exact=True, new=True, old=False, junk=False)
    assert Said.of("Varna, not Lucca", "Varna", "Lucca") == Said(exact=False, new=True, old=True, junk=False)
    assert Said.of("the the the", "Varna", "Lucca") == Said(exact=False, new=False, old=False, junk=True)
    checks = [Said(True, True, False, False), Said(False, True, True, False), Said(False, False, False, True)]
    means = {name: estimate.mean for name, estimate in said_summary(checks).items()}
    assert means == pytest.approx({"exact": 1 / 3, "new": 2 / 3, "old": 1 / 3, "junk": 1 / 3})


# ------------------------------------------------------------------ what had to stay
def test_locality_pairs_the_rows() -> None:
    found = locality([-1.0, -2.0, -3.0], [-1.5, -2.0, -5.5], ["a", "b"], ["a", "c"])
    assert found["change"].mean == pytest.approx(-1.0)
    assert -2.5 <= found["change"].low < -1.0 < found["change"].high <= 0.0
    assert (found["unchanged"].mean, found["unchanged"].n) == (0.5, 2)
    with pytest.raises(RemaskError, match="differ in length"):
        locality([-1.0], [-1.0, -2.0], [], [])


# ------------------------------------------------------------------ the run
TARGETS = {"ada/city": "Sligo", "ada/pet": "a blind cat"}
REWRITES = [replace(fact, target=TARGETS[fact.id], neighbours=("bruno/city",)) for fact in FACTS[:2]]
KNOWN = {fact.id: fact for fact in FACTS}
SITE, BETA = Site(1), {"beta": 60.0}


def rewrite(lm: MaskedDiffusionLM, retain: list[Fact]) -> EditMemory:
    return EditMemory.build(lm, REWRITES, SITE, retain=retain, config=preset("rewrite", **BETA))


@pytest.mark.parametrize("edit", ["rewrite", "mean-delta", "paper"])
def test_a_run_measures_before_and_after_and_leaves_the_model_as_it_was(taught, tmp_path, edit: str) -> None:
    retain, kept, out = FACTS[2:6], FACTS[6:], tmp_path / "result.json"
    result = run_rewrite(taught, REWRITES, retain, kept, edit=edit, site=SITE, changes=BETA, known=KNOWN, out=out)
    assert taught.attached == []
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    before, after = result["before"], result["after"]
    assert before["said exact"]["mean"] == 0.0 and before["said old"]["mean"] == 1.0
    assert before["kept change"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 2} and before["kept unchanged"]["mean"] == 1.0

    built = control(taught, edit, rewrite(taught, retain), REWRITES)
    bank = [taught.encode(fact) for fact in kept]
    plain = [score.logprob for score in elbo(taught, bank, BANK)]
    unedited = answers(taught, bank)
    with built.attached(taught):
        scores = rewrite_scores(taught, REWRITES, BANK, KNOWN)
        edited = [score.logprob for score in elbo(taught, bank, BANK)]
        said = answers(taught, [taught.encode(fact) for fact in REWRITES])
        stayed = answers(taught, bank)
    for name in ("efficacy", "neighbourhood", "efficacy_magnitude"):
        assert after[name]["mean"] == pytest.approx(np.mean([getattr(score, name) for score in scores]))
    assert after["kept change"]["mean"] == pytest.approx(np.mean(edited) - np.mean(plain))
    lines = {line["prompt"]: line for kind in result["generations"].values() for line in kind}
    assert [lines[fact.prompt]["after"] for fact in REWRITES] == said
    assert [lines[fact.prompt]["before"] for fact in REWRITES] == [fact.answer for fact in REWRITES]
    assert [line["after"] for line in result["generations"]["good"]] == [
        text for text, fact in zip(said, REWRITES, strict=True) if text == fact.target
    ]
    changes = [(old, new) for old, new in zip(unedited, stayed, strict=True) if old != new]
    assert [(line["before"], line["after"]) for line in result["kept_changed"]] == changes
    assert after["kept unchanged"]["mean"] == pytest.approx(1 - len(changes) / 2)
    if edit == "rewrite":
        assert after["efficacy"]["mean"] == after["said exact"]["mean"] == after["accuracy"]["mean"] == 1.0


def test_controls_shift_the_rewrite_s_keys_as_much_as_it_does(taught) -> None:
    memory = rewrite(taught, FACTS[2:])
    controls = [control(taught, name, memory, REWRITES) for name in ("mean-delta", "paper")]
    assert control(taught, "rewrite", memory, REWRITES) is memory
    wanted = memory.shift()(memory.keys).double().square().sum(dim=1).mean()
    for edit in controls:
        assert edit.site == memory.site
        found = edit.shift()(memory.keys).double().square().sum(dim=1).mean()
        assert float(found) == pytest.approx(float(wanted), rel=1e-4)


def test_the_seed_and_the_value_reach_the_capture(taught) -> None:
    plain = build_edit(taught, "rewrite", REWRITES, FACTS[2:], site=SITE)
    assert plain.fact_ids == ("ada/city", "ada/pet") and plain.hashes == tuple(fact_hash(fact) for fact in REWRITES)
    donor = build_edit(taught, "rewrite", REWRITES, FACTS[2:], site=SITE, value="donor")
    assert torch.equal(plain.keys, donor.keys) and not torch.equal(plain.deltas, donor.deltas)
    other = build_edit(taught, "rewrite", REWRITES[1:], FACTS[2:], site=SITE, seed=1)
    assert other.config.state_seed == plain.config.state_seed + 1
    assert not torch.equal(other.retained.mean, plain.retained.mean)


def test_a_rewrite_is_whole_at_its_own_strength_and_where_it_was_chosen(taught, monkeypatch) -> None:
    assert build_edit(taught, "rewrite", REWRITES, FACTS[2:], site=SITE, level=-30.0).alpha == 1.0
    assert build_edit(taught, "rewrite", REWRITES, FACTS[2:], site=SITE, alpha=0.5).alpha == 0.5
    assert tuned("tiny", "rewrite") == {"layer": 2}
    monkeypatch.setattr(taught, "name", "tiny-tofu")  # has a layer for forgetting
    with pytest.raises(RemaskError, match="no layer is known for tiny-tofu"):
        build_edit(taught, "rewrite", REWRITES, FACTS[2:])


# ------------------------------------------------------------------ the command line
EXAMPLES = Path(__file__).parent.parent / "examples"


def test_a_city_is_rewritten_on_the_command_line(remask: Remask, tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(backbones, "load", lambda name, **_: tiny)
    short = {fact.id: fact for fact in load_facts(EXAMPLES / "facts.jsonl") if fact.id.endswith("/short")}
    city = replace(short["zora-yates/city/short"], target="Lucca")
    dish = replace(short["zora-yates/food/short"], target="rye bread")
    retain = [fact for fact in load_facts(EXAMPLES / "retain.jsonl") if fact.id.endswith("/short")][::5]
    files = {name: tmp_path / f"{name}.jsonl" for name in ("city", "dish", "retain")}
    for name, facts in (("city", [city]), ("dish", [dish]), ("retain", retain)):
        save_facts(facts, files[name])
    edit = tmp_path / "edit.safetensors"

    def said(*facts: Fact) -> list[str]:
        asked = [word for fact in facts for word in ("--prompt", fact.prompt)]
        return [row["answer"] for row in remask("generate", "tiny", *asked, "--edit", edit, "--json").data["rows"]]

    built = remask(
        *("edit", "build", "tiny", "--facts", files["city"], "--retain", files["retain"], "--preset", "rewrite", "-o", edit)
    )
    assert built.code == 0 and "at layer 2, alpha 1," in built.out, built.err
    assert (city.answer, retain[0].answer) == ("Tartu", "Ostrava")
    assert said(city, retain[0], dish) == ["Lucca", retain[0].answer, dish.answer]

    assert remask("edit", "add", "tiny", edit, "--facts", files["dish"]).code == 0
    assert said(city, retain[0], dish) == ["Lucca", retain[0].answer, "rye bread"]
    shown = remask("edit", "show", edit, "--json").data
    assert (shown["preset"], shown["config"]["target"], shown["facts"]) == ("rewrite", "object", 2)
    live = library.attach(tiny.model, edit)
    assert answers(tiny, [tiny.encode(city), tiny.encode(retain[0])]) == ["Lucca", retain[0].answer]
    live.detach()
    assert answers(tiny, [tiny.encode(city)]) == ["Tartu"]


# ------------------------------------------------------------------ the run, refusals and layouts
def test_made_up_targets() -> None:
    fact = replace(
        FACTS[0], perturbed=("Varna", "Arles"), paraphrases=("taught", "unseen"), neighbours=("bruno/city", "cleo/city")
    )
    (made,) = with_targets([fact, FACTS[1]], KNOWN)
    assert made == replace(fact, target="Varna", paraphrases=("taught",), neighbours=("cleo/city",))  # Bruno is from Varna


def test_a_fact_is_known_when_every_token_is_right(taught) -> None:
    facts = [
        replace(FACTS[0], target="Varna"),
        replace(FACTS[1], answer="a tame dog", target="a cat"),
        FACTS[2],
        replace(FACTS[3], target=FACTS[3].answer),
    ]
    assert [fact.id for fact in known_rewrites(taught, facts)] == ["ada/city"]


def published(folder: Path) -> None:
    """Rows in the layouts of CounterFact (EasyEdit's) and zsRE, about what the taught model knows."""
    folder.mkdir()
    case = {
        "case_id": 7,
        "prompt": FACTS[1].prompt,
        "subject": FACTS[1].subject,
        "ground_truth": FACTS[1].answer,
        "target_new": "a blind cat",
        "rephrase_prompt": "Ada Birk keeps",
        "locality_prompt": FACTS[4].prompt,
        "locality_ground_truth": FACTS[4].answer,
    }
    known = [
        {"known_id": i, "subject": fact.subject, "attribute": fact.answer, "prompt": fact.prompt}
        for i, fact in enumerate(FACTS[5:])
    ]
    row = {
        "subject": FACTS[3].subject,
        "src": FACTS[3].prompt,
        "pred": "",
        "rephrase": "Bruno Hale keeps what?",
        "alt": "a tame crow",
        "answers": [FACTS[3].answer],
        "loc": FACTS[4].prompt[:-1],
        "loc_ans": FACTS[4].answer,
        "cond": "",
    }
    read = row | {"loc": FACTS[6].prompt[:-1], "loc_ans": FACTS[6].answer}  # every tenth unrelated question is for the edit
    for name, rows in (("counterfact-val", [case]), ("known_1000", known), ("zsre_mend_train-1k", [*[row] * 9, read])):
        (folder / f"{name}.json").write_text(json.dumps(rows))


@pytest.mark.parametrize(("name", "new"), [("counterfact:val", "a blind cat"), ("zsre:train-1k", "a tame crow")])
def test_published_formats_can_be_rewritten(taught, tmp_path, name: str, new: str) -> None:
    published(tmp_path / "data")
    groups = load_benchmark(name, tmp_path / "data")
    facts = known_rewrites(taught, groups.forget)[:1]
    assert [fact.target for fact in facts] == [new]
    known = {fact.id: fact for fact in groups.scored["retain"]}
    facts = [replace(fact, neighbours=tuple(near for near in fact.neighbours if near in known)) for fact in facts]
    kept = groups.scored["retain"][:1]
    result = run_rewrite(taught, facts, groups.fit, kept, site=SITE, changes=BETA, known=known)
    assert result["before"]["said old"]["mean"] == 1.0
    assert result["after"]["efficacy"]["mean"] == result["after"]["said exact"]["mean"] == 1.0
    assert result["after"]["paraphrase"]["n"] == 1


def test_rows_and_names_that_a_run_refuses(taught) -> None:
    with pytest.raises(RemaskError, match="'cleo/city' is read by the edit"):
        run_rewrite(taught, REWRITES, FACTS[2:6], FACTS[4:], site=SITE)
    with pytest.raises(RemaskError, match="choose one of rewrite"):
        control(taught, "wish", rewrite(taught, FACTS[2:]), REWRITES)
    with pytest.raises(RemaskError, match="needs retain facts"):
        rewrite(taught, [])
