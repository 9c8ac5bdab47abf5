"""SDAR (1.7B to 8B): Qwen3's layout as it is, with block-causal attention."""

from __future__ import annotations

from transformers import Qwen3Config

from .dream import CHATML
from .family import Config, Family, copied, require, rope_theta


def native_config(config: Config) -> Qwen3Config:
    """The equivalent Qwen3 config.

    Raises:
        RemaskError: sliding-window attention, scaled rotary positions, biases, or an activation other than SiLU.
    """
    require("SDAR", config, {"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False})
    return Qwen3Config(
        **copied(config, "intermediate_size", "head_dim"),
        rope_theta=rope_theta("SDAR", config),
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
