"""LLaDA2.0-mini on transformers' Glm4Moe stack: block-causal attention, one shared expert, grouped sigmoid routing.

Five renames, and the fused query-key-value rows are split. A 2D padding mask makes the original causal; here attention is
block-causal by construction. The config holds neither the mask id nor the block length (32 in the published models).
"""

from __future__ import annotations

import re

import torch
from transformers import Glm4MoeConfig

from .family import Config, Family, State, copied, require
from .llada_moe import CHAT, SPECIAL

_FUSED = re.compile(r"(model\.layers\.\d+\.)attention\.query_key_value\.weight")


def native_config(config: Config) -> Glm4MoeConfig:
    """The equivalent Glm4Moe config.

    Raises:
        RemaskError: a field has a value that the native stack does not cover.
    """
    require(
        "LLaDA2",
        config,
        {
            "hidden_act": "silu",
            "use_bias": False,
            "use_qkv_bias": False,
            "use_qk_norm": True,
            "use_rmsnorm": True,
            "use_sliding_window": False,
            "score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "norm_topk_prob": True,
            "rope_scaling": None,
        },
    )
    return Glm4MoeConfig(
        **copied(
            config,
            "intermediate_size",
            "moe_intermediate_size",
            "head_dim",
            "num_experts_per_tok",
            "n_group",
            "topk_group",
            "routed_scaling_factor",
            "first_k_dense_replace",
        ),
        n_routed_experts=config["num_experts"],
        n_shared_experts=config["num_shared_experts"],
        norm_topk_prob=True,
        use_qk_norm=True,
        attention_bias=False,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(config["rope_theta"]),
            "partial_rotary_factor": config["partial_rotary_factor"],
        },
        hidden_act="silu",
    )


def _split(state: State, config: Config) -> State:
    """Rows of query_key_value are q | k | v."""
    rows = [config["num_attention_heads"], config["num_key_value_heads"], config["num_key_value_heads"]]
    native: State = {}
    for key, value in state.items():
        if found := _FUSED.fullmatch(key):
            parts = value.split([count * config["head_dim"] for count in rows])
            native |= {f"{found[1]}self_attn.{name}_proj.weight": part for name, part in zip("qkv", parts, strict=True)}
        else:
            native[key] = value
    return native


def _fuse(state: State, config: Config) -> State:
    """Inverse of `_split`."""
    fused = {}
    for key, value in state.items():
        if key.endswith("self_attn.q_proj.weight"):
            prefix = key.removesuffix("self_attn.q_proj.weight")
            parts = [state[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkv"]
            fused[f"{prefix}attention.query_key_value.weight"] = torch.cat(parts)
        elif not key.endswith(("self_attn.k_proj.weight", "self_attn.v_proj.weight")):
            fused[key] = value
    return fused


FAMILY = Family(
    name="llada2",
    title="LLaDA2.0-mini",
    native="Glm4MoeForCausalLM",
    config=native_config,
    architectures=("LLaDA2MoeModelLM",),
    renames=(
        ("model.word_embeddings.weight", "model.embed_tokens.weight"),
        ("model.layers.{n}.attention.dense.weight", "model.layers.{n}.self_attn.o_proj.weight"),
        ("model.layers.{n}.attention.query_layernorm.weight", "model.layers.{n}.self_attn.q_norm.weight"),
        ("model.layers.{n}.attention.key_layernorm.weight", "model.layers.{n}.self_attn.k_norm.weight"),
        ("model.layers.{n}.mlp.gate.expert_bias", "model.layers.{n}.mlp.gate.e_score_correction_bias"),
    ),
    to_native=_split,
    to_original=_fuse,
    block=lambda config: 32,
    mask_token="<|mask|>",
    mask_id=156895,
    special_tokens=SPECIAL,
    chat_template=CHAT,
    sampler="llada2",
    verified="goldens",
    note="block-causal attention (block 32); flash attention cannot express it; LLaDA2.1 masks differently and is not covered",
)
