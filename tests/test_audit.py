"""The audit: paired rows under one bank, cells that can be computed anywhere, and aggregates that follow from the records."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import remask.evaluation.audit as audit_module
from conftest import FACTS, build_toy
from remask.backbones import MaskedDiffusionLM, Site
from remask.backbones.intervention import NoEdit
from remask.diffusion.likelihood import elbo
from remask.diffusion.masks import MaskBank
from remask.diffusion.sampler import SamplerConfig, generate
from remask.editing import EditMemory, mean_delta
from remask.errors import RemaskError
from remask.evaluation.audit import Cell, Group, Plan, State, groups_of, run_cells, states_of
from remask.evaluation.benchmarks.base import Benchmark, Choice, Probe, Text
from remask.evaluation.benchmarks.registry import load_benchmark
from remask.evaluation.metrics.membership import membership_scores
from remask.evaluation.metrics.text import exact_match, junk, rouge_l_recall
from remask.evaluation.records import Record, Source
from remask.evaluation.summary import LOGPROB, Scores, gap_closed, group_table, memberships, selectivity, utilities
from remask.facts import Fact

STATES = ["before", "after", "never trained", "prompt masked", "mean-delta"]
WRONG = {"ada/city": ("Varna", "Arles"), "ada/pet": ("a blind cat", "a lame goat")}
FORGET = tuple(replace(fact, perturbed=WRONG[fact.id]) for fact in FACTS[:2])
GROUPS = (
    Group("forget", "forget", FORGET, ("likelihood", "generation", "memorisation")),
    Group("retain", "retain", tuple(FACTS[4:7])),
    Group("neighbours", "retain", tuple(FACTS[2:4])),
)
READ_OFF_TEXT = {"output", "exact match", "ROUGE-L recall", "ROUGE-L F1", "junk rate", "n-gram entropy"}
BANK = MaskBank(draws=2, replicates=2, seed=0)


@pytest.fixture(scope="module")
def lm() -> MaskedDiffusionLM:
    return build_toy(seed=1)


@pytest.fixture(scope="module")
def reference() -> MaskedDiffusionLM:
    """Random too; its level of the forget rows is the lower one."""
    return build_toy()


@pytest.fixture(scope="module")
def memory(lm: MaskedDiffusionLM) -> EditMemory:
    return EditMemory.build(lm, FACTS[:2], Site(1), retain=FACTS[4:], alpha=2.0)


@pytest.fixture(scope="module")
def plan(lm: MaskedDiffusionLM) -> Plan:
    return Plan("toy", GROUPS, {}, (), BANK.draws, BANK.replicates, SamplerConfig.default(lm), "fp32", {})


@pytest.fixture(scope="module")
def states(lm: MaskedDiffusionLM, memory: EditMemory, reference: MaskedDiffusionLM) -> list[State]:
    return states_of(lm, memory, reference, mean_delta(memory))


@pytest.fixture(scope="module")
def cells(plan: Plan, states: list[State]) -> list[Cell]:
    return [cell for seed in (0, 1) for cell in plan.cells(states, seed)]


@pytest.fixture(scope="module")
def records(cells: list[Cell]) -> list[Record]:
    return [record for part in run_cells(cells, "toy") for record in part]


@pytest.fixture(scope="module")
def scores(records: list[Record]) -> Scores:
    return Scores(records)


# ------------------------------------------------------------------ what is measured
def test_every_state_has_a_log_probability_of_every_row_under_every_seed(scores: Scores) -> None:
    assert scores.states == STATES
    assert scores.groups == ["forget", "retain", "neighbours"]
    for state in STATES:
        for group in GROUPS:
            for seed in (0, 1):
                assert list(scores.rows(state, group.name, LOGPROB, seed=seed)) == [row.id for row in group.rows]


def test_log_probabilities_are_those_of_the_state_under_the_bank_of_the_seed(
    scores: Scores, lm: MaskedDiffusionLM, reference: MaskedDiffusionLM, memory: EditMemory
) -> None:
    rows = [lm.encode(row) for group in GROUPS for row in group.rows]  # type: ignore[arg-type]
    for seed in (0, 1):
        bank = replace(BANK, seed=seed)
        expected = {"before": elbo(lm, rows, bank), "prompt masked": elbo(lm, rows, bank, hide_prompt=True)}
        expected["never trained"] = elbo(reference, rows, bank)
        for state, edit in (("after", memory), ("mean-delta", mean_delta(memory))):
            with edit.attached(lm):
                expected[state] = elbo(lm, rows, bank)
        for state, found in expected.items():
            own = {name: r for group in GROUPS for name, r in scores.rows(state, group.name, LOGPROB, seed=seed).items()}
            for score in found:
                assert own[score.id].value == pytest.approx(score.logprob, abs=1e-4), (state, score.id)
                assert own[score.id].stderr == pytest.approx(score.stderr, abs=1e-4)
                assert own[score.id].replicates == pytest.approx(score.replicates, abs=1e-4)
                assert own[score.id].tokens == score.tokens


def test_generations_are_those_of_the_state(scores: Scores, lm: MaskedDiffusionLM, memory: EditMemory, plan: Plan) -> None:
    for state, edit in (("before", NoEdit()), ("after", memory)):
        for group in GROUPS:
            rows = [lm.encode(row) for row in group.rows]  # type: ignore[arg-type]
            with edit.attached(lm):
                made = generate(lm, [row.prompt_ids for row in rows], plan.sampler, keys=[row.id for row in rows])
            for fact, result in zip(group.rows, made, strict=True):
                assert isinstance(fact, Fact)
                output = lm.decode(result.response)
                row = {name: scores.rows(state, group.name, name)[fact.id].value for name in scores.metrics(group.name)}
                assert scores.rows(state, group.name, "output")[fact.id].value == output
                assert row["exact match"] == float(exact_match(output, fact.answer))
                assert row["ROUGE-L recall"] == rouge_l_recall(output, fact.answer)
                assert row["junk rate"] == float(junk(output) is not None)


def test_slow_measurements_are_made_under_the_first_seed_and_in_three_states(records: list[Record]) -> None:
    for metric in ("exact match", "exact memorisation", "truth ratio"):
        assert {record.source.seed for record in records if record.metric == metric} == {0}
        assert {record.state for record in records if record.metric == metric} == set(STATES[:3])
    assert {record.group for record in records if record.metric == "truth ratio"} == {"forget"}  # has wrong answers


def test_every_record_says_what_it_depends_on(
    records: list[Record], lm: MaskedDiffusionLM, reference: MaskedDiffusionLM, memory: EditMemory
) -> None:
    bare = {"before": lm, "never trained": reference, "prompt masked": lm}
    for record in records:
        source = record.source
        if record.state in bare:
            assert (source.model, source.intervention) == (bare[record.state].fingerprint(), "")
        if record.state == "after":
            assert (source.intervention, source.preset) == (memory.fingerprint(), "default")
        if record.metric in READ_OFF_TEXT:
            assert source.sampler is not None
            assert (source.sampler["gen_length"], source.bank) == (16, None)
        else:
            assert (source.sampler, source.draws) == (None, 4)
            rows = next(group.rows for group in GROUPS if group.name == record.group)
            lengths = [(row.id, len(lm.encode(row).answer_ids)) for row in rows]  # type: ignore[arg-type]
            assert source.bank == replace(BANK, seed=source.seed).fingerprint(lengths)


def test_the_model_is_left_bare(scores: Scores, lm: MaskedDiffusionLM) -> None:
    assert lm.attached == []


def test_no_edit_changes_nothing_exactly(lm: MaskedDiffusionLM, plan: Plan) -> None:
    cells = list(plan.cells(states_of(lm, NoEdit()), 0))
    scores = Scores([record for part in run_cells(cells, "toy") for record in part])
    assert scores.states == ["before", "after", "prompt masked"]
    for group in GROUPS:
        for metric in scores.metrics(group.name):
            assert not scores.change(group.name, metric=metric).any()
    assert gap_closed(scores) is None
    assert selectivity(scores) == {}
    lines = group_table(scores, {group.name: group.side for group in GROUPS})
    changes = [metric["change"]["after"] for line in lines for metric in line["metrics"].values()]
    assert {(c["mean"], c["low"], c["high"], c["p_holm"]) for c in changes} == {(0.0, 0.0, 0.0, 1.0)}


# ------------------------------------------------------------------ cells
def test_values_do_not_depend_on_how_rows_are_cut_into_cells(
    records: list[Record], plan: Plan, states: list[State], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_module, "CELL_ROWS", 1)
    cells = [cell for seed in (0, 1) for cell in plan.cells(states, seed)]
    assert all(len(cell.rows) == 1 for cell in cells)
    single = Scores([record for part in run_cells(cells, "toy") for record in part])
    for record in records:
        other = single.rows(record.state, record.group, record.metric, seed=record.source.seed)[record.id]
        if isinstance(record.value, str):
            assert other.value == record.value
        else:
            assert other.value == pytest.approx(record.value, abs=1e-4)
        assert other.source == record.source


def test_a_cells_name_changes_with_everything_that_its_numbers_depend_on(
    plan: Plan, lm: MaskedDiffusionLM, memory: EditMemory, reference: MaskedDiffusionLM
) -> None:
    def names(plan: Plan, states: Sequence[State], seed: int = 0) -> list[str]:
        return [cell.key for cell in plan.cells(states, seed)]

    def forget(plan: Plan, *rows: Fact) -> Plan:
        return replace(plan, groups=(replace(plan.groups[0], rows=rows or plan.groups[0].rows), *plan.groups[1:]))

    after = [State("after", lm, memory)]
    original = names(plan, after)
    assert names(plan, after) == original
    assert len(set(original)) == len(original)
    first = FORGET[0]
    changed = [
        names(plan, [State("before", lm, memory)]),
        names(plan, [State("after", lm)]),
        names(plan, [State("after", lm, memory.with_alpha(2.5))]),
        names(plan, [State("after", reference)]),
        names(plan, [State("after", lm, memory, hide_prompt=True)]),
        names(replace(plan, draws=3), after),
        names(replace(plan, replicates=3), after),
        names(replace(plan, precision="bf16 autocast"), after),
        names(replace(plan, sampler=replace(plan.sampler, steps=8)), after),
        names(plan, after, seed=1),
        names(forget(plan, replace(first, answer="Lucca."), FORGET[1]), after),
        names(forget(plan, replace(first, prompt="Where, Ada Birk?"), FORGET[1]), after),
        names(forget(plan, replace(first, perturbed=("Rome",)), FORGET[1]), after),
    ]
    for other in changed:
        assert other[0] != original[0]
    assert len({other[0] for other in changed}) == len(changed)


def test_finished_cells_are_read_back_and_damaged_ones_measured_again(
    cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = cells[:4]
    first = run_cells(some, "toy", tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 4
    files[1].write_bytes(files[1].read_bytes()[:-40])
    ran: list[str] = []
    genuine = Cell.run

    def counted(cell: Cell, benchmark: str) -> list[Record]:
        ran.append(cell.key)
        return genuine(cell, benchmark)

    monkeypatch.setattr(Cell, "run", counted)
    for _ in range(2):
        again = run_cells(some, "toy", tmp_path)
        assert [record.to_json() for part in again for record in part] == [r.to_json() for part in first for r in part]
        assert ran == [files[1].stem]


# ------------------------------------------------------------------ planning
BENCHMARK = Benchmark(
    "made-up", list(FORGET), [], {"retain": list(FACTS[4:7]), "blanks": list(FACTS[2:4])}, [], [],
    probes={
        "asked again": Probe("question", "forget", [FACTS[2]], template="Tell me. {prompt} Well?"),
        "blanks probe": Probe("cloze", "forget", FACTS[2:4]),
        "fresh": Probe("question", "holdout", [FACTS[7]]),
        "texts": Probe("membership", "forget", texts=[Text("t0", "Ada Birk was born in Lucca."), Text("t1", "word " * 200)]),
        "letters": Probe("choice", "forget", choices=[Choice("c0", "Where was Ada Birk born?", ("Varna", "Lucca"), 1)]),
        "known": Probe("question", "retain", [FACTS[5]], context=[FACTS[4]]),
    },
)  # fmt: skip


def test_probes_become_groups_where_they_ask_in_their_own_way() -> None:
    groups = {group.name: group for group in groups_of(BENCHMARK)}
    assert {name: group.tasks for name, group in groups.items()} == {
        "forget": ("likelihood", "generation", "memorisation", "membership"),
        "retain": ("likelihood", "generation"),
        "blanks": ("likelihood", "generation"),
        "asked again": ("generation",),
        "fresh": ("membership",),
        "texts": ("membership",),
        "letters": ("choice",),
        "known": ("knowledge",),
    }
    assert groups["blanks"].side == "forget"  # the probe with the same rows says so
    assert groups["asked again"].rows[0].prompt == f"Tell me. {FACTS[2].prompt} Well?"  # type: ignore[union-attr]
    [letters] = groups["letters"].rows
    assert isinstance(letters, Fact)
    assert (letters.prompt, letters.answer, letters.perturbed) == (
        "Where was Ada Birk born?\nA. Varna\nB. Lucca",
        "B",
        ("A",),
    )
    assert groups["known"].context == ((FACTS[4].prompt, FACTS[4].answer),)


def test_rows_longer_than_the_context_are_named_and_left_out(lm: MaskedDiffusionLM) -> None:
    long = replace(FACTS[4], id="long", answer="word " * 120)
    tight = replace(FACTS[4], id="tight", prompt="Where was Cleo Pell " + "very " * 15 + "born?")  # no room for an answer
    room = len(lm.encode(tight).prompt_ids)
    assert room <= lm.spec.max_length < room + SamplerConfig.default(lm).gen_length
    wide = replace(BENCHMARK, scored={"retain": [long, FACTS[5], tight]}, fit=[long])
    plan = Plan.of(lm, wide, SamplerConfig.default(lm), attacks=False)
    assert plan.too_long == {"retain": ("long", "tight"), "texts": ("t1",), "fit": ("long",)}
    kept = {group.name: [row.id for row in group.rows] for group in plan.groups}
    assert (kept["retain"], kept["texts"]) == ([FACTS[5].id], ["t0"])
    with pytest.raises(RemaskError, match="made-up: no forget row fits the context of toy-1"):
        Plan.of(lm, replace(wide, forget=[long]), SamplerConfig.default(lm), attacks=False)


def test_a_whole_benchmark_runs_through_every_task(
    lm: MaskedDiffusionLM, memory: EditMemory, reference: MaskedDiffusionLM
) -> None:
    plan = Plan.of(lm, BENCHMARK, SamplerConfig.default(lm), attacks=False, extraction=True)
    cells = list(plan.cells(states_of(lm, memory, reference), 0))
    scores = Scores([record for part in run_cells(cells, "made-up") for record in part])
    sides = {group.name: group.side for group in plan.groups}
    found = {(line["group"], metric) for line in group_table(scores, sides) for metric in line["metrics"]}
    assert {("forget", "extraction strength"), ("forget", "MIA Min-K++"), ("fresh", "MIA loss")} <= found
    assert {("letters", "MCQ accuracy"), ("known", "KnowMem"), ("asked again", "exact match")} <= found
    assert not any(group == "fresh" and not metric.startswith("MIA") for group, metric in found)
    rows = [lm.encode(fact) for fact in FORGET]
    own = membership_scores(lm, rows, [fact.answer for fact in FORGET], plan.bank(0))
    assert scores.table("before", "forget", "MIA loss")[0] == pytest.approx(own.loss, abs=1e-5)
    table = memberships(scores, sides)
    # Two members against one outsider: the share of the two that score below it.
    outsider, members = scores.table("after", "fresh", "MIA Min-K")[0], scores.table("after", "forget", "MIA Min-K")[0]
    assert table["after"]["AUC Min-K"]["mean"] == np.mean(members < outsider[0])
    assert "AUC reference" in table["after"]
    assert "AUC reference" not in table["never trained"]


def test_every_bundled_and_made_up_benchmark_names_each_group_once() -> None:
    for benchmark in (BENCHMARK, load_benchmark("closed-world", None)):
        names = [group.name for group in groups_of(benchmark)]
        assert len(names) == len(set(names))


# ------------------------------------------------------------------ what follows from the records
def test_aggregates_are_recomputed_from_the_record_lines_alone(records: list[Record]) -> None:
    lines = [json.loads(record.to_json()) for record in records]

    def mean(state: str, group: str, metric: str) -> float:
        return float(np.mean([x["value"] for x in lines if (x["state"], x["group"], x["metric"]) == (state, group, metric)]))

    table = group_table(Scores(records), {group.name: group.side for group in GROUPS})
    for line in table:
        for metric, entry in line["metrics"].items():
            for state, value in entry["states"].items():
                assert value["mean"] == pytest.approx(mean(state, line["group"], metric)), (state, metric)
                assert value["low"] <= value["mean"] + 1e-9
                assert value["mean"] <= value["high"] + 1e-9
            for state, change in entry["change"].items():
                expected = mean(state, line["group"], metric) - mean("before", line["group"], metric)
                assert change["mean"] == pytest.approx(expected, abs=1e-9)
                assert change["p"] <= change["p_holm"] <= 1
        errors = [x["stderr"] for x in lines if (x["state"], x["group"], x["metric"]) == ("after", line["group"], LOGPROB)]
        found = line["metrics"][LOGPROB]["states"]["after"]["mc_stderr"]
        assert found == pytest.approx(math.sqrt(sum(e * e for e in errors)) / len(errors))
    json.dumps(table, allow_nan=False)


def test_no_value_is_recorded_twice(records: list[Record]) -> None:
    keys = Counter((r.state, r.group, r.id, r.metric, r.attack, r.source.seed) for r in records)
    assert set(keys.values()) == {1}
    with pytest.raises(RemaskError, match="twice"):
        Scores([*records, records[0]])
    with pytest.raises(RemaskError, match="several benchmarks"):
        Scores([*records, replace(records[0], benchmark="other")])


def made(values: dict[str, dict[str, list[float]]], metric: str = LOGPROB, seed: int = 0) -> list[Record]:
    """Records of made-up numbers: state -> group -> one value a row."""
    return [
        Record("x", state, group, f"{group}{i}", metric, value, 0.1, 2, None, "", Source("m", seed=seed))
        for state, groups in values.items()
        for group, row in groups.items()
        for i, value in enumerate(row)
    ]


HAND = {
    "before": {"forget": [-1.0, -3.0], "retain": [-2.0, -2.0]},
    "after": {"forget": [-10.0, -12.0], "retain": [-2.5, -2.5]},
    "never trained": {"forget": [-11.0, -13.0], "retain": [-2.0, -2.0]},
}


def test_arithmetic_on_hand_numbers() -> None:
    scores = Scores(made(HAND))
    assert gap_closed(scores) == pytest.approx([9 / 10])  # from -2 to -11, of the way to -12
    assert scores.change("forget").tolist() == [[-9.0, -9.0]]
    assert scores.change("retain").tolist() == [[-0.5, -0.5]]
    expected = {"mean": 18.0, "low": 18.0, "high": 18.0, "n": 2, "seeds": [18.0]}
    assert selectivity(scores)["after"] == expected


def test_seeds_are_averaged_within_rows_and_reported_apart() -> None:
    other = {state: {g: [v - 1.0 for v in row] for g, row in groups.items()} for state, groups in HAND.items()}
    other["after"]["forget"] = [-6.0, -8.0]
    scores = Scores(made(HAND) + made(other, seed=1))
    [forget, _] = group_table(scores, {"forget": "forget", "retain": "retain"})
    change = forget["metrics"][LOGPROB]["change"]["after"]
    assert change["seeds"] == [-9.0, -4.0]  # from -2 to -11, and from -3 to -7
    assert change["mean"] == -6.5
    assert forget["n"] == change["n"] == 2  # rows, not rows x seeds
    assert gap_closed(scores) == pytest.approx([0.9, 0.4])


@pytest.mark.parametrize(("after", "closed"), [(-2.0, 0.0), (-7.0, 0.5), (-12.0, 1.0), (-17.0, 1.5), (-1.0, -0.1)])
def test_gap_closed_counts_the_way_to_the_reference(after: float, closed: float) -> None:
    changed = {**HAND, "after": {**HAND["after"], "forget": [after, after]}}
    assert gap_closed(Scores(made(changed))) == pytest.approx([closed])


def test_a_reference_at_the_models_own_level_leaves_no_gap() -> None:
    assert gap_closed(Scores(made({**HAND, "never trained": HAND["before"]}))) == [None]
    assert gap_closed(Scores(made({**HAND, "before": HAND["never trained"], "never trained": HAND["before"]}))) == [None]


def test_model_utility_is_the_harmonic_mean_of_nine_numbers() -> None:
    """TOFU's definition, by hand: probability, ROUGE and max(0, 1 - truth ratio) of three sets."""
    parts = {"retain": (0.9, 0.8, 0.3), "real_authors": (0.6, 0.5, 0.1), "world_facts": (0.8, 0.7, 0.4)}
    records = []
    for group, (probability, rouge, ratio) in parts.items():
        name = "length-normalised probability" if group == "retain" else "normalised probability"
        for metric, value in ((name, probability), ("ROUGE-L recall", rouge), ("truth ratio", ratio)):
            records += made({"before": {group: [value, value]}}, metric)
    nine = [x for p, r, t in parts.values() for x in (p, r, 1 - t)]
    assert utilities(Scores(records)) == pytest.approx({"before": 9 / sum(1 / x for x in nine)})
    assert utilities(Scores([r for r in records if r.group != "retain"])) == {}


def test_a_single_replicate_has_no_monte_carlo_error(lm: MaskedDiffusionLM, plan: Plan) -> None:
    cells = list(replace(plan, replicates=1).cells([State("before", lm)], 1))
    scores = Scores([record for part in run_cells(cells, "toy") for record in part])
    assert scores.stderr("before", "forget", LOGPROB) is None
    [line, *_] = group_table(scores, {group.name: group.side for group in GROUPS})
    assert "mc_stderr" not in line["metrics"][LOGPROB]["states"]["before"]
