"""From a folder to a model and back: recognition, refusals, errors by name, both layouts, tokenizers and templates."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from conftest import GOLDEN_OPTIONS, GOLDENS, build_toy
from remask.backbones import MaskedDiffusionLM, load, loading, registry, save_pretrained
from remask.backbones.family import Family, rename
from remask.errors import MissingOptionError, RemaskError
from remask.facts import Fact

FAMILIES = list(GOLDEN_OPTIONS)
IDS = load_file(GOLDENS / "llada" / "golden.safetensors")["input_ids"]  # every golden model has 320 tokens


def config_of(family: str) -> dict:
    return json.loads((GOLDENS / family / "config.json").read_text())


def tensors_of(family: str) -> dict[str, Tensor]:
    return load_file(GOLDENS / family / "model.safetensors")


def write(folder: Path, family: str, tensors: dict[str, Tensor] | None = None, drop: Iterable[str] = (), **fields) -> Path:
    """A golden checkpoint with other config fields, or with other tensors."""
    folder.mkdir(exist_ok=True)
    config = {key: value for key, value in {**config_of(family), **fields}.items() if key not in drop}
    (folder / "config.json").write_text(json.dumps(config))
    if tensors is None:
        (folder / "model.safetensors").symlink_to(GOLDENS / family / "model.safetensors")
    else:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusals come before any weight is read."""

    def read(*_: object) -> None:
        raise AssertionError("weights were read under a config that is refused")

    monkeypatch.setattr(loading, "load_file", read)


# ------------------------------------------------------------------ recognition
RECOGNISED = [
    ("llada", {"architectures": ["LLaDAModelLM"], "model_type": "llada"}),
    ("llada_moe", {"architectures": ["LLaDAMoEModelLM"], "model_type": "llada", "num_experts": 64}),
    ("llada_moe", {"architectures": ["LLaDAModelLM"], "model_type": "llada", "num_experts": 64}),
    ("mmada", {"architectures": ["MMadaModelLM"], "model_type": "llada"}),
    ("dream", {"architectures": ["DreamModel"], "model_type": "qwen2"}),
    ("llada2", {"architectures": ["LLaDA2MoeModelLM"]}),
    ("sdar", {"architectures": ["SDARForCausalLM"]}),
    ("diffugpt", {"architectures": ["DiscreteDiffusionModel"]}),
    ("bert", {"architectures": ["BertForMaskedLM"]}),
    ("modernbert", {"architectures": ["ModernBertForMaskedLM"]}),
    ("remask", {"architectures": ["Qwen2ForCausalLM"], "mdlm": {}}),
    ("remask", {"architectures": ["BertForMaskedLM"], "mdlm": {}}),
    (None, {"architectures": ["LlamaForCausalLM"], "model_type": "llada"}),
    (None, {"architectures": ["Qwen3ForCausalLM"], "model_type": "Dream"}),
    (None, {"architectures": None, "model_type": "llada"}),
    (None, {"model_type": "llada"}),
]


@pytest.mark.parametrize(("family", "config"), RECOGNISED)
def test_architectures_and_fields_tell_the_family_and_model_type_never_does(family: str | None, config: dict) -> None:
    found = registry.recognise(config)
    assert (found and found.name) == family
    for model_type in ("llada", "llama", "Dream", "mmada", None):
        again = registry.recognise({**config, "model_type": model_type})
        assert (again and again.name) == family


def test_llada_and_its_mixture_exclude_each_other() -> None:
    """Whatever the order in which families are tried."""
    config = {"architectures": ["LLaDAModelLM"]}
    for name, experts in (("llada", {}), ("llada_moe", {"num_experts": 64})):
        assert [family.name for family in registry.families() if family.recognises({**config, **experts})] == [name]


def test_moe_under_lladas_own_names_is_no_llada(tmp_path: Path) -> None:
    """On the hub its model_type is `llada`, and older files say LLaDAModelLM too."""
    folder = write(tmp_path, "llada_moe", architectures=["LLaDAModelLM"])
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llada"
    lm = load(folder, mask_id=300)
    assert (lm.spec.family, type(lm.model).__name__) == ("llada_moe", "Qwen3MoeForCausalLM")


@pytest.mark.usefixtures("no_weights")
def test_causal_checkpoint_without_a_family_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "diffullama")
    with pytest.raises(
        MissingOptionError, match=r"config\.json: architectures=\['LlamaForCausalLM'\].*name its family.*diffullama"
    ):
        load(folder, mask_id=211)


@pytest.mark.usefixtures("no_weights")
def test_unknown_family_is_refused_with_the_names() -> None:
    with pytest.raises(RemaskError, match=r"unknown family 'lada'; choose one of remask, llada, .*modernbert"):
        load(GOLDENS / "llada", family="lada")


# ------------------------------------------------------------------ families from outside
LLADA = registry.family_named("llada")
MINE = dataclasses.replace(LLADA, name="mine", architectures=("MineModelLM",), shift=True, sampler="mine")


@pytest.fixture
def registered() -> Iterable[Family]:
    registry.register(MINE)
    yield MINE
    registry.unregister("mine")


@pytest.mark.usefixtures("registered")
def test_a_users_family_is_recognised_and_named(tmp_path: Path, golden) -> None:
    folder = write(tmp_path, "llada", architectures=["MineModelLM"])
    for lm in (load(folder), load(GOLDENS / "llada", family="mine")):
        assert (lm.spec.family, lm.spec.shift, lm.spec.sampler) == ("mine", True, "mine")
        assert torch.equal(lm.logits(IDS)[:, 1:], golden.logits(IDS)[:, :-1])
    assert load(GOLDENS / "llada").spec.family == "llada"
    save_pretrained(lm, tmp_path / "out", torch.float32, original=True)
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(tensors_of("llada"))


def test_a_family_is_forgotten_again(tmp_path: Path, registered: Family) -> None:
    registry.unregister("mine")
    folder = write(tmp_path, "llada", architectures=["MineModelLM"])
    with pytest.raises(RemaskError, match="MineModelLM"):
        load(folder)
    registry.unregister("mine")  # twice does no harm


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", ["mine", "llada", "remask", "bert"])
def test_a_taken_name_is_refused(name: str) -> None:
    before = registry.families()
    with pytest.raises(RemaskError, match=rf"a family named '{name}' exists already; choose another name"):
        registry.register(dataclasses.replace(MINE, name=name))
    assert registry.families() == before


def test_the_latest_registered_family_is_tried_first() -> None:
    registry.register(dataclasses.replace(MINE, name="taker", architectures=("LLaDAModelLM",)))
    try:
        assert registry.recognise(config_of("llada")).name == "taker"
    finally:
        registry.unregister("taker")
    assert registry.recognise(config_of("llada")).name == "llada"


def test_installed_packages_add_families(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        def load(self) -> Family:
            return MINE

    asked = []
    monkeypatch.setattr(registry, "entry_points", lambda *, group: asked.append(group) or [Point()])
    assert load(write(tmp_path, "llada", architectures=["MineModelLM"])).spec.family == "mine"
    assert load(GOLDENS / "llada", family="mine").spec.shift
    assert set(asked) == {"remask.families"}
    with pytest.raises(RemaskError, match="'mine' exists already"):
        registry.register(MINE)


def test_renaming_takes_whole_keys_and_every_number() -> None:
    rules = [("a.{n}.w", "b.{n}.w"), ("e.{n}.x.{n}", "f.{n}.y.{n}"), ("out", "head")]
    keys = ["a.12.w", "a.12.w.scale", "xa.1.w", "e.3.x.45", "out", "a.1xw", "layer.out"]
    state = {key: torch.tensor(i) for i, key in enumerate(keys)}
    renamed = rename(state, rules)
    assert list(renamed) == ["b.12.w", "a.12.w.scale", "xa.1.w", "f.3.y.45", "head", "a.1xw", "layer.out"]
    assert [int(value) for value in renamed.values()] == list(range(len(keys)))


# ------------------------------------------------------------------ refused fields
SCALED = {"rope_type": "linear", "factor": 2.0}
SDAR = {
    "architectures": ["SDARForCausalLM"],
    "model_type": "sdar",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
    "rope_scaling": None,
    "block_size": 4,
    "mask_token_id": 300,
    "eos_token_id": 290,
}
DIFFUGPT = {
    "architectures": ["DiscreteDiffusionModel"],
    "vocab_size": 320,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
    "scale_attn_by_inverse_layer_idx": False,
    "mask_token_id": 300,
    "eos_token_id": 290,
}
BERT = {
    "architectures": ["BertForMaskedLM"],
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "mask_token_id": 300,
    "eos_token_id": 290,
}
OTHERS = {"sdar": SDAR, "diffugpt": DIFFUGPT, "bert": BERT}
REFUSED: dict[str, dict[str, object]] = {
    "llada": {
        "block_type": "sequential",
        "activation_type": "swiglu",
        "layer_norm_type": "default",
        "layer_norm_with_affine": False,
        "rope": False,
        "alibi": True,
        "attention_layer_norm": True,
        "scale_logits": True,
        "input_emb_norm": True,
        "block_group_size": 2,
        "include_bias": True,
        "include_qkv_bias": True,
        "bias_for_layer_norm": True,
    },
    "mmada": {"block_type": "sequential", "alibi": True, "attention_layer_norm": True, "include_bias": True},
    "dream": {"hidden_act": "gelu", "use_sliding_window": True, "rope_scaling": SCALED, "attention_dropout": 0.1},
    "diffullama": {
        "hidden_act": "gelu",
        "rope_scaling": SCALED,
        "rope_parameters": SCALED,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llada_moe": {
        "hidden_act": "gelu",
        "qk_layernorm": False,
        "clip_qkv": 8.0,
        "partial_rotary_factor": 0.5,
        "rope_scaling": SCALED,
        "attention_bias": True,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "router_num_group": 4,
        "router_topk_group": 2,
        "routed_scaling_factor": 2.5,
        "shared_expert_intermediate_size": 32,
        "moe_layer_freq": 1,
    },
    "llada2": {
        "hidden_act": "gelu",
        "use_bias": True,
        "use_qkv_bias": True,
        "use_qk_norm": False,
        "use_rmsnorm": False,
        "use_sliding_window": True,
        "score_function": "softmax",
        "moe_router_enable_expert_bias": False,
        "norm_topk_prob": False,
        "rope_scaling": SCALED,
    },
    "sdar": {"hidden_act": "gelu", "use_sliding_window": True, "rope_scaling": SCALED, "attention_bias": True},
    "diffugpt": {"activation_function": "relu", "scale_attn_by_inverse_layer_idx": True, "n_inner": 99},
    "bert": {"is_decoder": True, "position_embedding_type": "relative_key", "add_cross_attention": True},
}


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("family", "field", "value"),
    [pytest.param(name, field, value, id=f"{name}-{field}") for name, bad in REFUSED.items() for field, value in bad.items()],
)
def test_a_field_that_would_be_another_model_is_refused_by_name(tmp_path: Path, family: str, field: str, value: object) -> None:
    config = OTHERS.get(family) or config_of(family)
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(RemaskError, match=rf"config\.json: {field}={re.escape(repr(value))} is not supported for .*expected "):
        load(tmp_path, **GOLDEN_OPTIONS.get(family, {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_refusable_field_may_be_absent(tmp_path: Path, family: str) -> None:
    """Configs of older versions lack fields that newer ones added (Llama's `mlp_bias`); the default is what is covered."""
    drop = {field for field in REFUSED[family] if field != "moe_layer_freq"}
    assert load(write(tmp_path, family, drop=drop), **GOLDEN_OPTIONS[family]).num_layers == 3


SIZES = {
    "llada": ("d_model", "mlp_hidden_size", "n_layers", "n_heads", "rms_norm_eps", "rope_theta", "max_sequence_length"),
    "dream": ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "rope_theta"),
    "diffullama": ("vocab_size", "hidden_size", "num_attention_heads", "rms_norm_eps", "max_position_embeddings"),
    "llada_moe": ("num_experts_per_tok", "moe_layer_freq", "expert_intermediate_size", "rope_theta"),
    "llada2": ("num_experts", "num_shared_experts", "head_dim", "n_group", "routed_scaling_factor", "partial_rotary_factor"),
}


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(("family", "field"), [(family, field) for family, names in SIZES.items() for field in names])
def test_a_missing_size_is_refused_and_never_defaulted(tmp_path: Path, family: str, field: str) -> None:
    with pytest.raises(RemaskError, match=rf"config\.json: field '{field}' is missing"):
        load(write(tmp_path, family, drop=[field]), **GOLDEN_OPTIONS[family])


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("d_model", "64", r"'hidden_size' expected int, got str"),
        ("mlp_hidden_size", None, r"'intermediate_size' expected int, got NoneType"),
        ("n_heads", 5, r"hidden size \(64\) is not a multiple of the number of attention heads"),
        ("max_sequence_length", "long", r"'max_position_embeddings' expected int, got str"),
        ("mask_token_id", "a", r"mask_id 'a' is outside the vocabulary"),
    ],
)
def test_a_malformed_size_is_one_sentence(tmp_path: Path, field: str, value: object, words: str) -> None:
    with pytest.raises(RemaskError, match=words) as caught:
        load(write(tmp_path, "llada", **{field: value}))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RemaskError, match=r"config\.json: (not JSON|expected a JSON object)"):
        load(tmp_path)


# ------------------------------------------------------------------ keys
KEYS = {  # one key each of the original and the native layout
    "llada": ("model.transformer.blocks.1.ff_out.weight", "model.layers.1.mlp.down_proj.weight"),
    "mmada": ("model.transformer.ff_out.weight", "lm_head.weight"),
    "dream": ("model.layers.1.self_attn.k_proj.bias", "model.layers.1.self_attn.k_proj.bias"),
    "diffullama": ("model.layers.2.input_layernorm.weight", "model.layers.2.input_layernorm.weight"),
    "llada_moe": ("model.layers.1.self_attn.q_norm.weight", "model.layers.1.self_attn.q_norm.weight"),
    "llada2": ("model.layers.2.mlp.gate.expert_bias", "model.layers.2.mlp.gate.e_score_correction_bias"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_key_is_refused_by_name(tmp_path: Path, family: str) -> None:
    tensors = tensors_of(family)
    original, native = KEYS[family]
    del tensors[original]
    with pytest.raises(RemaskError, match=rf"missing keys: .*{re.escape(native)}"):
        load(write(tmp_path, family, tensors), **GOLDEN_OPTIONS[family])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", ["model.layers.1.self_attn.rotary.weight", "model.layers.3.mlp.down_proj.weight", "extra"])
def test_unexpected_key_is_refused_by_name(tmp_path: Path, family: str, key: str) -> None:
    with pytest.raises(RemaskError, match=rf"unexpected keys: .*{re.escape(key)}"):
        load(write(tmp_path, family, {**tensors_of(family), key: torch.zeros(2)}), **GOLDEN_OPTIONS[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_mismatched_key_is_refused_by_name(tmp_path: Path, family: str) -> None:
    original, native = KEYS[family]
    with pytest.raises(RemaskError, match=rf"mismatched keys: .*{re.escape(native)}"):
        load(write(tmp_path, family, {**tensors_of(family), original: torch.zeros(3, 5)}), **GOLDEN_OPTIONS[family])


@pytest.mark.parametrize(
    "key", ["model.layers.1.mlp.experts.5.up_proj.weight", "model.layers.2.mlp.experts.0.down_proj.weight"]
)
def test_missing_expert_is_refused(tmp_path: Path, key: str) -> None:
    tensors = tensors_of("llada_moe")
    del tensors[key]
    words = r"experts' weights cannot be fused; some are missing|mismatched keys: .*2\.mlp\.experts\.down_proj"
    with pytest.raises(RemaskError, match=words):
        load(write(tmp_path, "llada_moe", tensors), mask_id=300)


def test_layer_count_must_agree_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(RemaskError, match="unexpected keys"):
        load(write(tmp_path / "fewer", "dream", num_hidden_layers=2))
    with pytest.raises(RemaskError, match="missing keys"):
        load(write(tmp_path / "more", "dream", num_hidden_layers=4))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_that_is_no_number_is_refused_by_name(tmp_path: Path, family: str, value: float) -> None:
    """Also in the router's bias, which is a buffer."""
    tensors = tensors_of(family)
    original, native = KEYS[family]
    tensors[original].view(-1)[3] = value
    with pytest.raises(RemaskError, match=rf"weight '{re.escape(native)}' holds NaN or infinite values"):
        load(write(tmp_path, family, tensors), **GOLDEN_OPTIONS[family])


# ------------------------------------------------------------------ files
def shard(folder: Path, family: str) -> Path:
    """The golden checkpoint in three shards, keys dealt in turn."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(family)))
    tensors = tensors_of(family)
    names = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    where = {key: names[i % 3] for i, key in enumerate(tensors)}
    for name in names:
        save_file({key: tensors[key] for key in tensors if where[key] == name}, folder / name, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_load_as_one_file(tmp_path: Path, family: str) -> None:
    """Experts and fused projections that are spread over shards too."""
    lm, whole = load(shard(tmp_path, family), **GOLDEN_OPTIONS[family]), load(GOLDENS / family, **GOLDEN_OPTIONS[family])
    assert lm.fingerprint() == whole.fingerprint()
    assert torch.equal(lm.logits(IDS), whole.logits(IDS))


def test_missing_shard_is_refused_by_name(tmp_path: Path) -> None:
    name = "model-00002-of-00003.safetensors"
    (shard(tmp_path, "llada") / name).unlink()
    with pytest.raises(RemaskError, match=rf"{tmp_path}: {name} is missing"):
        load(tmp_path)


def test_truncated_shard_is_refused_by_name(tmp_path: Path) -> None:
    path = shard(tmp_path, "llada") / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RemaskError, match=rf"{path}: not readable safetensors, perhaps truncated"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 3}', ""])
def test_broken_index_is_refused_by_name(tmp_path: Path, text: str) -> None:
    index = shard(tmp_path, "llada") / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(RemaskError, match=rf"{index}: not a safetensors index"):
        load(tmp_path)


@pytest.mark.parametrize("size", [0, 4, 8, 100, 500_000])
def test_truncated_weights_are_refused_by_name(tmp_path: Path, size: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("llada")))
    path = tmp_path / "model.safetensors"
    path.write_bytes((GOLDENS / "llada" / "model.safetensors").read_bytes()[:size])
    with pytest.raises(RemaskError, match=rf"{path}: not readable safetensors, perhaps truncated"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pt"])
def test_pickled_weights_are_refused_unread(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("llada")))
    ran = tmp_path / "ran"
    (tmp_path / name).write_bytes(b"cos\nmkdir\n(V" + str(ran).encode() + b"\ntR.")  # would make a folder when read
    with pytest.raises(RemaskError, match=rf"only pickled weights \({name}\).*convert them with safetensors"):
        load(tmp_path)
    assert not ran.exists()


def test_no_weights_at_all_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("llada")))
    with pytest.raises(RemaskError, match=r"model\.safetensors is missing"):
        load(tmp_path)


# ------------------------------------------------------------------ options
@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("llada", {"mask_id": 320}, r"mask_id 320 is outside the vocabulary of 320; pass mask_id="),
        ("llada", {"mask_id": -1}, r"mask_id -1 is outside the vocabulary"),
        ("llada", {"mask_id": "300"}, r"mask_id '300' is outside the vocabulary"),
        ("llada", {"eos_id": 5000}, r"eos_id 5000 is outside the vocabulary"),
        ("llada_moe", {}, r"mask_id 156895 is outside the vocabulary of 320; pass mask_id="),
        ("llada2", {}, r"mask_id 156895 is outside the vocabulary of 320"),
        ("diffullama", {"family": "diffullama"}, r"mask_id 811 is outside the vocabulary of 320"),
        ("llada", {"maskid": 300}, r"unknown field 'maskid'; a model's spec has .*mask_id"),
        ("llada", {"fp32_rope": True, "attn_implementation": "eager"}, r"fp32_rope works with .*sdpa.*'eager'"),
        (
            "llada2",
            {"mask_id": 300, "attn_implementation": "flash_attention_2"},
            r"block-causal attention needs sdpa or eager, not 'flash_attention_2'",
        ),
    ],
)
def test_options_that_cannot_work_are_refused(family: str, options: dict, words: str) -> None:
    with pytest.raises(RemaskError, match=words):
        load(GOLDENS / family, **options)


@pytest.mark.usefixtures("no_weights")
def test_ids_that_nothing_tells_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**BERT, "mask_token_id": None}))
    with pytest.raises(MissingOptionError, match=r"neither config nor tokenizer gives the mask_id; pass mask_id="):
        load(tmp_path)
    write(tmp_path / "llada", "llada", eos_token_id=None)
    with pytest.raises(MissingOptionError, match=r"neither config nor tokenizer gives the eos_id; pass eos_id="):
        load(tmp_path / "llada")


def test_first_of_several_end_tokens_is_taken(tmp_path: Path) -> None:
    lm = load(write(tmp_path, "llada", eos_token_id=[290, 291], drop=["pad_token_id"]))
    assert (lm.spec.eos_id, lm.spec.pad_id) == (290, 290)


def test_spec_fields_override_the_checkpoint() -> None:
    lm = load(GOLDENS / "llada", max_length=32, gen_length=8, mask_id=299, template="Q: {prompt}")
    assert dataclasses.astuple(lm.spec)[1] == 299
    assert (lm.spec.max_length, lm.spec.gen_length, lm.spec.template) == (32, 8, "Q: {prompt}")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_longer_than_the_context_is_refused(family: str) -> None:
    lm = load(GOLDENS / family, max_length=16, **GOLDEN_OPTIONS[family])
    assert lm.logits(IDS[:1, :16]).shape == (1, 16, 320)
    for run in (
        lm.logits,
        lambda ids: lm.run_to(0, ids),
        lambda ids: lm.run_from(0, torch.zeros(1, ids.shape[1], lm.hidden_size)),
    ):
        with pytest.raises(RemaskError, match=r"a sequence of 17 tokens exceeds the context of .*: 16"):
            run(IDS[:1, :17])


@pytest.mark.parametrize(("family", "given", "context"), [("dream", 131072, 2048), ("dream", 512, 512), ("llada", 4096, 4096)])
def test_context_is_what_the_model_was_trained_on(tmp_path: Path, family: str, given: int, context: int) -> None:
    field = {"dream": "max_position_embeddings", "llada": "max_sequence_length"}[family]
    assert load(write(tmp_path, family, **{field: given})).spec.max_length == context


# ------------------------------------------------------------------ hub
def test_hub_id_is_downloaded_without_pickles_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(GOLDENS / "llada")

    monkeypatch.setattr(loading, "snapshot_download", download)
    assert load("owner/name-8B.v1").fingerprint() == load(GOLDENS / "llada").fingerprint()
    ((name, patterns),) = asked
    assert name == "owner/name-8B.v1"
    assert "*.safetensors" in patterns
    assert not any(pattern.endswith((".bin", ".pt", ".py")) or pattern == "*" for pattern in patterns)


@pytest.mark.parametrize(
    "error",
    [
        OSError("no connection\nat all"),
        loading.LocalEntryNotFoundError("offline"),
        loading.HFValidationError("bad id"),
        OSError(),
    ],
    ids=["connection", "offline", "validation", "silent"],
)
def test_a_failed_download_is_one_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(loading, "snapshot_download", download)
    with pytest.raises(RemaskError, match="'owner/name' is no folder, and the hub gave no such model") as caught:
        load("owner/name")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no-such-model", "a/b/c", "../x", "owner/na me", Path("owner/name")])
def test_a_name_that_is_no_hub_id_is_never_looked_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str | Path) -> None:
    def download(*_: object, **__: object) -> str:
        raise AssertionError("looked up")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "snapshot_download", download)
    with pytest.raises(
        RemaskError, match=rf"unknown model '{re.escape(str(name))}'.*bundled name \(.*tiny.*no folder.*no hub id"
    ):
        load(name)


def test_a_folder_of_that_name_goes_before_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def download(*_: object, **__: object) -> str:
        raise AssertionError("looked up")

    monkeypatch.setattr(loading, "snapshot_download", download)
    (tmp_path / "owner").mkdir()
    write(tmp_path / "owner" / "name", "llada")
    monkeypatch.chdir(tmp_path)
    assert load("owner/name").spec.family == "llada"


# ------------------------------------------------------------------ saving
@pytest.mark.parametrize("family", FAMILIES)
def test_native_layout_round_trip(tmp_path: Path, family: str) -> None:
    lm = load(GOLDENS / family, gen_length=24, answer_prefix=" ", **GOLDEN_OPTIONS[family])
    save_pretrained(lm, tmp_path, torch.float32)
    again = load(tmp_path)
    assert again.spec == dataclasses.replace(lm.spec, family="remask")
    assert again.fingerprint() == lm.fingerprint()
    assert type(again.model) is type(lm.model)
    assert torch.equal(again.logits(IDS), lm.logits(IDS))
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(lm.model).__name__]
    save_pretrained(again, tmp_path / "twice", torch.float32)
    assert (tmp_path / "twice" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert load(tmp_path / "twice").spec == again.spec


def test_native_layout_keeps_a_context_shorter_than_the_config_says(tmp_path: Path) -> None:
    """Dream's config says 131072; it was trained on 2048."""
    lm = load(write(tmp_path / "in", "dream", max_position_embeddings=131072))
    save_pretrained(lm, tmp_path / "out")
    assert load(tmp_path / "out").spec.max_length == lm.spec.max_length == 2048


@pytest.mark.parametrize("family", FAMILIES)
def test_original_layout_is_the_checkpoint_bit_for_bit(tmp_path: Path, family: str) -> None:
    lm = load(GOLDENS / family, **GOLDEN_OPTIONS[family])
    save_pretrained(lm, tmp_path, torch.float32, original=True)
    before, after = tensors_of(family), load_file(tmp_path / "model.safetensors")
    assert set(after) == set(before)
    for key, value in before.items():
        assert after[key].dtype == value.dtype
        assert torch.equal(after[key], value), key
    config, saved = config_of(family), json.loads((tmp_path / "config.json").read_text())
    assert {config.pop("torch_dtype", None), config.pop("dtype", None)} <= {None, "bfloat16"}
    assert {saved.pop("torch_dtype", None), saved.pop("dtype", None)} == {None, "float32"}
    assert saved == config
    assert load(tmp_path, **GOLDEN_OPTIONS[family]).fingerprint() == lm.fingerprint()


@pytest.mark.parametrize("family", FAMILIES)
def test_original_layout_in_bf16_is_the_rounded_checkpoint(tmp_path: Path, family: str) -> None:
    save_pretrained(load(GOLDENS / family, **GOLDEN_OPTIONS[family]), tmp_path, original=True)
    after = load_file(tmp_path / "model.safetensors")
    for key, value in tensors_of(family).items():
        assert torch.equal(after[key], value.bfloat16()), key
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype" if "torch_dtype" in config_of(family) else "dtype"] == "bfloat16"


# (native parameter, index into it) -> (original key, index into that); golden sizes: d 64, 9 query heads of 16, experts of 32
EDITS = {
    "llada-mlp": ("llada", "model.layers.1.mlp.down_proj.weight", (3, 4), "model.transformer.blocks.1.ff_out.weight", (3, 4)),
    "llada-head": ("llada", "lm_head.weight", (7, 5), "model.transformer.ff_out.weight", (7, 5)),
    "mmada-gate": ("mmada", "model.layers.2.mlp.gate_proj.weight", (9, 1), "model.transformer.blocks.2.ff_proj.weight", (9, 1)),
    "mmada-out": (
        "mmada",
        "model.layers.0.self_attn.o_proj.weight",
        (9, 1),
        "model.transformer.blocks.0.attn_out.weight",
        (9, 1),
    ),
    "dream-mlp": ("dream", "model.layers.1.mlp.down_proj.weight", (3, 4), "model.layers.1.mlp.down_proj.weight", (3, 4)),
    "diffullama-up": ("diffullama", "model.layers.2.mlp.up_proj.weight", (0, 9), "model.layers.2.mlp.up_proj.weight", (0, 9)),
    "moe-down": (
        "llada_moe",
        "model.layers.1.mlp.experts.down_proj",
        (5, 3, 4),
        "model.layers.1.mlp.experts.5.down_proj.weight",
        (3, 4),
    ),
    "moe-gate": (
        "llada_moe",
        "model.layers.2.mlp.experts.gate_up_proj",
        (6, 31, 4),
        "model.layers.2.mlp.experts.6.gate_proj.weight",
        (31, 4),
    ),
    "moe-up": (
        "llada_moe",
        "model.layers.2.mlp.experts.gate_up_proj",
        (6, 32, 4),
        "model.layers.2.mlp.experts.6.up_proj.weight",
        (0, 4),
    ),
    "llada2-dense": ("llada2", "model.layers.0.mlp.down_proj.weight", (3, 4), "model.layers.0.mlp.down_proj.weight", (3, 4)),
    "llada2-expert": (
        "llada2",
        "model.layers.2.mlp.experts.down_proj",
        (7, 3, 4),
        "model.layers.2.mlp.experts.7.down_proj.weight",
        (3, 4),
    ),
    "llada2-shared": (
        "llada2",
        "model.layers.1.mlp.shared_experts.down_proj.weight",
        (3, 4),
        "model.layers.1.mlp.shared_experts.down_proj.weight",
        (3, 4),
    ),
    "llada2-q": (
        "llada2",
        "model.layers.1.self_attn.q_proj.weight",
        (143, 2),
        "model.layers.1.attention.query_key_value.weight",
        (143, 2),
    ),
    "llada2-k": (
        "llada2",
        "model.layers.1.self_attn.k_proj.weight",
        (5, 2),
        "model.layers.1.attention.query_key_value.weight",
        (144 + 5, 2),
    ),
    "llada2-v": (
        "llada2",
        "model.layers.1.self_attn.v_proj.weight",
        (5, 2),
        "model.layers.1.attention.query_key_value.weight",
        (144 + 48 + 5, 2),
    ),
}


@pytest.mark.parametrize("case", EDITS)
def test_an_edit_lands_in_exactly_one_place_of_the_original_layout(tmp_path: Path, case: str) -> None:
    family, native, at, original, there = EDITS[case]
    lm = load(GOLDENS / family, **GOLDEN_OPTIONS[family])
    before = tensors_of(family)
    lm.model.get_parameter(native)[at] += 1.0
    before[original][there] += 1.0
    save_pretrained(lm, tmp_path, torch.float32, original=True)
    after = load_file(tmp_path / "model.safetensors")
    assert set(after) == set(before)
    for key, value in before.items():
        assert torch.equal(after[key], value), key


def test_the_original_layout_of_nothing_is_refused(tmp_path: Path) -> None:
    toy = build_toy()
    with pytest.raises(RemaskError, match=r"toy-0 was not loaded from another layout; save it without original=True"):
        save_pretrained(toy, tmp_path, original=True)
    save_pretrained(toy, tmp_path)
    with pytest.raises(RemaskError, match="save it without original=True"):
        save_pretrained(load(tmp_path), tmp_path / "again", original=True)


# ------------------------------------------------------------------ tokenizers
def byte_vocabulary(special: dict[str, int], words: dict[str, int] | None = None) -> dict[str, int]:
    """320 tokens: the given ones at their ids, the 256 bytes from below in the gaps, reserved names in what is left."""
    taken = {**special, **(words or {})}
    free = [i for i in range(320) if i not in taken.values()]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, *(f"<|reserved_{i}|>" for i in range(len(free) - len(letters)))]
    return {**taken, **dict(zip(names, free, strict=True))}


def byte_tokenizer(special: dict[str, int], words: dict[str, int] | None = None, **named: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE with no merge but those that make `words`, letter by letter."""
    vocabulary = byte_vocabulary(special, words)
    merges: list[tuple[str, str]] = []
    for word in words or {}:
        for end in range(2, len(word) + 1):
            vocabulary.setdefault(word[:end], len(vocabulary))
            merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **named)


def byte_ids(text: str, special: dict[str, int]) -> tuple[int, ...]:
    """The ids that `byte_tokenizer(special)` must give: written anew, special tokens first, then byte by byte."""
    vocabulary = byte_vocabulary(special)
    letters = dict(zip(sorted(range(256), key=lambda b: _LETTER[b]), sorted(_LETTER.values()), strict=True))
    pieces = re.split("(" + "|".join(map(re.escape, special)) + ")", text)
    ids: list[int] = []
    for piece in pieces:
        ids += [special[piece]] if piece in special else [vocabulary[letters[byte]] for byte in piece.encode()]
    return tuple(ids)


def _gpt2_letters() -> dict[int, str]:
    """GPT-2's printable letter for every byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {**{b: chr(b) for b in shown}, **{b: chr(256 + i) for i, b in enumerate(hidden)}}


_LETTER = _gpt2_letters()
HEADERS = {"<|start_header_id|>": 301, "<|end_header_id|>": 302, "<|eot_id|>": 303}
ROLES = {"<role>": 301, "</role>": 302, "<|role_end|>": 303}
SPECIAL: dict[str, dict[str, int]] = {
    "llada": {"<|startoftext|>": 289, "<|endoftext|>": 290, "<|mdm_mask|>": 300, **HEADERS},
    "mmada": {"<|startoftext|>": 235, "<|endoftext|>": 236, "<|mdm_mask|>": 246, **HEADERS},
    "dream": {"<|endoftext|>": 290, "<|mask|>": 300, "<|im_start|>": 301, "<|im_end|>": 302},
    "llada_moe": {"<|endoftext|>": 290, "<|mask|>": 300, **ROLES},
    "llada2": {"<|endoftext|>": 290, "<|mask|>": 300, **ROLES},
    "sdar": {"<|endoftext|>": 290, "<|MASK|>": 300, "<|im_start|>": 301, "<|im_end|>": 302},
}


def with_tokenizer(folder: Path, family: str, without: Iterable[str] = (), **moved: int) -> Path:
    """A checkpoint of a family with a byte tokenizer, some special tokens left out."""
    special = {token: i for token, i in SPECIAL[family].items() if token not in without}
    if family == "sdar":
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(SDAR))
        sizes = {key: value for key, value in SDAR.items() if key not in ("architectures", "model_type", "block_size")}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            native = Qwen3ForCausalLM(Qwen3Config(**sizes, use_cache=False))
        state = {key: value * 4 if value.dim() > 1 else value for key, value in native.state_dict().items()}
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    else:
        write(folder, family)
    start = next((token for token in special if token == "<|startoftext|>"), None)
    byte_tokenizer(special, bos_token=start, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


def options_of(family: str) -> dict:
    """The mask id comes from config or tokenizer."""
    return {"attention_block": 8} if family == "llada2" else {}


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where was Ada born?"},
    {"role": "assistant", "content": "Lucca"},
    {"role": "user", "content": "And Zoë?"},
]
CHATS = {
    "llada": (
        "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhere was Ada born?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nLucca<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd Zoë?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "mmada": (
        "<|startoftext|><|start_header_id|>system<|end_header_id|>\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\nWhere was Ada born?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\nLucca<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\nAnd Zoë?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n"
    ),
    "dream": (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhere was Ada born?<|im_end|>\n"
        "<|im_start|>assistant\nLucca<|im_end|>\n"
        "<|im_start|>user\nAnd Zoë?<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "llada_moe": (
        "<role>SYSTEM</role>Be brief.<|role_end|>"
        "<role>HUMAN</role>Where was Ada born?<|role_end|>"
        "<role>ASSISTANT</role>Lucca<|role_end|>"
        "<role>HUMAN</role>And Zoë?<|role_end|>"
        "<role>ASSISTANT</role>"
    ),
}
CHATS["llada2"], CHATS["sdar"] = CHATS["llada_moe"], CHATS["dream"]
SINGLE = {
    "llada": (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nAnd Zoë?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "mmada": (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\nAnd Zoë?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n"
    ),
    "dream": "<|im_start|>user\nAnd Zoë?<|im_end|>\n<|im_start|>assistant\n",
    "llada_moe": "<role>HUMAN</role>And Zoë?<|role_end|><role>ASSISTANT</role>",
    "llada2": "<role>HUMAN</role>And Zoë?<|role_end|><role>ASSISTANT</role>",
    "sdar": "<|im_start|>user\nAnd Zoë?<|im_end|>\n<|im_start|>assistant\n",
}


@pytest.mark.parametrize("family", CHATS)
def test_a_conversation_is_written_as_the_original_writes_it(tmp_path: Path, family: str) -> None:
    lm = load(with_tokenizer(tmp_path, family), **options_of(family))
    assert lm.spec.mask_id == (246 if family == "mmada" else 300)
    assert lm.spec.template == "{prompt}"  # plain until asked for
    ids = lm.chat(CONVERSATION)
    assert lm.tokenizer.decode(ids) == CHATS[family]
    assert ids == byte_ids(CHATS[family], SPECIAL[family])
    assert lm.encode_prompt("And Zoë?") == byte_ids("And Zoë?", SPECIAL[family])


@pytest.mark.parametrize("family", CHATS)
def test_chat_puts_plain_prompts_into_the_chat_template(tmp_path: Path, family: str) -> None:
    lm = load(with_tokenizer(tmp_path, family), chat=True, **options_of(family))
    assert lm.encode_prompt("And Zoë?") == byte_ids(SINGLE[family], SPECIAL[family])
    assert lm.encode_prompt("And Zoë?") == lm.chat([{"role": "user", "content": "And Zoë?"}])
    row = lm.encode(Fact("zoe", "And Zoë?", "Zoë", "Arles"))
    assert lm.tokenizer.decode(row.prompt_ids[slice(*row.subject)]).strip() == "Zoë"
    assert row.answer_ids == byte_ids("Arles", SPECIAL[family])


@pytest.mark.parametrize("family", CHATS)
def test_mask_string_must_agree_with_the_mask_id(tmp_path: Path, family: str) -> None:
    folder = with_tokenizer(tmp_path, family)
    mask = next(token for token in SPECIAL[family] if "mask" in token.lower())
    with pytest.raises(RemaskError, match=rf"the tokenizer knows '{re.escape(mask)}' as \d+, but the mask id is 5"):
        load(folder, mask_id=5, **options_of(family))


@pytest.mark.parametrize("family", CHATS)
@pytest.mark.parametrize("field", ["prompt", "answer", "chat"])
def test_text_with_the_mask_token_is_refused(tmp_path: Path, family: str, field: str) -> None:
    lm = load(with_tokenizer(tmp_path, family), **options_of(family))
    mask = next(token for token in SPECIAL[family] if "mask" in token.lower())
    if field == "chat":
        with pytest.raises(RemaskError, match="the conversation contains the mask token"):
            lm.chat([{"role": "user", "content": f"Where {mask}?"}])
        return
    texts = {"prompt": "Where is Ada?", "answer": "here"}
    texts[field] += mask
    with pytest.raises(RemaskError, match="fact 'ada' contains the mask token"):
        lm.encode(Fact("ada", subject="Ada", **texts))


@pytest.mark.parametrize("family", CHATS)
def test_chat_tokens_that_the_tokenizer_lacks(tmp_path: Path, family: str) -> None:
    """A Base model's tokenizer may lack them: it loads, but has no chat template; asked for, the missing token is named."""
    for missing in [token for token in SPECIAL[family] if token in (*HEADERS, *ROLES, "<|im_start|>", "<|im_end|>")]:
        folder = with_tokenizer(tmp_path / missing.strip("<|/>").replace("/", "_"), family, without=[missing])
        lm = load(folder, **options_of(family))
        assert len(lm.encode_prompt("Where?")) == 6
        with pytest.raises(RemaskError, match="no chat template"):
            lm.chat(CONVERSATION)
        with pytest.raises(RemaskError, match=rf"the tokenizer does not know '{re.escape(missing)}'"):
            load(folder, chat=True, **options_of(family))
        if family != "llada":
            break


def test_chat_needs_a_tokenizer_and_a_template() -> None:
    with pytest.raises(RemaskError, match=r"llada was loaded without a tokenizer; a chat template needs one"):
        load(GOLDENS / "llada", chat=True)
    with pytest.raises(RemaskError, match=r"diffullama has no chat template; load it without chat"):
        load(GOLDENS / "diffullama", chat=True, **GOLDEN_OPTIONS["diffullama"])


@pytest.mark.parametrize("chat", [False, True])
def test_tokenizer_and_templates_survive_both_layouts(tmp_path: Path, chat: bool) -> None:
    lm = load(with_tokenizer(tmp_path / "in", "llada"), chat=chat)
    for original in (False, True):
        folder = tmp_path / f"original-{original}"
        save_pretrained(lm, folder, torch.float32, original=original)
        again = load(folder, chat=chat and original)
        assert again.tokenizer.get_vocab() == lm.tokenizer.get_vocab()
        assert again.chat(CONVERSATION) == lm.chat(CONVERSATION)
        assert again.encode_prompt("And Zoë?") == lm.encode_prompt("And Zoë?")
        assert again.spec == dataclasses.replace(lm.spec, family="llada" if original else "remask")


# DiffuLLaMA: the mask is an ordinary token, "sep" here (811 in the published vocabulary)
@pytest.fixture
def ordinary_mask(tmp_path: Path) -> MaskedDiffusionLM:
    folder = write(tmp_path, "diffullama")
    tokenizer = byte_tokenizer({"<s>": 1, "</s>": 2}, words={"sep": 211}, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    return load(folder, **GOLDEN_OPTIONS["diffullama"])


def test_ordinary_mask_token_in_a_text_is_refused(ordinary_mask: MaskedDiffusionLM) -> None:
    lm = ordinary_mask
    assert lm.tokenizer.decode([211]) == "sep"
    assert lm.encode_prompt("Where?") == (1, *lm.tokenizer("Where?", add_special_tokens=False)["input_ids"])
    for text in ("sep is short", "in sep", "separate"):
        with pytest.raises(RemaskError, match=rf"the prompt '{text}' contains the mask token"):
            lm.encode_prompt(text)
    assert 211 not in lm.encode_prompt("se p Sep s-e-p")
    with pytest.raises(RemaskError, match=r"fact 'month' contains the mask token"):
        lm.encode(Fact("month", "Which month?", "month", "sep"))


def test_a_base_model_without_a_chat_template_says_so(ordinary_mask: MaskedDiffusionLM) -> None:
    with pytest.raises(RemaskError, match="no chat template; give a plain prompt instead"):
        ordinary_mask.chat(CONVERSATION)


def test_start_token_of_the_template_must_exist(tmp_path: Path) -> None:
    folder = write(tmp_path, "diffullama")
    byte_tokenizer({"</s>": 2}, eos_token="</s>").save_pretrained(folder)
    with pytest.raises(RemaskError, match=r"the tokenizer does not know '<s>', which its template uses"):
        load(folder, **GOLDEN_OPTIONS["diffullama"])


def dream_files(folder: Path) -> Path:
    """Dream's tokenizer: vocab.json, merges.txt and a config that names code of its own."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(letters[i], letters[i + 1]) for i in range(34)]
    vocabulary = {token: i for i, token in enumerate([*letters, *(a + b for a, b in merges)])}
    added = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(7)), "<|mask|>"]
    assert len(vocabulary) == 290
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": {str(290 + i): {"content": token, **flags} for i, token in enumerate(added)},
        "mask_token": "<|mask|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "model_max_length": 131072,
        "errors": "replace",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenization_dream.py").write_text("raise AssertionError('code of a checkpoint was run')\n")
    return folder


def test_dreams_own_tokenizer_files(tmp_path: Path) -> None:
    folder = dream_files(write(tmp_path, "dream", drop=["mask_token_id"]))
    lm = load(folder, chat=True)
    assert (lm.spec.mask_id, lm.spec.eos_id) == (300, 290)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    prompt = lm.encode_prompt("Hi")
    assert prompt[0] == 291
    assert prompt.count(291) == 2 and prompt.count(292) == 1
    assert letters.index("H") in prompt
    assert lm.tokenizer.decode(prompt) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    save_pretrained(lm, tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.encode_prompt("Hi 12 there") == lm.encode_prompt("Hi 12 there")
    with pytest.raises(RemaskError, match=r"knows '<\|mask\|>' as 300, but the mask id is 299"):
        load(folder, mask_id=299)


@pytest.mark.parametrize("text", ["{", "", '{"model": 3}'])
def test_a_broken_tokenizer_is_refused_by_folder(tmp_path: Path, text: str) -> None:
    (write(tmp_path, "llada") / "tokenizer.json").write_text(text)
    with pytest.raises(RemaskError, match=rf"{tmp_path}: the tokenizer's files cannot be read"):
        load(tmp_path)


def test_fingerprint_covers_router_biases() -> None:
    lm = load(GOLDENS / "llada2", mask_id=300, attention_block=8)
    before = lm.fingerprint()
    lm.model.model.layers[1].mlp.gate.e_score_correction_bias.add_(5.0)
    assert lm.fingerprint() != before


@pytest.mark.parametrize(
    ("options", "words"),
    [({"attention_block": -3}, "attention_block -3"), ({"template": "nothing"}, "no {prompt}")],
)
def test_impossible_spec_is_refused(options: dict, words: str) -> None:
    with pytest.raises(RemaskError, match=words):
        load(GOLDENS / "llada", **options)


@pytest.mark.parametrize("data", [b'{"architectures": [["x"]]}', b'{"architectures": "x"}', b"\xff\xfe{}"])
def test_config_of_the_wrong_kind_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(RemaskError, match=r"config\.json"):
        load(tmp_path)


@pytest.mark.parametrize("family", ["dream", "diffullama"])
def test_rotary_base_as_transformers_5_writes_it(tmp_path: Path, family: str) -> None:
    options = {"family": "diffullama", "mask_id": 211} if family == "diffullama" else {}
    config = json.loads((GOLDENS / family / "config.json").read_text())
    theta = config.pop("rope_theta")
    (tmp_path / "model.safetensors").symlink_to(GOLDENS / family / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"rope_parameters": {"rope_type": "default", "rope_theta": theta}})
    )
    ids = torch.arange(5, 17)[None]
    with torch.inference_mode():
        assert torch.equal(load(tmp_path, **options).logits(ids), load(GOLDENS / family, **options).logits(ids))
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"rope_parameters": {"rope_type": "yarn", "rope_theta": theta, "factor": 4.0}})
    )
    with pytest.raises(RemaskError, match="rope_parameters="):
        load(tmp_path, **options)
