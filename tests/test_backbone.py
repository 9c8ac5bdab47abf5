"""`MaskedDiffusionLM`: early exit, resume, padding, shift, loading, saving, fingerprints."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from conftest import GOLDENS, build_toy
from remask.backbones import MaskedDiffusionLM, Site, capture, load, save_pretrained
from remask.backbones.intervention import NoEdit
from remask.backbones.model import length_batches
from remask.editing import SteeringVector
from remask.errors import RemaskError
from remask.facts import Fact

GOLDEN = load_file(GOLDENS / "llada" / "golden.safetensors")


# ------------------------------------------------------------------ forward passes
@pytest.mark.parametrize("padded", [False, True])
def test_run_to_then_run_from_is_logits_bit_for_bit(golden, padded: bool) -> None:
    mask = GOLDEN["attention_mask"] if padded else None
    with torch.inference_mode():
        whole = golden.logits(GOLDEN["input_ids"], mask)
        for layer in range(golden.num_layers):
            hidden = golden.run_to(layer, GOLDEN["input_ids"], mask)
            assert torch.equal(golden.run_from(layer, hidden, mask), whole)


def test_only_the_needed_blocks_run_and_counters_say_so(toy: MaskedDiffusionLM) -> None:
    ran: list[int] = []
    for index, block in enumerate(toy.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    ids = torch.arange(14).view(2, 7)
    hidden = toy.run_to(1, ids)
    assert ran == [0, 1]
    assert dataclasses.astuple(toy.counters) == (1, 2, 14, 4)
    ran.clear()
    toy.run_from(0, hidden)
    assert ran == [1, 2]
    assert dataclasses.astuple(toy.counters) == (1, 4, 14, 8)
    ran.clear()
    toy.run_from(2, hidden)
    assert ran == []
    toy.logits(ids)
    assert ran == [0, 1, 2]
    assert dataclasses.astuple(toy.counters) == (2, 7, 28, 14)


def test_a_block_called_alone_attends_in_both_directions(golden) -> None:
    """The lone block, called without a mask, gives the original's block output (a causal one would not)."""
    hidden = GOLDEN["trace.embed"][None]
    rotary = golden.model.model.rotary_emb(hidden, position_ids=torch.arange(hidden.shape[1])[None])
    with torch.inference_mode():
        alone = golden.blocks[0](hidden, position_embeddings=rotary)
        changed = hidden.clone()
        changed[0, -1] += 1.0
        other = golden.blocks[0](changed, position_embeddings=rotary)
    assert (alone[0] - GOLDEN["trace.block_out.0"]).abs().max() <= 1e-5
    assert not torch.equal(alone[0, 0], other[0, 0])


def test_right_padded_row_equals_the_unpadded_row(toy: MaskedDiffusionLM) -> None:
    ids = torch.arange(20, 31)[None]
    for filler in (toy.spec.pad_id, 77):
        padded = torch.cat([ids, torch.full((1, 5), filler)], dim=1)
        mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 5, dtype=ids.dtype)], dim=1)
        assert (toy.logits(padded, mask)[:, :11] - toy.logits(ids)).abs().max() <= 1e-5


def test_padding_is_never_inferred_from_ids(golden) -> None:
    """pad == eos here: such ids inside a prompt are read like any other token."""
    pad = golden.spec.pad_id
    assert pad == golden.spec.eos_id
    ids = GOLDEN["input_ids"][:1].clone()
    with_pad, without = ids.clone(), ids.clone()
    with_pad[0, 7], without[0, 7] = pad, pad + 1
    with torch.inference_mode():
        logits = golden.logits(with_pad)
        assert (logits - golden.logits(with_pad, torch.ones_like(ids))).abs().max() <= 1e-5
        hole = torch.ones_like(ids)
        hole[0, 7] = 0
        assert (logits - golden.logits(with_pad, hole))[0, 0].abs().max() > 1e-3
        assert (logits - golden.logits(without))[0, 0].abs().max() > 1e-3


@pytest.mark.parametrize("shift", [False, True])
def test_logits_at_positions_equal_the_slice(toy: MaskedDiffusionLM, shift: bool) -> None:
    lm = dataclasses.replace(toy, spec=dataclasses.replace(toy.spec, shift=shift))
    ids = torch.arange(30).view(3, 10)
    positions = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    picked = lm.logits(ids, positions=positions)
    full = lm.logits(ids)
    expected = torch.stack([full[b, i] for b in range(3) for i in range(10) if positions[b, i]])
    assert (picked - expected).abs().max() <= 1e-5


def test_shifted_model_is_position_aligned(toy: MaskedDiffusionLM) -> None:
    """Row i of a shifted model is what the plain model emits at i-1; the first position emits its own."""
    lm = dataclasses.replace(toy, spec=dataclasses.replace(toy.spec, shift=True))
    ids = torch.arange(24).view(2, 12)
    raw = toy.model(input_ids=ids).logits  # transformers' own forward
    aligned = lm.logits(ids)
    for i in range(12):
        assert (aligned[:, i] - raw[:, max(0, i - 1)]).abs().max() <= 1e-5


@pytest.mark.parametrize("shift", [False, True])
def test_emitting_names_the_hidden_states_that_matter(toy: MaskedDiffusionLM, shift: bool) -> None:
    """Found by perturbing the head's input one position at a time."""
    lm = dataclasses.replace(toy, spec=dataclasses.replace(toy.spec, shift=shift))
    length = 6
    hidden = torch.randn(1, length, lm.hidden_size, generator=torch.Generator().manual_seed(1))
    before = lm.head(hidden)[0]
    influence = torch.zeros(length, length, dtype=torch.bool)  # [hidden position, predicted position]
    for j in range(length):
        changed = hidden.clone()
        changed[0, j] += 1.0 + torch.arange(lm.hidden_size) / 7
        influence[j] = (lm.head(changed)[0] - before).abs().amax(dim=1) > 1e-6
    for code in range(1, 2**length):
        positions = torch.tensor([[bool(code >> i & 1) for i in range(length)]])
        expected = (influence & positions).any(dim=1)
        assert torch.equal(lm.emitting(positions)[0], expected)


def test_too_long_a_sequence_is_refused(toy: MaskedDiffusionLM) -> None:
    with pytest.raises(RemaskError, match=r"97 tokens.*96"):
        toy.logits(torch.zeros(1, 97, dtype=torch.long))


@pytest.mark.parametrize("site", [Site(3), Site(-1)])
def test_site_outside_the_model_is_refused(toy: MaskedDiffusionLM, site: Site) -> None:
    with pytest.raises(RemaskError, match=r"toy-0 has layers 0\.\.2"):
        toy.site_module(site)


def test_a_module_that_no_site_has_is_refused() -> None:
    with pytest.raises(RemaskError, match="'mlp_out' is unknown; choose one of resid, attn, mlp"):
        Site(0, "mlp_out")  # type: ignore[arg-type]


def test_capture_leaves_no_hook_behind(toy: MaskedDiffusionLM) -> None:
    with pytest.raises(KeyError), capture(toy, [Site(0), Site(1, "attn")]):
        raise KeyError
    assert not any(module._forward_hooks for module in toy.model.modules())


# ------------------------------------------------------------------ loading and saving
def checkpoint(tmp_path: Path, change) -> Path:
    """A copy of the golden checkpoint with its tensors changed."""
    tensors = load_file(GOLDENS / "llada" / "model.safetensors")
    change(tensors)
    shutil.copy(GOLDENS / "llada" / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


KEY = "model.transformer.blocks.1.ff_out.weight"
NATIVE = "model.layers.1.mlp.down_proj.weight"


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors[KEY][3, 4] = torch.nan


def test_nan_weight_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RemaskError, match=rf"{NATIVE}.*NaN"):
        load(checkpoint(tmp_path, poison))


def test_missing_weight_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RemaskError, match=rf"missing keys.*{NATIVE}"):
        load(checkpoint(tmp_path, lambda tensors: tensors.pop(KEY)))


def test_unexpected_weight_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RemaskError, match=r"unexpected keys.*extra"):
        load(checkpoint(tmp_path, lambda tensors: tensors.update(extra=torch.zeros(2))))


def test_weight_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RemaskError, match="down_proj"):
        load(checkpoint(tmp_path, lambda tensors: tensors.update({KEY: torch.zeros(64, 32)})))


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, lambda tensors: None)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(RemaskError, match=str(folder)):
        load(folder)


def test_missing_weights_file_and_unknown_names_are_refused(tmp_path: Path) -> None:
    shutil.copy(GOLDENS / "llada" / "config.json", tmp_path)
    with pytest.raises(RemaskError, match=r"model\.safetensors is missing"):
        load(tmp_path)
    with pytest.raises(RemaskError, match="unknown model 'no-such-model'"):
        load("no-such-model")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        (json.dumps({"architectures": ["GPT2LMHeadModel"]}), "GPT2LMHeadModel.*not a masked diffusion model.*family"),
        pytest.param(
            json.dumps({"architectures": ["LLaDAModelLM"], "vocab_size": 320, "n_layers": 2}),
            "d_model",
        ),
        pytest.param("[1]", "config.json"),
    ],
    ids=["syntax", "architecture", "missing-field", "not-an-object"],
)
def test_bad_config_is_refused_by_field(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.json").write_text(text)
    shutil.copy(GOLDENS / "llada" / "model.safetensors", tmp_path)
    with pytest.raises(RemaskError, match=words):
        load(tmp_path)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"mask_id": 1, "pad_id": 0}, "mdlm.*missing.*'eos_id'"),
        ({"mask_id": 1, "eos_id": 2, "pad_id": 0, "sift": 1}, "mdlm.*unknown.*'sift'"),
    ],
)
def test_bad_mdlm_section_is_refused_before_any_weight_is_read(
    toy: MaskedDiffusionLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: dict, words: str
) -> None:
    save_pretrained(toy, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "mdlm": section}))

    def weights(*_: object, **__: object) -> None:
        raise AssertionError("weights were read under a config that is refused")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", weights)
    with pytest.raises(RemaskError, match=words):
        load(tmp_path)


def test_saved_toy_loads_as_itself(toy: MaskedDiffusionLM, tmp_path: Path, facts: list[Fact]) -> None:
    lm = dataclasses.replace(toy, spec=dataclasses.replace(toy.spec, shift=True, answer_prefix=" ", gen_length=7))
    save_pretrained(lm, tmp_path, torch.float32)
    again = load(tmp_path)
    ids = torch.arange(40).view(2, 20)
    assert again.spec == lm.spec
    assert again.fingerprint() == lm.fingerprint()
    assert torch.equal(again.logits(ids), lm.logits(ids))
    assert [again.encode(fact) for fact in facts] == [lm.encode(fact) for fact in facts]


def test_llada_checkpoint_survives_our_own_layout(golden, tmp_path: Path) -> None:
    lm = load(GOLDENS / "llada")
    save_pretrained(lm, tmp_path, torch.float32)
    again = load(tmp_path)
    assert "model.layers.0.mlp.down_proj.weight" in load_file(tmp_path / "model.safetensors")
    with torch.inference_mode():
        assert torch.equal(again.logits(GOLDEN["input_ids"]), golden.logits(GOLDEN["input_ids"]))
    assert (again.spec.mask_id, again.spec.max_length) == (golden.spec.mask_id, golden.spec.max_length)


def test_bfloat16_save_loads_the_rounded_weights(toy: MaskedDiffusionLM, tmp_path: Path) -> None:
    save_pretrained(toy, tmp_path)
    again = load(tmp_path)
    for (name, value), (_, other) in zip(toy.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(value.bfloat16().float(), other), name


# ------------------------------------------------------------------ fingerprints
def test_fingerprint_changes_with_every_single_tensor(toy: MaskedDiffusionLM) -> None:
    seen = {toy.fingerprint()}
    names = [name for name, _ in toy.model.named_parameters()]
    for name in names:
        other = copy.deepcopy(toy)
        with torch.no_grad():
            other.model.get_parameter(name).mul_(1.001)
        seen.add(other.fingerprint())
    assert len(seen) == len(names) + 1


def test_fingerprint_is_blind_to_use_and_hooks(toy: MaskedDiffusionLM) -> None:
    before = toy.fingerprint()
    toy.logits(torch.arange(10)[None])
    with SteeringVector(torch.ones(32), Site(1)).attached(toy), NoEdit().attached(toy):
        assert toy.fingerprint() == before
    assert copy.deepcopy(toy).fingerprint() == before == build_toy().fingerprint()


def test_fingerprint_sees_a_single_edited_row(toy: MaskedDiffusionLM) -> None:
    before = toy.fingerprint()
    missed = []
    for row in range(0, len(toy.tokenizer), 10):
        other = copy.deepcopy(toy)
        with torch.no_grad():
            other.model.model.embed_tokens.weight[row, 1:4] += 1.0
        if other.fingerprint() == before:
            missed.append(row)
    assert missed == []


# ------------------------------------------------------------------ text
def test_encoding_round_trips_and_marks_the_subject(toy: MaskedDiffusionLM, facts: list[Fact]) -> None:
    for fact in facts:
        row = toy.encode(fact)
        assert toy.tokenizer.decode(row.prompt_ids) == f"<bos>{fact.prompt}<sep>"
        assert toy.decode([*row.answer_ids, toy.spec.eos_id, 9]) == fact.answer
        assert toy.encode_prompt(fact.prompt) == row.prompt_ids
        assert fact.subject in toy.tokenizer.decode(row.prompt_ids[slice(*row.subject)])


def test_subject_of_another_wording(toy: MaskedDiffusionLM, facts: list[Fact]) -> None:
    with_name = toy.encode(facts[0], prompt=facts[0].paraphrases[0])
    assert "Ada Birk" in toy.tokenizer.decode(with_name.prompt_ids[slice(*with_name.subject)])
    without = toy.encode(facts[0], prompt="Where was she born?")
    assert toy.tokenizer.decode(without.prompt_ids[slice(*without.subject)]) == "Where was she born?"


def test_prompt_that_also_occurs_in_the_template(toy: MaskedDiffusionLM) -> None:
    """The template's own characters before `{prompt}` must not be taken for the prompt."""
    lm = dataclasses.replace(toy, spec=dataclasses.replace(toy.spec, template="<bos>user: {prompt}<sep>"))
    row = lm.encode(Fact("u", "user", "user", "x"))
    assert row.subject[1] == len(row.prompt_ids) - 1  # right before <sep>


@pytest.mark.parametrize("field", ["prompt", "answer"])
def test_mask_token_in_a_text_is_refused_by_fact(toy: MaskedDiffusionLM, field: str) -> None:
    texts = {"prompt": "Who is Ada?", "answer": "a baker"}
    texts[field] += " <mask>"
    with pytest.raises(RemaskError, match=r"'ada/x'.*mask token"):
        toy.encode(Fact("ada/x", subject="Ada", **texts))
    with pytest.raises(RemaskError, match="mask token"):
        toy.encode_prompt("Who is <mask>?")


def test_too_long_a_fact_is_refused_by_id(toy: MaskedDiffusionLM) -> None:
    with pytest.raises(RemaskError, match=r"'ada/long'.*context.*96"):
        toy.encode(Fact("ada/long", "Who is Ada?", "Ada", "qzx" * 40))


def test_model_without_a_tokenizer_says_so(golden) -> None:
    with pytest.raises(RemaskError, match="without a tokenizer"):
        golden.encode_prompt("hello")


def test_length_batches_partition_by_length() -> None:
    lengths = [5, 3, 5, 5, 3, 9, 5]
    batches = [batch.tolist() for batch in length_batches(lengths, token_budget=10)]
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    for batch in batches:
        assert len({lengths[i] for i in batch}) == 1
        assert len(batch) == 1 or len(batch) * lengths[batch[0]] <= 10
    assert [1, 4] in batches  # 2 x 3 tokens fit, and do share a batch
