"""Every family against numbers from its original code (goldens/*/NOTES.md says how they were made)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from conftest import GOLDEN_OPTIONS, GOLDENS
from remask.backbones import MaskedDiffusionLM, Site, capture, load
from remask.backbones.stacks import block_causal_mask
from remask.errors import RemaskError

FAMILIES = list(GOLDEN_OPTIONS)
FULL = [family for family in FAMILIES if family != "llada2"]  # full attention
SHIFTED = ("dream", "diffullama")
DENSE = {"llada": 3, "mmada": 3, "dream": 3, "diffullama": 3, "llada_moe": 0, "llada2": 1}  # leading dense layers
TENSORS = {family: load_file(GOLDENS / family / "golden.safetensors") for family in FAMILIES}
PADDING = {"none": slice(0, 2), "left": slice(2, 4), "right": slice(4, 6)}
SITES = {"resid": "block_out", "attn": "attn_out", "mlp": "mlp_out"}

_loaded: dict[tuple, MaskedDiffusionLM] = {}


def model(family: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, **options) -> MaskedDiffusionLM:
    """The golden checkpoint of a family (read-only, shared)."""
    key = (family, attention, dtype, *sorted(options.items()))
    if key not in _loaded:
        _loaded[key] = load(
            GOLDENS / family, attn_implementation=attention, dtype=dtype, **{**GOLDEN_OPTIONS[family], **options}
        )
    return _loaded[key]


def raw_logits(lm: MaskedDiffusionLM, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits where they are emitted, as the originals give them."""
    return lm.stack.head(lm.run_to(lm.num_layers - 1, ids, mask))


def equal(value: Tensor, expected: Tensor) -> None:
    """1e-5, absolute plus relative: logits are about 10, and another processor rounds differently."""
    torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(params=["sdpa", "eager"])
def attention(request: pytest.FixtureRequest) -> str:
    return request.param


# ------------------------------------------------------------------ logits
@pytest.mark.parametrize("family", FAMILIES)
def test_family_facts_come_from_the_checkpoint(family: str) -> None:
    lm, tensors = model(family), TENSORS[family]
    assert lm.spec.family == family
    assert lm.spec.shift == (family in SHIFTED)
    assert lm.spec.attention_block == (8 if family == "llada2" else 0)
    assert lm.spec.unpadded_positions == ("position_ids" in tensors)
    assert (lm.spec.mask_id, lm.spec.eos_id) == {"mmada": (246, 236), "diffullama": (211, 2)}.get(family, (300, 290))
    assert lm.spec.pad_id == lm.spec.eos_id


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_without_a_mask(family: str, attention: str) -> None:
    tensors = TENSORS[family]
    equal(raw_logits(model(family, attention), tensors["input_ids"]), tensors["logits_nomask"])


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_padded_rows(family: str, attention: str, padding: str) -> None:
    rows, tensors = PADDING[padding], TENSORS[family]
    mask = tensors["attention_mask"][rows]
    real = mask.bool()
    assert real.all() == (padding == "none")
    for given in (mask, real):
        logits = raw_logits(model(family, attention), tensors["input_ids"][rows], given)
        equal(logits[real], tensors["logits"][rows][real])


@pytest.mark.parametrize("family", FAMILIES)
def test_one_row_equals_the_row_of_a_batch(family: str, attention: str) -> None:
    """All six rows at once (three kinds of padding in one batch) and each alone."""
    lm, tensors = model(family, attention), TENSORS[family]
    ids, mask = tensors["input_ids"], tensors["attention_mask"]
    together = raw_logits(lm, ids, mask)
    equal(together[mask.bool()], tensors["logits"][mask.bool()])
    for row in range(len(ids)):
        alone = raw_logits(lm, ids[row : row + 1], mask[row : row + 1])[0]
        real = mask[row].bool()
        equal(alone[real], tensors["logits"][row][real])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_position_aligned(family: str) -> None:
    """Row i of a shifted family is what the original emits at i-1."""
    lm, tensors = model(family), TENSORS[family]
    emitted = tensors["logits_nomask"]
    aligned = lm.logits(tensors["input_ids"])
    if family in SHIFTED:
        equal(aligned[:, 1:], emitted[:, :-1])
        equal(aligned[:, 0], emitted[:, 0])
        assert (aligned - emitted).abs().max() > 1
    else:
        equal(aligned, emitted)


@pytest.mark.parametrize("family", FAMILIES)
def test_selected_positions_equal_the_full_head(family: str) -> None:
    lm, tensors = model(family), TENSORS[family]
    ids = tensors["input_ids"]
    positions = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    positions[0, 0] = positions[1, -1] = True
    emitted = tensors["logits_nomask"]
    shift = int(family in SHIFTED)
    expected = torch.stack([emitted[b, max(0, i - shift)] for b, i in positions.nonzero().tolist()])
    equal(lm.logits(ids, positions=positions), expected)
    equal(lm.run_from(0, lm.run_to(0, ids), positions=positions), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_emitting_positions_are_the_ones_whose_hidden_state_matters(family: str) -> None:
    """A masked position's prediction moves when the last block's output moves at its emitting position, and nowhere else."""
    lm, tensors = model(family), TENSORS[family]
    ids = tensors["input_ids"][:1]
    hidden = lm.run_to(lm.num_layers - 1, ids)
    for position in (0, 1, 7, 19):
        wanted = torch.zeros_like(ids, dtype=torch.bool)
        wanted[0, position] = True
        emitting = lm.emitting(wanted)[0].nonzero().flatten().tolist()
        assert emitting == [max(0, position - 1) if family in SHIFTED else position]
        before = lm.head(hidden, wanted)
        for other in range(ids.shape[1]):
            changed = hidden.clone()
            changed[0, other] = changed[0, other].flip(0) + 1.0
            assert torch.equal(lm.head(changed, wanted), before) == (other not in emitting)


# ------------------------------------------------------------------ sites
@pytest.mark.parametrize("family", FAMILIES)
def test_traces_of_every_site(family: str, attention: str) -> None:
    lm, tensors = model(family, attention), TENSORS[family]
    ids = tensors["input_ids"][:1]
    sites = [Site(layer, module) for layer in range(lm.num_layers) for module in SITES]
    with capture(lm, sites) as store:
        logits = raw_logits(lm, ids)
    for site in sites:
        equal(store[site][0], tensors[f"trace.{SITES[site.module]}.{site.layer}"])
    equal(lm.embedding(ids)[0], tensors["trace.embed"])
    equal(logits[0], tensors["trace.logits"])


@pytest.mark.parametrize("family", FAMILIES)
def test_mlp_keys_of_dense_layers(family: str, attention: str) -> None:
    lm, tensors = model(family, attention), TENSORS[family]
    stored = {int(key.rpartition(".")[2]) for key in tensors if key.startswith("trace.mlp_key.")}
    assert stored == set(range(DENSE[family]))
    keys: dict[int, Tensor] = {}
    hooks = [
        lm.mlp_key_module(layer).register_forward_hook(lambda _m, inputs, _o, layer=layer: keys.update({layer: inputs[0]}))
        for layer in stored
    ]
    lm.logits(tensors["input_ids"][:1])
    for hook in hooks:
        hook.remove()
    for layer in stored:
        equal(keys[layer][0], tensors[f"trace.mlp_key.{layer}"])
    for layer in set(range(lm.num_layers)) - stored:
        with pytest.raises(RemaskError, match="mixture-of-experts layer has no single MLP key"):
            lm.mlp_key_module(layer)


@pytest.mark.parametrize("family", ["llada_moe", "llada2"])
def test_router_of_every_expert_layer(family: str, attention: str) -> None:
    lm, tensors = model(family, attention), TENSORS[family]
    layers = range(DENSE[family], lm.num_layers)
    seen: dict[int, tuple] = {}
    hooks = [
        lm.blocks[layer].mlp.gate.register_forward_hook(lambda _m, _i, out, layer=layer: seen.update({layer: out}))
        for layer in layers
    ]
    lm.logits(tensors["input_ids"][:1])
    for hook in hooks:
        hook.remove()
    for layer in layers:
        equal(seen[layer][0], tensors[f"trace.router_logits.{layer}"])
        if family == "llada2":
            assert torch.equal(seen[layer][2].sort(dim=-1).values, tensors[f"trace.topk_idx.{layer}"])
    if family == "llada_moe":  # never renormalised, whatever norm_topk_prob says
        assert (seen[0][1].sum(dim=-1) < 0.99).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_run_to_and_run_from_on_the_original_traces(family: str, attention: str) -> None:
    lm, tensors = model(family, attention), TENSORS[family]
    ids = tensors["input_ids"][:1]
    emitted = tensors["trace.logits"]
    expected = torch.cat([emitted[:1], emitted[:-1]]) if family in SHIFTED else emitted
    for layer in range(lm.num_layers):
        stored = tensors[f"trace.block_out.{layer}"][None]
        equal(lm.run_to(layer, ids), stored)
        equal(lm.run_from(layer, stored)[0], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_resumed_run_equals_the_whole_one_bit_for_bit(family: str, attention: str) -> None:
    lm, tensors = model(family, attention), TENSORS[family]
    ids, mask = tensors["input_ids"], tensors["attention_mask"]
    whole = lm.logits(ids, mask)
    for layer in range(lm.num_layers):
        assert torch.equal(lm.run_from(layer, lm.run_to(layer, ids, mask), mask), whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_early_exit_runs_only_the_blocks_it_needs(family: str) -> None:
    lm, tensors = model(family), TENSORS[family]
    ran: list[int] = []
    hooks = [block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(lm.blocks)]
    hidden = lm.run_to(1, tensors["input_ids"])
    assert ran == [0, 1]
    lm.run_from(1, hidden)
    assert ran == [0, 1, 2]
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("family", FULL)
def test_a_block_called_alone_attends_in_both_directions(family: str, attention: str) -> None:
    """The lone block, called without a mask, gives the original's output; the causal mask would not."""
    lm, tensors = model(family, attention), TENSORS[family]
    hidden = tensors["trace.embed"][None]
    rotary = lm.model.model.rotary_emb(hidden, position_ids=torch.arange(20)[None])
    equal(lm.blocks[0](hidden, position_embeddings=rotary)[0], tensors["trace.block_out.0"])
    causal = torch.full((20, 20), torch.finfo(torch.float32).min).triu(1)[None, None]
    one_way = lm.blocks[0](hidden, attention_mask=causal, position_embeddings=rotary)[0]
    assert (one_way - tensors["trace.block_out.0"]).abs().max() > 0.1


# ------------------------------------------------------------------ block-causal attention
def test_block_causal_mask_is_the_originals() -> None:
    tensors = TENSORS["llada2"]
    mask, allowed = tensors["attention_mask"], tensors["allowed"].bool()
    additive = block_causal_mask(torch.arange(20)[None], 8, mask, torch.float32)
    assert additive.shape == (6, 1, 20, 20)
    assert torch.equal(additive[:, 0] == 0, allowed)
    assert (additive[:, 0][~allowed] == torch.finfo(torch.float32).min).all()
    unpadded = block_causal_mask(torch.arange(20)[None], 8, None, torch.float32)
    assert torch.equal(unpadded[0, 0] == 0, allowed[0])


def test_block_causal_family_under_full_attention(attention: str) -> None:
    lm, tensors = model("llada2", attention, attention_block=0), TENSORS["llada2"]
    real = tensors["attention_mask"].bool()
    logits = raw_logits(lm, tensors["input_ids"], real)
    equal(logits[real], tensors["logits_full"][real])
    assert (logits[real] - tensors["logits"][real]).abs().max() > 1


# ------------------------------------------------------------------ padding
@pytest.mark.parametrize("family", FULL)
def test_left_padding_changes_nothing_on_the_real_tokens(family: str, attention: str) -> None:
    """To 1e-5 where positions count real tokens (Dream); LLaDA's move with the padding, and rotary positions are relative."""
    lm, tensors = model(family, attention), TENSORS[family]
    for row in (2, 3):
        real = tensors["attention_mask"][row].bool()
        ids = tensors["input_ids"][row]
        padded = raw_logits(lm, ids[None], real[None])[0, real]
        alone = raw_logits(lm, ids[real][None])[0]
        assert len(alone) < len(ids)
        torch.testing.assert_close(padded, alone, atol=1e-5 if family == "dream" else 1e-4, rtol=1e-5)


def test_dream_positions_count_real_tokens() -> None:
    lm, tensors = model("dream"), TENSORS["dream"]
    seen: dict[str, Tensor] = {}
    hook = lm.blocks[0].register_forward_pre_hook(lambda _m, _a, options: seen.update(options), with_kwargs=True)
    lm.run_to(0, tensors["input_ids"], tensors["attention_mask"])
    hook.remove()
    real = tensors["attention_mask"].bool()
    assert torch.equal(seen["position_ids"][real], tensors["position_ids"][real])


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_ids_do_not_matter(family: str, attention: str) -> None:
    lm, tensors = model(family, attention), TENSORS[family]
    ids, real = tensors["input_ids"], tensors["attention_mask"].bool()
    other = ids.masked_fill(~real, 17)
    equal(raw_logits(lm, other, real)[real], tensors["logits"][real])


# ------------------------------------------------------------------ bf16
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FULL)
def test_our_walk_is_the_native_forward_bit_for_bit(family: str, attention: str, dtype: torch.dtype) -> None:
    lm, tensors = model(family, attention, dtype), TENSORS[family]
    ids, mask = tensors["input_ids"], tensors["attention_mask"]
    for given in (None, mask):
        positions = tensors["position_ids"] if family == "dream" and given is not None else None
        theirs = lm.model(input_ids=ids, attention_mask=given, position_ids=positions, use_cache=False).logits
        real = slice(None) if given is None else given.bool()
        assert torch.equal(raw_logits(lm, ids, given)[real], theirs[real])


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_stays_within_the_originals_own_rounding(family: str) -> None:
    """Rotary frequencies stay fp32. Bits depend on the processor's matrix product; wrong variants miss by far more.

    Mixtures of experts are compared where routing agrees: near-ties flip under any rounding.
    """
    lm, tensors = model(family, dtype=torch.bfloat16), TENSORS[family]
    assert lm.model.model.rotary_emb.inv_freq.dtype == torch.float32
    real = tensors["attention_mask"].bool()
    off = (raw_logits(lm, tensors["input_ids"], real)[real].float() - tensors["logits_bf16"][real].float()).abs()
    assert off.mean(dim=-1).median() < 0.05
    assert off.mean() < (0.1 if family in ("llada_moe", "llada2") else 0.05)


@pytest.mark.parametrize("family", ["llada", "mmada"])
def test_fp32_rope_brings_bf16_to_the_original(family: str) -> None:
    tensors = TENSORS[family]
    real = tensors["attention_mask"].bool()
    expected = tensors["logits_bf16"][real].float()
    off = []
    for fp32_rope in (False, True):
        lm = model(family, dtype=torch.bfloat16, fp32_rope=fp32_rope)
        off.append((raw_logits(lm, tensors["input_ids"], real)[real].float() - expected).abs())
    stock, shim = off
    assert shim.mean() < stock.mean() / 4
    assert shim.max() <= stock.max() / 2


def test_fp32_rope_changes_nothing_in_fp32() -> None:
    tensors = TENSORS["llada"]
    ids, mask = tensors["input_ids"], tensors["attention_mask"]
    with_shim = model("llada", fp32_rope=True).logits(ids, mask)
    assert torch.equal(with_shim, model("llada").logits(ids, mask))


def llada_by_hand(folder: Path, ids: Tensor, mask: Tensor | None) -> Tensor:
    """LLaDA from its description, over the checkpoint's own tensors in bf16: rotation in fp32, then cast back."""
    weights = {
        key.removeprefix("model.transformer."): value.bfloat16()
        for key, value in load_file(folder / "model.safetensors").items()
    }
    layers, heads, width = 3, 4, 16

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).bfloat16()

    def split(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], heads, width).transpose(1, 2)

    frequencies = 1.0 / (500000.0 ** (torch.arange(0, width, 2).float() / width))
    angles = torch.arange(ids.shape[1]).float()[:, None] * frequencies[None, :]
    angles = torch.cat([angles, angles], dim=-1)

    def rotate(x: Tensor) -> Tensor:
        wide = x.float()
        first, second = wide.chunk(2, dim=-1)
        return (wide * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()).bfloat16()

    keys = None if mask is None else mask.bool()[:, None, None, :].expand(-1, 1, ids.shape[1], -1)
    hidden = F.embedding(ids, weights["wte.weight"])
    for layer in range(layers):
        of = {
            key.removeprefix(f"blocks.{layer}."): value for key, value in weights.items() if key.startswith(f"blocks.{layer}.")
        }
        x = norm(hidden, of["attn_norm.weight"])
        q, k, v = (split(F.linear(x, of[f"{name}_proj.weight"])) for name in "qkv")
        out = F.scaled_dot_product_attention(rotate(q), rotate(k), v, attn_mask=keys)
        hidden = hidden + F.linear(out.transpose(1, 2).reshape(hidden.shape), of["attn_out.weight"])
        x = norm(hidden, of["ff_norm.weight"])
        gated = F.silu(F.linear(x, of["ff_proj.weight"])) * F.linear(x, of["up_proj.weight"])
        hidden = hidden + F.linear(gated, of["ff_out.weight"])
    return F.linear(norm(hidden, weights["ln_f.weight"]), weights["ff_out.weight"])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["llada", "mmada"])
def test_fp32_rope_is_lladas_block_bit_for_bit(family: str, padded: bool) -> None:
    tensors = TENSORS[family]
    ids, mask = tensors["input_ids"], tensors["attention_mask"] if padded else None
    real = slice(None) if mask is None else mask.bool()
    expected = llada_by_hand(GOLDENS / family, ids, mask)[real]
    shim = raw_logits(model(family, dtype=torch.bfloat16, fp32_rope=True), ids, mask)[real]
    stock = raw_logits(model(family, dtype=torch.bfloat16), ids, mask)[real]
    assert torch.equal(shim, expected)
    assert not torch.equal(stock, expected)
