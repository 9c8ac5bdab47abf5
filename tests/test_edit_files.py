"""Edit files on the command line: built, changed, shown, compared and verified; what fails leaves the file that was there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import remask.backbones as backbones
from conftest import build_toy
from remask.backbones import MaskedDiffusionLM, Site, save_pretrained
from remask.diffusion.likelihood import elbo
from remask.editing import EditMemory, SteeringVector, preset
from remask.editing.build import fact_hash
from remask.experiments.editfiles import BANK, diff_memories, show_memory, verify_edit
from remask.facts import Fact, load_facts, save_facts
from test_cli import Remask, Result, assert_refused, remask, snapshot

__all__ = ["remask"]  # a fixture

EXAMPLES = Path(__file__).parent.parent / "examples"
KINDS = ("/city/short", "/pet/short", "/food/short")  # one token and several
FACTS = [fact for fact in load_facts(EXAMPLES / "facts.jsonl") if fact.id.endswith(KINDS)]
KEPT = [fact for fact in load_facts(EXAMPLES / "retain.jsonl") if fact.id.endswith("/short")][:10:2]
CHECKS = ["fits the model", "numbers are finite", "changes the logits", "reverts to the same bits"]
LAYER = 2
FORGET, RETAIN = "facts.jsonl", "retain.jsonl"


@pytest.fixture(autouse=True)
def _loaded_once(tiny: MaskedDiffusionLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands load the bundled model once for all tests."""
    read = backbones.load
    monkeypatch.setattr(backbones, "load", lambda name, **options: tiny if name == "tiny" else read(name, **options))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Fact files: all three, the retained ones, and single ones by their number."""
    save_facts(FACTS, tmp_path / FORGET)
    save_facts(KEPT, tmp_path / RETAIN)
    for index, fact in enumerate(FACTS):
        save_facts([fact], tmp_path / f"{index}.jsonl")
    save_facts([replace(FACTS[0], answer="Lucca"), FACTS[1]], tmp_path / "changed.jsonl")
    return tmp_path


def library(lm: MaskedDiffusionLM, chosen: Sequence[Fact] = FACTS, name: str = "paper", **options: Any) -> EditMemory:
    config = preset(name)
    retain = KEPT if config.needs_retain else ()
    return EditMemory.build(lm, chosen, Site(LAYER), retain=retain, config=config, **{"alpha": 3.0, **options})


def saved(memory: EditMemory | SteeringVector, path: Path) -> Path:
    memory.save(path)
    return path


def steering(lm: MaskedDiffusionLM, alpha: float = 2.0) -> SteeringVector:
    return SteeringVector(torch.linspace(-1, 1, lm.hidden_size), Site(LAYER), alpha, model=lm.fingerprint())


def stranger(path: Path) -> MaskedDiffusionLM:
    """Another model, in a folder."""
    save_pretrained(build_toy(seed=3), path)
    return backbones.load(path)


def done(result: Result) -> str:
    """What was printed, without line breaks."""
    assert result.code == 0, (result.out, result.err)
    return " ".join(result.out.split())


def facts_of(path: Path) -> list[str]:
    return list(EditMemory.load(path).fact_ids)


# ------------------------------------------------------------------ build, show
@pytest.mark.parametrize("name", ["default", "ridge", "paper", "softmax", "gated"])
def test_every_preset_is_built_shown_and_verified(remask: Remask, tiny, folder: Path, name: str) -> None:
    out = folder / "m.safetensors"
    chosen = FACTS[:1] if name == "gated" else FACTS
    words = ["edit", "build", "tiny", "--facts", folder / ("0.jsonl" if name == "gated" else FORGET), "-o", out]
    words += ["--preset", name, "--layer", LAYER, "--alpha", 3] + (
        [] if name in ("paper", "gated") else ["--retain", folder / RETAIN]
    )
    assert f"{len(chosen)} facts" in done(remask(*words))

    found = remask("edit", "show", out, "--json").data
    assert (found["kind"], found["preset"], found["alpha"], found["model"]) == ("edit memory", name, 3.0, tiny.fingerprint())
    assert found["site"] == {"layer": LAYER, "module": "resid", "steps": None}
    assert found["fact_ids"] == [line["id"] for line in found["fact_list"]] == sorted(fact.id for fact in chosen)
    assert {line["hash"] for line in found["fact_list"]} == {fact_hash(fact) for fact in chosen}
    assert sum(line["keys"] for line in found["fact_list"]) == found["keys"] >= len(chosen)
    assert (found["retain_keys"] > 0) == (found["retain_set"] != "") == (name in ("default", "ridge", "softmax"))
    memory = EditMemory.load(out)
    for index, line in enumerate(found["fact_list"]):
        norms = [float(delta.norm()) for delta, owner in zip(memory.deltas, memory.owner, strict=True) if owner == index]
        assert line["delta"] == pytest.approx(sum(norms) / len(norms), rel=1e-5)

    table = done(remask("edit", "show", out))
    assert name in table
    assert all(fact.id in table and fact_hash(fact) in table for fact in chosen)
    verified = remask("edit", "verify", "tiny", out, "--json")
    assert verified.code == 0
    assert verified.data == {"checks": dict.fromkeys(CHECKS, True), "passed": True}


def test_build_writes_the_library_s_memory(remask: Remask, tiny, folder: Path) -> None:
    words = ["edit", "build", "tiny", "--facts", folder / FORGET, "-o", folder / "m", "--preset", "paper", "--layer", LAYER]
    done(remask(*words, "--alpha", 3))
    assert (folder / "m").read_bytes() == saved(library(tiny), folder / "library").read_bytes()


def test_gated_build_of_several_facts_and_softmax_without_retain_are_refused(remask: Remask, folder: Path) -> None:
    words = ["edit", "build", "tiny", "--facts", folder / FORGET, "-o", folder / "m", "--alpha", 1, "--preset"]
    assert_refused(remask(*words, "gated"), "one key, not 3", "'paper'")
    assert_refused(remask(*words, "softmax"), "'softmax'", "--retain")
    assert not (folder / "m").exists()


def test_ids_with_brackets_are_shown_as_they_are(remask: Remask, tiny, folder: Path) -> None:
    names = ["[red]", "[/b]x"]
    memory = library(tiny, [replace(fact, id=name) for fact, name in zip(FACTS, names, strict=False)])
    out = saved(memory, folder / "m")
    other = saved(memory.remove("[red]"), folder / "one")
    assert all(name in done(remask("edit", "show", out)) for name in names)
    assert "only in the first: [red]" in done(remask("edit", "diff", out, other))


# ------------------------------------------------------------------ add, remove, merge
@pytest.mark.parametrize("name", ["default", "ridge", "paper", "softmax"])
def test_add_remove_and_merge_give_the_bytes_of_a_build(remask: Remask, tiny, folder: Path, name: str) -> None:
    whole = saved(library(tiny, name=name), folder / "whole").read_bytes()
    two = saved(library(tiny, FACTS[:2], name), folder / "two")
    last = saved(library(tiny, FACTS[2:], name), folder / "last")
    before = two.read_bytes()

    assert "2 facts and 1 new" in done(
        remask("edit", "add", "tiny", two, "--facts", folder / "2.jsonl", "-o", folder / "new" / "m")
    )
    assert (folder / "new" / "m").read_bytes() == whole
    assert two.read_bytes() == before
    assert "3 facts" in done(remask("edit", "merge", two, last, "-o", folder / "merged"))
    assert (folder / "merged").read_bytes() == whole
    done(remask("edit", "add", "tiny", two, "--facts", folder / "2.jsonl"))
    assert two.read_bytes() == whole
    done(remask("edit", "remove", two, FACTS[2].id, "-o", folder / "less"))
    assert (folder / "less").read_bytes() == before
    assert two.read_bytes() == whole
    assert "2 facts left" in done(remask("edit", "remove", two, FACTS[2].id))
    assert two.read_bytes() == before
    assert "1 facts left" in done(remask("edit", "remove", folder / "merged", FACTS[0].id, FACTS[2].id))
    assert facts_of(folder / "merged") == [FACTS[1].id]


def test_merge_in_either_order_writes_the_same_bytes(remask: Remask, tiny, folder: Path) -> None:
    one, other = saved(library(tiny, FACTS[:1]), folder / "a"), saved(library(tiny, FACTS[1:]), folder / "b")
    done(remask("edit", "merge", one, other, "-o", folder / "ab"))
    done(remask("edit", "merge", other, one, "-o", folder / "ba"))
    assert (folder / "ab").read_bytes() == (folder / "ba").read_bytes()


def test_add_for_the_mean_target_reads_the_retain_facts(remask: Remask, tiny, folder: Path) -> None:
    def of(chosen: Sequence[Fact], path: str) -> Path:
        config = preset("paper", target="mean")
        return saved(EditMemory.build(tiny, chosen, Site(LAYER), retain=KEPT, config=config), folder / path)

    file, both = of(FACTS[:1], "m"), of(FACTS[:2], "both")
    done(remask("edit", "add", "tiny", file, "--facts", folder / "1.jsonl", "--retain", folder / RETAIN))
    assert file.read_bytes() == both.read_bytes()
    assert_refused(remask("edit", "add", "tiny", file, "--facts", folder / "2.jsonl"), "'mean'", "retain")
    assert file.read_bytes() == both.read_bytes()


def test_a_change_that_fails_leaves_every_file_as_it_was(remask: Remask, tiny, folder: Path) -> None:
    toy = stranger(folder / "toy")
    file = saved(library(tiny, FACTS[:2]), folder / "m")
    strong = saved(library(tiny, FACTS[2:], alpha=9.0), folder / "strong")
    (folder / "broken.jsonl").write_text("{", encoding="utf-8")
    twice = [replace(FACTS[2], id=name, target=name) for name in ("one", "two")]
    save_facts(twice, folder / "twice.jsonl")
    before = snapshot(folder)
    for words, *named in (
        (["add", "tiny", file, "--facts", folder / FORGET], f"{min(fact.id for fact in FACTS[:2])!r} already"),
        (["add", "tiny", file, "--facts", folder / "broken.jsonl"], "broken.jsonl, line 1"),
        (["add", "tiny", file, "--facts", folder / "none.jsonl"], "none.jsonl: no such file"),
        (["add", "tiny", file, "--facts", folder / "twice.jsonl"], "'one'", "'two'", "two targets"),
        (["add", folder / "toy", file, "--facts", folder / "2.jsonl"], tiny.fingerprint(), toy.fingerprint()),
        (["remove", file, FACTS[0].id, "nobody"], "no fact 'nobody'"),
        (["remove", file, *(fact.id for fact in FACTS[:2])], "removing every fact"),
        (["merge", file, file, "-o", file], "both memories hold"),
        (["merge", file, strong, "-o", file], "strengths", "3.0", "9.0"),
    ):
        assert_refused(remask("edit", *words), *named)
        assert snapshot(folder) == before


# ------------------------------------------------------------------ diff
def test_diff_names_facts_and_settings(remask: Remask, tiny, folder: Path) -> None:
    changed = [replace(FACTS[0], answer="Lucca"), FACTS[1]]
    first, second = saved(library(tiny), folder / "a"), saved(library(tiny, changed, alpha=1.0), folder / "b")
    found = remask("edit", "diff", first, second, "--json").data
    assert found == {
        "settings": {"alpha": [3.0, 1.0]},
        "removed": [FACTS[2].id],
        "added": [],
        "changed": [FACTS[0].id],
        "same": 1,
    }
    back = remask("edit", "diff", second, first, "--json").data
    assert (back["settings"], back["removed"], back["added"]) == ({"alpha": [1.0, 3.0]}, [], [FACTS[2].id])
    table = done(remask("edit", "diff", first, second))
    for line in (f"only in the first: {FACTS[2].id}", f"different rows: {FACTS[0].id}", "1 facts are the same", "alpha"):
        assert line in table
    same = remask("edit", "diff", first, first, "--json").data
    assert same == {"settings": {}, "removed": [], "added": [], "changed": [], "same": 3}


def test_diff_tells_configs_and_retain_sets_apart(tiny) -> None:
    paper, default = library(tiny, FACTS[:1]), library(tiny, FACTS[:1], "default")
    settings = diff_memories(paper, default)["settings"]
    assert settings["preset"] == ["paper", "default"]
    assert settings["mu"] == [0.0, 10.0]
    assert settings["retain_keys"] == [0, show_memory(default)["retain_keys"]]
    assert settings["readout"] == ["ridge", "kernel"]
    assert not {"model", "site", "alpha", "compress"} & set(settings)
    linear = diff_memories(paper, library(tiny, FACTS[:1], "ridge"))["settings"]
    assert linear["mu"] == [0.0, 10.0] and "readout" not in linear
    renamed = [replace(fact, prompt=f"{fact.prompt} Please.") for fact in KEPT]  # as many keys
    other = EditMemory.build(tiny, FACTS[:1], Site(LAYER), retain=renamed, alpha=3.0)
    assert list(diff_memories(default, other)["settings"]) == ["retain_set"]
    assert diff_memories(default, library(tiny, FACTS[:1], "default"))["settings"] == {}


# ------------------------------------------------------------------ verify
def test_verify_with_facts_reports_how_far_they_moved(remask: Remask, tiny, folder: Path) -> None:
    file = saved(library(tiny, name="default"), folder / "m")
    result = remask("edit", "verify", "tiny", file, "--facts", folder / FORGET, "--json")
    assert result.code == 0
    assert result.data["checks"] == dict.fromkeys([*CHECKS, "holds the facts"], True)
    assert result.data["missing"] == []
    rows = [tiny.encode(fact) for fact in FACTS]
    before = sum(score.logprob for score in elbo(tiny, rows, BANK)) / len(rows)
    with EditMemory.load(file).attached(tiny):
        after = sum(score.logprob for score in elbo(tiny, rows, BANK)) / len(rows)
    assert result.data["log-probability"] == pytest.approx({"before": before, "after": after})
    assert after < before - 1
    table = done(remask("edit", "verify", "tiny", file, "--facts", folder / FORGET))
    assert "no" not in table.split()
    assert f"{before:.2f} -> {after:.2f} nats" in table
    assert tiny.attached == []


@pytest.mark.parametrize("facts", ["changed.jsonl", "2.jsonl"])
def test_verify_of_facts_with_other_texts_or_not_held_fails(remask: Remask, tiny, folder: Path, facts: str) -> None:
    file = saved(library(tiny, FACTS[:2]), folder / "m")
    missing = FACTS[0 if facts == "changed.jsonl" else 2].id
    result = remask("edit", "verify", "tiny", file, "--facts", folder / facts, "--json")
    assert result.code == 1
    assert (result.data["missing"], result.data["passed"]) == ([missing], False)
    assert [name for name, passed in result.data["checks"].items() if not passed] == ["holds the facts"]
    result = remask("edit", "verify", "tiny", file, "--facts", folder / facts)
    assert result.code == 1
    assert missing in result.out


def test_verify_of_an_edit_that_does_nothing_fails(remask: Remask, tiny, folder: Path) -> None:
    for edit in (library(tiny, alpha=0.0), steering(tiny, alpha=0.0)):
        file = saved(edit, folder / "m")
        result = remask("edit", "verify", "tiny", file, "--json")
        assert result.code == 1
        assert [name for name, passed in result.data["checks"].items() if not passed] == ["changes the logits"]
        result = remask("edit", "verify", "tiny", file)
        assert result.code == 1
        assert result.out.count(" no ") == 1


def test_verify_of_an_edit_that_overflows_fails(tiny) -> None:
    found = verify_edit(tiny, library(tiny, alpha=1e38))
    assert found["checks"]["numbers are finite"] is False
    assert found["passed"] is False


def test_verify_of_another_models_edit_is_refused(remask: Remask, tiny, folder: Path) -> None:
    toy = stranger(folder / "toy")
    file = saved(library(tiny, FACTS[:1]), folder / "m")
    assert_refused(remask("edit", "verify", folder / "toy", file), tiny.fingerprint(), toy.fingerprint())


def test_verify_tries_an_edit_that_is_limited_to_steps_at_its_step(tiny) -> None:
    for steps in ((3, 4), (0,)):
        edit = EditMemory.build(tiny, FACTS[:1], Site(LAYER, "resid", steps), config=preset("paper"), alpha=3.0)
        assert verify_edit(tiny, edit)["passed"] is True
        assert tiny.clock.step is None
    never = replace(steering(tiny), site=Site(LAYER, "resid", ()))
    assert verify_edit(tiny, never)["checks"]["changes the logits"] is False


# ------------------------------------------------------------------ other kinds, no file
def test_steering_file_is_shown_and_verified_but_holds_no_facts(remask: Remask, tiny, folder: Path) -> None:
    vector = steering(tiny)
    file, memory = saved(vector, folder / "v"), saved(library(tiny), folder / "m")
    shown = remask("edit", "show", file, "--json").data
    assert (shown["kind"], shown["alpha"], shown["site"]["layer"]) == ("steering vector", 2.0, LAYER)
    assert shown["norm"] == pytest.approx(float(vector.vector.norm()))
    assert "steering vector" in done(remask("edit", "show", file))
    verified = remask("edit", "verify", "tiny", file, "--facts", folder / FORGET, "--json")
    assert verified.code == 0
    assert verified.data["checks"] == dict.fromkeys(CHECKS, True)
    assert verified.data["log-probability"]["before"] != verified.data["log-probability"]["after"]
    done(remask("edit", "verify", "tiny", file))
    before = snapshot(folder)
    for words in (
        ["add", "tiny", file, "--facts", folder / FORGET],
        ["remove", file, FACTS[0].id],
        ["merge", memory, file, "-o", folder / "x"],
        ["merge", file, memory, "-o", folder / "x"],
        ["diff", memory, file],
        ["diff", file, memory, "--json"],
    ):
        assert_refused(remask("edit", *words), f"{file.name}: holds a steering vector, not an edit memory")
    assert snapshot(folder) == before


def test_missing_file_is_refused_by_every_command(remask: Remask, tiny, folder: Path) -> None:
    memory, gone = saved(library(tiny), folder / "m"), folder / "gone.safetensors"
    before = snapshot(folder)
    for words in (
        ["show", gone],
        ["add", "tiny", gone, "--facts", folder / FORGET],
        ["remove", gone, FACTS[0].id],
        ["merge", gone, memory, "-o", folder / "x"],
        ["merge", memory, gone, "-o", folder / "x"],
        ["diff", memory, gone],
        ["verify", "tiny", gone, "--json"],
    ):
        assert_refused(remask("edit", *words), "gone.safetensors: no such edit file")
    assert snapshot(folder) == before


def test_truncated_file_is_refused_by_every_command(remask: Remask, tiny, folder: Path) -> None:
    memory = saved(library(tiny), folder / "m")
    (folder / "half").write_bytes(memory.read_bytes()[:-100])
    before = snapshot(folder)
    for words in (
        ["show", folder / "half"],
        ["add", "tiny", folder / "half", "--facts", folder / FORGET],
        ["remove", folder / "half", FACTS[0].id],
        ["merge", memory, folder / "half", "-o", folder / "x"],
        ["verify", "tiny", folder / "half"],
    ):
        assert_refused(remask("edit", *words), "half: no", "edit file")
    assert snapshot(folder) == before


def test_json_is_all_that_is_printed(remask: Remask, tiny, folder: Path) -> None:
    memory = saved(library(tiny, FACTS[:1]), folder / "m")
    for words in (["show", memory], ["diff", memory, memory], ["verify", "tiny", memory]):
        result = remask("edit", *words, "--json")
        assert json.dumps(result.data, indent=1, ensure_ascii=False) + "\n" == result.out
        with pytest.raises(json.JSONDecodeError):
            json.loads(done(remask("edit", *words)))


# ------------------------------------------------------------------ settings
def test_single_settings_of_a_preset(remask: Remask, folder: Path) -> None:
    words = ["edit", "build", "tiny", "--facts", folder / FORGET, "--preset", "paper", "--layer", LAYER, "--alpha", 2]
    out = folder / "m.safetensors"
    result = remask(*words, "--set", "keys=subject-last", "--set", "ridge=2.5", "--set", "q=0.5", "-o", out)
    assert result.code == 0, result.err
    config = EditMemory.load(out).config
    assert (config.keys, config.ridge, config.q, config.target) == ("subject-last", 2.5, 0.5, "refusal")
    for bad, said in (("mug=1", "no setting 'mug'"), ("ridge=soft", "another type"), ("q", "is not KEY=VALUE")):
        assert_refused(remask(*words, "--set", bad, "-o", folder / "n.safetensors"), said)
    assert not (folder / "n.safetensors").exists()


def test_a_tuned_setting_is_calibrated_only_without_a_strength(
    remask: Remask, folder: Path, tiny: MaskedDiffusionLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chosen calibrated or at 1.25; asked for nothing, `calibrated` or 2.5."""
    import remask.experiments.tuning as tuning

    levels: list[float | None] = []

    def to_seven(_lm: object, memory: EditMemory, _rows: object, level: float | None) -> EditMemory:
        levels.append(level)
        return memory.with_alpha(7.0)

    monkeypatch.setattr(tuning, "calibrate", to_seven)
    out = folder / "m.safetensors"
    words = ["edit", "build", "tiny", "--facts", folder / FORGET, "-o", out, "--tuned", folder]
    for chosen, asked, expected in (
        ("calibrated", None, 7.0),
        ("calibrated", 2.5, 2.5),
        (1.25, None, 1.25),
        (1.25, "calibrated", 7.0),
    ):
        build = {"preset": "paper", "layer": 3, "alpha": chosen}
        (folder / "tune.json").write_text(json.dumps({"fingerprint": tiny.fingerprint(), "chosen": {"build": build}}))
        done(remask(*words, *([] if asked is None else ["--alpha", asked])))
        assert EditMemory.load(out).alpha == expected
    assert len(levels) == 2 and None not in levels


def test_what_tuning_chose_is_built(remask: Remask, folder: Path, tiny: MaskedDiffusionLM) -> None:
    build = {"preset": "default", "layer": 3, "mu": 7.0, "alpha": 1.25}
    record = {"fingerprint": tiny.fingerprint(), "chosen": {"build": build}}
    (folder / "tune.json").write_text(json.dumps(record))
    out = folder / "m.safetensors"
    words = ["edit", "build", "tiny", "--facts", folder / FORGET, "--retain", folder / RETAIN, "-o", out]
    assert remask(*words, "--tuned", folder).code == 0
    memory = EditMemory.load(out)
    assert (memory.site, memory.alpha, memory.config) == (Site(3), 1.25, preset("default", mu=7.0))
    assert_refused(remask(*words, "--tuned", folder, "--layer", 1), "leave out --layer")
    assert_refused(remask(*words, "--tuned", folder, "--preset", "default"), "--tuned brings preset", "--preset")
    for strength in ([], ["--alpha", 2.5]):
        said = remask(*words, "--tuned", folder, "--reference", "tiny-reference", *strength)
        assert_refused(said, "--reference", "is not calibrated")
    assert remask(*words, "--tuned", folder, "--alpha", 2.5).code == 0
    assert out.read_bytes() == saved(memory.with_alpha(2.5), folder / "stronger").read_bytes()
    (folder / "tune.json").write_text(json.dumps({**record, "fingerprint": "0123456789abcdef"}))
    assert_refused(remask(*words, "--tuned", folder), "0123456789abcdef", tiny.fingerprint())
    (folder / "tune.json").write_text("{}")
    assert_refused(remask(*words, "--tuned", folder), "not a tune.json")
