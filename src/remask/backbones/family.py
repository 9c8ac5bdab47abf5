"""What a family of checkpoints is.

A `Family` says how to recognise a checkpoint's config.json, which native transformers class carries it, how its keys are
renamed, and the facts that make it a diffusion model. One file a family; `registry.py` lists them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedConfig

from ..errors import RemaskError

State = dict[str, Tensor]
Config = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A family of masked diffusion checkpoints.

    Attributes:
        name: what the user writes.
        title: which published models it covers.
        native: transformers class that carries it; empty = the one that config.json names.
        config: the checkpoint's config.json -> native config; raises RemaskError for a value the class does not cover.
        architectures: names in config.json that identify it; empty = only when the user names the family.
        matches: finer test on config.json, after `architectures`.
        renames: (original, native) key patterns, `{n}` stands for a number; keys without a pattern keep their name.
        to_native, to_original: reshaping that renaming cannot express, before and after it.
        spec: further `BackboneSpec` fields that config.json itself holds.
        shift: logits of position i are emitted at i-1.
        unpadded_positions: positions count real tokens only; otherwise they are indices of the padded row.
        block: attention block of block-causal families, from the config; 0 = full attention.
        mask_token, mask_id: the mask's text and published id, for configs that do not hold it.
        slow_tokenizer: transformers class for a folder with vocab.json and merges.txt but no tokenizer.json.
        special_tokens: texts of the template that the tokenizer must know as one token each.
        template: plain prompt template; `chat_template`: Jinja template of the chat models.
        sampler: name of the sampler preset that reproduces the original.
        max_length: the context, from the config.
        verified: `goldens` (numbers of the original code), `adapted` (trained here), `read` (source only).
        note: limits that a user should know.
    """

    name: str
    title: str
    native: str
    config: Callable[[Config], PreTrainedConfig]
    architectures: tuple[str, ...] = ()
    matches: Callable[[Config], bool] = lambda config: True
    renames: Sequence[tuple[str, str]] = ()
    to_native: Callable[[State, Config], State] = lambda state, config: state
    to_original: Callable[[State, Config], State] = lambda state, config: state
    spec: Callable[[Config], Mapping[str, Any]] = lambda config: {}
    shift: bool = False
    unpadded_positions: bool = False
    block: Callable[[Config], int] = lambda config: 0
    mask_token: str | None = None
    mask_id: int | None = None
    slow_tokenizer: str = "Qwen2Tokenizer"
    special_tokens: tuple[str, ...] = ()
    template: str = "{prompt}"
    chat_template: str = ""
    sampler: str = "llada"
    max_length: Callable[[Config], int] = lambda config: int(config["max_position_embeddings"])
    verified: Literal["goldens", "adapted", "read"] = "read"
    note: str = ""

    def recognises(self, config: Config) -> bool:
        """Whether config.json is of this family; `model_type` is never looked at (LLaDA-MoE's says `llada`)."""
        return bool(set(self.architectures) & set(config.get("architectures") or ())) and self.matches(config)

    def native_state(self, state: State, config: Config) -> State:
        """The checkpoint's tensors under native names."""
        return rename(self.to_native(state, config), self.renames)

    def original_state(self, state: State, config: Config) -> State:
        """Inverse of `native_state`."""
        return self.to_original(rename(state, [(native, original) for original, native in self.renames]), config)


def rename(state: State, patterns: Sequence[tuple[str, str]]) -> State:
    """Keys renamed by whole-key patterns in which `{n}` stands for a number, kept in order; other keys stay."""
    rules = [(re.compile(re.escape(old).replace(r"\{n\}", r"(\d+)")), new) for old, new in patterns]
    renamed = {}
    for key, value in state.items():
        found, new = next(((m, new) for rule, new in rules if (m := rule.fullmatch(key))), (None, key))
        renamed[new if found is None else _filled(new, found.groups())] = value
    return renamed


def _filled(pattern: str, numbers: Sequence[str]) -> str:
    for number in numbers:
        pattern = pattern.replace("{n}", number, 1)
    return pattern


def require(family: str, config: Config, values: Mapping[str, Any]) -> None:
    """Refuse a config field whose value the native class does not cover.

    Raises:
        RemaskError: names the field, its value and what is supported.
    """
    for name, value in values.items():
        if name in config and config[name] not in (value if isinstance(value, tuple) else (value,)):
            raise RemaskError(f"config.json: {name}={config[name]!r} is not supported for {family}; expected {value!r}")


DECODER_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "max_position_embeddings",
    "tie_word_embeddings",
)


def copied(config: Config, *more: str) -> dict[str, Any]:
    """The fields that a decoder's config shares with transformers' own by name, and `more`.

    Raises:
        KeyError: a field is missing.
    """
    return {name: config[name] for name in (*DECODER_FIELDS, *more)}


def rope_theta(family: str, config: Config, default: float | None = None) -> float:
    """Base of unscaled rotary positions, from `rope_theta` or from the `rope_parameters` that transformers 5 writes.

    Raises:
        RemaskError: scaled positions.
        KeyError: no base, and no default.
    """
    for name in ("rope_scaling", "rope_parameters"):
        kind = (config.get(name) or {}).get("rope_type", "default")
        if kind != "default" or set(config.get(name) or {}) - {"rope_type", "rope_theta"}:
            raise RemaskError(f"config.json: {name}={config[name]!r} is not supported for {family}; expected plain positions")
    theta = (config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta", default))
    if theta is None:
        raise KeyError("rope_theta")
    return float(theta)
