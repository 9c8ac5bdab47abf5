"""The edit memory as a method: it does what the equations say, leaves alone what it should, and can be undone exactly."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import build_toy
from remask.backbones import MaskedDiffusionLM, Site, capture
from remask.backbones.intervention import NoEdit, add_shift
from remask.diffusion.masks import MaskBank
from remask.diffusion.sampler import SamplerConfig, generate
from remask.editing import EditMemory, MemoryConfig, SteeringVector, anchor_level, calibrate, mean_delta, preset
from remask.editing.calibrate import mean_logprob
from remask.errors import RemaskError
from remask.experiments.edits import load_edit
from remask.facts import Fact

SITE = Site(1)
IDS = torch.arange(20, 50).view(2, 15)
CONFIGS = pytest.mark.parametrize(
    "config",
    [preset("default"), preset("default", compress=2, landmarks=8), preset("ridge"), preset("ridge", q=0.4)],
    ids=["kernel", "compressed", "linear", "sparse"],
)


def default_memory(lm: MaskedDiffusionLM, facts: list[Fact], **changes: object) -> EditMemory:
    return EditMemory.build(lm, facts[:3], SITE, retain=facts[4:], **changes)


def hidden_states(lm: MaskedDiffusionLM, ids: tuple[int, ...], layer: int) -> torch.Tensor:
    """Residual stream after block `layer`, [L, d], from transformers' own forward."""
    with torch.inference_mode():
        return lm.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0]


# ------------------------------------------------------------------ what it computes
def test_one_fact_is_the_gated_edit(toy, facts) -> None:
    """Equations 6-9 for N = 1:  h + alpha * <h, k> / (|k|^2 + lambda) * delta."""
    alpha, ridge, fact = 0.7, 2.5, facts[1]
    memory = EditMemory.build(toy, [fact], SITE, config=preset("paper", ridge=ridge), alpha=alpha)
    own, refusal = toy.encode(fact), toy.encode(fact, answer="I don't know.")
    start = len(own.prompt_ids)
    before = hidden_states(toy, own.ids, 1)
    key = before[slice(*own.subject)].mean(0)
    delta = hidden_states(toy, refusal.ids, 1)[start:].mean(0) - before[start:].mean(0)
    hidden = toy.run_to(1, IDS)
    gate = (hidden @ key) / (key.square().sum() + ridge)
    with memory.attached(toy):
        edited = toy.run_to(1, IDS)
    shift = alpha * gate[..., None] * delta
    assert shift.abs().max() > 0.1
    assert (edited - hidden - shift).abs().max() <= 1e-5 * hidden.abs().max()


@pytest.mark.parametrize("anchor", ["prompt", "subject"])
def test_default_keys_and_deltas_are_those_of_partial_states(toy, facts, anchor: str) -> None:
    """Each partial state by hand: keys where tokens are hidden, deltas towards the state with the prompt hidden too."""
    config = MemoryConfig(anchor=anchor, compress=0)
    memory = EditMemory.build(toy, facts[:2], SITE, retain=facts[4:], config=config)
    for index, fact in enumerate(facts[:2]):
        row = toy.encode(fact)
        start, mask_id = len(row.prompt_ids), toy.spec.mask_id
        first, last = (0, start) if anchor == "prompt" else row.subject
        keys, deltas = [], []
        for mask in np.unique(config.bank.masks(row.id, len(row.answer_ids)), axis=0):
            canvas = [*row.prompt_ids, *(mask_id if m else a for a, m in zip(row.answer_ids, mask, strict=True))]
            blind = [mask_id if first <= i < last else token for i, token in enumerate(canvas)]
            where = [start + i for i in np.nonzero(mask)[0]]
            keys.append(hidden_states(toy, tuple(canvas), 1)[where])
            deltas.append(hidden_states(toy, tuple(blind), 1)[where] - keys[-1])
        own = memory.owner == index
        assert sorted_rows(memory.keys[own], memory.deltas[own]) == pytest.approx(
            sorted_rows(torch.cat(keys), torch.cat(deltas)), abs=1e-4
        )


def slow_linear(memory: EditMemory, state: torch.Tensor) -> torch.Tensor:
    """A h D of one residual [d] in fp64."""
    return (memory.solution.readout.double() @ state) @ memory.deltas.double()


def slow_kernel(memory: EditMemory, state: torch.Tensor) -> torch.Tensor:
    """The kernel readout at one residual [d] in fp64, a landmark at a time."""
    away = state - memory.retained.mean.double()
    pairs = zip(memory.solution.landmarks.double(), memory.solution.values.double(), strict=True)
    return sum(torch.exp(memory.config.beta * (mark @ away / away.norm() - 1)) * value for mark, value in pairs)


def sorted_rows(keys: torch.Tensor, deltas: torch.Tensor) -> np.ndarray:
    table = torch.cat([keys, deltas], dim=1).numpy()
    return table[np.argsort(table[:, 0])]


@pytest.mark.parametrize("compress", [0, 3])
@pytest.mark.parametrize("name", ["default", "ridge"])
def test_mean_delta_is_the_mean_at_equal_strength(toy, facts, name: str, compress: int) -> None:
    """A key that stands for several counts as often; the shift is the memory's on each of its keys, one at a time in fp64."""
    memory = default_memory(toy, facts, alpha=1.7, config=preset(name, compress=compress))
    vector = mean_delta(memory)
    counts = memory.counts.double()
    assert (counts > 1).any() == bool(compress)
    mean = sum(c * delta for c, delta in zip(counts, memory.deltas.double(), strict=True)) / counts.sum()
    assert torch.allclose(vector.vector.double(), mean)
    shift = {"default": slow_kernel, "ridge": slow_linear}[name]
    squares = [float((1.7 * shift(memory, key)).square().sum()) for key in memory.keys.double()]
    expected = np.sqrt(np.average(squares, weights=counts))
    assert float(vector.alpha * vector.vector.norm()) == pytest.approx(expected, rel=1e-4)
    with vector.attached(toy):
        shift = toy.run_to(1, IDS)
    assert (shift - toy.run_to(1, IDS) - vector.alpha * vector.vector).abs().max() <= 1e-4


def test_steps_limit_the_edit_to_those_steps(toy, facts, rows) -> None:
    strong = SteeringVector(torch.linspace(-9, 9, 32), Site(1))
    settings = SamplerConfig(gen_length=4)

    def run(edit: SteeringVector) -> list[list[int]]:
        with edit.attached(toy):
            return generate(toy, [rows[0].prompt_ids], settings, history=True)[0].history

    plain = generate(toy, [rows[0].prompt_ids], settings, history=True)[0].history
    every = run(strong)
    late = run(dataclasses.replace(strong, site=Site(1, "resid", (2, 3))))
    assert every[1] != plain[1]
    assert late[:3] == plain[:3]
    assert late[3] != plain[3]
    assert run(dataclasses.replace(strong, site=Site(1, "resid", (0, 1, 2, 3)))) == every
    with dataclasses.replace(strong, site=Site(1, "resid", (0,))).attached(toy):
        assert toy.clock.step is None  # no denoising step is running: nothing acts
        edited = toy.logits(IDS)
    assert torch.equal(edited, toy.logits(IDS))


# ------------------------------------------------------------------ what it must not change
@CONFIGS
def test_strength_zero_and_detached_are_bit_exact(toy, facts, config: MemoryConfig) -> None:
    before = toy.logits(IDS)
    memory = default_memory(toy, facts, config=config)
    with memory.with_alpha(0.0).attached(toy):
        assert torch.equal(toy.logits(IDS), before)
    with memory.attached(toy):
        assert not torch.equal(toy.logits(IDS), before)
    assert torch.equal(toy.logits(IDS), before)
    assert toy.attached == []


def test_attaching_twice_is_an_error_and_leaves_one(toy, facts) -> None:
    memory = default_memory(toy, facts)
    with memory.attached(toy):
        once = toy.logits(IDS)
        with pytest.raises(RemaskError, match="already attached to toy-0"):
            memory.attach(toy)
        assert torch.equal(toy.logits(IDS), once)
    memory.attach(toy).detach()  # and again is fine after that


def test_detaching_out_of_order_leaves_the_right_one(toy, facts) -> None:
    memory, steering = default_memory(toy, facts), SteeringVector(torch.ones(32), Site(0, "mlp"))
    before = toy.logits(IDS)
    with steering.attached(toy):
        only_steering = toy.logits(IDS)
    first, second = memory.attach(toy), steering.attach(toy)
    first.detach()
    assert toy.attached == [steering]
    assert torch.equal(toy.logits(IDS), only_steering)
    second.detach()
    assert torch.equal(toy.logits(IDS), before)
    with pytest.raises(RemaskError, match="not attached"):
        second.detach()


def test_a_used_handle_cannot_detach_a_later_attachment(toy) -> None:
    steering = SteeringVector(torch.ones(32), SITE)
    old = steering.attach(toy)
    old.detach()
    new = steering.attach(toy)
    with pytest.raises(RemaskError, match="not attached"):
        old.detach()
    assert toy.attached == [steering]
    new.detach()


def test_exception_inside_the_block_detaches(toy) -> None:
    before = toy.logits(IDS)
    with pytest.raises(KeyError), SteeringVector(torch.ones(32), SITE).attached(toy):
        raise KeyError
    assert torch.equal(toy.logits(IDS), before)


def test_nothing_is_captured_while_something_is_attached(toy, facts) -> None:
    with SteeringVector(torch.ones(32), SITE).attached(toy), pytest.raises(RemaskError, match="steering vector attached"):
        default_memory(toy, facts)
    with NoEdit().attached(toy), pytest.raises(RemaskError, match="attached"):
        EditMemory.build(toy, facts[:1], SITE, config=preset("paper"))


# ------------------------------------------------------------------ collection
@CONFIGS
@pytest.mark.parametrize("keys", ["answer", "subject-mean"])
def test_insertion_order_does_not_matter(toy, facts, config: MemoryConfig, keys: str) -> None:
    config = dataclasses.replace(config, keys=keys, target="anchor" if keys == "answer" else "refusal")
    effects = []
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        memory = EditMemory.build(toy, [facts[i] for i in order], SITE, retain=facts[4:], config=config)
        with memory.attached(toy):
            effects.append(toy.run_to(1, IDS))
    assert torch.equal(*effects)
    assert not torch.equal(effects[0], toy.run_to(1, IDS))


@pytest.mark.parametrize("name", ["default", "ridge", "paper"])
def test_removed_equals_never_inserted(toy, facts, tmp_path: Path, name: str) -> None:
    config = preset(name)
    whole = EditMemory.build(toy, facts[:4], SITE, retain=facts[4:], config=config)
    never = EditMemory.build(toy, [facts[0], facts[2], facts[3]], SITE, retain=facts[4:], config=config)
    removed = whole.remove(facts[1].id)
    assert removed.fact_ids == never.fact_ids
    assert torch.equal(removed.keys, never.keys)
    assert torch.equal(removed.deltas, never.deltas)
    assert torch.equal(removed.owner, never.owner)
    for field in dataclasses.fields(removed.solution):
        one, other = (getattr(memory.solution, field.name) for memory in (removed, never))
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    removed.save(tmp_path / "removed.safetensors")
    never.save(tmp_path / "never.safetensors")
    data = (tmp_path / "removed.safetensors").read_bytes()
    assert facts[1].id.encode() not in data
    assert data == (tmp_path / "never.safetensors").read_bytes()
    for row in whole.keys[whole.owner == 1]:
        assert row.numpy().tobytes() not in data


def test_removing_the_unknown_or_everything_is_an_error(toy, facts) -> None:
    memory = default_memory(toy, facts)
    with pytest.raises(RemaskError, match="no fact 'nobody'"):
        memory.remove(facts[0].id, "nobody")
    with pytest.raises(RemaskError, match="every fact"):
        memory.remove(*memory.fact_ids)


# ------------------------------------------------------------------ files
@CONFIGS
def test_saved_memory_acts_bit_for_bit_the_same(toy, facts, tmp_path: Path, config: MemoryConfig) -> None:
    memory = EditMemory.build(toy, facts[:3], Site(1, "mlp", (0, 1)), retain=facts[4:], config=config, alpha=0.6)
    memory.save(tmp_path / "m.safetensors")
    again = EditMemory.load(tmp_path / "m.safetensors")
    assert again.describe() == memory.describe()
    assert again.fact_ids == memory.fact_ids
    assert torch.equal(again.counts, memory.counts) and torch.equal(again.lost, memory.lost)
    outputs = []
    for edit in (memory, again):
        with edit.attached(toy):
            toy.clock.step = 1
            outputs.append(toy.logits(IDS))
            toy.clock.step = None
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], toy.logits(IDS))


def test_file_of_another_model_is_refused_with_both_fingerprints(toy, facts, tmp_path: Path) -> None:
    default_memory(toy, facts).save(tmp_path / "m.safetensors")
    other = build_toy(seed=1)
    with pytest.raises(RemaskError) as error:
        EditMemory.load(tmp_path / "m.safetensors").attach(other)
    assert toy.fingerprint() in str(error.value)
    assert other.fingerprint() in str(error.value)
    assert other.attached == []


def test_broken_edit_files_are_refused_by_name(toy, facts, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(RemaskError, match=r"m\.safetensors: no such edit file"):
        EditMemory.load(path)
    default_memory(toy, facts).save(path)
    good = path.read_bytes()
    for bad in (good[: len(good) // 2], b"", b"{}", good.replace(b'\\"format\\":3', b'\\"format\\":9')):
        assert bad != good
        path.write_bytes(bad)
        with pytest.raises(RemaskError, match=r"m\.safetensors: (this is )?no (readable )?edit file"):
            EditMemory.load(path)


def test_steering_file_round_trip(toy, facts, rows, tmp_path: Path) -> None:
    vector = mean_delta(default_memory(toy, facts, alpha=2.0))
    vector.save(tmp_path / "v.safetensors")
    again = load_edit(tmp_path / "v.safetensors")
    assert isinstance(again, SteeringVector)
    assert again.fingerprint() == vector.fingerprint()
    ids = torch.tensor([rows[0].ids])
    results = []
    for edit in (vector, again):
        with edit.attached(toy):
            results.append(toy.logits(ids))
    assert torch.equal(*results)
    with pytest.raises(RemaskError, match="was built on model"):
        again.attach(build_toy(seed=3))
    with pytest.raises(RemaskError, match="holds a steering vector, not an edit memory"):
        EditMemory.load(tmp_path / "v.safetensors")
    with pytest.raises(RemaskError, match="no such edit file"):
        load_edit(tmp_path / "none.safetensors")


@pytest.mark.parametrize("name", ["default", "ridge"])
def test_shift_is_computed_in_fp32_under_autocast(toy, facts, rows, name: str) -> None:
    """The hook sees what autocast hands it, and adds the shift that it would add without autocast."""
    memory = default_memory(toy, facts, config=preset(name), alpha=2.0)
    ids = torch.tensor([rows[0].ids])
    with torch.autocast("cpu", torch.bfloat16):
        bare = toy.run_to(1, ids)
        with memory.attached(toy):
            edited = toy.run_to(1, ids)
    shift = {"default": slow_kernel, "ridge": slow_linear}[name]
    expected = 2.0 * torch.stack([shift(memory, state) for state in bare[0].double()])
    assert edited.dtype == torch.float32
    assert ((edited - bare)[0].double() - expected).abs().max() <= 1e-3 * expected.abs().max()  # bf16 would be off by 1e-2


@pytest.mark.parametrize("name", ["default", "ridge"])
def test_forward_in_wider_and_narrower_types(toy, facts, name: str) -> None:
    """In fp64 the shift is computed in fp64; bf16 residuals are shifted in fp32 and rounded once."""
    memory = default_memory(toy, facts, config=preset(name), alpha=2.0)
    slow = {"default": slow_kernel, "ridge": slow_linear}[name]
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.bfloat16, 1e-2)):
        lm = build_toy()
        lm.model.to(dtype)
        bare = lm.run_to(1, IDS)
        undo = add_shift(lm, SITE, memory.shift())
        edited = lm.run_to(1, IDS)
        undo()
        shift = torch.stack([2.0 * slow(memory, state) for state in bare.double().flatten(0, 1)])
        expected = bare.double() + shift.view_as(bare)
        assert edited.dtype == bare.dtype == dtype
        assert (edited.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(("old", "new"), [('"q":1.0', '"p":1.0'), ('"alpha":', '"alphx":'), ('"ridge":0.001', '"ridge":-1.01')])
def test_edit_file_with_a_damaged_header_is_refused_by_name(toy, facts, tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "m.safetensors"
    default_memory(toy, facts).save(path)
    old, new = (json.dumps(text)[1:-1] for text in (old, new))
    assert len(old) == len(new)
    assert old.encode() in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old.encode(), new.encode()))
    with pytest.raises(RemaskError, match=r"m\.safetensors"):
        EditMemory.load(path)


def test_fingerprints_tell_different_edits_apart(toy, facts) -> None:
    up = SteeringVector(torch.ones(32), SITE)
    down = SteeringVector(-torch.ones(32), SITE)
    assert up.fingerprint() != down.fingerprint()
    forget = EditMemory.build(toy, facts[:1], SITE, config=preset("paper"))
    rewritten = dataclasses.replace(facts[0], target="Tartu")
    rewrite = EditMemory.build(toy, [rewritten], SITE, config=preset("paper", target="object"))
    assert not torch.equal(forget.deltas, rewrite.deltas)
    assert forget.fingerprint() != rewrite.fingerprint()
    assert forget.fingerprint() == EditMemory.build(toy, facts[:1], SITE, config=preset("paper")).fingerprint()
    assert forget.fingerprint() != forget.with_alpha(0.5).fingerprint()


# ------------------------------------------------------------------ bad input
def test_duplicate_facts_with_a_tiny_ridge_are_refused(toy, facts) -> None:
    copies = [dataclasses.replace(facts[0], id=name) for name in ("one", "two")]
    with pytest.raises(RemaskError, match=r"singular.*near-duplicate.*raise ridge"):
        EditMemory.build(toy, copies, SITE, config=preset("paper", ridge=1e-14, relative=True))
    assert EditMemory.build(toy, copies, SITE, config=preset("paper")).solution.condition < 1e13


@pytest.mark.parametrize("layer", [3, -1])
def test_site_outside_the_model_is_refused(toy, facts, layer: int) -> None:
    with pytest.raises(RemaskError, match="outside the model"):
        EditMemory.build(toy, facts[:1], Site(layer), config=preset("paper"))
    with pytest.raises(RemaskError, match=r"'heads' is unknown.*resid, attn, mlp"):
        Site(1, "heads")  # type: ignore[arg-type]


def test_bad_collections_are_refused(toy, facts) -> None:
    with pytest.raises(RemaskError, match="at least one fact"):
        EditMemory.build(toy, [], SITE)
    with pytest.raises(RemaskError, match="duplicate fact id 'ada/city'"):
        EditMemory.build(toy, [facts[0], facts[0]], SITE, retain=facts[4:])
    with pytest.raises(RemaskError, match="needs retain facts"):
        EditMemory.build(toy, facts[:1], SITE)


@pytest.mark.parametrize(
    "changes",
    [
        *({"q": value} for value in (0.0, 0.5, 1.1)),
        *({name: value} for name, value in (("ridge", 0.0), ("mu", -1.0), ("states", 0), ("balance", 2.0))),
        *({name: value} for name, value in (("keys", "subject"), ("target", "refusal"))),
    ],
)
def test_impossible_configs_are_refused(changes: dict) -> None:
    with pytest.raises(RemaskError):
        preset("default", **changes)


def test_unknown_preset_is_refused_with_the_names() -> None:
    with pytest.raises(RemaskError, match=r"unknown preset 'papr'.*default, ridge, paper"):
        preset("papr")


# ------------------------------------------------------------------ calibration
@pytest.mark.parametrize("make", [default_memory, lambda lm, facts: mean_delta(default_memory(lm, facts))])
def test_calibration_reaches_the_level(taught, facts, make) -> None:
    rows = [taught.encode(fact) for fact in facts[:3]]
    bank = MaskBank(draws=4, replicates=1, seed=8)
    start, level = mean_logprob(taught, rows, bank), anchor_level(taught, rows, bank)
    assert start - level > 5, "the toy did not learn: nothing to calibrate on"
    edit = calibrate(taught, make(taught, facts), rows, level, bank)
    with edit.attached(taught):
        reached = mean_logprob(taught, rows, bank)
    assert abs(reached - level) <= 0.01 * (start - level)
    assert taught.attached == []


def test_calibration_with_nothing_to_forget_is_an_error(taught, facts) -> None:
    rows = [taught.encode(fact) for fact in facts[:3]]
    bank = MaskBank(draws=2, replicates=1)
    start = mean_logprob(taught, rows, bank)
    with pytest.raises(RemaskError, match="nothing to forget"):
        calibrate(taught, default_memory(taught, facts), rows, start + 0.5, bank)


def test_calibration_says_when_no_strength_is_enough(taught, facts) -> None:
    rows = [taught.encode(fact) for fact in facts[:2]]
    idle = SteeringVector(torch.zeros(32), SITE)
    with pytest.raises(RemaskError, match=r"alpha = 256.*above the level"):
        calibrate(taught, idle, rows, -100.0, MaskBank(draws=1, replicates=1))
    assert taught.attached == []


def test_edits_compose_with_capture(toy, facts) -> None:
    """What `capture` records at an edited site is the edited output, the one that later blocks read."""
    with default_memory(toy, facts).attached(toy), capture(toy, [SITE]) as store:
        seen = toy.run_to(1, IDS)
    assert torch.equal(store[SITE], seen)
