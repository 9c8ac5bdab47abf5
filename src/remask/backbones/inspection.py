"""What a checkpoint is and which jobs fit a machine, told from its config alone: no weight is read.

Memory is an estimate: weights are counted exactly on transformers' meta device, activations by the rules in `job_memory`.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import MissingOptionError, RemaskError
from .loading import Checkpoint, load, read_checkpoint
from .model import MODULES
from .registry import families

TOKENS = 8192  # of one forward: the batch that scoring and sampling fill
FP32, ADAM = 4, 8


@dataclass(frozen=True)
class Job:
    """Memory of one job in bytes, and whether it fits the device."""

    name: str
    bytes: int
    fits: bool


def count_parameters(checkpoint: Checkpoint) -> int:
    """Parameters of the model, tied ones once; nothing is allocated."""
    with torch.device("meta"):
        model = checkpoint.native(checkpoint.native_config)
    return sum({id(p): p.numel() for p in model.parameters()}.values())


def job_memory(checkpoint: Checkpoint, parameters: int, dtype: torch.dtype) -> dict[str, int]:
    """Estimated peak bytes of each job.

    A forward of T = 8192 tokens holds a handful of [T, d] and [T, mlp] tensors of one block and then, those freed, the fp32
    logits and log-probabilities of half of the positions; a trace stores nothing beside. An edit adds fp64 keys and their
    Gram matrix (1000 facts, 16 keys each); training adds fp32 weights, gradients and Adam's two moments (16 bytes a parameter
    instead of the dtype's) and keeps every block's activations of 2048 tokens; LoRA keeps the weights as they are and trains
    one percent of them.
    """
    config, size = checkpoint.native_config, dtype.itemsize
    width = int(config.hidden_size)
    mlp = max(int(getattr(config, name, 0) or 0) for name in ("intermediate_size", "n_inner", "moe_intermediate_size"))
    block = TOKENS * (8 * width + 3 * (mlp or 4 * width)) * size
    head = TOKENS // 2 * int(config.vocab_size) * 2 * FP32
    forward = parameters * size + max(block, TOKENS * width * size + head)
    layers = int(config.num_hidden_layers)
    kept = layers * 2048 * (16 * width + 3 * (mlp or 4 * width)) * size + 2048 * int(config.vocab_size) * 3 * FP32
    keys = 16_000 * width * 8 * 2 + 16_000**2 * 8
    return {
        "generate, score, audit": forward,
        "trace": forward,
        "edit memory, 1000 facts": forward + keys,
        "unlearn with LoRA": parameters * size + parameters // 100 * (FP32 + FP32 + ADAM) + kept,
        "unlearn, all weights": parameters * (FP32 + FP32 + ADAM) + kept,
    }


def available_memory(device: str) -> int:
    """Bytes free on a device now.

    Raises:
        RemaskError: unknown device.
    """
    if device == "cpu":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return int(torch.cuda.mem_get_info(device)[0])
    except (RuntimeError, ValueError, AssertionError) as error:
        raise RemaskError(f"device {device!r} cannot be asked for its memory ({str(error).splitlines()[0]})") from None


def inspect(
    name: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", chat: bool = False, **options: Any
) -> dict[str, Any]:
    """Everything `remask inspect` prints; weights are read only for the fingerprint, and only where they fit.

    Args:
        name: as for `load`.
        options: of `load`: family, mask_id, and so on.

    Returns:
        JSON; a checkpoint that does not tell its family or its mask id gets `loads: false` and a `remedy` instead of more.

    Raises:
        RemaskError: as `load` does, for what no option can mend.
    """
    loading = {
        key: options.pop(key) for key in ("attn_implementation", "experts_implementation", "fp32_rope") if key in options
    }
    try:
        found = read_checkpoint(name, options.pop("family", None), **options)
    except MissingOptionError as error:
        return {"name": str(name), "loads": False, "remedy": str(error)}
    parameters = count_parameters(found)
    free = available_memory(device)
    jobs = [Job(job, size, size <= free) for job, size in job_memory(found, parameters, dtype).items()]
    spec, config = found.spec, found.native_config
    report: dict[str, Any] = {
        "name": str(name),
        "loads": True,
        "family": spec.family,
        "verified": found.family.verified,
        "note": found.family.note,
        "native_class": found.native.__name__,
        "parameters": parameters,
        "layers": int(config.num_hidden_layers),
        "hidden_size": int(config.hidden_size),
        "vocabulary": int(config.vocab_size),
        "context": spec.max_length,
        "gen_length": spec.gen_length,
        "mask_id": spec.mask_id,
        "eos_id": spec.eos_id,
        "pad_id": spec.pad_id,
        "logits_shifted": spec.shift,
        "attention": f"block-causal, blocks of {spec.attention_block}" if spec.attention_block else "full",
        "sampler": spec.sampler,
        "template": spec.template,
        "chat_template": bool(spec.chat_template),
        "tokenizer": type(found.tokenizer).__name__ if found.tokenizer is not None else None,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "sites": [f"{module}@{layer}" for layer in range(int(config.num_hidden_layers)) for module in MODULES],
        "memory_free": free,
        "jobs": [asdict(job) for job in jobs],
        "fingerprint": None,
    }
    if jobs[0].fits:
        lm = load(name, dtype=dtype, device=device, chat=chat, family=spec.family, **loading, **options)
        report |= {"template": lm.spec.template, "fingerprint": lm.fingerprint()}
    return report


def list_families() -> list[dict[str, Any]]:
    """One row a family: what `remask models` prints."""
    return [
        {
            "family": family.name,
            "models": family.title,
            "native_class": family.native or "as config.json says",
            "recognised_by": list(family.architectures) or "name it",
            "verified": family.verified,
            "mask_token": family.mask_token,
            "mask_id": family.mask_id,
            "logits_shifted": family.shift,
            "sampler": family.sampler,
            "chat_template": bool(family.chat_template),
            "note": family.note,
        }
        for family in families()
    ]
