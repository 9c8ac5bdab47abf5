"""The audit: paired rows under one bank, numbers that follow from the rows, and a record of every one of them."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest

from conftest import FACTS, build_toy
from remask.backbones import MaskedDiffusionLM, Site
from remask.backbones.intervention import NoEdit
from remask.diffusion.likelihood import elbo
from remask.diffusion.masks import MaskBank
from remask.diffusion.sampler import SamplerConfig
from remask.editing import EditMemory, MemoryConfig, mean_delta
from remask.evaluation.audit import Audit, run_audit
from remask.evaluation.metrics.text import exact_match, junk, rouge_l_recall
from remask.evaluation.records import RowScore, score_rows

GROUPS = {"forget": FACTS[:2], "retain": FACTS[4:7], "neighbours": FACTS[2:4]}
BANK = MaskBank(draws=2, replicates=2, seed=3)
STATES = ["before", "after", "never trained", "prompt masked", "mean-delta"]


@pytest.fixture(scope="module")
def lm() -> MaskedDiffusionLM:
    return build_toy(seed=1)


@pytest.fixture(scope="module")
def reference() -> MaskedDiffusionLM:
    """Random too; its level of the forget rows is the lower one."""
    return build_toy()


@pytest.fixture(scope="module")
def memory(lm: MaskedDiffusionLM) -> EditMemory:
    return EditMemory.build(lm, GROUPS["forget"], Site(1), config=MemoryConfig(mu=0.0), alpha=2.0)


@pytest.fixture(scope="module")
def audit(lm: MaskedDiffusionLM, reference: MaskedDiffusionLM, memory: EditMemory) -> Audit:
    return run_audit(lm, memory, GROUPS, BANK, reference=reference, control=mean_delta(memory))


# ------------------------------------------------------------------ what is scored
def test_every_state_scores_the_same_rows(audit: Audit) -> None:
    assert list(audit.states) == STATES
    for state, groups in audit.states.items():
        assert list(groups) == list(GROUPS)
        for name, rows in groups.items():
            assert [row.id for row in rows] == [fact.id for fact in GROUPS[name]], state
            assert [row.tokens for row in rows] == [row.tokens for row in audit.states["before"][name]]


def test_every_state_is_scored_under_the_bank_of_the_header(
    audit: Audit, lm: MaskedDiffusionLM, reference: MaskedDiffusionLM, memory: EditMemory
) -> None:
    facts = [fact for group in GROUPS.values() for fact in group]
    rows = [lm.encode(fact) for fact in facts]
    estimator = audit.header["estimator"]
    assert estimator["bank"] == BANK.fingerprint([(row.id, len(row.answer_ids)) for row in rows])
    assert estimator["bank"] != MaskBank(2, 2, seed=4).fingerprint([(row.id, len(row.answer_ids)) for row in rows])
    assert (estimator["draws"], estimator["seed"]) == (4, 3)

    expected = {"before": elbo(lm, rows, BANK), "prompt masked": elbo(lm, rows, BANK, hide_prompt=True)}
    expected["never trained"] = elbo(reference, rows, BANK)
    for state, intervention in (("after", memory), ("mean-delta", mean_delta(memory))):
        with intervention.attached(lm):
            expected[state] = elbo(lm, rows, BANK)
    for state, scores in expected.items():
        found = {row.id: row for group in audit.states[state].values() for row in group}
        for score in scores:
            assert found[score.id].logprob == pytest.approx(score.logprob, abs=1e-4), (state, score.id)
            assert found[score.id].stderr == pytest.approx(score.stderr, abs=1e-4)


def test_header_says_what_was_measured_with_what(
    audit: Audit, lm: MaskedDiffusionLM, reference: MaskedDiffusionLM, memory: EditMemory
) -> None:
    assert audit.header["model"] == {"name": "toy-1", "fingerprint": lm.fingerprint()}
    assert audit.header["reference"]["fingerprint"] == reference.fingerprint()
    edit = audit.header["intervention"]
    assert (edit["kind"], edit["preset"], edit["alpha"], edit["site"]["layer"]) == (memory.kind, "default", 2.0, 1)
    assert audit.header["control"]["preset"] == "mean-delta"
    assert audit.header["sampler"] == json.loads(json.dumps(SamplerConfig.default(lm).to_dict())) | {
        "suppress_eos_confidence": audit.header["sampler"]["suppress_eos_confidence"]
    }
    assert set(audit.header["versions"]) >= {"python", "torch", "transformers"}


def test_generations_are_those_of_the_state(audit: Audit, lm: MaskedDiffusionLM, memory: EditMemory) -> None:
    with memory.attached(lm):
        after = score_rows(lm, GROUPS["forget"], BANK, SamplerConfig.default(lm))
    before = score_rows(lm, GROUPS["forget"], BANK, SamplerConfig.default(lm))
    assert [row.output for row in audit.states["after"]["forget"]] == [row.output for row in after]
    assert [row.output for row in audit.states["before"]["forget"]] == [row.output for row in before]
    for state in ("before", "after", "never trained"):
        for name, facts in GROUPS.items():
            for row, fact in zip(audit.states[state][name], facts, strict=True):
                assert row.output is not None
                assert row.exact == exact_match(row.output, fact.answer)
                assert row.rouge == pytest.approx(rouge_l_recall(row.output, fact.answer))
                assert row.junk == junk(row.output)
    assert all(row.output is None for state in STATES[3:] for rows in audit.states[state].values() for row in rows)


def test_audit_leaves_the_model_bare(audit: Audit, lm: MaskedDiffusionLM) -> None:
    assert lm.attached == []


def test_a_report_announces_every_state(lm: MaskedDiffusionLM) -> None:
    lines: list[str] = []
    run_audit(lm, NoEdit(), {"forget": FACTS[:1], "retain": FACTS[1:2]}, MaskBank(1, 2), report=lines.append)
    assert lines == ["before", "after", "prompt masked"]


# ------------------------------------------------------------------ no edit
def test_no_edit_changes_nothing_exactly(lm: MaskedDiffusionLM) -> None:
    audit = run_audit(lm, NoEdit(), GROUPS, BANK)
    for group in GROUPS:
        assert audit.change(group) == [0.0] * len(GROUPS[group])
        assert audit.states["after"][group] == audit.states["before"][group]
    assert audit.gap_closed() is None
    assert "never trained" not in audit.states
    assert audit.selectivity()["mean"] == 0.0
    assert all(math.isfinite(audit.selectivity()[key]) for key in ("mean", "low", "high"))
    json.dumps(audit.to_dict(), allow_nan=False)


# ------------------------------------------------------------------ what follows from the rows
def test_table_is_recomputed_from_the_records(audit: Audit) -> None:
    """From the JSON's rows alone."""
    data = json.loads(json.dumps(audit.to_dict(), allow_nan=False))

    def rows(state: str, group: str) -> list[dict]:
        return [row for row in data["rows"] if (row["state"], row["group"]) == (state, group)]

    assert [line["group"] for line in data["table"]] == list(GROUPS)
    for line in data["table"]:
        group = line["group"]
        before = [row["logprob"] for row in rows("before", group)]
        assert line["n"] == len(GROUPS[group])
        for state in STATES:
            own = rows(state, group)
            number = line[state]["logprob"]
            assert number["mean"] == pytest.approx(np.mean([row["logprob"] for row in own]))
            assert number["n"] == len(own)
            assert number["low"] <= number["mean"] <= number["high"]
            assert number["mc_stderr"] == pytest.approx(math.sqrt(sum(row["stderr"] ** 2 for row in own)) / len(own))
            if state in ("before", "after", "never trained"):
                assert line[state]["exact"]["mean"] == pytest.approx(np.mean([row["exact"] for row in own]))
                assert line[state]["rouge"]["mean"] == pytest.approx(np.mean([row["rouge"] for row in own]))
                assert line[state]["junk"]["mean"] == pytest.approx(np.mean([row["junk"] is not None for row in own]))
            else:
                assert "exact" not in line[state]
            if state in ("after", "mean-delta"):
                moved = [row["logprob"] - old for row, old in zip(own, before, strict=True)]
                assert line[state]["change"]["mean"] == pytest.approx(np.mean(moved))
            else:
                assert "change" not in line[state]
    change = {
        group: np.mean([r["logprob"] for r in rows("after", group)]) - np.mean([r["logprob"] for r in rows("before", group)])
        for group in GROUPS
    }
    assert data["selectivity"]["after"]["mean"] == pytest.approx(abs(change["forget"]) / abs(change["retain"]))
    level = {state: np.mean([r["logprob"] for r in rows(state, "forget")]) for state in ("before", "after", "never trained")}
    assert level["never trained"] < level["before"]
    closed = (level["before"] - level["after"]) / (level["before"] - level["never trained"])
    assert data["gap_closed"] == pytest.approx(closed)


def test_json_holds_one_record_a_state_group_and_row(audit: Audit) -> None:
    data = audit.to_dict()
    counts = Counter((row["state"], row["group"], row["id"]) for row in data["rows"])
    assert set(counts) == {(state, group, fact.id) for state in STATES for group, facts in GROUPS.items() for fact in facts}
    assert set(counts.values()) == {1}
    assert data["schema"] == 1
    assert set(data["selectivity"]) == {"after", "mean-delta"}


def row(name: str, logprob: float, **more: object) -> RowScore:
    return RowScore(name, 2, logprob, 0.1, **more)  # type: ignore[arg-type]


def by_hand() -> Audit:
    values = {
        "before": {"forget": [-1.0, -3.0], "retain": [-2.0, -2.0]},
        "after": {"forget": [-10.0, -12.0], "retain": [-2.5, -2.5]},
        "never trained": {"forget": [-11.0, -13.0], "retain": [-2.0, -2.0]},
    }
    states = {s: {g: [row(f"{g}{i}", v) for i, v in enumerate(vs)] for g, vs in gs.items()} for s, gs in values.items()}
    return Audit({"intervention": {}}, states)


def test_arithmetic_on_hand_numbers() -> None:
    audit = by_hand()
    assert audit.gap_closed() == pytest.approx(9 / 10)  # from -2 to -11, of the way to -12
    assert audit.change("forget") == pytest.approx([-9.0, -9.0])
    assert audit.change("retain") == pytest.approx([-0.5, -0.5])
    assert audit.change("retain", "never trained") == [0.0, 0.0]
    assert audit.selectivity() == pytest.approx({"mean": 18.0, "low": 18.0, "high": 18.0, "n": 2})


@pytest.mark.parametrize(("after", "closed"), [(-2.0, 0.0), (-7.0, 0.5), (-12.0, 1.0), (-17.0, 1.5), (-1.0, -0.1)])
def test_gap_closed_counts_the_way_to_the_reference(after: float, closed: float) -> None:
    audit = by_hand()
    audit.states["after"]["forget"] = [row("forget0", after), row("forget1", after)]
    assert audit.gap_closed() == pytest.approx(closed)


def test_values_read_text_metrics_as_numbers() -> None:
    audit = by_hand()
    audit.states["after"]["forget"] = [
        row("forget0", -1.0, output="x", exact=True, rouge=0.25, junk=None),
        row("forget1", -1.0, output="", exact=False, rouge=0.0, junk="empty"),
    ]
    assert audit.values("after", "forget", "exact") == [1.0, 0.0]
    assert audit.values("after", "forget", "rouge") == [0.25, 0.0]
    assert audit.values("after", "forget", "junk") == [0.0, 1.0]


def test_reference_that_is_no_lower_still_gives_json() -> None:
    """A twin at the model's own level leaves no gap; the audit must not lose its rows over that."""
    audit = by_hand()
    audit.states["never trained"] = audit.states["before"]
    data = json.loads(json.dumps(audit.to_dict(), allow_nan=False))
    assert data["gap_closed"] is None


def test_single_replicate_has_no_monte_carlo_error_but_gives_json(lm: MaskedDiffusionLM) -> None:
    audit = run_audit(lm, NoEdit(), {"forget": FACTS[:1], "retain": FACTS[1:2]}, MaskBank(draws=2, replicates=1))
    data = json.loads(json.dumps(audit.to_dict(), allow_nan=False))
    assert data["table"][0]["before"]["logprob"]["mc_stderr"] is None


# ------------------------------------------------------------------ reuse
def test_known_states_are_not_scored_again_and_change_no_number(
    audit: Audit, lm: MaskedDiffusionLM, reference: MaskedDiffusionLM, memory: EditMemory
) -> None:
    asked: list[str] = []
    known = {state: audit.states[state] for state in ("before", "never trained", "prompt masked")}
    options = {"reference": reference, "control": mean_delta(memory), "known": known, "report": asked.append}
    again = run_audit(lm, memory, GROUPS, BANK, **options)
    assert asked == ["after", "mean-delta"]
    assert again.states == audit.states
    assert again.to_dict() == audit.to_dict()


def test_without_text_only_log_probabilities_are_scored(audit: Audit, lm: MaskedDiffusionLM, memory: EditMemory) -> None:
    bare = run_audit(lm, memory, GROUPS, BANK, text=False)
    assert all(row.output is None for row in bare.states["after"]["forget"])
    assert bare.values("after", "forget", "logprob") == audit.values("after", "forget", "logprob")
