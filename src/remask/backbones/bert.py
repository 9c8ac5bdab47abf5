"""BERT and ModernBERT as masked diffusion models: encoders already, nothing renamed; the mask id comes from the tokenizer."""

from __future__ import annotations

from transformers import BertConfig, ModernBertConfig

from ..errors import RemaskError
from .family import Config, Family, State, require


def bert_config(config: Config) -> BertConfig:
    """The checkpoint's own config.

    Raises:
        RemaskError: a decoder, or relative positions.
    """
    require("BERT", config, {"is_decoder": False, "position_embedding_type": "absolute", "add_cross_attention": False})
    return BertConfig.from_dict(config)


def modernbert_config(config: Config) -> ModernBertConfig:
    """The checkpoint's own config."""
    if "hidden_size" not in config:
        raise RemaskError("config.json: field 'hidden_size' is missing")
    return ModernBertConfig.from_dict(config)


def _head_only(state: State, config: Config) -> State:
    """Published BERTs carry a pooler and a sentence-pair head, and old ones LayerNorm as gamma and beta."""
    return {
        key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): value
        for key, value in state.items()
        if not key.startswith(("bert.pooler.", "cls.seq_relationship.")) and key != "bert.embeddings.position_ids"
    }


_TEMPLATE = "[CLS]{prompt}[SEP]"
BERT = Family(
    name="bert",
    title="BERT with its masked-language-model head",
    native="BertForMaskedLM",
    config=bert_config,
    architectures=("BertForMaskedLM", "BertForPreTraining"),
    to_native=_head_only,
    unpadded_positions=True,
    mask_token="[MASK]",
    special_tokens=("[CLS]", "[SEP]"),
    template=_TEMPLATE,
    verified="read",
    note="an encoder: fine-tune it with masked diffusion before judging its text",
)
MODERNBERT = Family(
    name="modernbert",
    title="ModernBERT",
    native="ModernBertForMaskedLM",
    config=modernbert_config,
    architectures=("ModernBertForMaskedLM",),
    mask_token="[MASK]",
    special_tokens=("[CLS]", "[SEP]"),
    template=_TEMPLATE,
    verified="read",
    note="most layers attend to a sliding window, so full attention holds in every third layer only",
)
