"""From a folder or hub id to a `MaskedDiffusionLM`, and back: recognise the family, load every key or fail, prove attention."""

from __future__ import annotations

import contextlib
import json
import re
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging as transformers_logging

from ..assets import MODELS, bundled_models
from ..errors import MissingOptionError, RemaskError
from ..facts import write_atomically
from .family import Config, Family, State
from .model import BackboneSpec, Counters, MaskedDiffusionLM
from .native import FAMILY as NATIVE
from .registry import families, family_named, recognise

FP32_ROPE = "remask_sdpa_fp32_rope"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "merges.txt", "vocab.txt", "tokenizer.model"]
_SPEC_FIELDS = {field.name for field in fields(BackboneSpec)} - {"family"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint before its weights are read: what its config.json and tokenizer say.

    Attributes:
        folder: where it is.
        config: its config.json.
        family, native: its family and the transformers class that carries it.
        native_config: that class's config.
        spec: what makes it a diffusion model.
        tokenizer: None where the folder has none.
    """

    folder: Path
    config: Config
    family: Family
    native: Any
    native_config: PreTrainedConfig
    spec: BackboneSpec
    tokenizer: PreTrainedTokenizerBase | None


def read_checkpoint(name: str | Path, family: str | None = None, **spec: Any) -> Checkpoint:
    """Recognise a bundled model, a folder or a hub id, without its weights; arguments and errors as of `load`."""
    folder = locate(name)
    config = read_config(folder)
    chosen = _family(folder, config, family)
    tokenizer = read_tokenizer(folder, chosen.slow_tokenizer)
    try:
        native_config = chosen.config(config)
        section = {**_spec(chosen, config, tokenizer), **spec}
    except (KeyError, TypeError, ValueError) as error:
        raise RemaskError(f"{folder / 'config.json'}: field {error} is missing or malformed") from None
    except StrictDataclassError as error:  # transformers' own check of types and sizes
        raise RemaskError(f"{folder / 'config.json'}: {' '.join(str(error).split())}") from None
    native = getattr(transformers, chosen.native or config["architectures"][0])
    checked = _checked(section, folder, int(native_config.vocab_size))
    return Checkpoint(folder, config, chosen, native, native_config, checked, tokenizer)


def load(
    name: str | Path,
    *,
    family: str | None = None,
    chat: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    device_map: Any = None,
    attn_implementation: str = "sdpa",
    experts_implementation: str = "eager",
    fp32_rope: bool = False,
    quantization_config: Any = None,
    **spec: Any,
) -> MaskedDiffusionLM:
    """Load a bundled model by name (`"tiny"`), a checkpoint folder by path, or a hub id (`"owner/name"`, downloaded).

    Args:
        name: bundled name, folder with config.json and safetensors, or hub id.
        family: name of the family where config.json does not tell it (DiffuLLaMA).
        chat: put prompts into the family's chat template; for Instruct models.
        dtype: weights' dtype; given to the loader so that rotary frequencies stay fp32.
        device: where the weights go; with `device_map` (needs accelerate) they are spread as it says.
        attn_implementation: of transformers: sdpa, eager, flash_attention_2; block-causal families take the first two.
        experts_implementation: of transformers, for mixtures of experts: eager is bit-exact, grouped_mm is faster.
        fp32_rope: apply rotary positions in fp32, as LLaDA's own code does; makes its bf16 logits bit-identical.
        quantization_config: of transformers (bitsandbytes, torchao, ...); needs `device_map` for most.
        spec: fields of `BackboneSpec` that the checkpoint does not hold or that are to differ: mask_id, max_length, ...

    Raises:
        MissingOptionError: the checkpoint does not tell its family, or a token id that fits its vocabulary.
        RemaskError: unknown name or family, unsupported config field, missing, unexpected or mismatched keys, NaN weights,
            tokens of the template that the tokenizer does not know, causal attention.
    """
    found = read_checkpoint(name, family, **spec)
    folder = found.folder
    if found.spec.attention_block and attn_implementation not in ("sdpa", "eager"):
        raise RemaskError(f"{folder}: block-causal attention needs sdpa or eager, not {attn_implementation!r}")
    if fp32_rope:
        if attn_implementation != "sdpa":
            raise RemaskError(f"fp32_rope works with attn_implementation='sdpa', not {attn_implementation!r}")
        ALL_ATTENTION_FUNCTIONS.register(FP32_ROPE, _sdpa_fp32_rope)
        ALL_MASK_ATTENTION_FUNCTIONS.register(FP32_ROPE, sdpa_mask)
    state = found.family.native_state(_read_state(folder), found.config)
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise RemaskError(f"{folder}: weight {key!r} holds NaN or infinite values")
    options: dict[str, Any] = {"device_map": device_map, "quantization_config": quantization_config}
    try:
        with quiet():
            model, info = found.native.from_pretrained(
                None,
                config=found.native_config,
                state_dict=state,
                dtype=dtype,
                attn_implementation=FP32_ROPE if fp32_rope else attn_implementation,
                experts_implementation=experts_implementation,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are reported, and raised below
                **{key: value for key, value in options.items() if value is not None},
            )
    except (ValueError, ImportError) as error:
        raise RemaskError(f"{folder}: transformers cannot build this model ({str(error).splitlines()[0]})") from None
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # its report is silenced; on well-formed files only fusing experts fails
        raise RemaskError(f"{folder}: the experts' weights cannot be fused; some are missing or of another shape") from None
    check_keys(folder, info, ("missing_keys", "unexpected_keys", "mismatched_keys"))
    lm = MaskedDiffusionLM(
        model=model if device_map is not None else model.to(device),
        tokenizer=found.tokenizer,
        spec=found.spec,
        name=name if isinstance(name, str) and (MODELS / name).is_dir() else folder.name,
        source=found.config,
        fp32_rope=fp32_rope,
    )
    _check_tokens(lm, found.family, chat)
    if chat:
        lm.spec = replace(lm.spec, template=_chat_as_template(lm))
    check_attention(lm)
    return lm


def check_keys(folder: Path, info: dict[str, Any], kinds: tuple[str, ...]) -> None:
    """Raise RemaskError where transformers' loading info lists keys of one of these kinds."""
    for kind in kinds:
        if info[kind]:
            raise RemaskError(f"{folder}: {kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[:3]}")


def check_attention(lm: MaskedDiffusionLM) -> None:
    """Self-test that attention is what the family says, through the model and through a single block.

    Full attention: the first position sees the last one. Block-causal: it sees the last one of its own block and nothing of
    the next.

    Raises:
        RemaskError: attention is causal somewhere, or looks beyond its block.
    """
    block = lm.spec.attention_block
    length = min(2 * block if block else 8, lm.spec.max_length)
    near = block if block else length
    ids = torch.arange(length, device=lm.device).remainder(lm.embedding.num_embeddings).unsqueeze(0)
    # Dense layers repeat their bits, so any change counts; experts see other batches when other tokens change.
    rounding = 4 if hasattr(lm.model.config, "num_experts_per_tok") else 0
    with torch.inference_mode():
        for where, run in (("the model", lambda x: lm.logits(x)[0, 0]), ("a single block", lambda x: lm.run_to(0, x)[0, 0])):
            if near > 1 and not _differ(run(ids), run(_changed(ids, range(1, near))), rounding):
                raise RemaskError(f"{lm.name}: attention is causal in {where}")
            if near < length and _differ(run(ids), run(_changed(ids, range(near, length))), max(8 * rounding, 4)):
                raise RemaskError(f"{lm.name}: attention in {where} looks beyond its block of {block}")
    lm.counters = Counters()


def save_pretrained(
    lm: MaskedDiffusionLM, folder: str | Path, dtype: torch.dtype = torch.bfloat16, *, original: bool = False
) -> None:
    """Write weights, config and tokenizer.

    Args:
        dtype: of the weights in the file.
        original: in the layout of the checkpoint that the model was loaded from, for the code that reads that one;
            otherwise in the library's own, with the `mdlm` section.

    Raises:
        RemaskError: `original` for a model that was not loaded from another layout.
    """
    folder = Path(folder)
    tied = set(lm.model.all_tied_weights_keys or {})
    with quiet():
        state = revert_weight_conversion(lm.model, dict(lm.model.state_dict()))  # experts one by one, as checkpoints have them
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items() if key not in tied}
    if original:
        if not lm.source or "mdlm" in lm.source:
            raise RemaskError(f"{lm.name} was not loaded from another layout; save it without original=True")
        config = dict(lm.source)
        state = family_named(lm.spec.family).original_state(state, config)
    else:
        section = asdict(lm.spec)
        config = lm.model.config.to_dict()
        del section["family"]
        if section["max_length"] == NATIVE.max_length(config):
            del section["max_length"]
        config["mdlm"] = section
        config["architectures"] = [type(lm.model).__name__]
        config.pop("torch_dtype", None)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "model.safetensors.partial"
    save_file({key: value.contiguous().cpu() for key, value in state.items()}, partial, metadata={"format": "pt"})
    partial.replace(folder / "model.safetensors")
    write_atomically(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    if lm.tokenizer is not None:
        lm.tokenizer.save_pretrained(folder)


def read_config(folder: Path) -> Config:
    """config.json of a checkpoint, as it is.

    Raises:
        RemaskError: not JSON, or not an object.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise RemaskError(f"{folder / 'config.json'}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise RemaskError(f"{folder / 'config.json'}: expected a JSON object")
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RemaskError(f"{folder / 'config.json'}: architectures={names!r} is not a list of names")
    return config


def read_tokenizer(folder: Path, slow: str = "Qwen2Tokenizer") -> PreTrainedTokenizerBase | None:
    """The folder's fast tokenizer, or None where it has none; tokenizer code that comes with a checkpoint is never run."""
    kinds = {"tokenizer.json": "PreTrainedTokenizerFast", "merges.txt": slow, "vocab.txt": "BertTokenizer"}
    found = next((kind for file, kind in kinds.items() if (folder / file).is_file()), None)
    if found is None:
        return None
    try:
        with quiet():
            return getattr(transformers, found).from_pretrained(folder)
    except Exception as error:  # tokenizers raises bare Exception
        raise RemaskError(f"{folder}: the tokenizer's files cannot be read ({error})") from None


def _family(folder: Path, config: Config, name: str | None) -> Family:
    if name is not None:
        return family_named(name)
    found = recognise(config)
    if found is None:
        known = ", ".join(family.name for family in families())
        raise MissingOptionError(
            f"{folder / 'config.json'}: architectures={config.get('architectures')!r} is not a masked diffusion model "
            f"that remask recognises; name its family ({known}), or turn a causal model into one with `remask adapt`"
        )
    return found


def _spec(family: Family, config: Config, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """Ids from the config, else from the tokenizer, else the family's published ones."""
    block = family.block(config)
    section: dict[str, Any] = {
        "family": family.name,
        "mask_id": config.get("mask_token_id"),
        "eos_id": config.get("eos_token_id"),
        "pad_id": config.get("pad_token_id"),
        "shift": family.shift,
        "attention_block": block,
        "unpadded_positions": family.unpadded_positions,
        "template": family.template,
        "chat_template": family.chat_template,
        "sampler": family.sampler,
        "max_length": family.max_length(config),
    }
    if block:
        section["block_length"] = block
    if section["mask_id"] is None and tokenizer is not None and family.mask_token in tokenizer.get_vocab():
        section["mask_id"] = tokenizer.convert_tokens_to_ids(family.mask_token)
    if section["mask_id"] is None:
        section["mask_id"] = family.mask_id
    if section["eos_id"] is None and tokenizer is not None:
        section["eos_id"] = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if isinstance(section["eos_id"], list):
        section["eos_id"] = section["eos_id"][0]
    if section["pad_id"] is None:
        section["pad_id"] = section["eos_id"]
    return section | dict(family.spec(config))


def _checked(section: dict[str, Any], folder: Path, vocabulary: int) -> BackboneSpec:
    strange = sorted(set(section) - _SPEC_FIELDS - {"family"})
    if strange:
        raise RemaskError(f"unknown field {strange[0]!r}; a model's spec has {', '.join(sorted(_SPEC_FIELDS))}")
    for name in ("mask_id", "eos_id", "pad_id"):
        value = section[name]
        if value is None:
            raise MissingOptionError(f"{folder}: neither config nor tokenizer gives the {name}; pass {name}=...")
        if not isinstance(value, int) or not 0 <= value < vocabulary:
            raise MissingOptionError(f"{folder}: {name} {value!r} is outside the vocabulary of {vocabulary}; pass {name}=...")
    if not isinstance(section["attention_block"], int) or section["attention_block"] < 0:
        raise RemaskError(f"attention_block {section['attention_block']!r} must be 0 (full attention) or a number of positions")
    if "{prompt}" not in section["template"]:
        raise RemaskError(f"template {section['template']!r} has no {{prompt}}; say where the prompt goes")
    return BackboneSpec(**section)


def _check_tokens(lm: MaskedDiffusionLM, family: Family, chat: bool) -> None:
    """The tokenizer must know the mask under its id, and every special token of the template in use as one token.

    Base models may lack the chat template's tokens (LLaDA's does): they lose that template.
    """
    if lm.tokenizer is None:
        return
    known = lm.tokenizer.get_vocab()
    if family.mask_token is not None and known.get(family.mask_token, lm.spec.mask_id) != lm.spec.mask_id:
        raise RemaskError(
            f"{lm.name}: the tokenizer knows {family.mask_token!r} as {known[family.mask_token]}, "
            f"but the mask id is {lm.spec.mask_id}"
        )
    for token in [token for token in family.special_tokens if token not in known]:
        if token in lm.spec.template or (chat and token in lm.spec.chat_template):
            raise RemaskError(f"{lm.name}: the tokenizer does not know {token!r}, which its template uses")
        if token in lm.spec.chat_template:
            lm.spec = replace(lm.spec, chat_template="")


def _chat_as_template(lm: MaskedDiffusionLM) -> str:
    if not lm.spec.chat_template:
        raise RemaskError(f"{lm.name} has no chat template; load it without chat")
    if lm.tokenizer is None:
        raise RemaskError(f"{lm.name} was loaded without a tokenizer; a chat template needs one")
    return str(
        lm.tokenizer.apply_chat_template(
            [{"role": "user", "content": "{prompt}"}],
            chat_template=lm.spec.chat_template,
            add_generation_prompt=True,
            tokenize=False,
        )
    )


def _changed(ids: Tensor, positions: range) -> Tensor:
    """Other tokens at `positions`: the sequence with them reversed and moved on by half the ids in use."""
    other = ids.clone()
    other[0, positions] = (ids[0, positions].flip(0) + len(positions) // 2 + 1) % (int(ids.max()) + 1)
    return other


def _differ(a: Tensor, b: Tensor, rounding: int) -> bool:
    """By more than so many units of rounding of the largest value."""
    return bool((a - b).abs().max() > rounding * torch.finfo(a.dtype).eps * a.abs().max())


def _sdpa_fp32_rope(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    """Attention over queries and keys that fp32 rotary tables promoted: cast back before the product."""
    return sdpa_attention_forward(module, query.to(value.dtype), key.to(value.dtype), value, attention_mask, **options)


def _read_state(folder: Path) -> State:
    """Every tensor of model.safetensors, or of the shards of its index; memory-mapped."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RemaskError(f"{index}: not a safetensors index, perhaps truncated") from None
    else:
        names = ["model.safetensors"]
    state: State = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
            if pickles:
                raise RemaskError(
                    f"{folder}: only pickled weights ({pickles[0]}), which can run code when read; convert them with "
                    "safetensors.torch.save_file on a machine that trusts them"
                )
            raise RemaskError(f"{folder}: {name} is missing")
        try:
            state |= load_file(path)
        except (OSError, SafetensorError, struct.error) as error:
            raise RemaskError(f"{path}: not readable safetensors, perhaps truncated ({error})") from None
    return state


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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


def locate(name: str | Path) -> Path:
    """Folder of a bundled model, of a path, or of a hub id, which is downloaded.

    Raises:
        RemaskError: none of them.
    """
    for folder in (MODELS / str(name), Path(name)):
        if (folder / "config.json").is_file():
            return folder
    if isinstance(name, str) and not Path(name).exists() and _HUB_ID.fullmatch(name):
        try:
            return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise RemaskError(f"{name!r} is no folder, and the hub gave no such model ({reason})") from None
    raise RemaskError(
        f"unknown model {str(name)!r}: not a bundled name ({', '.join(bundled_models())}), no folder with config.json, "
        "no hub id"
    )
