"""`remask unlearn` and what comes of it: listed, run, audited, refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from remask.backbones import MaskedDiffusionLM
from remask.backbones.weight_edit import WeightEdit
from remask.diffusion.likelihood import elbo
from remask.diffusion.masks import MaskBank
from remask.errors import RemaskError
from remask.evaluation.benchmarks.registry import load_benchmark
from remask.evaluation.records import read_records
from remask.experiments.edits import load_edit
from remask.experiments.unlearning import EDITORS, NAMES, UnlearnJob, config_of
from remask.experiments.workers import Workers
from remask.facts import Fact, load_facts, save_facts
from test_cli import Remask, assert_refused, remask, snapshot

__all__ = ["remask"]  # a fixture

EXAMPLES = Path(__file__).parent.parent / "examples"
FORGET = [fact for fact in load_facts(EXAMPLES / "facts.jsonl") if fact.id.endswith("/short")][:3]
KEEP = [fact for fact in load_facts(EXAMPLES / "retain.jsonl") if fact.id.endswith("/short")][:8]
PUBLISHED = (
    "mdu me ga graddiff kl npo simnpo dpo idk wga satimp undial rmu adaptive-rmu task-vector whp rome memit alphaedit"
).split()
QUICK = ["--set", "rank=2", "--set", "batch_size=2", "--set", "tails=[1,0,0]"]


@pytest.fixture
def files(tmp_path: Path) -> list[str | Path]:
    save_facts(FORGET, tmp_path / "forget.jsonl")
    save_facts(KEEP, tmp_path / "retain.jsonl")
    return ["--forget", tmp_path / "forget.jsonl", "--retain", tmp_path / "retain.jsonl"]


def logprob(lm: MaskedDiffusionLM, facts: list[Fact]) -> float:
    return float(np.mean([score.logprob for score in elbo(lm, [lm.encode(f) for f in facts], MaskBank(4, 1, 77))]))


def test_every_published_method_is_listed_with_its_options(remask: Remask) -> None:
    listed = {row["name"]: row for row in remask("unlearn", "--list", "--json").data}
    assert set(PUBLISHED) <= set(listed) == set(NAMES)
    assert {"tau", "anchor", "prompt"} <= set(listed["mdu"]["options"])
    assert listed["npo"]["options"]["beta"] == 0.1
    assert listed["graddiff"]["needs_retain"] and not listed["ga"]["needs_retain"]
    more = {name: row["draws"] for name, row in listed.items() if row["draws"] != 1}
    assert more == {"npo": 4, "simnpo": 4, "dpo": 4, "rome": None, "memit": None, "alphaedit": None}
    helped = remask("unlearn", "--help").out
    assert all(name in helped for name in PUBLISHED)
    assert "beta=0.1" in helped and "early_stop=None" in helped and "parts=1" in helped
    lines = [line.split() for line in helped.splitlines() if "noise={'draws': 4}" in line]
    assert [words[1] for words in lines] == ["npo", "simnpo", "dpo"]


@pytest.mark.parametrize("method", ["npo", "mdu", "rmu", "memit"])
def test_a_method_runs_and_its_folder_loads_as_an_edit(
    remask: Remask, files: list[str | Path], tmp_path: Path, tiny: MaskedDiffusionLM, method: str
) -> None:
    quick = [] if method in EDITORS else QUICK
    found = remask("unlearn", "tiny", "--method", method, *files, "-o", tmp_path / "out", "--max-steps", 3, *quick, "--json")
    assert found.code == 0, found.err
    assert found.data == json.loads((tmp_path / "out" / "unlearn.json").read_text())
    assert found.data["method"] == method and found.data["cost"]["forwards"] > 0
    edit = load_edit(tmp_path / "out")
    assert isinstance(edit, WeightEdit) and edit.preset == method
    before = logprob(tiny, FORGET)
    with edit.attached(tiny):
        assert logprob(tiny, FORGET) != before
    assert logprob(tiny, FORGET) == before
    scored = remask("edit", "verify", "tiny", tmp_path / "out" / "edit.safetensors")
    assert scored.code == 0, scored.err


def test_only_the_first_process_prints(
    remask: Remask, files: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workers, "here", lambda: Workers(index=1, count=2))
    found = remask("unlearn", "tiny", "--method", "memit", *files, "-o", tmp_path / "out", "--max-steps", 1)
    assert found.code == 0 and found.out == ""
    assert (tmp_path / "out" / "unlearn.json").is_file()


def test_ascent_forgets(remask: Remask, files: list[str | Path], tmp_path: Path, tiny: MaskedDiffusionLM) -> None:
    words = ["--max-steps", 12, "--learning-rate", 3e-3, "--set", "batch_size=3"]
    assert remask("unlearn", "tiny", "--method", "graddiff", *files, "-o", tmp_path / "o", *words).code == 0
    before = logprob(tiny, FORGET), logprob(tiny, KEEP)
    with load_edit(tmp_path / "o").attached(tiny):
        after = logprob(tiny, FORGET), logprob(tiny, KEEP)
    assert after[0] < before[0] - 3 and before[0] - after[0] > 3 * (before[1] - after[1])


def test_an_edit_of_weights_is_audited_by_its_folder(
    remask: Remask, files: list[str | Path], tmp_path: Path, tiny: MaskedDiffusionLM
) -> None:
    assert remask("unlearn", "tiny", "--method", "memit", *files, "-o", tmp_path / "m", "--max-steps", 3).code == 0
    words = ["tiny", "--benchmark", "closed-world", "--no-attacks", "--steps", "1", "--precision", "fp32"]
    found = remask("audit", *words, "--adapter", tmp_path / "m", "-o", tmp_path / "audit", "--json")
    assert found.code == 0, found.err
    (seed,) = found.data["edit"]["seeds"]
    assert seed["kind"] == "weight edit" and seed["preset"] == "memit"
    kept = [
        record for record in read_records(tmp_path / "audit" / "records.jsonl") if record.metric == "answer log-probability"
    ]
    bank = MaskBank(draws=4, replicates=2, seed=0)
    row = next(fact for fact in load_benchmark("closed-world", None).forget)
    with load_edit(tmp_path / "m").attached(tiny):
        (by_hand,) = elbo(tiny, [tiny.encode(row)], bank)
    (value,) = [r.value for r in kept if (r.id, r.state, r.attack) == (row.id, "after", "")]
    assert value == pytest.approx(by_hand.logprob, abs=1e-4)


def test_the_two_ways_to_say_it_meet() -> None:
    """A setting goes to the method if it has one of that name, else to the trainer."""
    config = config_of("mdu", {"tau": 0.5, "rank": 4, "seed": 3})
    assert (config.options["tau"], config.rank, config.seed) == (0.5, 4, 3)
    random = config_of("rmu", {"seed": 3})
    assert (random.options["seed"], random.seed) == (3, 3)


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("npo", {"tau": 1}, "tau"),
        ("npo", {"beta": "much"}, "beta"),
        ("rome", {"rank": 4}, "rank"),
        ("mdu", {"rank": -1}, "rank"),
        ("mdu", {"method": "npo"}, "method is no setting"),
        ("memit", {"options": {"steps": 3}}, "options is no setting"),
    ],
)
def test_settings_that_a_method_does_not_have_are_refused(method: str, settings: dict[str, object], said: str) -> None:
    with pytest.raises(RemaskError, match=f"{method}.*{said}"):
        config_of(method, settings)


def test_bad_calls_are_one_sentence_and_leave_nothing(remask: Remask, files: list[str | Path], tmp_path: Path) -> None:
    save_facts([*KEEP, replace(FORGET[0], id="again")], tmp_path / "overlap.jsonl")
    before = snapshot(tmp_path)
    out = ["-o", tmp_path / "x"]
    assert_refused(remask("unlearn", "tiny", "--method", "npo", *out), "--forget is missing")
    assert_refused(remask("unlearn", "tiny", "--method", "nope", *files, *out), "unknown method 'nope'", "npo")
    overlap = ["--forget", tmp_path / "forget.jsonl", "--retain", tmp_path / "overlap.jsonl"]
    assert_refused(remask("unlearn", "tiny", "--method", "npo", *overlap, *out), "'again'", "take")
    assert_refused(remask("unlearn", "tiny", "--method", "memit", *overlap, *out), "also retained")
    assert_refused(remask("unlearn", "tiny", "--method", "rmu", *files[:2], *out), "retain")
    assert_refused(remask("unlearn", "tiny", "--method", "memit", *files[:2], *out), "retain")
    assert_refused(remask("unlearn", "tiny", "--method", "npo", *files, *out, "--set", "targets=[nothing]"), "nothing")
    assert snapshot(tmp_path) == before


def test_unknown_method_in_python() -> None:
    with pytest.raises(RemaskError, match="unknown method"):
        UnlearnJob("tiny", "forgetting", Path("f"))
