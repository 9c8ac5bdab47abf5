"""DiffuGPT-S/M: GPT-2 under a wrapper's key names, bidirectional, logits shifted by one."""

from __future__ import annotations

from transformers import GPT2Config

from .family import Config, Family, State, require


def native_config(config: Config) -> GPT2Config:
    """The checkpoint's own GPT-2 config.

    Raises:
        RemaskError: another activation, or attention scaling that the native class does not share.
    """
    require("DiffuGPT", config, {"activation_function": "gelu_new", "scale_attn_by_inverse_layer_idx": False, "n_inner": None})
    return GPT2Config(
        vocab_size=config["vocab_size"],
        n_positions=config["n_positions"],
        n_embd=config["n_embd"],
        n_layer=config["n_layer"],
        n_head=config["n_head"],
        layer_norm_epsilon=config["layer_norm_epsilon"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=True,
    )


def _buffers_dropped(state: State, config: Config) -> State:
    """Old GPT-2 code stored its causal masks (`attn.bias`, `attn.masked_bias`) as buffers."""
    return {key: value for key, value in state.items() if not key.endswith((".attn.bias", ".attn.masked_bias"))}


_INNER = ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
FAMILY = Family(
    name="diffugpt",
    title="DiffuGPT-S, DiffuGPT-M",
    native="GPT2LMHeadModel",
    config=native_config,
    architectures=("DiscreteDiffusionModel",),
    renames=(
        ("embed_tokens.weight", "transformer.wte.weight"),
        ("denoise_model.wpe.weight", "transformer.wpe.weight"),
        *((f"denoise_model.ln_f.{kind}", f"transformer.ln_f.{kind}") for kind in ("weight", "bias")),
        *(
            (f"denoise_model.h.{{n}}.{name}.{kind}", f"transformer.h.{{n}}.{name}.{kind}")
            for name in _INNER
            for kind in ("weight", "bias")
        ),
    ),
    to_native=_buffers_dropped,
    shift=True,
    unpadded_positions=True,
    mask_id=10541,
    slow_tokenizer="GPT2Tokenizer",
    sampler="diffullama",
    max_length=lambda config: int(config["n_positions"]),
    verified="read",
    note="mask 10541 is the small model's (an ordinary token); pass mask_id for others",
)
