"""From a folder to a `MaskedDiffusionLM`: detect the family, load every key or fail, prove that attention is full."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from ..assets import MODELS, bundled_models
from ..errors import RemaskError
from ..facts import write_atomically
from . import llada, native
from .model import MaskedDiffusionLM

# A family is a module with matches(), native_config(), key_mapping() and spec().
FAMILIES: tuple[ModuleType, ...] = (native, llada)


def load(name: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> MaskedDiffusionLM:
    """Load a bundled model by name (`"tiny"`) or a checkpoint folder by path.

    Args:
        name: bundled name or folder with config.json and safetensors.
        dtype: weights' dtype; given to the loader so that rotary frequencies stay fp32.
        device: where the weights go.

    Raises:
        RemaskError: unknown name, unsupported config field, missing, unexpected or mismatched keys, NaN weights.
    """
    folder = _folder(name)
    config = _read_config(folder)
    family = next((family for family in FAMILIES if family.matches(config)), None)
    if family is None:
        raise RemaskError(
            f"{folder / 'config.json'}: architectures={config.get('architectures')!r} is not a supported masked diffusion "
            "model (supported: remask's own layout, LLaDA)"
        )
    try:
        native_config = family.native_config(config)
        spec = family.spec(config)
    except (KeyError, TypeError) as error:
        raise RemaskError(f"{folder / 'config.json'}: field {error} is missing or malformed") from None
    try:
        with _quiet():
            model, info = LlamaForCausalLM.from_pretrained(
                folder,
                config=native_config,
                key_mapping=family.key_mapping(config),
                dtype=dtype,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except (OSError, SafetensorError) as error:
        raise RemaskError(f"{folder}: no readable safetensors weights ({error})") from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise RemaskError(f"{folder}: {kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[:3]}")
    for key, value in model.named_parameters():
        if not torch.isfinite(value).all():
            raise RemaskError(f"{folder}: weight {key!r} holds NaN or infinite values")
    lm = MaskedDiffusionLM(
        model=model.to(device),
        tokenizer=native.read_tokenizer(folder),
        spec=spec,
        name=name if isinstance(name, str) and (MODELS / name).is_dir() else folder.name,
    )
    check_attention(lm)
    return lm


def check_attention(lm: MaskedDiffusionLM) -> None:
    """Self-test: the first position must see the last one, through the model and through a single block.

    Raises:
        RemaskError: attention is causal somewhere.
    """
    vocab = int(lm.model.config.vocab_size)
    ids = torch.arange(8, device=lm.device).remainder(vocab).unsqueeze(0)
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % vocab
    with torch.inference_mode():
        whole = not torch.equal(lm.logits(ids)[0, 0], lm.logits(other)[0, 0])
        block = not torch.equal(lm.run_to(0, ids)[0, 0], lm.run_to(0, other)[0, 0])
    if not (whole and block):
        raise RemaskError(f"{lm.name}: attention is causal {'in a single block' if whole else 'in the model'}")
    lm.counters.forwards = lm.counters.blocks = lm.counters.tokens = 0


def save_pretrained(lm: MaskedDiffusionLM, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write weights, config (with the `mdlm` section) and tokenizer in the library's own layout."""
    folder = Path(folder)
    spec = lm.spec
    section = asdict(spec)
    lm.model.config.mdlm = {key: section[key] for key in section if key not in ("family", "max_length")}
    tied = {"lm_head.weight"} if lm.model.config.tie_word_embeddings else set()
    state = {key: value.to(dtype) for key, value in lm.model.state_dict().items() if key not in tied}
    with _quiet():
        lm.model.save_pretrained(folder, state_dict=state, save_original_format=False)
    config = _read_config(folder) | {"dtype": str(dtype).removeprefix("torch.")}
    write_atomically(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    (folder / "generation_config.json").unlink(missing_ok=True)  # autoregressive defaults: meaningless here
    if lm.tokenizer is not None:
        lm.tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' bars and reports inside the block: what they say is checked and raised here."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _folder(name: str | Path) -> Path:
    for folder in (MODELS / str(name), Path(name)):
        if (folder / "config.json").is_file():
            return folder
    raise RemaskError(
        f"unknown model {str(name)!r}: not a bundled name ({', '.join(bundled_models())}) and no folder with config.json"
    )


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RemaskError(f"{folder / 'config.json'}: not JSON ({error.msg})") from None
    if not isinstance(config, dict):
        raise RemaskError(f"{folder / 'config.json'}: expected a JSON object")
    return config
