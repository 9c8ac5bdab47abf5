"""LLaDA checkpoints (8B Base, Instruct, 1.5) on transformers' native Llama stack, by renaming keys.

LLaDA's block is Llama's under other names: `ff_proj` is the gate, `up_proj` the up and `ff_out` the down projection; the
*top-level* `transformer.ff_out` is the output head. Logits are bit-identical in fp32; in bf16 with `fp32_rope=True`.
"""

from __future__ import annotations

from transformers import LlamaConfig

from .family import Config, Family, require

RENAMES = (
    ("model.transformer.wte.weight", "model.embed_tokens.weight"),
    ("model.transformer.ln_f.weight", "model.norm.weight"),
    ("model.transformer.ff_out.weight", "lm_head.weight"),
    *(
        (f"model.transformer.blocks.{{n}}.{theirs}.weight", f"model.layers.{{n}}.{ours}.weight")
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
    ),
)
CHAT = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
SPECIAL = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def native_config(config: Config) -> LlamaConfig:
    """The equivalent Llama config.

    Raises:
        RemaskError: a field has a value that the native stack does not cover.
    """
    require(
        "LLaDA",
        config,
        {
            "block_type": "llama",
            "activation_type": "silu",
            "layer_norm_type": "rms",
            "layer_norm_with_affine": True,
            "rope": True,
            "alibi": False,
            "attention_layer_norm": False,
            "scale_logits": False,
            "input_emb_norm": False,
            "block_group_size": 1,
            "include_bias": False,
            "include_qkv_bias": (False, None),
            "bias_for_layer_norm": (False, None),
        },
    )
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
    )


FAMILY = Family(
    name="llada",
    title="LLaDA-8B Base and Instruct, LLaDA-1.5",
    native="LlamaForCausalLM",
    config=native_config,
    architectures=("LLaDAModelLM",),
    matches=lambda config: "num_experts" not in config,
    renames=RENAMES,
    mask_token="<|mdm_mask|>",
    special_tokens=SPECIAL,
    chat_template=CHAT,
    max_length=lambda config: int(config["max_sequence_length"]),
    verified="goldens",
    note="Base and Instruct share one config.json: ask for the chat template with chat=True",
)
