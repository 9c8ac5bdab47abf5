"""The library's own layout: a native transformers checkpoint whose config carries an `mdlm` section."""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from ..errors import RemaskError
from .family import Config, Family
from .model import BackboneSpec
from .stacks import STACKS

SPECIAL = {"pad": "<pad>", "mask": "<mask>", "bos": "<bos>", "sep": "<sep>", "eos": "<eos>"}
TEMPLATE = "<bos>{prompt}<sep>"
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def native_config(config: Config) -> PreTrainedConfig:
    """The transformers config; nothing is renamed.

    Raises:
        RemaskError: an architecture that is not covered, or a size that is missing.
    """
    name = config["architectures"][0]
    sizes = ("n_embd", "n_layer", "n_head") if name == "GPT2LMHeadModel" else SIZES
    for field in (*sizes, "vocab_size"):
        if not isinstance(config.get(field), int):
            raise RemaskError(f"config.json: field {field!r} is missing; transformers' default would be another model")
    return getattr(transformers, name).config_class.from_dict(config)


def spec_fields(config: Config) -> dict[str, Any]:
    """The `mdlm` section, checked.

    Raises:
        RemaskError: a missing or unknown field, by name.
    """
    section = config["mdlm"]
    fields = set(BackboneSpec.__dataclass_fields__) - {"family"}
    unknown = sorted(set(section) - fields)
    missing = sorted({"mask_id", "eos_id", "pad_id"} - set(section))
    if unknown or missing:
        raise RemaskError(
            f"config.json, section 'mdlm': {'unknown' if unknown else 'missing'} field {(unknown or missing)[0]!r}"
        )
    return section


FAMILY = Family(
    name="remask",
    title="the library's own layout: any covered transformers architecture with an `mdlm` section in its config",
    native="",
    config=native_config,
    architectures=tuple(STACKS),
    matches=lambda config: "mdlm" in config,
    spec=spec_fields,
    max_length=lambda config: int(config.get("max_position_embeddings") or config["n_positions"]),
    verified="adapted",
)


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer over `texts` with the library's special tokens; lossless on any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{key}_token": SPECIAL[key] for key in SPECIAL},
        clean_up_tokenization_spaces=False,
    )


def new_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int,
    layers: int,
    heads: int,
    mlp_size: int,
    max_length: int,
    gen_length: int,
    block_length: int,
) -> tuple[LlamaForCausalLM, BackboneSpec]:
    """A randomly initialised model and its spec. Uses torch's global generator for the weights: seed it around this call."""
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in SPECIAL.items()}
    spec = BackboneSpec(
        family=FAMILY.name,
        mask_id=ids["mask"],
        eos_id=ids["eos"],
        pad_id=ids["pad"],
        template=TEMPLATE,
        max_length=max_length,
        gen_length=gen_length,
        block_length=block_length,
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=mlp_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        pad_token_id=ids["pad"],
    )
    return LlamaForCausalLM(config), spec
