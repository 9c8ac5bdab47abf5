"""Dream-7B (Base, Instruct) and its relatives in Qwen2's layout (Dream-Coder, DiffuCoder): no key is renamed.

Logits are shifted by one: position i is emitted at i-1. Under left padding positions count real tokens.
"""

from __future__ import annotations

from transformers import Qwen2Config

from .family import Config, Family, copied, require, rope_theta

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def native_config(config: Config) -> Qwen2Config:
    """The equivalent Qwen2 config.

    Raises:
        RemaskError: sliding-window attention, scaled rotary positions, or an activation other than SiLU.
    """
    require("Dream", config, {"hidden_act": "silu", "use_sliding_window": False, "attention_dropout": 0.0})
    return Qwen2Config(
        **copied(config, "intermediate_size"),
        rope_theta=rope_theta("Dream", config),
        use_sliding_window=False,
        hidden_act="silu",
    )


FAMILY = Family(
    name="dream",
    title="Dream-7B Base and Instruct; Dream-Coder and DiffuCoder (same layout)",
    native="Qwen2ForCausalLM",
    config=native_config,
    architectures=("DreamModel",),
    shift=True,
    unpadded_positions=True,
    mask_token="<|mask|>",
    mask_id=151666,
    special_tokens=("<|im_start|>", "<|im_end|>"),
    chat_template=CHATML,
    sampler="dream",
    # config.json says 131072; the published models were trained on 2048 tokens.
    max_length=lambda config: min(2048, int(config["max_position_embeddings"])),
    verified="goldens",
    note="trained on 2048 tokens whatever max_position_embeddings says",
)
