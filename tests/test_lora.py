"""Adapters of every family: which layers get them, what they compute, and what they leave behind."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

import remask.backbones as backbones
from conftest import GOLDEN_OPTIONS, GOLDENS, build_toy
from remask.backbones import BackboneSpec, MaskedDiffusionLM
from remask.backbones.weight_edit import LowRank, WeightEdit
from remask.errors import RemaskError
from remask.unlearning.lora import Targets, adapter_changes, adapters_off, add_adapters, find_targets
from remask.unlearning.training.objective import recomputed_blocks

peft = pytest.importorskip("peft", reason="adapters need remask[train]")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
DENSE = [f"self_attn.{name}" for name in ATTENTION] + [f"mlp.{name}" for name in MLP]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = torch.arange(24).view(2, 12) + 5


def random_gpt2() -> MaskedDiffusionLM:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2))
    return MaskedDiffusionLM(model, None, BackboneSpec("gpt2", 63, 62, 62, max_length=32), "gpt2")


def random_bert() -> MaskedDiffusionLM:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    return MaskedDiffusionLM(BertForMaskedLM(config), None, BackboneSpec("bert", 63, 62, 62, max_length=32), "bert")


def golden(name: str) -> MaskedDiffusionLM:
    return backbones.load(GOLDENS / name, **GOLDEN_OPTIONS[name])


FAMILIES: dict[str, Callable[[], MaskedDiffusionLM]] = {
    **{name: (lambda name=name: golden(name)) for name in GOLDEN_OPTIONS},
    "gpt2": random_gpt2,
    "bert": random_bert,
}
GPT2_LAYERS = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
BERT_LAYERS = [f"attention.self.{name}" for name in ("query", "key", "value")]
BERT_LAYERS += ["attention.output.dense", "intermediate.dense", "output.dense"]


def expected(name: str, layers: int) -> tuple[set[str], set[str]]:
    """Names of all linear layers and all experts of a family, written out."""
    prefix = {"gpt2": "transformer.h", "bert": "bert.encoder.layer"}.get(name, "model.layers")
    modules, experts = set(), set()
    for layer in range(layers):
        kinds = {"gpt2": GPT2_LAYERS, "bert": BERT_LAYERS}.get(name, DENSE)
        if name == "llada_moe" or (name == "llada2" and layer > 0):
            experts |= {f"{prefix}.{layer}.{kind}" for kind in EXPERTS}
            kinds = [f"self_attn.{kind}" for kind in ATTENTION]
            kinds += [f"mlp.shared_experts.{kind}" for kind in MLP] if name == "llada2" else []
        modules |= {f"{prefix}.{layer}.{kind}" for kind in kinds}
    return modules, experts


def logits(lm: MaskedDiffusionLM) -> Tensor:
    with torch.inference_mode():
        return lm.logits(IDS)


def stir(lm: MaskedDiffusionLM) -> None:
    """Make the adapters act."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in lm.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_layers_and_experts_of_the_blocks(family: str) -> None:
    lm = FAMILIES[family]()
    found = find_targets(lm)
    modules, experts = expected(family, lm.num_layers)
    assert (set(found.modules), set(found.parameters)) == (modules, experts)
    assert len(found.modules) == len(modules) and len(found.parameters) == len(experts)
    names = dict(lm.model.named_parameters())
    assert all(weight in names for weight in found.weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_adapters_become_changes_of_the_weights(family: str) -> None:
    lm = FAMILIES[family]()
    base, modules = logits(lm), [name for name, _ in lm.model.named_modules()]
    parameters, fingerprint = dict(lm.model.named_parameters()), lm.fingerprint()
    wrapped = add_adapters(lm, 2, seed=0)
    assert torch.equal(logits(lm), base)
    assert not adapter_changes(lm)  # B is 0 at the start
    stir(lm)
    adapted, changes = logits(lm), adapter_changes(lm)
    with adapters_off(lm):
        assert torch.equal(logits(lm), base)
    assert torch.equal(logits(lm), adapted)
    wrapped.unload()
    assert torch.equal(logits(lm), base) and lm.fingerprint() == fingerprint
    assert [name for name, _ in lm.model.named_modules()] == modules
    assert all(lm.model.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert not any(parameter.requires_grad for parameter in parameters.values())

    assert set(changes) == set(find_targets(lm).weights)
    assert all(isinstance(change, LowRank) and change.left.shape[-1] == 2 for change in changes.values())
    with WeightEdit(changes, fingerprint, "ga").attached(lm):
        torch.testing.assert_close(logits(lm), adapted, rtol=1e-4, atol=1e-4)
    assert (adapted - base).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_adapter_also_through_recomputed_blocks(family: str) -> None:
    found, runs = [], []
    for wanted in (False, True):
        lm = FAMILIES[family]()
        add_adapters(lm, 2, seed=0)
        stir(lm)
        named = {name: p for name, p in lm.model.named_parameters() if p.requires_grad}
        assert all("lora_" in name for name in named)
        calls: list[int] = []
        lm.stack.attn(lm.blocks[0]).register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with recomputed_blocks(lm, wanted):
            lm.logits(IDS).square().mean().backward()
        found.append({name: parameter.grad for name, parameter in named.items()})
        runs.append(len(calls))
        assert not any(block.training for block in lm.blocks)
    assert runs == [1, 2]
    for name, gradient in found[0].items():
        assert gradient is not None and bool(gradient.any()), name
        torch.testing.assert_close(gradient, found[1][name])


def test_the_change_is_twice_b_a() -> None:
    """Scaling alpha / r = 2, by hand, on [out, in] of a linear layer and [in, out] of GPT-2."""
    for lm, name in ((build_toy(), "model.layers.1.mlp.up_proj"), (random_gpt2(), "transformer.h.1.mlp.c_fc")):
        add_adapters(lm, 3, seed=1, targets=Targets((name,)))
        stir(lm)
        layer = lm.model.get_submodule(name)
        product = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        changes = adapter_changes(lm)
        assert list(changes) == [f"{name}.weight"]
        (change,) = changes.values()
        assert isinstance(change, LowRank)
        wanted = product.T if "c_fc" in name else product
        torch.testing.assert_close(change.dense(), wanted.detach())


def test_patterns_choose(toy: MaskedDiffusionLM) -> None:
    def names(*patterns: str) -> list[str]:
        return list(find_targets(toy, patterns).modules)

    assert names("q_proj") == [f"model.layers.{layer}.self_attn.q_proj" for layer in range(3)]
    assert names("layers.[1-2].mlp.down_proj") == [f"model.layers.{layer}.mlp.down_proj" for layer in (1, 2)]
    assert names("model.layers.0.mlp.*") == [f"model.layers.0.mlp.{kind}" for kind in MLP]
    assert names("up_proj", "up_proj") == names("up_proj")
    assert find_targets(golden("llada_moe"), ["experts.down_proj"]) == Targets(
        (), tuple(f"model.layers.{layer}.mlp.experts.down_proj" for layer in range(golden("llada_moe").num_layers))
    )


@pytest.mark.parametrize("pattern", ["c_attn", "lm_head", "embed_tokens", "proj", "layers.7.mlp.up_proj"])
def test_a_target_without_a_match_is_named_with_what_there_is(toy: MaskedDiffusionLM, pattern: str) -> None:
    with pytest.raises(RemaskError, match=r"matches nothing.*toy-0.*mlp\.down_proj.*self_attn\.v_proj") as caught:
        find_targets(toy, ["q_proj", pattern])
    assert repr(pattern) in str(caught.value)


def test_routers_that_are_linear_layers_must_be_named(toy: MaskedDiffusionLM) -> None:
    toy.blocks[0].mlp.gate = torch.nn.Linear(32, 4)
    assert not any(name.endswith(".gate") for name in find_targets(toy).modules)
    assert find_targets(toy, ["mlp.gate"]).modules == ("model.layers.0.mlp.gate",)


def test_equal_seeds_give_equal_adapters() -> None:
    starts = []
    for seed in (0, 0, 1):
        lm = build_toy()
        before = torch.get_rng_state()
        add_adapters(lm, 2, seed)
        assert torch.equal(torch.get_rng_state(), before)
        starts.append(copy.deepcopy([p for n, p in lm.model.named_parameters() if "lora_A" in n]))
    assert all(torch.equal(a, b) for a, b in zip(starts[0], starts[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(starts[0], starts[2], strict=True))


def test_adapters_on_adapters_and_an_old_peft_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = golden("llada_moe")
    with monkeypatch.context() as patch:
        patch.setattr(peft, "LoraConfig", lambda r, lora_alpha, target_modules, fan_in_fan_out: None)
        with pytest.raises(RemaskError, match=r"experts of .* need peft 0\.17"):
            add_adapters(lm, 2, 0)
    wrapped = add_adapters(lm, 2, 0)
    with pytest.raises(RemaskError, match="has adapters already"):
        add_adapters(lm, 2, 0)
    wrapped.unload()
    add_adapters(lm, 2, 0).unload()


def test_a_model_without_linear_layers_is_refused(toy: MaskedDiffusionLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remask.unlearning.lora._candidates", lambda lm: Targets(()))
    with pytest.raises(RemaskError, match="no linear layers"):
        find_targets(toy)
