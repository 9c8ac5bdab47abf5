"""Masked-diffusion fine-tuning: the loop behind `remask teach`.

Each row is prompt + answer + a tail of end tokens. A noise level per row hides an exact count of response tokens; the loss is
the cross-entropy of the hidden ones. With probability `prompt_dropout` the whole prompt is hidden too, which trains the
unconditional branch that anchors and classifier-free guidance read. Every draw is keyed by (seed, epoch, batch), so a run that
was killed and resumed takes exactly the steps it would have taken.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..backbones.model import Encoded, MaskedDiffusionLM
from ..errors import RemaskError
from ..facts import write_atomically
from ..random import digest, numpy_generator

TAIL_SHORT = 24  # a short tail has 1..24 end tokens


def _shares(tails: tuple[float, float, float]) -> tuple[float, float, float]:
    if min(tails) < 0 or abs(sum(tails) - 1) > 1e-9:
        raise ValueError("shares must not be negative and must add up to 1")
    return tails


Tails = Annotated[tuple[float, float, float], AfterValidator(_shares)]  # shares of no, a short, and a full tail


class TrainConfig(BaseModel):
    """Hyper-parameters of masked-diffusion fine-tuning."""

    model_config = ConfigDict(extra="forbid")

    seed: int = 0
    epochs: int = Field(gt=0)
    batch_size: int = Field(default=32, gt=0)
    learning_rate: float = Field(default=4e-3, gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=1.0, gt=0)
    prompt_dropout: float = Field(default=0.15, ge=0, le=1)
    checkpoint_every: int = Field(default=20, gt=0, description="epochs between checkpoints")
    tails: Tails = Field(
        default=(0.4, 0.4, 0.2),
        description="shares of batches with no end tokens behind the answer, with a few, and with as many as fill gen_length",
    )
    tail_weight: float = Field(default=0.1, ge=0, description="loss weight of end tokens after the first one")


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bf16 autocast is faster than fp32 there: always on CUDA, on CPUs with AMX or AVX512-BF16."""
    if device.type != "cpu":
        return True
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def train(
    lm: MaskedDiffusionLM, rows: Sequence[Encoded], config: TrainConfig, out: Path, *, resume: bool = False
) -> dict[str, Any]:
    """Fine-tune all weights of `lm` in place on `rows`; returns what was done (epochs, steps, seconds, losses).

    Checkpoints go to `out/checkpoint.safetensors`; with `resume` the run continues from there.

    Raises:
        RemaskError: no rows, an intervention attached, loss not finite, or a checkpoint of another run.
    """
    if not rows:
        raise RemaskError("nothing to teach: the data holds no rows")
    if lm.attached:
        raise RemaskError(f"{lm.name} has {lm.attached[0].kind} attached; detach it before teaching")
    lm.model.requires_grad_(True)
    try:
        return _train(lm, rows, config, out / "checkpoint.safetensors", resume)
    finally:
        lm.model.requires_grad_(False)


def _train(
    lm: MaskedDiffusionLM, rows: Sequence[Encoded], config: TrainConfig, checkpoint: Path, resume: bool
) -> dict[str, Any]:
    parameters = list(lm.model.parameters())
    optimizers = _optimizers(lm, config)
    identity = {"config": config.model_dump_json(), "data": digest(*(row.ids for row in rows))}
    named = dict(lm.model.named_parameters())
    restored = load_checkpoint(checkpoint, named, optimizers, identity) if resume else None
    epoch, losses, seconds = (0, [], 0.0) if restored is None else restored
    steps_per_epoch = math.ceil(len(rows) / config.batch_size)
    total = config.epochs * steps_per_epoch
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("teaching", total=total, completed=epoch * steps_per_epoch)
        while epoch < config.epochs:
            started, running = time.perf_counter(), []
            for batch_index, batch in enumerate(batches(rows, config, epoch, lm.spec.gen_length, lm.spec.max_length)):
                factor = schedule(epoch * steps_per_epoch + batch_index, total, config.warmup)
                loss = masked_loss(lm, batch, config, (epoch, batch_index))
                lm.model.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, config.clip)
                for optimizer in optimizers:
                    optimizer.param_groups[0]["lr"] = config.learning_rate * factor
                    optimizer.step()
                running.append(float(loss.detach()))
                progress.advance(task)
            epoch += 1
            losses.append(float(np.mean(running)))
            seconds += time.perf_counter() - started
            progress.update(task, description=f"teaching, loss {losses[-1]:.3f}")
            if not math.isfinite(losses[-1]):
                raise RemaskError(f"epoch {epoch}: the loss is not finite; lower learning_rate ({config.learning_rate})")
            if epoch % config.checkpoint_every == 0 or epoch == config.epochs:
                save_checkpoint(checkpoint, named, optimizers, identity, (epoch, losses, seconds))
    return {
        "rows": len(rows),
        "epochs": epoch,
        "steps": total,
        "seconds": round(seconds, 1),
        "final_loss": losses[-1],
        "losses": [round(value, 4) for value in losses],
    }


def _optimizers(lm: MaskedDiffusionLM, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon on the blocks' matrices, AdamW on the rest; one learning rate (Muon's update has AdamW's scale).

    From scratch, AdamW alone stays far longer on the unigram plateau (docs/decisions.md).
    """
    matrices = [p for p in lm.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in lm.model.parameters() if id(p) not in chosen]
    rate, decay = config.learning_rate, config.weight_decay
    return [
        torch.optim.Muon(matrices, lr=rate, momentum=0.95, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=decay, fused=True),
    ]


def batches(
    rows: Sequence[Encoded], config: TrainConfig, epoch: int, gen_length: int, max_length: int
) -> Iterator[dict[str, Any]]:
    """Batches of rows of similar length, filled up with end tokens to one canvas length, in shuffled order."""
    rng = numpy_generator(config.seed, "batches", epoch)
    noise = rng.uniform(0, 6, len(rows))
    order = np.argsort([len(row.ids) for row in rows] + noise)
    groups = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
    for g in rng.permutation(len(groups)):
        chosen = [rows[i] for i in groups[g]]
        length = max(len(row.ids) for row in chosen)
        kind = rng.choice(3, p=config.tails)
        if kind == 1:
            length += int(rng.integers(1, TAIL_SHORT + 1))
        elif kind == 2:
            length = max(length, max(len(row.prompt_ids) for row in chosen) + gen_length)
        yield {"rows": chosen, "length": min(length, max_length)}


def masked_loss(lm: MaskedDiffusionLM, batch: dict[str, Any], config: TrainConfig, key: tuple[int, int]) -> Tensor:
    """Weighted mean cross-entropy over hidden response tokens."""
    rows, length = batch["rows"], batch["length"]
    rng = numpy_generator(config.seed, "noise", *key)
    clean = np.full((len(rows), length), lm.spec.eos_id)
    weight = np.zeros((len(rows), length), dtype=np.float32)
    hidden = np.zeros((len(rows), length), dtype=bool)
    for i, row in enumerate(rows):
        start, end = len(row.prompt_ids), len(row.ids)
        clean[i, :end] = row.ids
        weight[i, start : end + 1] = 1.0
        weight[i, end + 1 :] = config.tail_weight
        count = max(1, math.ceil((1.0 - rng.random()) * (length - start)))
        hidden[i, start + np.argsort(rng.random(length - start))[:count]] = True
    noisy = np.where(hidden, lm.spec.mask_id, clean)
    for dropped in np.nonzero(rng.random(len(rows)) < config.prompt_dropout)[0]:
        noisy[dropped, : len(rows[dropped].prompt_ids)] = lm.spec.mask_id
    device = lm.device
    positions = torch.from_numpy(hidden).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=fast_bfloat16(device)):
        logits = lm.logits(torch.from_numpy(noisy).to(device), positions=positions)
    losses = nn.functional.cross_entropy(logits.float(), torch.from_numpy(clean).to(device)[positions], reduction="none")
    weights = torch.from_numpy(weight).to(device)[positions]
    return (losses * weights).sum() / weights.sum()


def schedule(step: int, total: int, warmup: float) -> float:
    """Factor on the learning rate: linear over the share `warmup` of the `total` steps, then cosine to zero."""
    ramp = max(1, int(warmup * total))
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, total - ramp)))


def save_checkpoint(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    identity: Mapping[str, str],
    progress: Any,
) -> None:
    """Write parameters, optimizer state and progress as one safetensors file, atomically.

    Args:
        parameters: what is trained, by name.
        identity: `config` and `data` of the run; another run's checkpoint is refused on loading.
        progress: anything that JSON holds.
    """
    state = {f"model.{name}": value.detach().contiguous() for name, value in parameters.items()}
    for name, parameter in parameters.items():
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                state[f"optimizer.{key}.{name}"] = torch.as_tensor(value).detach().clone().contiguous()
    write_atomically(path, save(state, metadata={**identity, "progress": json.dumps(progress)}))


def load_checkpoint(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    identity: Mapping[str, str],
) -> Any:
    """Put a checkpoint's state into `parameters` and `optimizers`; returns its progress, None where there is no file.

    Raises:
        RemaskError: damaged file, or a checkpoint of another run.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as stream:
            header = stream.metadata() or {}
    except SafetensorError as error:
        raise RemaskError(f"{path} is damaged ({error}); delete it to start again") from None
    for key, what in (("config", "hyper-parameters"), ("data", "data")):
        if header.get(key) != identity[key]:
            raise RemaskError(f"{path} belongs to a run with other {what}; delete it or choose another --out")
    state = load_file(path)
    names = {id(parameter): name for name, parameter in parameters.items()}
    for optimizer in optimizers:
        for parameter in optimizer.param_groups[0]["params"]:
            name = names[id(parameter)]
            parameter.data.copy_(state[f"model.{name}"])
            keys = [key for key in state if key.startswith("optimizer.") and key.endswith(f".{name}")]
            optimizer.state[parameter] = {key.split(".")[1]: state[key].to(parameter.device) for key in keys}
    return json.loads(header["progress"])
