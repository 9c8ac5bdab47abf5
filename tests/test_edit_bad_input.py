"""Bad facts, models and files, through the real commands: one sentence that names the thing, and no file is touched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import remask as library
import remask.backbones as backbones
from conftest import build_toy
from remask.backbones import MaskedDiffusionLM, Site, save_pretrained
from remask.editfile import FORMAT
from remask.editing import EditMemory, preset
from remask.errors import RemaskError
from remask.facts import Fact, load_facts, save_facts
from test_cli import Remask, assert_refused, remask, snapshot

__all__ = ["remask"]  # a fixture

EXAMPLES = Path(__file__).parent.parent / "examples"
ONE, TWO, *_ = [fact for fact in load_facts(EXAMPLES / "facts.jsonl") if fact.id.endswith(("/city/short", "/pet/short"))]
KEPT = [fact for fact in load_facts(EXAMPLES / "retain.jsonl") if fact.id.endswith("/short")][:4]
AGAIN = replace(ONE, id="again")
REFUSAL = preset("paper").refusal
PAPER = ["--preset", "paper", "--layer", "2", "--alpha", "2"]


@pytest.fixture(autouse=True)
def _loaded_once(tiny: MaskedDiffusionLM, monkeypatch: pytest.MonkeyPatch) -> None:
    read = backbones.load
    monkeypatch.setattr(
        backbones, "load", lambda name, **options: tiny if name == "tiny" and not options else read(name, **options)
    )


@pytest.fixture
def file(tiny: MaskedDiffusionLM, tmp_path: Path) -> Path:
    """A memory of two facts."""
    path = tmp_path / "m.safetensors"
    EditMemory.build(tiny, [ONE, TWO], Site(2), config=preset("paper"), alpha=2.0).save(path)
    return path


# ------------------------------------------------------------------ facts
BAD: dict[str, tuple[list[Fact], list[str], list[str]]] = {
    "one question, two targets": (
        [replace(ONE, target="Lucca"), replace(AGAIN, target="Kelso")],
        [*PAPER, "--set", "target=object"],
        [ONE.id, "'again'", "two targets", "keep one"],
    ),
    "no target to rewrite to": ([replace(ONE, target="Lucca"), TWO], [*PAPER, "--set", "target=object"], [TWO.id, "'target'"]),
    "rewritten to what it is": ([replace(ONE, target=ONE.answer)], [*PAPER, "--set", "target=object"], ["every delta is zero"]),
    "answered with the refusal": ([replace(ONE, answer=REFUSAL)], PAPER, ["every delta is zero", "nothing to write"]),
    "equal keys, hardly a ridge": ([ONE, AGAIN], [*PAPER, "--set", "ridge=1.0e-15"], ["singular", "raise ridge or drop"]),
    "one key, centred": ([ONE], [*PAPER, "--set", "centre=true"], ["centring leaves nothing", "centre=False"]),
    "layer beyond the model": ([ONE], ["--preset", "paper", "--layer", "6", "--alpha", "2"], ["layer 6", "layers 0..5"]),
    "no ridge": ([ONE], [*PAPER, "--set", "ridge=0"], ["ridge", "> 0"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_facts_and_settings_build_nothing(remask: Remask, tmp_path: Path, name: str) -> None:
    facts, words, said = BAD[name]
    save_facts(facts, tmp_path / "facts.jsonl")
    save_facts(KEPT, tmp_path / "retain.jsonl")
    (tmp_path / "m").write_bytes(b"older")
    before = snapshot(tmp_path)
    assert_refused(remask("edit", "build", "tiny", "--facts", tmp_path / "facts.jsonl", "-o", tmp_path / "m", *words), *said)
    assert snapshot(tmp_path) == before


def test_a_fact_cannot_be_forgotten_and_retained(remask: Remask, tmp_path: Path) -> None:
    save_facts([ONE], tmp_path / "facts.jsonl")
    save_facts([*KEPT, AGAIN], tmp_path / "retain.jsonl")
    before = snapshot(tmp_path)
    words = ["--facts", tmp_path / "facts.jsonl", "--retain", tmp_path / "retain.jsonl", "-o", tmp_path / "m"]
    assert_refused(remask("edit", "build", "tiny", *words, "--layer", 2, "--alpha", 2), ONE.id, "also retained", "'again'")
    assert snapshot(tmp_path) == before


def test_equal_keys_with_a_ridge_share_the_edit(tiny: MaskedDiffusionLM) -> None:
    """The system [[k.k + 1, k.k], [k.k, k.k + 1]] gives both rows the readout k / (2 k.k + 1)."""
    memory = EditMemory.build(tiny, [ONE, AGAIN], Site(2), config=preset("paper"))
    key, (first, second) = memory.keys[0].double(), memory.solution.readout.double()
    torch.testing.assert_close(first, key / (2 * key @ key + 1.0), rtol=1e-5, atol=0)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=0)


# ------------------------------------------------------------------ models
def test_a_model_with_fewer_layers_is_refused(remask: Remask, file: Path) -> None:
    """By its fingerprint; and by the layer where the fingerprint is not asked for."""
    toy = build_toy(seed=3)
    save_pretrained(toy, file.parent / "toy")
    save_facts([AGAIN], file.parent / "again.jsonl")
    before = snapshot(file.parent)
    assert_refused(remask("edit", "verify", file.parent / "toy", file), "built on model", "does not fit")
    words = ["edit", "add", file.parent / "toy", file, "--facts", file.parent / "again.jsonl"]
    assert_refused(remask(*words), "this memory is of model", "its own model")
    assert snapshot(file.parent) == before
    with pytest.raises(RemaskError, match=r"built on model .* this one is"):
        library.attach(toy.model, file)
    deep = replace(EditMemory.load(file), site=Site(5))
    with pytest.raises(RemaskError, match=r"layer 5 is outside the model, which has layers 0\.\.2"):
        library.attach(toy.model, deep, same_model=False)
    with pytest.raises(RemaskError, match="192 dimensions and the model 32"):
        library.attach(toy.model, file, same_model=False)
    assert not any(module._forward_hooks for module in toy.model.modules())


def test_the_same_checkpoint_in_another_dtype_is_edited_within_its_rounding(file: Path) -> None:
    """The bundled weights are bf16 numbers, so the fingerprint is the same; the shift is computed in fp32."""
    half = backbones.load("tiny", dtype=torch.bfloat16)
    ids = torch.tensor([half.encode(ONE).ids])
    wide = backbones.load("tiny")
    with torch.inference_mode():
        change = []
        for lm in (half, wide):
            before = lm.run_to(2, ids).double()
            with library.load_edit(file).attached(lm):
                change.append(lm.run_to(2, ids).double() - before)
    assert (change[0] - change[1]).norm() < 0.05 * change[1].norm()


def test_more_keys_than_there_is_room_for(tiny: MaskedDiffusionLM, file: Path) -> None:
    top = replace(EditMemory.load(file), config=preset("paper", q=0.5))
    larger = top.add(tiny, [replace(AGAIN, answer=TWO.answer)])
    canvas = torch.tensor([tiny.encode(ONE).ids])
    with pytest.raises(RemaskError, match="2 keys and there is room for 1; attach it with more capacity"):
        library.attach(tiny.model, top, capacity=1)
    live = library.attach(tiny.model, top, capacity=2)
    try:
        before, version = tiny.logits(canvas), live.version
        with pytest.raises(RemaskError, match="3 keys and there is room for 2"):
            live.update(larger)
        assert torch.equal(tiny.logits(canvas), before) and live.version == version
    finally:
        live.detach()


# ------------------------------------------------------------------ files
def cut(size: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:size]


def swapped(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    assert len(old) == len(new)
    return lambda data: data.replace(old, new, 1)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": cut(0),
    "cut in the length": cut(4),
    "cut after the length": cut(8),
    "cut in the header": cut(100),
    "cut in the tensors": cut(-1),
    "longer": lambda data: data + b"\0",
    "text": lambda data: b"not a file of tensors at all",
    "no fact ids": swapped(b"fact_ids", b"fact_idz"),
    "another format": swapped(b'\\"format\\":%d' % FORMAT, b'\\"format\\":0'),
    "another kind": swapped(b"edit memory", b"edit nemory"),
    "no keys": swapped(b'"keys":{"dtype"', b'"kees":{"dtype"'),
    "a setting of another name": swapped(b'\\"ridge\\"', b'\\"rigde\\"'),
    "infinite": lambda data: data[:-4] + torch.tensor(torch.inf).numpy().tobytes(),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_refused_by_name(remask: Remask, file: Path, name: str) -> None:
    bad = file.parent / "damaged"
    bad.write_bytes(DAMAGE[name](file.read_bytes()))
    assert bad.read_bytes() != file.read_bytes()
    save_facts([AGAIN], file.parent / "again.jsonl")
    before = snapshot(file.parent)
    for words in (
        ["show", bad],
        ["verify", "tiny", bad],
        ["add", "tiny", bad, "--facts", file.parent / "again.jsonl"],
        ["remove", bad, ONE.id],
        ["merge", file, bad, "-o", file],
    ):
        assert_refused(remask("edit", *words), "damaged: ")
    assert snapshot(file.parent) == before


def test_removing_what_is_not_there_changes_nothing(remask: Remask, file: Path) -> None:
    before = snapshot(file.parent)
    assert_refused(remask("edit", "remove", file, ONE.id, "nobody"), "no fact 'nobody'")
    assert_refused(remask("edit", "remove", file, ONE.id, TWO.id), "removing every fact")
    assert_refused(remask("edit", "remove", file, "nobody", "-o", file.parent / "out"), "no fact 'nobody'")
    assert snapshot(file.parent) == before


def test_a_held_fact_under_another_id_is_refused(remask: Remask, file: Path) -> None:
    """By the hash of its texts; else it would be forgotten twice as much."""
    save_facts([AGAIN], file.parent / "again.jsonl")
    before = snapshot(file.parent)
    assert_refused(remask("edit", "add", "tiny", file, "--facts", file.parent / "again.jsonl"), "'again'", f"as {ONE.id!r}")
    assert snapshot(file.parent) == before


def test_a_question_with_two_answers_is_refused(remask: Remask, tmp_path: Path) -> None:
    save_facts([ONE, replace(AGAIN, answer=TWO.answer)], tmp_path / "two.jsonl")
    found = remask("edit", "build", "tiny", "--facts", tmp_path / "two.jsonl", *PAPER, "-o", tmp_path / "m")
    assert_refused(found, ONE.id, "'again'", "two answers", "keep one")


def test_a_changed_byte_is_noticed(remask: Remask, file: Path) -> None:
    whole = bytearray(file.read_bytes())
    whole[-40] ^= 1
    file.write_bytes(whole)
    assert_refused(remask("edit", "show", file), "checksum", "make it again")
