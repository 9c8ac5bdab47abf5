"""Temporal Indirect Effects (TIE), fast and exact.

`exact` computes the numbers of the reference for a fraction of its work, by three identities:

- Between steps an MDLM carries nothing but the canvas. After the restored step, two patched runs of a (fact, draw) that
  committed the same tokens have the same future, so it is computed once; that of a run that committed what the corrupted run
  did is already known.
- A module restored at layer l leaves the blocks below l alone: only the blocks above run (a layer prefix).
- Restoring the attention or the MLP output of block l replaces the block's output at the restored positions by something that
  is computed from these positions alone, so the three modules of a layer share one pass through the block.

Clean, corrupted and patched sequences move up through the layers in one batch (a wavefront), so no activation is stored.

`sweep` is another estimand: the canvases of all steps are the clean run's, so all steps are traced in one pass and only the
effect on the restored step itself is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ..backbones.model import Encoded, MaskedDiffusionLM
from ..errors import RemaskError
from .batch import Batch, Units, batches, clock_reset, precision
from .effects import Effects, Mode, Trace, assemble, check_mode, join
from .protocol import TraceConfig, check_rows
from .reference import reference_effects


def trace(
    lm: MaskedDiffusionLM,
    rows: Sequence[Encoded],
    config: TraceConfig | None = None,
    *,
    mode: Mode = "exact",
    facts: Sequence[str] | None = None,
    keep_unknown: bool = False,
    memory: int | None = None,
    progress: bool = False,
) -> Trace:
    """Trace every fact over layers x modules x steps.

    Args:
        lm: the model, with whatever is attached to it.
        rows: the facts; several rows may word one fact.
        config: the protocol.
        mode: `exact`, `sweep` (another estimand, see the module) or `reference` (hooks; slow).
        facts: the fact that each row words; the rows' own ids by default.
        keep_unknown: trace also facts whose object the clean run does not produce. They are left out otherwise, as ROME does,
            and named in `Trace.unknown`.
        memory: bytes that activations may take; by default half of what is free.
        progress: show a bar.

    Raises:
        RemaskError: no facts, a fact without a subject, an object that the model knows of no fact, too little memory.
    """
    config = config or TraceConfig()
    check_rows(rows)
    names = dict(zip((row.id for row in rows), facts or [row.id for row in rows], strict=True))
    options: dict[str, Any] = {
        "mode": mode,
        "facts": names,
        "model": lm.fingerprint(),
        "keep_unknown": keep_unknown,
        "memory": memory,
    }
    parts = [
        trace_batch(lm, [rows[i] for i in batch], config, **options)
        for batch in track(batches(rows, config), "tracing", disable=not progress, console=Console(stderr=True))
    ]
    result = join(parts, [row.id for row in rows])
    check_known(result, lm.name)
    return result


def check_known(result: Trace, model: str, purpose: str = "facts") -> None:
    """Refuse a trace without facts; `purpose` says of what.

    Raises:
        RemaskError: every fact was left out.
    """
    if not result.ids:
        raise RemaskError(
            f"{purpose}: {model} does not produce the object of any of the {len(result.unknown)} facts, nothing is left; "
            "give facts that it knows, or keep unknown ones (--keep-unknown)"
        )


@torch.inference_mode()
def trace_batch(
    lm: MaskedDiffusionLM,
    rows: Sequence[Encoded],
    config: TraceConfig,
    *,
    mode: Mode,
    facts: Mapping[str, str],
    model: str,
    keep_unknown: bool,
    memory: int | None,
) -> Trace:
    """One batch of `batches`; a trace without rows when the model knows none of them.

    `facts` maps row names to facts, `model` is the fingerprint; the rest is as in `trace`.
    """
    check_mode(mode)
    batch = Batch(lm, rows, config, memory)
    with clock_reset(lm):
        batch.run_clean()
        known = [i for i, right in enumerate(batch.knows()) if right or keep_unknown]
        kept = [rows[i] for i in known]
        if mode == "reference":
            measured = [reference_effects(lm, row, config) for row in kept]
        else:
            measured = (_Exact if mode == "exact" else _Sweep)(batch.take(known)).run() if known else []
    return assemble(
        kept,
        measured,
        lm.num_layers,
        batch.steps,
        facts=tuple(facts[row.id] for row in kept),
        unknown=tuple(row.id for i, row in enumerate(rows) if i not in known),
        config=config,
        mode=mode,
        model=model,
        precision=precision(lm),
    )


class _Exact:
    """Free-running effects of a batch, step by step; a *node* is a canvas that some run of a (fact, draw) has at a step."""

    def __init__(self, batch: Batch) -> None:
        self.batch, config = batch, batch.config
        pairs = torch.cartesian_prod(torch.arange(len(batch.rows)), torch.arange(config.draws)).to(batch.lm.device)
        self.fact, self.draw = pairs.view(-1, 2).unbind(1)
        self.sites = batch.lm.num_layers * len(config.modules)
        steps, units = batch.steps, len(self.fact)
        self.effects = torch.full((units, self.sites, steps, steps), torch.nan, dtype=torch.float64)
        self.corrupted = torch.zeros(units, steps, dtype=torch.float64)
        self.placed = torch.zeros(units, steps, dtype=torch.float64)

    def run(self) -> list[Effects]:
        """Trace all facts."""
        batch, units = self.batch, len(self.fact)
        canvas, owner = batch.canvases[0][self.fact], torch.arange(units)  # nodes: the corrupted runs first
        kept: Tensor | None = None  # values of the corrupted runs, [U, L]
        runs = torch.zeros(units, self.sites, 0, dtype=torch.long)  # node of every patched run, by the step it was patched at
        values = torch.zeros(units, self.sites, 0, canvas.shape[1], dtype=torch.float64)
        for step in range(batch.steps):
            base, after, patched, patched_after = batch.wavefronts(
                Units(self.fact, self.draw, torch.full_like(self.fact, step), canvas[:units])
            )
            if len(canvas) > units:  # runs that went another way
                mine = owner[units:].to(canvas.device)
                read, state = batch.forward(self.fact[mine], canvas[units:], step, self.draw[mine])
                base, after = torch.cat([base, read]), torch.cat([after, state])
            masked = batch.masked(self.fact[owner.to(canvas.device)], canvas)
            started = batch.keep(_over(kept), patched, masked[:units, None])
            values = torch.cat([batch.keep(values, base[runs], masked[runs]), started.unsqueeze(2)], dim=2)
            kept = batch.keep(kept, base[:units], masked[:units])
            self.effects[:, :, : step + 1, step] = values.sum(-1) - kept.sum(-1)[:, None, None]
            self.corrupted[:, step] = kept.sum(-1)
            self.placed[:, step] = batch.placed(after[:units], self.fact)
            if step + 1 < batch.steps:
                follow = [after[:units], after[units:], patched_after.flatten(0, 1)]
                owners = torch.cat([torch.arange(units), owner[units:], torch.arange(units).repeat_interleave(self.sites)])
                canvas, owner, place = _distinct(torch.cat(follow), owners, units)
                nodes = len(base)
                runs = torch.cat([place[runs], place[nodes:].view(units, self.sites, 1)], dim=2)
        return self._by_fact()

    def _by_fact(self) -> list[Effects]:
        batch, config = self.batch, self.batch.config
        shape = (batch.lm.num_layers, len(config.modules), batch.steps, batch.steps)
        found = []
        for fact in range(len(batch.rows)):
            mine = slice(fact * config.draws, (fact + 1) * config.draws)
            found.append(_effects(batch, fact, self.effects[mine].reshape(-1, *shape), self.corrupted[mine], self.placed[mine]))
        return found


class _Sweep:
    """Effects on the restored step itself, on the clean run's canvases, all steps in one pass."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def run(self) -> list[Effects]:
        """Trace all facts."""
        batch, config = self.batch, self.batch.config
        facts, draws, steps = len(batch.rows), config.draws, batch.steps
        keys = torch.cartesian_prod(torch.arange(facts), torch.arange(draws), torch.arange(steps)).view(-1, 3)
        fact, draw, step = keys.to(batch.lm.device).unbind(1)
        canvas = torch.stack(batch.canvases[:steps], dim=1)[fact, step]
        base, after, patched, _ = batch.wavefronts(Units(fact, draw, step, canvas))
        masked = batch.masked(fact, canvas)
        change = patched - base[:, None]
        if config.readout == "frozen":  # committed tokens keep their value, whatever is restored now
            change = change * masked[:, None]
        shape = (facts, draws, steps)
        effects = torch.full((*shape, change.shape[1], steps), torch.nan, dtype=torch.float64)
        own = torch.arange(steps)
        effects[:, :, own, :, own] = change.sum(-1).view(*shape, -1).permute(2, 0, 1, 3)
        effects = effects.transpose(2, 3).unflatten(2, (batch.lm.num_layers, len(config.modules)))
        placed = batch.placed(after, fact).view(shape)
        read, hidden = base.view(*shape, -1), masked.view(*shape, -1)
        kept = read[:, :, 0]
        corrupted = [kept.sum(-1)]
        for step_index in range(1, steps):
            kept = batch.keep(kept, read[:, :, step_index], hidden[:, :, step_index])
            corrupted.append(kept.sum(-1))
        runs = torch.stack(corrupted, dim=-1)
        return [_effects(batch, i, effects[i], runs[i], placed[i]) for i in range(facts)]


def _effects(batch: Batch, fact: int, effects: Tensor, corrupted: Tensor, placed: Tensor) -> Effects:
    """What was measured on one fact, with its clean run."""
    index = torch.tensor([fact], device=batch.lm.device)
    clean = torch.stack([values[fact].sum() for values in batch.clean])
    clean_placed = torch.cat([batch.placed(canvas[index], index) for canvas in batch.canvases[1:]])
    return Effects(effects, clean, corrupted, torch.stack([clean_placed, placed.mean(0)]))


def _distinct(canvas: Tensor, owner: Tensor, units: int) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct (owner, canvas) pairs, the first `units` kept as they are; owners of them, and the place of every input."""
    found: dict[tuple[int, bytes], int] = {}
    places = []
    rows = canvas.cpu().numpy()
    chosen: list[int] = []
    for index, (unit, row) in enumerate(zip(owner.tolist(), rows, strict=True)):
        key = (unit, row.tobytes())
        if key not in found:
            found[key] = len(chosen)
            chosen.append(index)
        places.append(found[key])
    keep = torch.tensor(chosen)
    return canvas[keep.to(canvas.device)], owner[keep], torch.tensor(places)


def _over(kept: Tensor | None) -> Tensor | None:
    return None if kept is None else kept[:, None]
