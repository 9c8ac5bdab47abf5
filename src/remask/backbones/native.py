"""The library's own layout: a transformers Llama checkpoint whose config carries an `mdlm` section."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..errors import RemaskError
from .model import BackboneSpec

SPECIAL = {"pad": "<pad>", "mask": "<mask>", "bos": "<bos>", "sep": "<sep>", "eos": "<eos>"}
TEMPLATE = "<bos>{prompt}<sep>"


def matches(config: dict[str, Any]) -> bool:
    """True for a config written by this library."""
    return "mdlm" in config and config.get("architectures") == ["LlamaForCausalLM"]


def native_config(config: dict[str, Any]) -> LlamaConfig:
    """The transformers config; nothing is renamed."""
    return LlamaConfig.from_dict({**config, "is_causal": False})


def key_mapping(_config: dict[str, Any]) -> None:
    """Keys are already native."""
    return None


def spec(config: dict[str, Any]) -> BackboneSpec:
    """Read the `mdlm` section.

    Raises:
        RemaskError: a missing or unknown field, by name.
    """
    section = config["mdlm"]
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
        if not isinstance(config.get(name), int):
            raise RemaskError(f"config.json: field {name!r} is missing; transformers' default would be a 7B model")
    fields = set(BackboneSpec.__dataclass_fields__) - {"family", "max_length"}
    unknown = sorted(set(section) - fields)
    missing = sorted({"mask_id", "eos_id", "pad_id"} - set(section))
    if unknown or missing:
        raise RemaskError(
            f"config.json, section 'mdlm': {'unknown' if unknown else 'missing'} field {(unknown or missing)[0]!r}"
        )
    return BackboneSpec(family="remask-llama", max_length=config["max_position_embeddings"], **section)


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
    section = {
        "mask_id": ids["mask"],
        "eos_id": ids["eos"],
        "pad_id": ids["pad"],
        "template": TEMPLATE,
        "gen_length": gen_length,
        "block_length": block_length,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=mlp_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        is_causal=False,
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        pad_token_id=ids["pad"],
        mdlm=section,
    )
    model = LlamaForCausalLM(config)
    return model, spec(config.to_dict())


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast | None:
    """The folder's fast tokenizer, or None where it has none."""
    if not (folder / "tokenizer.json").is_file():
        return None
    return PreTrainedTokenizerFast.from_pretrained(folder)
