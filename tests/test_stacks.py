"""Families without golden numbers (GPT-2, BERT, ModernBERT, SDAR) against transformers' own forward; the self-test."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from conftest import GOLDENS, build_toy
from remask.backbones import Encoded, MaskedDiffusionLM, Site, capture, load, save_pretrained
from remask.backbones import model as model_module
from remask.backbones.loading import check_attention
from remask.backbones.stacks import block_causal_mask, stack_of
from remask.errors import RemaskError
from remask.facts import Fact
from remask.tracing import TraceConfig, largest_difference, trace

LAYERS, WIDTH, MLP, VOCABULARY, BLOCK = 3, 32, 48, 320, 4
KINDS = ("diffugpt", "bert", "modernbert", "sdar")
IDS = torch.randint(5, VOCABULARY, (4, 14), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS)
MASK[1, :5] = 0  # left
MASK[2, 9:] = 0  # right
MASK[3, :1] = 0
IDS[MASK == 0] = 0
REAL = MASK.bool()
COUNTED = torch.tensor([[max(0, int(row[: i + 1].sum()) - 1) for i in range(14)] for row in MASK])


def native_model(kind: str) -> PreTrainedModel:
    """A small random model of transformers' own, biases and norms included."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    ids = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        if kind == "diffugpt":
            config = GPT2Config(
                vocab_size=VOCABULARY, n_positions=64, n_embd=WIDTH, n_layer=LAYERS, n_head=4, bos_token_id=2, eos_token_id=3
            )
            model: PreTrainedModel = GPT2LMHeadModel(config)
        elif kind == "bert":
            model = BertForMaskedLM(BertConfig(**sizes, **ids, intermediate_size=MLP, max_position_embeddings=64))
        elif kind == "modernbert":
            config = ModernBertConfig(
                **sizes,
                **ids,
                cls_token_id=2,
                sep_token_id=3,
                intermediate_size=MLP,
                max_position_embeddings=64,
                local_attention=6,
                global_attn_every_n_layers=3,
            )
            model = ModernBertForMaskedLM(config)
        else:
            config = Qwen3Config(
                **sizes,
                **ids,
                num_key_value_heads=2,
                head_dim=8,
                intermediate_size=MLP,
                max_position_embeddings=64,
                rope_theta=1000000.0,
                rms_norm_eps=1e-6,
                tie_word_embeddings=False,
            )
            model = Qwen3ForCausalLM(config)
        for name, parameter in model.named_parameters():
            scale = "norm" in name.lower() or ".ln_" in name
            parameter.data = torch.randn_like(parameter) * 0.2 + float(scale and name.endswith("weight"))
    return model.eval()


def published(kind: str, folder: Path, **more: Tensor) -> Path:
    """The random model as a checkpoint in the family's published layout."""
    folder.mkdir(exist_ok=True)
    model = native_model(kind)
    state = {key: value for key, value in model.state_dict().items() if key not in model.all_tied_weights_keys}
    config = {**model.config.to_dict(), "mask_token_id": 4, "architectures": [type(model).__name__]}
    if kind == "diffugpt":
        state = {
            "embed_tokens.weight" if key == "transformer.wte.weight" else key.replace("transformer.", "denoise_model."): value
            for key, value in state.items()
        }
        config["architectures"] = ["DiscreteDiffusionModel"]
    elif kind == "sdar":
        config |= {"architectures": ["SDARForCausalLM"], "model_type": "sdar", "block_size": BLOCK}
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config))
    save_file({**{key: value.contiguous() for key, value in state.items()}, **more}, folder / "model.safetensors")
    return folder


def by_hand_blocks(mask: Tensor | None) -> Tensor:
    """Additive block-causal mask, position by position."""
    rows = IDS.shape[0] if mask is not None else 1
    additive = torch.full((rows, 1, 14, 14), torch.finfo(torch.float32).min)
    for row in range(rows):
        for query in range(14):
            for key in range(14):
                if key // BLOCK <= query // BLOCK and (mask is None or mask[row, key]):
                    additive[row, 0, query, key] = 0.0
    return additive


def their_forward(kind: str, native: PreTrainedModel, mask: Tensor | None) -> Tensor:
    """What transformers itself computes with full (or block-causal) attention, unshifted."""
    if kind == "sdar":
        return native(input_ids=IDS, attention_mask=by_hand_blocks(mask).to(native.dtype), use_cache=False).logits
    options = {"position_ids": COUNTED} if mask is not None and kind != "modernbert" else {}
    if kind == "diffugpt":
        native.config.is_causal = False
        options["use_cache"] = False
    return native(input_ids=IDS, attention_mask=mask, **options).logits


def emitted(lm: MaskedDiffusionLM, mask: Tensor | None = None) -> Tensor:
    return lm.stack.head(lm.run_to(lm.num_layers - 1, IDS, mask))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: published(kind, tmp_path_factory.mktemp("published") / kind) for kind in KINDS}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# ------------------------------------------------------------------ numbers
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_transformers_own(folders: dict[str, Path], kind: str, padded: bool, attention: str) -> None:
    lm = load(folders[kind], attn_implementation=attention)
    mask, rows = (MASK, REAL) if padded else (None, slice(None))
    theirs = their_forward(kind, native_model(kind), mask)
    assert theirs.std() > 0.3
    torch.testing.assert_close(emitted(lm, mask)[rows], theirs[rows], atol=1e-5, rtol=1e-5)
    if mask is not None:
        for row in range(len(IDS)):
            alone = lm.stack.head(lm.run_to(LAYERS - 1, IDS[row : row + 1], mask[row : row + 1]))[0]
            torch.testing.assert_close(alone[REAL[row]], theirs[row, REAL[row]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_walk_is_transformers_own_bit_for_bit(folders: dict[str, Path], kind: str, dtype: torch.dtype) -> None:
    lm = load(folders[kind], dtype=dtype)
    for mask in (None, MASK):
        rows = slice(None) if mask is None else REAL
        assert torch.equal(emitted(lm, mask)[rows], their_forward(kind, lm.model, mask)[rows])


@pytest.mark.parametrize("kind", KINDS)
def test_family_and_its_facts(folders: dict[str, Path], kind: str) -> None:
    lm = load(folders[kind])
    spec = lm.spec
    assert (spec.family, spec.mask_id, spec.eos_id, spec.max_length) == (kind, 4, 3, 64)
    assert spec.shift == (kind == "diffugpt")
    assert spec.unpadded_positions == (kind in ("diffugpt", "bert"))
    assert (spec.attention_block, spec.block_length) == ((BLOCK, BLOCK) if kind == "sdar" else (0, 128))
    assert (lm.num_layers, lm.hidden_size, lm.embedding.num_embeddings) == (LAYERS, WIDTH, VOCABULARY)
    assert dataclasses.astuple(lm.counters) == (0, 0, 0, 0)  # the self-test does not count


def test_diffugpts_logits_are_shifted(folders: dict[str, Path]) -> None:
    lm = load(folders["diffugpt"])
    theirs = their_forward("diffugpt", native_model("diffugpt"), None)
    torch.testing.assert_close(lm.logits(IDS)[:, 1:], theirs[:, :-1], atol=1e-5, rtol=1e-5)
    causal = native_model("diffugpt")(input_ids=IDS, use_cache=False).logits
    assert (causal[:, 0] - theirs[:, 0]).abs().max() > 0.1
    assert load(folders["diffugpt"], family="diffugpt").fingerprint() == lm.fingerprint()


@pytest.mark.parametrize("kind", ["diffugpt", "bert"])
def test_left_padding_does_not_move_learned_positions(folders: dict[str, Path], kind: str) -> None:
    lm = load(folders[kind])
    alone = lm.stack.head(lm.run_to(LAYERS - 1, IDS[1:2, 5:]))[0]
    torch.testing.assert_close(emitted(lm, MASK)[1, 5:], alone, atol=1e-5, rtol=1e-5)


def test_sdar_sees_its_own_block_and_the_past_only(folders: dict[str, Path]) -> None:
    lm = load(folders["sdar"])
    before = lm.logits(IDS)
    for position in range(14):
        changed = IDS.clone()
        changed[:, position] = (changed[:, position] + 7) % VOCABULARY
        moved = (lm.logits(changed) - before).abs().amax(dim=(0, 2)) > 0
        assert moved.tolist() == [query // BLOCK >= position // BLOCK for query in range(14)]


def test_modernberts_window_is_local_in_two_of_three_layers(folders: dict[str, Path]) -> None:
    """local_attention=6: three neighbours on each side. Layer 0 is global, 1 and 2 are local."""
    lm = load(folders["modernbert"])
    hidden = lm.run_to(0, IDS)
    changed = hidden.clone()
    changed[:, 0] += torch.arange(WIDTH) / WIDTH
    outputs = []
    for state in (hidden, changed):
        with capture(lm, [Site(1)]) as store:
            lm.run_from(0, state)
        outputs.append(store[Site(1)])
    moved = (outputs[0] - outputs[1]).abs().amax(dim=(0, 2)) > 0
    assert moved.tolist() == [i <= 3 for i in range(14)]


def test_block_causal_mask_follows_positions_and_padding() -> None:
    positions = torch.arange(14)[None]
    assert torch.equal(block_causal_mask(positions, BLOCK, None, torch.float32), by_hand_blocks(None))
    assert torch.equal(block_causal_mask(positions, BLOCK, MASK, torch.float32), by_hand_blocks(MASK))
    half = block_causal_mask(positions, BLOCK, REAL, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half == 0, by_hand_blocks(MASK) == 0)
    assert half.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_beyond_the_context_is_refused(folders: dict[str, Path], kind: str) -> None:
    lm = load(folders[kind])
    assert lm.logits(torch.zeros(1, 64, dtype=torch.long)).shape == (1, 64, VOCABULARY)
    with pytest.raises(RemaskError, match=r"65 tokens exceeds the context of .*: 64"):
        lm.logits(torch.zeros(1, 65, dtype=torch.long))


# ------------------------------------------------------------------ sites
def loaded(kind: str, folders: dict[str, Path]) -> MaskedDiffusionLM:
    if kind in KINDS:
        return load(folders[kind])
    options = {"llada_moe": {"mask_id": 300}, "llada2": {"mask_id": 300, "attention_block": 8}}
    return load(GOLDENS / kind, **options.get(kind, {}))


EVERY = (*KINDS, "llada", "dream", "llada_moe", "llada2")


@pytest.mark.parametrize("kind", EVERY)
def test_resuming_from_a_changed_block_output_is_hooking_it(folders: dict[str, Path], kind: str) -> None:
    lm = loaded(kind, folders)
    for layer in range(LAYERS):
        delta = torch.randn(lm.hidden_size, generator=torch.Generator().manual_seed(layer))
        resumed = lm.run_from(layer, lm.run_to(layer, IDS, MASK) + delta, MASK)
        hook = lm.site_module(Site(layer)).register_forward_hook(lambda _m, _i, out, delta=delta: out + delta)
        hooked = lm.logits(IDS, MASK)
        hook.remove()
        assert torch.equal(resumed[REAL], hooked[REAL])
        assert not torch.equal(hooked[REAL], lm.logits(IDS, MASK)[REAL])


def block_input_and_sites(lm: MaskedDiffusionLM, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    position_ids = torch.arange(14)[None]
    entering = lm.run_to(layer - 1, IDS) if layer else lm.stack.embed(IDS, position_ids)
    sites = [Site(layer, "attn"), Site(layer, "mlp"), Site(layer)]
    with capture(lm, sites) as store:
        lm.run_to(layer, IDS)
    return entering, *(store[site] for site in sites)


@pytest.mark.parametrize("kind", [kind for kind in EVERY if kind != "bert"])
def test_attention_and_mlp_outputs_add_up_to_the_blocks_change(folders: dict[str, Path], kind: str) -> None:
    lm = loaded(kind, folders)
    for layer in range(LAYERS):
        entering, attn, mlp, leaving = block_input_and_sites(lm, layer)
        assert attn.std() > 0.01 and mlp.std() > 0.01
        torch.testing.assert_close(entering + attn + mlp, leaving, atol=1e-5, rtol=1e-5)


def test_berts_outputs_enter_the_sums_before_its_norms(folders: dict[str, Path]) -> None:
    lm = loaded("bert", folders)
    for layer in range(LAYERS):
        entering, attn, mlp, leaving = block_input_and_sites(lm, layer)
        first, second = (part.LayerNorm for part in (lm.blocks[layer].attention.output, lm.blocks[layer].output))
        middle = F.layer_norm(entering + attn, (WIDTH,), first.weight, first.bias, 1e-12)
        torch.testing.assert_close(
            F.layer_norm(middle + mlp, (WIDTH,), second.weight, second.bias, 1e-12), leaving, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("kind", EVERY)
def test_a_block_in_three_parts_is_the_block(folders: dict[str, Path], kind: str) -> None:
    lm = loaded(kind, folders)
    for layer in range(LAYERS):
        entering, attn, mlp, leaving = block_input_and_sites(lm, layer)
        middle = lm.stack.after_attn(lm.blocks[layer], entering, attn)
        torch.testing.assert_close(lm.stack.run_mlp(lm.blocks[layer], middle), mlp, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lm.stack.after_mlp(lm.blocks[layer], middle, mlp), leaving, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fast_trace_equals_the_reference(folders: dict[str, Path], kind: str) -> None:
    lm, config = load(folders[kind]), TraceConfig(steps=3, draws=2)
    row = Encoded("row", tuple(range(5, 12)), tuple(range(20, 24)), (1, 4))
    fast, slow = (trace(lm, [row], config, mode=mode, keep_unknown=True) for mode in ("exact", "reference"))
    assert largest_difference(fast, slow)["effects"] <= 1e-5
    assert slow.effects.nan_to_num().abs().max() > 1e-3


@pytest.mark.parametrize("kind", [*KINDS, "llada", "dream"])
def test_the_mlp_key_is_what_the_last_projection_reads(folders: dict[str, Path], kind: str) -> None:
    lm = loaded(kind, folders)
    for layer in range(LAYERS):
        keys: list[Tensor] = []
        module = lm.mlp_key_module(layer)
        hook = module.register_forward_hook(lambda _m, inputs, _o, keys=keys: keys.append(inputs[0]))
        with capture(lm, [Site(layer, "mlp")]) as store:
            lm.logits(IDS)
        hook.remove()
        weight = module.weight if kind == "diffugpt" else module.weight.T  # Conv1D holds (in, out)
        bias = 0 if module.bias is None else module.bias
        torch.testing.assert_close(keys[0] @ weight + bias, store[Site(layer, "mlp")], atol=1e-4, rtol=1e-4)


def test_expert_layers_have_no_single_mlp_key(folders: dict[str, Path]) -> None:
    dense = {"llada_moe": [], "llada2": [0]}
    for kind, layers in dense.items():
        lm = loaded(kind, folders)
        for layer in range(LAYERS):
            if layer in layers:
                assert isinstance(lm.mlp_key_module(layer), nn.Linear)
            else:
                with pytest.raises(RemaskError, match="no single MLP key; use its mlp output, or a dense layer"):
                    lm.mlp_key_module(layer)


def test_an_uncovered_architecture_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(RemaskError, match=r"Linear is not a supported architecture; choose one of LlamaForCausalLM, .*Bert"):
        stack_of(nn.Linear(2, 2))  # type: ignore[arg-type]


# ------------------------------------------------------------------ layouts
@pytest.mark.parametrize("kind", KINDS)
def test_both_layouts_round_trip(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    lm = load(folders[kind])
    save_pretrained(lm, tmp_path / "original", torch.float32, original=True)
    before = load_file(folders[kind] / "model.safetensors")
    after = load_file(tmp_path / "original" / "model.safetensors")
    assert set(after) == set(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    save_pretrained(lm, tmp_path / "native", torch.float32)
    for layout, family in (("original", kind), ("native", "remask")):
        again = load(tmp_path / layout)
        assert again.fingerprint() == lm.fingerprint()
        assert again.spec == dataclasses.replace(lm.spec, family=family)
        assert torch.equal(again.logits(IDS, MASK), lm.logits(IDS, MASK))


def test_diffugpts_stored_causal_buffers_are_dropped(folders: dict[str, Path], tmp_path: Path) -> None:
    buffers = {f"denoise_model.h.{n}.attn.bias": torch.tril(torch.ones(64, 64))[None, None] for n in range(LAYERS)}
    buffers |= {f"denoise_model.h.{n}.attn.masked_bias": torch.tensor(-1e4) for n in range(LAYERS)}
    lm = load(published("diffugpt", tmp_path, **buffers))
    assert lm.fingerprint() == load(folders["diffugpt"]).fingerprint()


def test_diffugpts_stored_head_is_its_embedding(folders: dict[str, Path], tmp_path: Path) -> None:
    head = load_file(folders["diffugpt"] / "model.safetensors")["embed_tokens.weight"].clone()
    lm = load(published("diffugpt", tmp_path, **{"lm_head.weight": head}))
    assert torch.equal(lm.logits(IDS), load(folders["diffugpt"]).logits(IDS))


def test_berts_published_extras(folders: dict[str, Path], tmp_path: Path) -> None:
    """A pooler, a sentence-pair head, position ids, and LayerNorm's old names."""
    published("bert", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in state.items()
    }
    state["bert.pooler.dense.weight"], state["bert.pooler.dense.bias"] = torch.ones(WIDTH, WIDTH), torch.ones(WIDTH)
    state["cls.seq_relationship.weight"], state["cls.seq_relationship.bias"] = torch.ones(2, WIDTH), torch.ones(2)
    state["bert.embeddings.position_ids"] = torch.arange(64)[None]
    save_file(state, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BertForPreTraining"]}))
    lm = load(tmp_path)
    assert lm.fingerprint() == load(folders["bert"]).fingerprint()


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_key_is_an_error_for_every_stack(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    state = load_file(folders[kind] / "model.safetensors")
    tested = sorted(state)[:: max(1, len(state) // 5)]
    (tmp_path / "config.json").write_text((folders[kind] / "config.json").read_text())
    for key in tested:
        save_file({other: value for other, value in state.items() if other != key}, tmp_path / "model.safetensors")
        with pytest.raises(RemaskError, match="missing keys"):
            load(tmp_path)
    save_file({**state, "bert.encoder.layer.9.extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(RemaskError, match=r"unexpected keys.*layer\.9\.extra"):
        load(tmp_path)


# ------------------------------------------------------------------ text
def test_bert_reads_its_own_vocabulary(folders: dict[str, Path], tmp_path: Path) -> None:
    published("bert", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for field in ("mask_token_id", "eos_token_id"):
        del config[field]
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "where", "is", "ada", "bi", "##rk", "?", "lucca"]
    (tmp_path / "vocab.txt").write_text("\n".join([*words, *(f"[unused{i}]" for i in range(VOCABULARY - len(words)))]) + "\n")
    lm = load(tmp_path)
    assert (lm.spec.mask_id, lm.spec.eos_id, lm.spec.pad_id) == (4, 3, 0)
    row = lm.encode(Fact("ada", "Where is Ada Birk?", "Ada Birk", "Lucca"))
    assert row.prompt_ids == (2, 5, 6, 7, 8, 9, 10, 3)
    assert row.answer_ids == (11,)
    assert row.subject == (3, 6)
    with pytest.raises(RemaskError, match="mask token"):
        lm.encode_prompt("where is [MASK]?")
    with pytest.raises(RemaskError, match="no chat template"):
        lm.chat([{"role": "user", "content": "where"}])
    with pytest.raises(RemaskError, match=r"knows '\[MASK\]' as 4, but the mask id is 5"):
        load(tmp_path, mask_id=5)


# ------------------------------------------------------------------ the self-test
def set_causal(module: nn.Module, value: bool) -> int:
    """How many modules have the flag."""
    flagged = [part for part in module.modules() if hasattr(part, "is_causal")]
    for part in flagged:
        part.is_causal = value
    return len(flagged)


@pytest.mark.parametrize("kind", ["llada", "dream", "llada_moe", "diffugpt", "bert", "modernbert"])
def test_a_causal_model_fails_the_self_test(folders: dict[str, Path], kind: str) -> None:
    """Under sdpa without a mask, the modules' own flag decides."""
    lm = loaded(kind, folders)
    check_attention(lm)
    assert set_causal(lm.model, True) >= LAYERS
    # ModernBERT gives its sliding layers a mask always, so only the global ones turn causal.
    where = "a single block" if kind == "modernbert" else "the model"
    with pytest.raises(RemaskError, match=f"attention is causal in {where}"):
        check_attention(lm)
    set_causal(lm.model, False)
    check_attention(lm)


@pytest.mark.parametrize("kind", ["llada", "dream", "llada_moe", "diffugpt", "bert", "modernbert"])
def test_a_single_causal_block_fails_the_self_test(folders: dict[str, Path], kind: str) -> None:
    """The model as a whole still sees everything through its other blocks."""
    lm = loaded(kind, folders)
    set_causal(lm.blocks[0], True)
    with pytest.raises(RemaskError, match="attention is causal in a single block"):
        check_attention(lm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["llada", "llada_moe"])
def test_load_proves_attention(monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype) -> None:
    """With the library's own switch left out, no model comes out of `load`."""
    init = MaskedDiffusionLM.__post_init__

    def forgetful(self: MaskedDiffusionLM) -> None:
        init(self)
        set_causal(self.model, True)

    monkeypatch.setattr(MaskedDiffusionLM, "__post_init__", forgetful)
    with pytest.raises(RemaskError, match=f"{kind}: attention is causal in the model"):
        load(GOLDENS / kind, mask_id=300, dtype=dtype)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (lambda positions, block: torch.zeros(1, 1, positions.shape[1], positions.shape[1]), r"looks beyond its block of 8"),
        (
            lambda positions, block: torch.full((positions.shape[1],) * 2, -1e30).triu(1)[None, None],
            r"attention is causal in the",
        ),
    ],
    ids=["full", "causal"],
)
def test_a_wrong_block_mask_fails_the_self_test(monkeypatch: pytest.MonkeyPatch, mask, words: str) -> None:
    monkeypatch.setattr(model_module, "block_causal_mask", lambda positions, block, *_: mask(positions, block))
    with pytest.raises(RemaskError, match=words):
        load(GOLDENS / "llada2", mask_id=300, attention_block=8)


def test_a_wrong_block_length_fails_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "block_causal_mask", lambda ids, block, *rest: block_causal_mask(ids, 2 * block, *rest))
    with pytest.raises(RemaskError, match=r"llada2: attention in the model looks beyond its block of 8"):
        load(GOLDENS / "llada2", mask_id=300, attention_block=8)


@pytest.mark.parametrize("block", [1, 2, 8, 32])
def test_the_self_test_passes_for_any_block_length(block: int) -> None:
    lm = load(GOLDENS / "llada2", mask_id=300, attention_block=block)
    assert dataclasses.astuple(lm.counters) == (0, 0, 0, 0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_self_test_passes_in_bf16(folders: dict[str, Path], kind: str, attention: str) -> None:
    assert load(folders[kind], dtype=torch.bfloat16, attn_implementation=attention).model.dtype == torch.bfloat16


def test_weak_attention_is_not_taken_for_causal(tmp_path: Path) -> None:
    """In bf16 a trained model's first position may move by a few percent only."""
    state = load_file(GOLDENS / "llada" / "model.safetensors")
    for key in state:
        if key.endswith("attn_out.weight"):
            state[key] *= 0.01
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((GOLDENS / "llada" / "config.json").read_text())
    lm = load(tmp_path, dtype=torch.bfloat16)
    before, after = lm.logits(torch.arange(8)[None])[0, 0], lm.logits(torch.tensor([[0, 9, 8, 7, 6, 5, 4, 3]]))[0, 0]
    assert 0 < (before - after).abs().max() < before.abs().max() / 10
    set_causal(lm.model, True)
    with pytest.raises(RemaskError, match="attention is causal in the model"):
        check_attention(lm)


def test_a_context_of_one_token_has_nothing_to_test() -> None:
    assert load(GOLDENS / "llada", max_length=1).spec.max_length == 1


def test_a_fresh_model_passes_and_its_flags_are_off() -> None:
    lm = build_toy()
    assert not any(getattr(module, "is_causal", False) for module in lm.model.modules())
    assert lm.model.config.is_causal is False
    check_attention(lm)
