"""Positional tracing, ROME's protocol on one state of the canvas: restore one token position at a time.

The trace of an autoregressive model has two axes, layer and token position; the comparison that TimeROME-DLM makes is between
that map and the map over layers and denoising steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ..backbones.model import Encoded, MaskedDiffusionLM
from ..errors import RemaskError
from ..tensorfile import write_tensors
from .batch import Batch, Units, batches, clock_reset
from .protocol import TraceConfig, check_rows
from .wavefront import Patches

CLASSES = (
    "before subject",
    "first subject",
    "middle subject",
    "last subject",
    "first after",
    "further",
    "last of prompt",
    "answer slots",
)


@dataclass(frozen=True)
class PositionTrace:
    """Effects of restoring single positions.

    Attributes:
        effects: one tensor a fact, [layer, module, position], nats, summed over object tokens, mean over noise draws.
        tokens: one text a position, for every fact.
        rows: the facts that were traced.
        modules: names of the module axis.
        window: layers that `attn` and `mlp` are restored in at once, centred at the layer (ROME: 10 of 48); `resid` has one.
        step: the denoising step whose canvas is read.
        draws: noise samples a fact.
        model: fingerprint.
    """

    effects: tuple[Tensor, ...]
    tokens: tuple[tuple[str, ...], ...]
    rows: tuple[Encoded, ...]
    modules: tuple[str, ...]
    window: int
    step: int
    draws: int
    model: str

    def save(self, path: str | Path) -> None:
        """Write safetensors (one tensor a fact, named by its id) with JSON metadata, atomically."""
        header = {
            "format": 1,
            "kind": "position trace",
            "model": self.model,
            "modules": list(self.modules),
            "window": self.window,
            "step": self.step,
            "draws": self.draws,
            "axes": ["layer", "module", "position"],
            "unit": "nats",
            "tokens": {row.id: list(texts) for row, texts in zip(self.rows, self.tokens, strict=True)},
            "classes": {row.id: list(position_classes(row)) for row in self.rows},
        }
        write_tensors(path, header, {row.id: effects for row, effects in zip(self.rows, self.effects, strict=True)})

    def by_class(self) -> Tensor:
        """Mean effect of every class of positions (`CLASSES`) of every fact, [fact, layer, module, class]; NaN where empty.

        Per object token, so that facts of different length can be averaged.
        """
        result = torch.full((len(self.rows), *self.effects[0].shape[:2], len(CLASSES)), torch.nan)
        for index, (row, effects) in enumerate(zip(self.rows, self.effects, strict=True)):
            kinds = position_classes(row)
            for column, kind in enumerate(CLASSES):
                where = [i for i, name in enumerate(kinds) if name == kind]
                if where:
                    result[index, :, :, column] = effects[:, :, where].mean(-1) / len(row.answer_ids)
        return result


def position_classes(row: Encoded) -> tuple[str, ...]:
    """The class of every position of the canvas; a subject of one token is the last of itself."""
    start, stop = row.subject
    end = len(row.prompt_ids)

    def kind(position: int) -> str:
        if position >= end:
            return "answer slots"
        if position < start:
            return "before subject"
        if position < stop:
            inner = "first subject" if position == start else "middle subject"
            return "last subject" if position == stop - 1 else inner
        if position == end - 1:
            return "last of prompt"
        return "first after" if position == stop else "further"

    return tuple(kind(position) for position in range(len(row.ids)))


@torch.inference_mode()
def trace_positions(
    lm: MaskedDiffusionLM,
    rows: Sequence[Encoded],
    config: TraceConfig | None = None,
    *,
    step: int = 0,
    window: int | None = None,
    keep_unknown: bool = False,
    memory: int | None = None,
    progress: bool = False,
) -> PositionTrace:
    """Restore every position of the canvas alone, at every layer and module, on the clean run's canvas of one step.

    Args:
        lm: the model.
        rows: the facts; those whose object the clean run does not produce are left out unless `keep_unknown`.
        config: the protocol; `view` and `readout` do not matter here.
        step: the denoising step; 0 = everything masked, the state that is closest to ROME's.
        window: layers in which `attn` and `mlp` are restored at once; by default a fifth of the model, as ROME's 10 of 48.
        memory: bytes that activations may take.
        progress: show a bar.

    Raises:
        RemaskError: no facts that the model knows, fewer steps than `step`, a window below 1, too little memory.
    """
    config = config or TraceConfig()
    window = max(1, lm.num_layers // 5) if window is None else window
    if window < 1:
        raise RemaskError(f"a window of {window} layers restores nothing; give at least 1")
    check_rows(rows)
    found: dict[str, Tensor] = {}
    for indices in track(batches(rows, config), "tracing positions", disable=not progress, console=Console(stderr=True)):
        batch = Batch(lm, [rows[i] for i in indices], config, memory)
        if not 0 <= step < batch.steps:
            raise RemaskError(f"fact {batch.rows[0].id!r} has {batch.steps} steps; there is no step {step}")
        with clock_reset(lm):
            batch.run_clean()
            known = [i for i, right in enumerate(batch.knows()) if right or keep_unknown]
            if known:
                found |= _restore_each(batch.take(known), step, window)
    kept = [row for row in rows if row.id in found]
    if not kept:
        raise RemaskError(
            f"{lm.name} does not produce the object of any of the {len(rows)} facts, so there is nothing to trace"
        )
    effects = tuple(found[row.id] for row in kept)
    tokens = tuple(_texts(lm, row) for row in kept)
    return PositionTrace(effects, tokens, tuple(kept), config.modules, window, step, config.draws, lm.fingerprint())


def _restore_each(batch: Batch, step: int, window: int) -> dict[str, Tensor]:
    """Effects [layer, module, position] by row name."""
    lm, config = batch.lm, batch.config
    layers, modules, length = lm.num_layers, len(config.modules), batch.ids.shape[1]
    sites = layers * modules * length
    pairs = torch.cartesian_prod(torch.arange(len(batch.rows)), torch.arange(config.draws)).view(-1, 2).to(lm.device)
    units = Units(pairs[:, 0], pairs[:, 1], torch.full_like(pairs[:, 0], step), batch.canvases[step][pairs[:, 0]])
    number = torch.arange(sites, device=lm.device)
    layer, module, position = number // (modules * length), number // length % modules, number % length
    residual = torch.tensor([name == "resid" for name in config.modules], device=lm.device)[module]
    first = torch.where(residual, layer, (layer - window // 2).clamp_min(0))
    last = torch.where(residual, layer, (layer - window // 2 + window - 1).clamp_max(layers - 1))
    where = torch.nn.functional.one_hot(position, length).bool()
    total = torch.zeros(len(batch.rows), sites, dtype=torch.float64)
    for unit in torch.arange(len(pairs), device=lm.device).split(1):  # its patches fill a batch
        patches = Patches(torch.zeros_like(number), module, first, last, where, config.modules)
        values = torch.zeros(sites, dtype=torch.float64)
        base = torch.zeros((), dtype=torch.float64)
        for index, read, _ in batch.run_wavefront(units, unit, patches):
            if index is None:
                base = read.sum()
            else:
                values[index.cpu()] = read.sum(-1)
        total[pairs[int(unit), 0]] += (values - base) / config.draws
    return {row.id: values.view(layers, modules, length).float() for row, values in zip(batch.rows, total, strict=True)}


def _texts(lm: MaskedDiffusionLM, row: Encoded) -> tuple[str, ...]:
    """What stands at every position: the prompt's tokens, and masks."""
    prompt = [str(i) if lm.tokenizer is None else str(lm.tokenizer.decode([i])).strip() for i in row.prompt_ids]
    return (*prompt, *["[mask]"] * len(row.answer_ids))
