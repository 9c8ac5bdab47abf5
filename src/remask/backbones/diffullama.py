"""DiffuLLaMA-7B: a Llama-2 checkpoint as it is, bidirectional, with its logits kept shifted by one.

Nothing in config.json tells it from a causal Llama, so the family must be named: `load(path, family="diffullama")`. The mask
is id 811, an ordinary token: text that contains it is refused.
"""

from __future__ import annotations

from transformers import LlamaConfig

from .family import Config, Family, require, rope_theta


def native_config(config: Config) -> LlamaConfig:
    """The checkpoint's own Llama config.

    Raises:
        RemaskError: scaled rotary positions, biases, or an activation other than SiLU.
    """
    require(
        "DiffuLLaMA",
        config,
        {
            "hidden_act": "silu",
            "attention_bias": (False, None),
            "mlp_bias": (False, None),
        },
    )
    return LlamaConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        rms_norm_eps=config["rms_norm_eps"],
        rope_theta=rope_theta("DiffuLLaMA", config, default=10000.0),
        max_position_embeddings=config["max_position_embeddings"],
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        hidden_act="silu",
    )


FAMILY = Family(
    name="diffullama",
    title="DiffuLLaMA-7B",
    native="LlamaForCausalLM",
    config=native_config,
    shift=True,
    mask_id=811,
    special_tokens=("<s>",),
    template="<s>{prompt}",
    sampler="diffullama",
    max_length=lambda config: min(2048, int(config["max_position_embeddings"])),
    verified="goldens",
    note="name the family: its config.json is a causal Llama's; the mask is the ordinary token 811",
)
