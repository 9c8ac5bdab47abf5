"""Several edits as one: against explicit hooks, and with a model that is bit for bit itself afterwards."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import FACTS, build_toy
from remask.backbones import MaskedDiffusionLM, Site, load
from remask.backbones.intervention import Handle, Intervention, NoEdit
from remask.backbones.loading import save_pretrained
from remask.backbones.several import Several
from remask.backbones.weight_edit import WeightEdit
from remask.editing import EditMemory, SteeringVector, preset
from remask.editing.calibrate import mean_logprob
from remask.errors import RemaskError
from remask.evaluation.records import read_records
from remask.experiments.audits import AuditConfig, run_benchmark
from remask.experiments.clusters import build_clustered, sites_of
from remask.experiments.edits import load_edits
from remask.tracing.sites import Choice
from test_cli import Remask, remask  # noqa: F401

IDS = torch.arange(20, 50).view(2, 15)
DOWN = "model.layers.2.mlp.down_proj.weight"


def memory(lm: MaskedDiffusionLM, facts: list[Any], layer: int, alpha: float = 1.0) -> EditMemory:
    return EditMemory.build(lm, facts, Site(layer), config=preset("ridge", mu=0.0), alpha=alpha)


def weights(lm: MaskedDiffusionLM, alpha: float = 1.0) -> WeightEdit:
    change = 0.2 * torch.randn(32, 48, generator=torch.Generator().manual_seed(3))
    return WeightEdit({DOWN: change}, lm.fingerprint(), "memit", alpha)


def two(lm: MaskedDiffusionLM) -> tuple[EditMemory, SteeringVector]:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    return memory(lm, FACTS[:2], 0, 0.7), SteeringVector(vector, Site(2), alpha=0.3)


def by_hooks(lm: MaskedDiffusionLM, edits: list[Any]) -> Tensor:
    """Logits under a plain hook for every edit, each adding what the edit's shift says about what it sees."""

    def hook(shift: nn.Module) -> Any:
        def act(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            changed = hidden + shift(hidden)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return act

    handles = [lm.model.model.layers[edit.site.layer].register_forward_hook(hook(edit.shift())) for edit in edits]
    with torch.inference_mode():
        logits = lm.logits(IDS)
    for handle in handles:
        handle.remove()
    return logits


# ------------------------------------------------------------------ attaching
@pytest.mark.parametrize("layers", [(0, 2), (1, 1), (2, 0)])
def test_parts_act_like_hooks_of_their_own(toy, layers: tuple[int, int]) -> None:
    parts = [memory(toy, FACTS[:2], layers[0], 0.7), memory(toy, FACTS[2:4], layers[1], 0.4)]
    before = toy.logits(IDS)
    with Several(tuple(parts)).attached(toy):
        assert torch.equal(toy.logits(IDS), by_hooks_free(toy, parts))
    assert torch.equal(toy.logits(IDS), before)
    assert toy.attached == []


def by_hooks_free(lm: MaskedDiffusionLM, edits: list[Any]) -> Tensor:
    """`by_hooks` on a copy that has nothing attached."""
    copy = build_toy()
    copy.model.load_state_dict(lm.model.state_dict())
    return by_hooks(copy, edits)


def test_memory_and_weights_come_and_go_together(toy) -> None:
    """In order on, in reverse off: the weights are the very tensors that were there."""
    before, tensor = toy.logits(IDS), toy.model.get_parameter(DOWN).data
    first, last = memory(toy, FACTS[:2], 0), weights(toy)
    both = Several((first, last))
    handle = both.attach(toy)
    assert toy.attached == [first, last, both]
    changed = build_toy()
    with torch.no_grad():
        changed.model.get_parameter(DOWN).add_(last.changes[DOWN])  # type: ignore[arg-type]
    assert torch.allclose(toy.logits(IDS), by_hooks(changed, [first]), atol=1e-4)
    handle.detach()
    assert toy.model.get_parameter(DOWN).data is tensor or torch.equal(toy.model.get_parameter(DOWN), tensor)
    assert toy.model.get_parameter(DOWN).data_ptr() == tensor.data_ptr()
    assert torch.equal(toy.logits(IDS), before)
    assert toy.attached == []


class Noted(Intervention):
    """Writes down when it comes and goes."""

    def __init__(self, name: str, notes: list[str], *, refuse: bool = False) -> None:
        self.name, self.notes, self.refuse = name, notes, refuse

    def _install(self, lm: MaskedDiffusionLM) -> Any:
        if self.refuse:
            raise RemaskError(f"{self.name} refuses")
        self.notes.append(f"+{self.name}")
        return lambda: self.notes.append(f"-{self.name}")

    def describe(self) -> dict[str, Any]:
        return {"preset": self.name}


def test_order_is_kept_and_reversed(toy) -> None:
    notes: list[str] = []
    with Several(tuple(Noted(name, notes) for name in "abc")).attached(toy):
        assert notes == ["+a", "+b", "+c"]
    assert notes == ["+a", "+b", "+c", "-c", "-b", "-a"]


def test_a_part_that_refuses_leaves_nothing_behind(toy) -> None:
    notes: list[str] = []
    before = toy.logits(IDS)
    other = memory(build_toy(seed=1), FACTS[:2], 0)
    parts = [memory(toy, FACTS[:2], 0), weights(toy), Noted("a", notes)]
    for last, words in ((Noted("b", notes, refuse=True), "b refuses"), (other, "built on model")):
        with pytest.raises(RemaskError, match=words):
            Several((*parts, last)).attach(toy)
        assert notes == ["+a", "-a"]
        assert toy.attached == []
        assert torch.equal(toy.logits(IDS), before)
        notes.clear()
    held: Handle = parts[0].attach(toy)
    with pytest.raises(RemaskError, match="already attached"):
        Several(tuple(parts[::-1])).attach(toy)
    assert toy.attached == [parts[0]]
    held.detach()
    assert torch.equal(toy.logits(IDS), before)


# ------------------------------------------------------------------ as a value
def test_what_several_say_of_themselves(toy, tmp_path: Path) -> None:
    one, other = two(toy)
    several = Several((one, other))
    assert several.describe() == {
        "preset": f"{one.describe()['preset']} + {other.describe()['preset']}",
        "parts": [{"kind": "edit memory", **one.describe()}, {"kind": "steering vector", **other.describe()}],
    }
    prints = {edit.fingerprint() for edit in (several, Several((other, one)), Several((one,)), several.with_alpha(0.5))}
    assert len(prints) == 4
    assert several.fingerprint() == Several(two(toy)).fingerprint()
    with pytest.raises(RemaskError, match="save each of its parts"):
        several.save(tmp_path / "x")
    with pytest.raises(RemaskError, match="at least one part"):
        Several(())
    with pytest.raises(RemaskError, match="cannot be two parts"):
        Several((one, one))


def test_strengths_are_scaled_together(toy) -> None:
    one, other = two(toy)
    scaled = Several((one, Several((other, NoEdit())))).with_alpha(0.5)
    inner = scaled.parts[1]
    assert isinstance(inner, Several)
    assert [part.alpha for part in (scaled.parts[0], inner.parts[0])] == [0.35, 0.15]  # type: ignore[attr-defined]
    assert isinstance(inner.parts[1], NoEdit)
    with scaled.attached(toy):
        found = toy.logits(IDS)
    assert torch.equal(found, by_hooks_free(toy, [one.with_alpha(0.35), other.with_alpha(0.15)]))
    assert (one.alpha, other.alpha) == (0.7, 0.3)


# ------------------------------------------------------------------ several sites
def test_every_fact_is_edited_at_its_own_site(taught) -> None:
    facts, retain = FACTS[:4], FACTS[4:]
    config = preset("default", states=2)
    places = [(Choice(Site(2), 0, 1.0), (facts[2].id, facts[0].id)), (Choice(Site(1), 0, 1.0), (facts[1].id, facts[3].id))]
    sites = sites_of(places)
    edit = build_clustered(taught, facts, retain, sites, config, alpha=0.5)
    assert [(part.site, part.fact_ids) for part in edit.parts] == [  # type: ignore[attr-defined]
        (Site(1), (facts[1].id, facts[3].id)),
        (Site(2), (facts[0].id, facts[2].id)),
    ]
    for part, chosen in zip(edit.parts, (facts[1::2], facts[::2]), strict=True):
        assert isinstance(part, EditMemory)
        alone = EditMemory.build(taught, chosen, part.site, retain=retain, config=config, alpha=0.5)
        assert part.fingerprint() == alone.fingerprint()
    again = build_clustered(taught, facts[::-1], retain, sites | {"another": Site(0)}, config, alpha=0.5)
    assert again.fingerprint() == edit.fingerprint()


def test_one_strength_is_calibrated_on_all_facts(taught) -> None:
    facts, retain = FACTS[:4], FACTS[4:]
    rows = [taught.encode(fact) for fact in facts]
    before = mean_logprob(taught, rows)
    level = before - 2.0
    sites = {fact.id: Site(1 + i % 2) for i, fact in enumerate(facts)}
    edit = build_clustered(taught, facts, retain, sites, preset("default", states=2), level=level)
    alphas = {part.alpha for part in edit.parts}  # type: ignore[attr-defined]
    assert len(alphas) == 1
    with edit.attached(taught):
        assert mean_logprob(taught, rows) == pytest.approx(level, abs=0.05)
    with edit.parts[0].attached(taught):
        assert mean_logprob(taught, rows) > level + 0.2


def test_a_fact_without_site_is_named(toy) -> None:
    with pytest.raises(RemaskError, match=r"'ada/pet' has no site \(1 of 2 facts\)"):
        build_clustered(toy, FACTS[:2], FACTS[4:], {FACTS[0].id: Site(0)})
    with pytest.raises(RemaskError, match="duplicate"):
        build_clustered(toy, [FACTS[0]] * 2, FACTS[4:], {FACTS[0].id: Site(0)})


# ------------------------------------------------------------------ on the command line
@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, taught: MaskedDiffusionLM) -> Path:
    """A model, two edits of it in files, and a benchmark of the user's own completions."""
    root = tmp_path_factory.mktemp("several")
    save_pretrained(taught, root / "model")
    lm = load(root / "model")
    for name, layer, alpha in (("a", 0, 0.6), ("b", 1, 0.3)):
        facts = [dataclasses.replace(fact, id=f"{name}{fact.id}") for fact in FACTS[:2]]
        memory(lm, facts, layer, alpha).save(root / f"{name}.safetensors")
    (root / "data").mkdir()
    for name, facts in (("forget", FACTS[:2]), ("retain", FACTS[4:6]), ("fit", FACTS[6:8])):
        rows = [{"prompt": f.prompt, "completion": f.answer, "subject": f.subject, "group": f.group} for f in facts]
        (root / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (root / "facts.jsonl").write_text("".join(json.dumps(fact.to_dict()) + "\n" for fact in FACTS[:2]), "utf-8")
    return root


def audit(place: Path, out: str, *edits: str, **changes: Any) -> dict[str, Any]:
    first, *also = (str(place / f"{edit}.safetensors") for edit in edits)
    asked = {"precision": "fp32", "attacks": False, **changes}
    config = AuditConfig(str(place / "model"), "whp", first, also=tuple(also), **asked)
    result = run_benchmark(config, place / out, place / "data")
    assert result is not None
    return result


def after(result: dict[str, Any]) -> float:
    return float(result["groups"][0]["metrics"]["answer log-probability"]["states"]["after"]["mean"])


def test_an_audit_of_two_files_measures_both(place: Path) -> None:
    both = audit(place, "both", "a", "b")
    lm = load(place / "model")
    edits = [EditMemory.load(place / f"{name}.safetensors") for name in "ab"]
    seed = both["edit"]["seeds"][0]
    assert both["edit"]["name"] == f"{place / 'a.safetensors'} + {place / 'b.safetensors'}"
    assert [part["alpha"] for part in seed["parts"]] == [0.6, 0.3]
    assert f"--edit {place / 'a.safetensors'} --edit {place / 'b.safetensors'}" in both["command"]
    records = read_records(place / "both" / "records.jsonl")
    assert {r.source.intervention for r in records if r.state == "after"} == {Several(tuple(edits)).fingerprint()}
    assert all(after(audit(place, name, name)) != after(both) for name in "ab")
    stored = {path.read_bytes() for path in (place / "both" / "edits").iterdir()}
    assert stored == {(place / f"{name}.safetensors").read_bytes() for name in "ab"}
    levels = []
    for edit in (edits[0], edits[1], Several(tuple(edits))):
        with edit.attached(lm):
            levels.append(mean_logprob(lm, [lm.encode(fact) for fact in FACTS[:2]]))
    assert levels[2] < min(levels[:2]) - 0.1


def test_what_does_not_fit_several_files_is_refused(place: Path, remask: Remask) -> None:  # noqa: F811
    words = ["audit", place / "model", "--benchmark", "whp", "--data", place / "data", "-o", place / "refused"]
    a, b = place / "a.safetensors", place / "b.safetensors"
    for given, said in (
        (["--edit", a, "--edit", "paper"], "'paper' is no file"),
        (["--edit", "default", "--edit", b], "'default' is no file"),
        (["--edit", a, "--edit", b, "--alpha", 1], "leave out --alpha"),
        (["--edit", a, "--edit", b, "--layer", 1], "leave out --layer"),
    ):
        result = remask(*words, *given)
        assert (result.code, said in result.lines[-1]) == (2, True), result.err
    assert not (place / "refused").exists()


def test_generate_and_score_take_several_files(place: Path, remask: Remask) -> None:  # noqa: F811
    a, b = (place / f"{name}.safetensors" for name in "ab")
    words = ["score", place / "model", "--facts", place / "facts.jsonl", "--json"]
    one, both = remask(*words, "--edit", a), remask(*words, "--edit", a, "--edit", b)
    assert both.code == 0, both.err
    assert both.data["edit"] == f"{a} + {b}"
    assert both.data["mean"]["mean"] < one.data["mean"]["mean"] - 0.1
    said = remask("generate", place / "model", "--prompt", FACTS[0].prompt, "--edit", a, "--edit", b, "--json")
    assert said.code == 0, said.err
    assert said.data["edit"] == f"{a} + {b}"


def test_no_files_are_no_edit(place: Path) -> None:
    assert isinstance(load_edits([]), NoEdit)
    assert isinstance(load_edits([place / "a.safetensors"]), EditMemory)
    assert [type(part) for part in load_edits([place / "a.safetensors", place / "b.safetensors"]).parts] == [EditMemory] * 2  # type: ignore[attr-defined]
