"""Edited weights as an intervention: exactly the sum, exactly undone, refused elsewhere, and the same from a file."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import remask.backbones as backbones
from conftest import GOLDEN_OPTIONS, GOLDENS, build_toy
from remask.backbones import BackboneSpec, MaskedDiffusionLM, Site, save_pretrained
from remask.backbones.weight_edit import Change, LowRank, WeightEdit
from remask.editfile import read_edit, write_edit
from remask.editing import EditMemory, preset
from remask.editing.calibrate import calibrate, mean_logprob
from remask.errors import RemaskError
from remask.experiments.audits import AuditConfig, run_benchmark
from remask.experiments.edits import attach, load_edit
from remask.facts import Fact

IDS = torch.arange(24).view(2, 12) + 5
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def gpt2() -> MaskedDiffusionLM:
    """A random GPT-2, whose linear layers hold [in, out]."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2))
    return MaskedDiffusionLM(model, None, BackboneSpec("gpt2", 63, 62, 62, max_length=32), "gpt2")


def noise(lm: MaskedDiffusionLM, names: Sequence[str], rank: int = 2, scale: float = 0.3) -> dict[str, Change]:
    torch.manual_seed(1)
    changes: dict[str, Change] = {}
    for name in names:
        *lead, rows, columns = lm.model.get_parameter(name).shape
        changes[name] = LowRank(scale * torch.randn(*lead, rows, rank), torch.randn(*lead, rank, columns))
    return changes


def edit_of(lm: MaskedDiffusionLM, *names: str, alpha: float = 1.0) -> WeightEdit:
    return WeightEdit(noise(lm, names), lm.fingerprint(), "rome", alpha, {"note": [1, "a"]})


def logits(lm: MaskedDiffusionLM, ids: Tensor = IDS) -> Tensor:
    with torch.inference_mode():
        return lm.logits(ids)


def merged(lm: MaskedDiffusionLM, edit: WeightEdit) -> MaskedDiffusionLM:
    """A copy of the model whose weights were changed by hand, each through its own explicit sum over ranks."""
    other = copy.deepcopy(lm)
    for name, change in edit.changes.items():
        weight = other.model.get_parameter(name)
        if isinstance(change, LowRank):
            ranks = range(change.left.shape[-1])
            change = sum((change.left[..., :, r, None] * change.right[..., r, None, :] for r in ranks), torch.zeros(()))
        with torch.no_grad():
            weight.copy_((weight.double() + edit.alpha * change.double()).to(weight.dtype))
    return other


@pytest.mark.parametrize("alpha", [1.0, -0.5])
def test_attached_equals_the_weights_merged_by_hand(toy: MaskedDiffusionLM, alpha: float) -> None:
    edit = edit_of(toy, DOWN, "model.layers.0.self_attn.q_proj.weight", alpha=alpha)
    dense = torch.randn(toy.model.get_parameter("model.norm.weight").shape)
    edit = replace(edit, changes={**edit.changes, "model.norm.weight": dense})
    base, expected = logits(toy), logits(merged(toy, edit))
    with edit.attached(toy):
        torch.testing.assert_close(logits(toy), expected, rtol=1e-4, atol=1e-4)
        assert toy.attached == [edit]
    assert (base - expected).abs().max() > 0.1
    assert torch.equal(logits(toy), base)


def test_detaching_puts_the_very_tensors_back(toy: MaskedDiffusionLM) -> None:
    places = {name: parameter.data_ptr() for name, parameter in toy.model.named_parameters()}
    bits, fingerprint = {n: p.clone() for n, p in toy.model.named_parameters()}, toy.fingerprint()
    handle = edit_of(toy, DOWN).attach(toy)
    assert toy.fingerprint() != fingerprint
    handle.detach()
    assert places == {name: parameter.data_ptr() for name, parameter in toy.model.named_parameters()}
    assert all(torch.equal(bits[name], parameter) for name, parameter in toy.model.named_parameters())
    assert toy.fingerprint() == fingerprint and not toy.attached
    with pytest.raises(RemaskError, match="not attached"):
        handle.detach()


def test_alpha_zero_is_no_edit_to_the_bit(toy: MaskedDiffusionLM) -> None:
    base = logits(toy)
    weight = toy.model.get_parameter(DOWN)
    place = weight.data_ptr()
    with edit_of(toy, DOWN, alpha=0.0).attached(toy):
        assert torch.equal(logits(toy), base)
        assert weight.data_ptr() == place


def test_the_sum_is_taken_in_fp32_and_rounded_once(toy: MaskedDiffusionLM) -> None:
    toy.model.to(torch.bfloat16)
    weight = toy.model.get_parameter(DOWN)
    with torch.no_grad():
        weight.fill_(1.0)
    left, right = torch.full((*weight.shape[:1], 1), 3.0), torch.full((1, weight.shape[1]), 2.0**-9 + 2.0**-18)
    with WeightEdit({DOWN: LowRank(left, right)}, toy.fingerprint(), "rome", alpha=2 / 3).attached(toy):
        # 1 + 2^-8 + 2^-17 in fp32 is above the tie of 1 and the next bf16 number. With factors rounded first it is at the tie,
        # which goes down to 1.
        assert weight.dtype == torch.bfloat16
        assert (weight == 1.0 + 2.0**-7).all()
    assert (weight == 1.0).all()


def test_bfloat16_weights_revert_to_the_bit(toy: MaskedDiffusionLM) -> None:
    toy.model.to(torch.bfloat16)
    edit, base = edit_of(toy, DOWN), logits(toy)
    with edit.attached(toy):
        assert not torch.equal(logits(toy), base)
        assert torch.equal(logits(toy), logits(merged(build_bfloat16(), edit)))
    assert torch.equal(logits(toy), base)


def build_bfloat16() -> MaskedDiffusionLM:
    lm = build_toy()
    lm.model.to(torch.bfloat16)
    return lm


def test_gpt2_changes_are_in_its_transposed_layout(gpt2: MaskedDiffusionLM) -> None:
    name = "transformer.h.1.mlp.c_fc.weight"
    edit = edit_of(gpt2, name)
    change = edit.changes[name]
    assert isinstance(change, LowRank) and change.shape == (16, 64)
    base, extra = logits(gpt2), change.left @ change.right
    layer = gpt2.model.get_submodule("transformer.h.1.mlp.c_fc")
    hook = layer.register_forward_hook(lambda _m, inputs, output: output + inputs[0] @ extra)
    expected = logits(gpt2)
    hook.remove()
    with edit.attached(gpt2):
        torch.testing.assert_close(logits(gpt2), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(gpt2), base)


def test_experts_are_changed_one_by_one() -> None:
    lm = backbones.load(GOLDENS / "llada_moe", **GOLDEN_OPTIONS["llada_moe"])
    name = "model.layers.1.mlp.experts.down_proj"
    edit, base = edit_of(lm, name), logits(lm)
    change = edit.changes[name]
    assert isinstance(change, LowRank) and change.left.ndim == 3
    weight = lm.model.get_parameter(name)
    before = weight.detach().clone()
    with edit.attached(lm):
        for expert in range(len(weight)):
            expected = before[expert] + change.left[expert] @ change.right[expert]
            torch.testing.assert_close(weight[expert].detach(), expected)
        assert not torch.equal(logits(lm), base)
    assert torch.equal(logits(lm), base)


def test_tied_embeddings_change_both_ends(toy: MaskedDiffusionLM) -> None:
    name = "model.embed_tokens.weight"
    assert toy.model.lm_head.weight is toy.model.get_parameter(name)
    edit = edit_of(toy, name)
    expected = logits(merged(toy, edit))
    with edit.attached(toy):
        assert toy.model.lm_head.weight is toy.model.get_parameter(name)
        torch.testing.assert_close(logits(toy), expected, rtol=1e-4, atol=1e-4)


def test_a_file_comes_back_the_same(toy: MaskedDiffusionLM, tmp_path: Path) -> None:
    edit = edit_of(toy, DOWN, alpha=0.7)
    edit = replace(
        edit, changes={**edit.changes, "model.norm.weight": torch.randn(32)}, details={"cost": {"seconds": 2.5}, "k": 1}
    )
    edit.save(tmp_path / "edit.safetensors")
    loaded = load_edit(tmp_path / "edit.safetensors")
    assert isinstance(loaded, WeightEdit)
    assert loaded.describe() == edit.describe() and loaded.details == edit.details and loaded.alpha == 0.7
    assert loaded.fingerprint() == edit.fingerprint()
    assert replace(loaded, details={**edit.details, "cost": {"seconds": 9}}).fingerprint() == edit.fingerprint()
    assert loaded.with_alpha(0.8).fingerprint() != edit.fingerprint()
    with edit.attached(toy):
        expected = logits(toy)
    with loaded.attached(toy):
        assert torch.equal(logits(toy), expected)
    with pytest.raises(RemaskError, match="attach it to a MaskedDiffusionLM"):
        attach(toy.model, tmp_path / "edit.safetensors")


def test_broken_files_are_refused_by_name(toy: MaskedDiffusionLM, tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    edit_of(toy, DOWN).save(path)
    header, tensors = read_edit(path)
    header.pop("format"), header.pop("kind")
    broken: dict[str, tuple[dict[str, object], dict[str, Tensor]]] = {
        "no right": (header, {key: value for key, value in tensors.items() if not key.startswith("right")}),
        "shapes": (header, {**tensors, f"right:{DOWN}": torch.zeros(5, 5)}),
        "empty": (header, {}),
        "no model": ({key: value for key, value in header.items() if key != "model"}, tensors),
        "alpha": ({**header, "alpha": "strong"}, tensors),
        "infinite": (header, {**tensors, f"left:{DOWN}": tensors[f"left:{DOWN}"] / 0}),
    }
    for name, (head, numbers) in broken.items():
        write_edit(tmp_path / name, WeightEdit.kind, head, numbers)
        with pytest.raises(RemaskError, match=f"{name}: damaged edit file"):
            WeightEdit.load(tmp_path / name)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RemaskError, match="no readable edit file"):
        load_edit(path)


def test_another_model_is_refused_with_both_fingerprints(toy: MaskedDiffusionLM) -> None:
    other = build_toy(seed=3)
    edit = edit_of(other, DOWN)
    with pytest.raises(RemaskError, match=f"{other.fingerprint()}.*{toy.fingerprint()}"):
        edit.attach(toy)
    assert not toy.attached


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [("model.nothing", (2, 2), "does not have"), (DOWN, (2, 2), r"\[2, 2\] and the parameter \[32, 48\]")],
)
def test_what_does_not_fit_is_refused_before_anything_changes(
    toy: MaskedDiffusionLM, name: str, shape: tuple[int, int], reason: str
) -> None:
    fingerprint = toy.fingerprint()
    changes = noise(toy, ["model.layers.0.self_attn.q_proj.weight"]) | {name: torch.ones(shape)}
    with pytest.raises(RemaskError, match=reason):
        WeightEdit(changes, fingerprint, "rome").attach(toy)
    assert toy.fingerprint() == fingerprint and not toy.attached


@pytest.mark.parametrize("make", [lambda: {}, lambda: {DOWN: torch.tensor([[float("nan")]])}])
def test_empty_and_infinite_changes_are_refused(make: Callable[[], dict[str, Change]]) -> None:
    with pytest.raises(RemaskError, match=r"changes no parameter|not finite"):
        WeightEdit(make(), "x", "rome")
    with pytest.raises(RemaskError, match="alpha must be"):
        WeightEdit({DOWN: torch.ones(1)}, "x", "rome", alpha=float("inf"))
    with pytest.raises(RemaskError, match="cannot have factors"):
        LowRank(torch.ones(4, 2), torch.ones(3, 4))


def test_quantised_weights_and_a_second_edit_are_refused(toy: MaskedDiffusionLM) -> None:
    edit = edit_of(toy, DOWN)
    with edit.attached(toy), pytest.raises(RemaskError, match="weights of a rome edit already"):
        replace(edit, model=toy.fingerprint()).attach(toy)
    layer = toy.model.get_submodule("model.layers.1.mlp.down_proj")
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(RemaskError, match="quantised"):
        replace(edit, model=toy.fingerprint()).attach(toy)


def test_calibrate_finds_the_strength(taught: MaskedDiffusionLM, facts: list[Fact]) -> None:
    rows = [taught.encode(fact) for fact in facts[:3]]
    edit = WeightEdit(noise(taught, [DOWN], scale=0.05), taught.fingerprint(), "memit")
    start = mean_logprob(taught, rows)
    found = calibrate(taught, edit, rows, start - 2.0)
    assert isinstance(found, WeightEdit) and found.alpha > 0
    with found.attached(taught):
        assert mean_logprob(taught, rows) == pytest.approx(start - 2.0, abs=0.05)
    assert mean_logprob(taught, rows) == start


def test_a_memory_beside_it_in_either_order(taught: MaskedDiffusionLM, facts: list[Fact]) -> None:
    """Hooks and weights do not see one another: same logits in both orders, and each goes away by itself."""
    memory = EditMemory.build(taught, facts[:3], Site(1), config=preset("paper"), alpha=0.5)
    edit = WeightEdit(noise(taught, [DOWN], scale=0.05), taught.fingerprint(), "rome")
    ids = torch.tensor([taught.encode(facts[0]).ids])
    base = logits(taught, ids)
    with memory.attached(taught):
        memory_alone = logits(taught, ids)
    one, two = memory.attach(taught), edit.attach(taught)
    both = logits(taught, ids)
    one.detach()
    edit_alone = logits(taught, ids)
    two.detach()
    assert torch.equal(logits(taught, ids), base)
    # A memory checks the weights that it finds: on top of an edit it must have been built on the edited model.
    two = edit.attach(taught)
    with pytest.raises(RemaskError, match="does not fit"):
        memory.attach(taught)
    on_top = copy.copy(memory)
    on_top.model = taught.fingerprint()
    one = on_top.attach(taught)
    assert torch.equal(logits(taught, ids), both)
    two.detach()
    assert torch.equal(logits(taught, ids), memory_alone)
    one.detach()
    assert torch.equal(logits(taught, ids), base)
    assert len({round(float(value.sum()), 3) for value in (base, memory_alone, edit_alone, both)}) == 4


def test_an_audit_takes_its_file(taught: MaskedDiffusionLM, facts: list[Fact], tmp_path: Path) -> None:
    save_pretrained(taught, tmp_path / "model")
    lm = backbones.load(tmp_path / "model")
    edit = WeightEdit(noise(lm, [DOWN], scale=0.1), lm.fingerprint(), "memit")
    edit.save(tmp_path / "edit.safetensors")
    (tmp_path / "data").mkdir()
    for name, part in (("forget", facts[:2]), ("retain", facts[4:6]), ("fit", facts[6:])):
        rows = [{"prompt": f.prompt, "completion": f.answer, "subject": f.subject, "group": f.group} for f in part]
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    save_pretrained(merged(lm, edit), tmp_path / "merged")
    levels = []
    for model, name in (("model", str(tmp_path / "edit.safetensors")), ("merged", "none")):
        asked = AuditConfig(str(tmp_path / model), "whp", edit=name, precision="fp32", seeds=1, attacks=False)
        result = run_benchmark(asked, tmp_path / f"audit-{model}", tmp_path / "data")
        assert result is not None
        levels.append(result["groups"][0]["metrics"]["answer log-probability"]["states"])
    edited, alone = levels
    assert edited["after"]["mean"] == pytest.approx(alone["before"]["mean"], abs=0.05)  # the files hold bf16
    assert edited["after"]["mean"] < edited["before"]["mean"] - 0.5
