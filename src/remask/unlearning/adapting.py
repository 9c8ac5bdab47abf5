"""Continued training of a causal model as a masked diffusion model: the loop behind `remask adapt`.

Sequences of plain text, all of one length. In each an exact count of tokens is hidden, the count spread evenly over the batch;
the loss is the mean cross-entropy of a sequence's hidden tokens, averaged over sequences. That is the 1/t weight of the
diffusion bound with exact counts, so the number is a bound in nats a token. The causal mask is opened during the first steps
(`anneal`) or dropped at once. Every draw is keyed by (seed, purpose, step): a run that was killed and resumed takes exactly the
steps it would have taken, and more processes share the same batches. Start it with `accelerate launch` to use several devices.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ..backbones.adapt import opened_mask
from ..backbones.model import MaskedDiffusionLM
from ..errors import RemaskError
from ..random import digest, numpy_generator
from .lora import Attached, add_adapters
from .trainer import fast_bfloat16, load_checkpoint, save_checkpoint, schedule
from .training.processes import start_processes
from .training.rows import epoch_order

if TYPE_CHECKING:
    from accelerate import Accelerator

RATES = (0.15, 0.3, 0.5)  # shares of held-out tokens that are hidden
EVALUATION_BATCH = 8  # sequences a forward

Bank = Mapping[float, np.ndarray]

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class AdaptConfig(BaseModel):
    """Hyper-parameters of an adaptation."""

    model_config = ConfigDict(extra="forbid")

    seed: int = 0
    steps: int = Field(gt=0)
    batch_size: int = Field(default=8, gt=0, description="sequences a step, over all processes")
    length: int = Field(default=128, gt=1, description="tokens a sequence")
    learning_rate: float = Field(default=2e-4, gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=1.0, gt=0)
    anneal: float = Field(
        default=0.0, ge=0, le=1, description="share of the steps that open the causal mask; 0 drops it at once"
    )
    lora: int = Field(default=0, ge=0, description="rank of the adapters; 0 trains all weights")
    evaluate_every: int = Field(default=50, gt=0, description="steps between points of the learning curve")
    checkpoint_every: int = Field(default=200, gt=0, description="steps between checkpoints")


def train_adapted(
    lm: MaskedDiffusionLM,
    rows: np.ndarray,
    held_out: np.ndarray,
    config: AdaptConfig,
    checkpoint: Path,
    *,
    resume: bool = False,
) -> dict[str, Any]:
    """Train `lm` in place on `rows` [n, L] of token ids; returns what was done, with the learning curve on `held_out` [m, L].

    Each point of the curve holds step, tokens seen, training seconds, the mean train loss since the last point, and for every
    rate of `RATES` the held-out nats a hidden token and accuracy, with standard errors over sequences; always under full
    attention. Point 0 is the model as it came; `start_causal` is the same model under its causal mask.

    Raises:
        RemaskError: too few sequences, a batch that the processes cannot share, an intervention attached, loss not finite, a
            checkpoint of another run, a sharded launch, or accelerate or peft not installed.
    """
    if not len(rows) or len(held_out) < 2:
        raise RemaskError(
            f"{len(rows)} sequences of {config.length} tokens to train on, {len(held_out)} held out; give more text "
            "or a smaller length (1 and 2 are needed)"
        )
    if lm.attached:
        raise RemaskError(f"{lm.name} has {lm.attached[0].kind} attached; detach it before adapting")
    accelerator = start_processes("adapting", config.batch_size)
    identity = {"config": config.model_dump_json(), "data": digest(rows.tobytes(), held_out.tobytes(), lm.fingerprint())}
    with _trainable(lm, config):
        return _train(lm, rows, held_out, config, accelerator, checkpoint, identity, resume)


def add_lora(lm: MaskedDiffusionLM, rank: int, seed: int) -> Attached:
    """Put trainable low-rank adapters on the blocks, and make the mask's embedding trainable; the rest is frozen.

    `merge_and_unload()` of the result folds them into the weights of `lm.model`.

    Raises:
        RemaskError: as `add_adapters`.
    """
    return add_adapters(lm, rank, seed, tokens=[lm.spec.mask_id])


@contextlib.contextmanager
def adapters(lm: MaskedDiffusionLM, rank: int, seed: int) -> Iterator[None]:
    """Trainable low-rank adapters inside the block, nothing left of them behind it; hooks act on the adapted outputs.

    peft puts a wrapper in the place of every linear layer. Hooks of attached interventions sit on the layers themselves and
    would see their outputs before the adapter's are added, so they move to the wrappers for as long as these are there.

    Raises:
        RemaskError: peft not installed, or adapters on the model already.
    """
    attached = add_lora(lm, rank, seed)
    wrapped = [
        (module, module.base_layer)
        for module in lm.model.modules()
        if isinstance(getattr(module, "base_layer", None), nn.Module)
    ]
    try:
        for wrapper, layer in reversed(wrapped):  # the innermost first: adapters of experts sit in one another
            _swap_hooks(wrapper, layer)
        yield
    finally:
        for wrapper, layer in wrapped:
            _swap_hooks(wrapper, layer)
        attached.unload()


def _swap_hooks(one: nn.Module, other: nn.Module) -> None:
    """Exchange the hook tables themselves: handles hold on to the tables, so that they keep working."""
    for name in _HOOKS:
        first, second = getattr(one, name), getattr(other, name)
        setattr(one, name, second)
        setattr(other, name, first)


def mask_bank(rows: np.ndarray, special: set[int], seed: int) -> dict[float, np.ndarray]:
    """Fixed masks bool [n, L] for each rate of `RATES`, over tokens of text: never the first position or a special token."""
    text = ~np.isin(rows, sorted(special))
    text[:, 0] = False
    bank = {}
    for rate in RATES:
        hidden = np.zeros_like(text)
        for i, row in enumerate(text):
            places = numpy_generator(seed, "held-out", rate, i).permutation(np.nonzero(row)[0])
            hidden[i, places[: round(rate * len(places))]] = True
        bank[rate] = hidden
    return bank


def evaluate(
    lm: MaskedDiffusionLM,
    rows: np.ndarray,
    bank: Bank,
    attention_mask: Tensor | None = None,
    accelerator: Accelerator | None = None,
) -> dict[str, dict[str, float]]:
    """Nats a hidden token and accuracy for every rate, means over sequences with their standard errors.

    Args:
        rows: [n, L] token ids.
        bank: masks of `mask_bank`.
        attention_mask: of `MaskedDiffusionLM.logits`; None = full attention.
        accelerator: its processes share the sequences.
    """
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    result = {}
    for rate, hidden in bank.items():
        scores = torch.zeros(2, len(rows), device=lm.device)
        chosen = np.nonzero(hidden.any(axis=1))[0]
        mine = chosen[rank::world]
        for batch in np.split(mine, range(EVALUATION_BATCH, len(mine), EVALUATION_BATCH)):
            if len(batch):
                scores[:, batch] = _scores(lm, rows[batch], hidden[batch], attention_mask)
        if accelerator:
            scores = accelerator.reduce(scores)
        values = scores[:, chosen].double().cpu()
        error = values.std(dim=1) / math.sqrt(len(chosen))
        result[f"{rate:g}"] = {
            "nats": round(float(values[0].mean()), 4),
            "nats_stderr": round(float(error[0]), 4),
            "accuracy": round(float(values[1].mean()), 4),
            "accuracy_stderr": round(float(error[1]), 4),
        }
    return result


class _Objective(nn.Module):
    """The loss as one module, which is what accelerate wraps to average gradients."""

    def __init__(self, lm: MaskedDiffusionLM) -> None:
        super().__init__()
        self.lm, self.model = lm, lm.model

    def forward(self, clean: Tensor, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Mean over sequences of the mean cross-entropy of their hidden tokens; `clean`, `hidden` [B, L]."""
        losses = _losses(self.lm, clean, hidden, attention_mask)[0]
        counts = hidden.sum(dim=1)
        return (losses / counts.repeat_interleave(counts)).sum() / len(clean)


def _losses(lm: MaskedDiffusionLM, clean: Tensor, hidden: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every hidden token in row-major order, and whether it is the most likely one."""
    noisy = clean.masked_fill(hidden, lm.spec.mask_id)
    with torch.autocast(lm.device.type, torch.bfloat16, enabled=fast_bfloat16(lm.device)):
        logits = lm.logits(noisy, attention_mask, positions=hidden).float()
    target = clean[hidden]
    return nn.functional.cross_entropy(logits, target, reduction="none"), logits.argmax(dim=-1) == target


@torch.inference_mode()
def _scores(lm: MaskedDiffusionLM, rows: np.ndarray, hidden: np.ndarray, attention_mask: Tensor | None) -> Tensor:
    """[2, B]: mean nats and accuracy over the hidden tokens of each row."""
    positions = torch.from_numpy(hidden).to(lm.device)
    losses, right = _losses(lm, torch.from_numpy(rows).to(lm.device), positions, attention_mask)
    owner = positions.nonzero()[:, 0]
    sums = torch.zeros(2, len(rows), device=lm.device).index_add_(1, owner, torch.stack([losses, right.float()]))
    return sums / positions.sum(dim=1)


def _train(
    lm: MaskedDiffusionLM,
    rows: np.ndarray,
    held_out: np.ndarray,
    config: AdaptConfig,
    accelerator: Accelerator,
    checkpoint: Path,
    identity: dict[str, str],
    resume: bool,
) -> dict[str, Any]:
    objective = accelerator.prepare_model(_Objective(lm))
    named = {name: p for name, p in lm.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        named.values(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True
    )
    bank = mask_bank(held_out, special_ids(lm), config.seed)
    restored = load_checkpoint(checkpoint, named, [optimizer], identity) if resume else None
    if restored is None:
        causal = opened_mask(config.length, 0.0, numpy_generator(config.seed, "anneal"), lm.device)
        start = evaluate(lm, held_out, bank, causal, accelerator)
        scores = evaluate(lm, held_out, bank, None, accelerator)
        curve: list[dict[str, Any]] = [{"step": 0, "tokens": 0, "seconds": 0.0, "held_out": scores}]
        step, running, seconds = 0, [], 0.0
    else:
        step, start, curve, running, seconds = restored
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not accelerator.is_main_process) as progress:
        task = progress.add_task(_caption(curve[-1]), total=config.steps, completed=step)
        while step < config.steps:
            started = time.perf_counter()
            running.append(_step(lm, objective, optimizer, rows, config, step, accelerator))
            seconds += time.perf_counter() - started
            step += 1
            progress.advance(task)
            if step % config.evaluate_every == 0 or step == config.steps:
                point = {
                    "step": step,
                    "tokens": step * config.batch_size * config.length,
                    "seconds": round(seconds, 1),
                    "train_loss": round(float(np.mean(running)), 4),
                    "held_out": evaluate(lm, held_out, bank, None, accelerator),
                }
                curve.append(point)
                running = []
                progress.update(task, description=_caption(point))
            if step % config.checkpoint_every == 0 or step == config.steps:
                if accelerator.is_main_process:
                    save_checkpoint(checkpoint, named, [optimizer], identity, (step, start, curve, running, seconds))
                accelerator.wait_for_everyone()
    return {
        "sequences": len(rows),
        "held_out_sequences": len(held_out),
        "parameters": lm.num_parameters,
        "trained_parameters": sum(p.numel() for p in named.values()),
        "processes": accelerator.num_processes,
        "bfloat16": fast_bfloat16(lm.device),
        "start_causal": start,
        "curve": curve,
    }


def _step(
    lm: MaskedDiffusionLM,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: np.ndarray,
    config: AdaptConfig,
    step: int,
    accelerator: Accelerator,
) -> float:
    """One optimizer step on this process's share of the batch; the loss over all processes."""
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    clean, hidden = (torch.from_numpy(part[mine]).to(lm.device) for part in _batch(rows, config, step))
    openness = (step + 1) / (config.anneal * config.steps) if config.anneal else 1.0
    mask = opened_mask(config.length, openness, numpy_generator(config.seed, "anneal", step), lm.device)
    loss = objective(clean, hidden, mask)
    accelerator.backward(loss)
    parameters = optimizer.param_groups[0]["params"]
    nn.utils.clip_grad_norm_(parameters, config.clip)
    optimizer.param_groups[0]["lr"] = config.learning_rate * schedule(step, config.steps, config.warmup)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    value = float(accelerator.reduce(loss.detach(), "mean"))
    if not math.isfinite(value):
        raise RemaskError(f"step {step + 1}: the loss is not finite; lower learning_rate ({config.learning_rate})")
    return value


def _batch(rows: np.ndarray, config: AdaptConfig, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequences [B, L] of a step and their hidden positions, bool [B, L]; the first position stays: nothing emits it."""
    size, length, total = config.batch_size, config.length, len(rows)
    clean = rows[epoch_order(total, step * size, size, config.seed, "order")]
    rng = numpy_generator(config.seed, "noise", step)
    levels = rng.permutation(np.arange(size) + rng.random()) / size
    counts = 1 + (levels * (length - 1)).astype(int)
    ranks = rng.random((size, length - 1)).argsort(axis=1).argsort(axis=1)
    return clean, np.pad(ranks < counts[:, None], ((0, 0), (1, 0)))


@contextlib.contextmanager
def _trainable(lm: MaskedDiffusionLM, config: AdaptConfig) -> Iterator[None]:
    """Weights, or adapters that are merged at the end, require gradients inside the block."""
    attached = add_lora(lm, config.lora, config.seed) if config.lora else None
    if attached is None:
        lm.model.requires_grad_(True)
    try:
        yield
    finally:
        if attached is not None:
            attached.merge_and_unload()
        lm.model.requires_grad_(False)


def special_ids(lm: MaskedDiffusionLM) -> set[int]:
    """Ids that are no text: what the tokenizer calls special, and the spec's own."""
    known = set() if lm.tokenizer is None else set(lm.tokenizer.all_special_ids)
    return known | {lm.spec.mask_id, lm.spec.eos_id, lm.spec.pad_id}


def _caption(point: dict[str, Any]) -> str:
    held_out = point["held_out"]["0.3"]
    return f"adapting, held out at 30 %: {held_out['nats']:.2f} nats, accuracy {held_out['accuracy']:.1%}"
