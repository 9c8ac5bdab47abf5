"""SDAR (1.7B to 8B): Qwen3's layout as it is, with block-causal attention."""

from __future__ import annotations

from transformers import Qwen3Config

from .dream import CHATML
from .family import Config, Family, require, rope_theta


def native_config(config: Config) -> Qwen3Config:
    """The equivalent Qwen3 config.

    Raises:
        RemaskError: sliding-window attention, scaled rotary positions, biases, or an activation other than SiLU.
    """
    require("SDAR", config, {"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False})
    return Qwen3Config(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        rms_norm_eps=config["rms_norm_eps"],
        rope_theta=rope_theta("SDAR", config),
        max_position_embeddings=config["max_position_embeddings"],
        tie_word_embeddings=config["tie_word_embeddings"],
        use_sliding_window=False,
        hidden_act="silu",
    )


FAMILY = Family(
    name="sdar",
    title="SDAR-1.7B, 4B, 8B Chat",
    native="Qwen3ForCausalLM",
    config=native_config,
    architectures=("SDARForCausalLM",),
    block=lambda config: int(config["block_size"]),
    mask_token="<|MASK|>",
    mask_id=151669,
    special_tokens=("<|im_start|>", "<|im_end|>"),
    chat_template=CHATML,
    sampler="sdar",
    verified="read",
    note="block-causal attention (block_size of its config); flash attention cannot express it",
)
