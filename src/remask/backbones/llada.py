"""LLaDA checkpoints (8B Base, Instruct, 1.5) on transformers' native Llama stack, by renaming keys.

LLaDA's block is Llama's under other names: `ff_proj` is the gate, `up_proj` the up and `ff_out` the down projection; the
*top-level* `transformer.ff_out` is the output head. Logits are bit-identical in fp32.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from ..errors import RemaskError
from .model import BackboneSpec

# One capture group a pattern: transformers' key_mapping honours only the first.
_KEYS = {
    r"^model\.transformer\.wte\.weight": "model.embed_tokens.weight",
    r"^model\.transformer\.ln_f\.weight": "model.norm.weight",
    r"^model\.transformer\.ff_out\.weight": "lm_head.weight",
    **{
        rf"^model\.transformer\.blocks\.(\d+)\.{theirs}\.weight": rf"model.layers.\1.{ours}.weight"
        for theirs, ours in {
            "attn_norm": "input_layernorm",
            "q_proj": "self_attn.q_proj",
            "k_proj": "self_attn.k_proj",
            "v_proj": "self_attn.v_proj",
            "attn_out": "self_attn.o_proj",
            "ff_norm": "post_attention_layernorm",
            "ff_proj": "mlp.gate_proj",
            "up_proj": "mlp.up_proj",
            "ff_out": "mlp.down_proj",
        }.items()
    },
}
# Fields whose other values the native stack cannot represent.
_REQUIRED = {
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "alibi": False,
    "attention_layer_norm": False,
    "scale_logits": False,
    "input_emb_norm": False,
    "block_group_size": 1,
    "include_bias": False,
    "include_qkv_bias": False,
    "bias_for_layer_norm": False,
}


def matches(config: dict[str, Any]) -> bool:
    """By architecture, never by model_type alone: LLaDA-MoE's config also says `llada`."""
    return "LLaDAModelLM" in config.get("architectures", []) and "num_experts" not in config


def native_config(config: dict[str, Any]) -> LlamaConfig:
    """The equivalent Llama config.

    Raises:
        RemaskError: a field has a value that the native stack does not cover.
    """
    for name, value in _REQUIRED.items():
        if config.get(name, value) != value:
            raise RemaskError(f"config.json: {name}={config[name]!r} is not supported for LLaDA; expected {value!r}")
    return LlamaConfig(
        vocab_size=config.get("embedding_size") or config["vocab_size"],
        hidden_size=config["d_model"],
        intermediate_size=config["mlp_hidden_size"],
        num_hidden_layers=config["n_layers"],
        num_attention_heads=config["n_heads"],
        num_key_value_heads=config.get("n_kv_heads") or config["n_heads"],
        rms_norm_eps=config["rms_norm_eps"],
        rope_theta=config["rope_theta"],
        max_position_embeddings=config["max_sequence_length"],
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=config["weight_tying"],
        hidden_act="silu",
        is_causal=False,
    )


def key_mapping(_config: dict[str, Any]) -> dict[str, str]:
    """Original key pattern -> native key."""
    return dict(_KEYS)


def spec(config: dict[str, Any]) -> BackboneSpec:
    """Ids from the config, never from literals."""
    return BackboneSpec(
        family="llada",
        mask_id=config["mask_token_id"],
        eos_id=config["eos_token_id"],
        pad_id=config["pad_token_id"],
        max_length=config["max_sequence_length"],
    )
