"""LLaDA-MoE-7B-A1B on transformers' Qwen3Moe stack: per-head query and key norms, top-k weights never renormalised.

The keys are Qwen3Moe's already; transformers fuses the experts on load. On the hub its model_type is `llada` too, so only the
architecture tells. The config does not hold the mask id.
"""

from __future__ import annotations

from transformers import Qwen3MoeConfig

from ..errors import RemaskError
from .family import Config, Family, copied, require

SPECIAL = ("<role>", "</role>", "<|role_end|>")
CHAT = (
    "{% for message in messages %}<role>{{ 'HUMAN' if message.role == 'user' else message.role | upper }}</role>"
    "{{ message.content }}<|role_end|>{% endfor %}{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)


def native_config(config: Config) -> Qwen3MoeConfig:
    """The equivalent Qwen3Moe config.

    Raises:
        RemaskError: a field has a value that the native stack does not cover.
    """
    require(
        "LLaDA-MoE",
        config,
        {
            "hidden_act": "silu",
            "qk_layernorm": True,
            "clip_qkv": None,
            "partial_rotary_factor": 1,
            "rope_scaling": None,
            "attention_bias": False,
            "moe_router_score_function": "softmax",
            "moe_router_enable_expert_bias": False,
            "router_num_group": (None, 1),
            "router_topk_group": (None, 1),
            "routed_scaling_factor": (None, 1),
            "shared_expert_intermediate_size": (None, 0),
        },
    )
    frequency = config["moe_layer_freq"]
    if isinstance(frequency, int):
        raise RemaskError(
            f"config.json: moe_layer_freq={frequency!r} is not supported for LLaDA-MoE; expected a list, one a layer"
        )
    return Qwen3MoeConfig(
        **copied(config, "num_experts_per_tok", "num_experts"),
        intermediate_size=config["dense_intermediate_size"],
        moe_intermediate_size=config["expert_intermediate_size"],
        head_dim=config["hidden_size"] // config["num_attention_heads"],
        norm_topk_prob=False,  # hard-coded in the original, whatever its config says
        decoder_sparse_step=1,
        mlp_only_layers=[layer for layer, used in enumerate(frequency) if not used],
        attention_bias=False,
        rope_theta=config["rope_theta"],
        hidden_act="silu",
    )


FAMILY = Family(
    name="llada_moe",
    title="LLaDA-MoE-7B-A1B Base and Instruct",
    native="Qwen3MoeForCausalLM",
    config=native_config,
    architectures=("LLaDAMoEModelLM", "LLaDAModelLM"),
    matches=lambda config: "num_experts" in config,
    mask_token="<|mask|>",
    mask_id=156895,
    special_tokens=SPECIAL,
    chat_template=CHAT,
    verified="goldens",
    note="experts are fused tensors: edit block, attention or expert-mixture outputs",
)
