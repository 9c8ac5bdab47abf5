"""A causal language model as a masked diffusion model, before any training: DiffuLLaMA's construction.

The checkpoint keeps its weights and its logit shift (position i is predicted from the hidden state of i - 1, as it was trained
to); the causal mask goes, and a mask token comes. Such a model can do little; `remask adapt` trains it with the mask loss.
Source: Gong et al., "Scaling Diffusion Language Models via Adaptation from Autoregressive Models" (2025), section 3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import RemaskError
from .family import Config
from .loading import check_attention, check_keys, locate, quiet, read_config, read_tokenizer
from .model import BackboneSpec, MaskedDiffusionLM
from .native import FAMILY
from .registry import recognise

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel")
NEW_MASK = "<|mask|>"
GEN_LENGTH = 128


def adapt_model(
    name: str | Path,
    mask_token: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    **spec: Any,
) -> MaskedDiffusionLM:
    """Load a causal checkpoint as a masked diffusion model: full attention, shifted logits, a mask token.

    Args:
        name: folder with config.json, safetensors and a fast tokenizer, or hub id.
        mask_token: a special token that the tokenizer has, or the text of a new one; None = the tokenizer's own mask token,
            else a new `<|mask|>`.
        spec: fields of `BackboneSpec` that are to differ: template, gen_length, ...

    Raises:
        RemaskError: already a masked diffusion model, an architecture or a config field that is not covered, no safetensors,
            no tokenizer, or a mask token that is no special token.
    """
    folder = locate(name)
    config = read_config(folder)
    _check_config(folder, config)
    tokenizer = read_tokenizer(folder)
    if tokenizer is None:
        raise RemaskError(f"{folder}: no tokenizer.json; save a fast tokenizer there")
    native = getattr(transformers, config["architectures"][0])
    try:
        with quiet():
            model, info = native.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, KeyError) as error:
        raise RemaskError(f"{folder}: transformers cannot load this checkpoint ({str(error).splitlines()[0]})") from None
    check_keys(folder, info, ("missing_keys", "mismatched_keys"))
    return from_causal(model.to(device), tokenizer, mask_token, name=folder.name, **spec)


def from_causal(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    mask_token: str | None = None,
    *,
    name: str = "model",
    **spec: Any,
) -> MaskedDiffusionLM:
    """`adapt_model` for a model and a tokenizer in memory; both are changed in place.

    Raises:
        RemaskError: no end token, or a mask token that is no special token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise RemaskError(f"{name}: the tokenizer has no end token; set its eos_token")
    mask_id = _mask_id(tokenizer, mask_token, name)
    if mask_id >= model.get_input_embeddings().num_embeddings:
        _add_rows(model, mask_id + 1)
    config = model.config
    length = int(getattr(config, "max_position_embeddings", None) or config.n_positions)
    responses = min(GEN_LENGTH, length // 2)
    fields: dict[str, Any] = {
        "eos_id": eos,
        "pad_id": eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        # The start token emits the first real one; without it nothing could.
        "template": f"{tokenizer.bos_token or tokenizer.eos_token}{{prompt}}",
        "answer_prefix": " ",
        "chat_template": tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else "",
        "unpadded_positions": True,
        "max_length": length,
        "gen_length": responses,
        "block_length": responses,
    }
    lm = MaskedDiffusionLM(
        model=model,
        tokenizer=tokenizer,
        spec=BackboneSpec(family=FAMILY.name, mask_id=mask_id, shift=True, **{**fields, **spec}),
        name=name,
    )
    check_attention(lm)
    return lm


def opened_mask(length: int, openness: float, rng: np.random.Generator, device: torch.device) -> Tensor | None:
    """Attention between causal and full: additive [1, 1, L, L] fp32, or None when it is full.

    Every query sees itself and what precedes it; each later position it sees with probability `openness`, drawn once for all
    rows (DiffuLLaMA's annealed mask). Pass it as `attention_mask` of `MaskedDiffusionLM.logits`.
    """
    if openness >= 1:
        return None
    seen = np.tri(length, dtype=bool) | (rng.random((length, length)) < openness)
    mask = torch.zeros(1, 1, length, length)
    return mask.masked_fill(torch.from_numpy(~seen), torch.finfo(mask.dtype).min).to(device)


def _check_config(folder: Path, config: Config) -> None:
    """Only a causal checkpoint of a covered architecture passes, with attention that opens up completely."""
    family = recognise(config)
    if family is not None:
        raise RemaskError(f"{folder} is a masked diffusion model already (family {family.name}); use it as it is")
    found = (config.get("architectures") or [None])[0]
    if found not in ARCHITECTURES:
        raise RemaskError(
            f"{folder / 'config.json'}: architecture {found!r} cannot be adapted; choose one of {', '.join(ARCHITECTURES)}"
        )
    if config.get("quantization_config"):
        raise RemaskError(f"{folder / 'config.json'}: quantized weights cannot be trained; save the model dequantized")
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        raise RemaskError(
            f"{folder / 'config.json'}: sliding-window attention is not supported; set use_sliding_window to false"
        )


def _mask_id(tokenizer: PreTrainedTokenizerBase, token: str | None, name: str) -> int:
    """Id of the mask token, which is added to the tokenizer where it has none of that text."""
    token = token or tokenizer.mask_token or NEW_MASK
    known = tokenizer.get_vocab()
    if token in known:
        special = set(tokenizer.all_special_tokens) | {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        if token not in special:
            raise RemaskError(
                f"{name}: mask token {token!r} is an ordinary token that text may hold; name a special or a new one"
            )
        if token in (tokenizer.eos_token, tokenizer.bos_token):
            raise RemaskError(f"{name}: mask token {token!r} starts or ends texts already; name another one")
    tokenizer.add_special_tokens({"mask_token": token})
    return int(tokenizer.convert_tokens_to_ids(token))


def _add_rows(model: PreTrainedModel, size: int) -> None:
    """Enlarge the token table, and the head where it is another table, by rows that are the mean of the old ones.

    A mean row's logit is the mean of all logits, so a new token is never the most likely one.
    """
    tables = {id(m): m for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    old = next(iter(tables.values())).num_embeddings
    with quiet():
        model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight[old:] = module.weight[:old].mean(dim=0)
            if getattr(module, "bias", None) is not None:
                module.bias[old:] = module.bias[:old].mean()
