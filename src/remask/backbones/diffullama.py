"""DiffuLLaMA-7B: a Llama-2 checkpoint as it is, bidirectional, with its logits kept shifted by one.

Nothing in config.json tells it from a causal Llama, so the family must be named: `load(path, family="diffullama")`. The mask
is id 811, an ordinary token: text that contains it is refused.
"""

from __future__ import annotations

from transformers import LlamaConfig

from .family import Config, Family, copied, require, rope_theta


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
    defaults = {"num_key_value_heads": config["num_attention_heads"], "tie_word_embeddings": False}
    return LlamaConfig(
        **copied(defaults | config, "intermediate_size"),
        rope_theta=rope_theta("DiffuLLaMA", config, default=10000.0),
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
