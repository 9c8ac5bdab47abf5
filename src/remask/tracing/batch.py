"""Facts of equal shape that are traced together: their clean runs, their corruption, and how their sequences are read."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backbones.inspection import available_memory
from ..backbones.model import Encoded, MaskedDiffusionLM
from ..diffusion.likelihood import target_logprobs
from .protocol import Corruptor, TraceConfig, advance, blank, commits_at
from .wavefront import Patches, Sources, limits, wavefront

FACTS_A_BATCH = 16  # what is finished, and resumed, at a time


def batches(rows: Sequence[Encoded], config: TraceConfig) -> list[list[int]]:
    """Row indices that are traced together: of equal canvas length and number of steps, whatever else is traced."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[len(row.ids), config.steps_of(row)].append(index)
    return [group[start : start + FACTS_A_BATCH] for group in groups.values() for start in range(0, len(group), FACTS_A_BATCH)]


@dataclass(frozen=True)
class Units:
    """Corrupted sequences: fact, draw and step of each, [U], and its canvas [U, L]."""

    fact: Tensor
    draw: Tensor
    step: Tensor
    canvas: Tensor


class Batch:
    """Facts of equal canvas length and steps, their clean runs, and how their sequences are read.

    Shapes: F facts, L positions, T steps; values are log-probabilities at every position, 0 outside the object.
    """

    def __init__(self, lm: MaskedDiffusionLM, rows: Sequence[Encoded], config: TraceConfig, memory: int | None) -> None:
        self.lm, self.rows, self.config = lm, list(rows), config
        self.corruptor = Corruptor(lm, config)
        self.steps = config.steps_of(rows[0])
        length = len(rows[0].ids)
        self.slots = _spans([range(*row.answer) for row in rows], length, lm.device)
        self.subject = _spans([range(*row.subject) for row in rows], length, lm.device)
        self.restored = _spans([config.restored(row) for row in rows], length, lm.device)
        self.ids = torch.tensor([row.ids for row in rows], device=lm.device)
        self.counts = torch.tensor([commits_at(row, self.steps) for row in rows])
        self.memory = default_memory(lm) if memory is None else memory
        self.limit, self.head_limit = limits(lm, length, max(len(row.answer_ids) for row in rows), self.memory)
        self.canvases: list[Tensor] = []  # clean run: T + 1 of [F, L]
        self.clean: list[Tensor] = []  # its values: T of [F, L]

    def take(self, facts: list[int]) -> Batch:
        """The batch of some of the facts."""
        part = Batch(self.lm, [self.rows[i] for i in facts], self.config, self.memory)
        part.canvases = [canvas[facts] for canvas in self.canvases]
        part.clean = [values[facts] for values in self.clean]
        return part

    def run_clean(self) -> None:
        """Denoise every fact without corruption."""
        everyone = torch.arange(len(self.rows), device=self.lm.device)
        self.canvases = [torch.stack([blank(self.lm, row) for row in self.rows])]
        for step in range(self.steps):
            values, after = self.forward(everyone, self.canvases[-1], step)
            self.clean.append(self.keep(self.clean[-1] if step else None, values, self.masked(everyone, self.canvases[-1])))
            self.canvases.append(after)

    def knows(self) -> list[bool]:
        """Whether the clean run ends with the object."""
        return (self.canvases[-1] == self.ids).all(dim=1).tolist()

    def masked(self, fact: Tensor, canvas: Tensor) -> Tensor:
        """Object positions [n, L] that are masked."""
        return (self.slots[fact] & (canvas == self.lm.spec.mask_id)).cpu()

    def keep(self, before: Tensor | None, read: Tensor, masked: Tensor) -> Tensor:
        """Values after a step under the readout: what was read, or for committed tokens what they were committed with."""
        return read if before is None or self.config.readout == "raw" else torch.where(masked, read, before)

    def placed(self, canvas: Tensor, fact: Tensor) -> Tensor:
        """Share of the object tokens that stand rightly, [n]."""
        slots = self.slots[fact]
        return (((canvas == self.ids[fact]) & slots).sum(1) / slots.sum(1)).double().cpu()

    def forward(self, fact: Tensor, canvas: Tensor, step: int, draw: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Values [n, L] and the next canvases [n, L] of one step; corrupted where `draw` [n] is given."""
        values, after = [], []
        for part in torch.arange(len(fact), device=fact.device).split(self.limit):
            seen, where, noise = canvas[part], None, None
            if draw is not None:
                seen, where, noise = self.corrupted(fact[part], draw[part], torch.full_like(part, step), seen)
            self.lm.clock.step = step
            with self.corruptor.acting(where, noise) if where is not None else contextlib.nullcontext():
                hidden = self.lm.run_to(self.lm.num_layers - 1, seen)
            read, state = self.read(hidden, fact[part], canvas[part], torch.full_like(part, step))
            values.append(read)
            after.append(state)
        return torch.cat(values), torch.cat(after)

    def corrupted(self, fact: Tensor, draw: Tensor, step: Tensor, canvas: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Canvases [n, L] as the model sees them, corrupted positions [n, L], and the noise for them."""
        keys = list(zip(fact.tolist(), draw.tolist(), step.tolist(), strict=True))
        seen = torch.stack([self.corruptor.canvas(self.rows[f], row) for (f, _, _), row in zip(keys, canvas, strict=True)])
        noise = [self.corruptor.noise(self.rows[f], n, s) for f, n, s in keys]
        return seen, self.subject[fact], None if noise[0] is None else torch.cat([part for part in noise if part is not None])

    def read(self, hidden: Tensor, fact: Tensor, canvas: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Values [n, L] of the last block's outputs [n, L, d], and the canvases [n, L] after the step commits."""
        values = torch.zeros(canvas.shape, dtype=torch.float64)
        after = []
        for part in torch.arange(len(hidden), device=hidden.device).split(self.head_limit):
            slots = self.slots[fact[part]]
            logits = self.lm.head(hidden[part], slots)
            read = torch.zeros(slots.shape, dtype=torch.float64)
            read[slots.cpu()] = target_logprobs(logits, self.ids[fact[part]][slots]).double().cpu()
            values[part.cpu()] = read
            counts = self.counts[fact[part].cpu(), step[part].cpu()]
            after.append(advance(self.lm, canvas[part], slots, logits, counts))
        return values, torch.cat(after)

    def run_wavefront(self, units: Units, part: Tensor, patches: Patches) -> Iterator[tuple[Tensor | None, Tensor, Tensor]]:
        """Read the corrupted sequences of the units `part`, and patches of them.

        Yields:
            (None, values, next canvases) of the units, and (indices of patches, values, next canvases), in several parts.
        """
        fact, canvas, step = units.fact[part], units.canvas[part], units.step[part]
        seen, where, noise = self.corrupted(fact, units.draw[part], step, canvas)
        pairs, clean_of = torch.stack([fact, step]).unique(dim=1, return_inverse=True)
        clean = torch.stack([self.canvases[s][f] for f, s in pairs.T.tolist()])
        sources = Sources(clean, seen, clean_of, where, noise)
        for index, hidden in wavefront(self.lm, self.corruptor, sources, patches, self.limit):
            of = torch.arange(len(part), device=part.device) if index is None else patches.unit[index]
            yield index, *self.read(hidden, fact[of], canvas[of], step[of])

    def every_site(self, fact: Tensor) -> Patches:
        """The subject restored at every layer and module of units [U]; patch (u * layers + l) * modules + m."""
        layers, modules = self.lm.num_layers, len(self.config.modules)
        number = torch.arange(len(fact) * layers * modules, device=fact.device)
        unit, layer = number // (layers * modules), number // modules % layers
        return Patches(unit, number % modules, layer, layer, self.restored[fact][unit], self.config.modules)

    def wavefronts(self, units: Units) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Values and next canvases of all units, [U, L], and of all their patches, [U, layers * modules, L]."""
        sites = self.lm.num_layers * len(self.config.modules)
        shape, device = units.canvas.shape, units.canvas.device
        values, after = torch.zeros(shape, dtype=torch.float64), torch.zeros_like(units.canvas)
        patched = torch.zeros(shape[0] * sites, shape[1], dtype=torch.float64)
        patched_after = torch.zeros(shape[0] * sites, shape[1], dtype=torch.long, device=device)
        for part in torch.arange(shape[0], device=device).split(max(1, self.limit // (2 + sites))):
            for index, read, state in self.run_wavefront(units, part, self.every_site(units.fact[part])):
                if index is None:
                    values[part.cpu()], after[part] = read, state
                else:
                    place = index + int(part[0]) * sites
                    patched[place.cpu()], patched_after[place] = read, state
        return values, after, patched.view(shape[0], sites, -1), patched_after.view(shape[0], sites, -1)


def _spans(spans: Sequence[range], length: int, device: torch.device) -> Tensor:
    """[rows, length] bool, true on each row's span."""
    mask = torch.zeros(len(spans), length, dtype=torch.bool, device=device)
    for row, span in zip(mask, spans, strict=True):
        row[span.start : span.stop] = True
    return mask


def default_memory(lm: MaskedDiffusionLM) -> int:
    """Bytes that activations may take unless told otherwise: half of what an accelerator has free; 512 MiB on a CPU."""
    return 512 * 2**20 if lm.device.type == "cpu" else available_memory(str(lm.device)) // 2


def precision(lm: MaskedDiffusionLM) -> str:
    """Of the forwards: the weights' dtype, or autocast."""
    kind = lm.device.type
    if torch.is_autocast_enabled(kind):
        return f"{_name(torch.get_autocast_dtype(kind))} autocast"
    return _name(lm.embedding.weight.dtype)


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype).removeprefix("torch."))


@contextlib.contextmanager
def clock_reset(lm: MaskedDiffusionLM) -> Iterator[None]:
    """The clock tells no step after the block, however it is left."""
    try:
        yield
    finally:
        lm.clock.step = None
