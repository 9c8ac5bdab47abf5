"""The protocol of a trace: what is corrupted, what is restored, what is read, and how often.

A fact is carried by a site if restoring that site's clean output, in a run whose subject was corrupted, brings the object back.
In a diffusion model there is a second axis, the denoising step at which the site is restored (TimeROME-DLM, arXiv 2606.12841,
equations 2-5). Every choice that the paper leaves open is a field here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..backbones.model import MODULES, Encoded, MaskedDiffusionLM, Module
from ..diffusion.sampler import SamplerConfig, choose, transfer_counts
from ..errors import RemaskError
from ..random import normal

Corruption = Literal["add", "replace", "mask"]
View = Literal["subject", "first", "last"]
Readout = Literal["frozen", "raw"]


@dataclass(frozen=True)
class TraceConfig:
    """Protocol of a trace.

    Attributes:
        steps: denoising steps; capped at each fact's number of object tokens (one token a step at most).
        draws: noise samples a fact; effects are their mean. `mask` has no noise and so always one.
        corruption: what happens to the subject's embeddings: `add` Gaussian noise, `replace` them by it, or `mask`: the
            subject's tokens become mask tokens.
        noise: standard deviation of the noise, in standard deviations of the subject's own embedding entries (ROME: 3).
        fresh: new noise at every step; otherwise it is fixed for a (fact, draw).
        view: the subject tokens that are restored: all of them, the first, the last. All of them are corrupted.
        readout: `frozen` reads an object token while it is masked and keeps the value of the step that committed it; `raw`
            reads it on, although a model was never taught to predict a token that it sees.
        modules: which modules of each block are restored.
        seed: of the noise.
    """

    steps: int = 8
    draws: int = 3
    corruption: Corruption = "add"
    noise: float = 3.0
    fresh: bool = False
    view: View = "subject"
    readout: Readout = "frozen"
    modules: tuple[Module, ...] = MODULES
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.draws < 1 or self.noise < 0:
            raise RemaskError("a trace needs steps >= 1, draws >= 1 and noise >= 0")
        for field, known in (("corruption", Corruption), ("view", View), ("readout", Readout)):
            if getattr(self, field) not in get_args(known):
                raise RemaskError(f"{field} {getattr(self, field)!r} is unknown; choose one of {', '.join(get_args(known))}")
        unknown = set(self.modules) - set(MODULES)
        if unknown or not self.modules or len(set(self.modules)) < len(self.modules):
            raise RemaskError(f"modules {', '.join(self.modules)!r}: name each of {', '.join(MODULES)} at most once")
        object.__setattr__(self, "modules", tuple(self.modules))
        if self.corruption == "mask":
            object.__setattr__(self, "draws", 1)

    def steps_of(self, row: Encoded) -> int:
        """Denoising steps of a fact."""
        return min(self.steps, len(row.answer_ids))

    def restored(self, row: Encoded) -> range:
        """Prompt positions that are restored."""
        start, stop = row.subject
        return {"subject": range(start, stop), "first": range(start, start + 1), "last": range(stop - 1, stop)}[self.view]


def check_rows(rows: Sequence[Encoded]) -> None:
    """Refuse what cannot be traced.

    Raises:
        RemaskError: no facts, an id twice, or a fact without subject tokens; names the fact.
    """
    if not rows:
        raise RemaskError("nothing to trace: no facts")
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise RemaskError(f"fact {row.id!r} is given twice; ids must be unique")
        if not 0 <= row.subject[0] < row.subject[1] <= len(row.prompt_ids):
            raise RemaskError(f"fact {row.id!r} has no subject inside its prompt; name the span that is to be corrupted")
        seen.add(row.id)


def blank(lm: MaskedDiffusionLM, row: Encoded) -> Tensor:
    """The canvas before the first step: prompt and masks, [L]."""
    return torch.tensor(row.prompt_ids + (lm.spec.mask_id,) * len(row.answer_ids), device=lm.device)


def commits_at(row: Encoded, steps: int) -> list[int]:
    """Object tokens that commit at each step: equal split, remainder first (LLaDA)."""
    return [int(n) for n in transfer_counts(torch.ones(1, len(row.answer_ids)), steps)[0]]


def advance(lm: MaskedDiffusionLM, canvas: Tensor, slots: Tensor, logits: Tensor, counts: Tensor) -> Tensor:
    """One greedy denoising step from known logits: the most confident masked object positions get their likeliest token.

    Confidences are taken in fp64, where two that differ do not tie by rounding.

    Args:
        canvas: [B, L]; slots: [B, L] bool, object positions; logits: [n, V] at the slots in row-major order.
        counts: [B], tokens to commit.

    Returns:
        The next canvas, [B, L].
    """
    masked = slots & (canvas == lm.spec.mask_id)
    return choose(lm, canvas, masked, logits[masked[slots]], counts, [""] * len(canvas), _GREEDY)


_GREEDY = SamplerConfig(gen_length=1, fp64_confidence=True)


class Corruptor:
    """Corrupts the subject of (fact, draw) pairs, the same way in every run that asks for the same pair and step."""

    def __init__(self, lm: MaskedDiffusionLM, config: TraceConfig) -> None:
        self.lm, self.config = lm, config

    def canvas(self, row: Encoded, canvas: Tensor) -> Tensor:
        """The canvas [..., L] that the model sees instead of `canvas`."""
        if self.config.corruption != "mask":
            return canvas
        canvas = canvas.clone()
        canvas[..., slice(*row.subject)] = self.lm.spec.mask_id
        return canvas

    def noise(self, row: Encoded, draw: int, step: int) -> Tensor | None:
        """[|S|, d] in the embedding's dtype, keyed by (seed, fact, draw), and by the step if it is fresh; None for `mask`."""
        if self.config.corruption == "mask":
            return None
        table = self.lm.embedding.weight
        ids = torch.tensor(row.prompt_ids[slice(*row.subject)], device=self.lm.device)
        scale = self.config.noise * table[ids].float().std(correction=int(table.shape[1] * len(ids) > 1))
        when = (step,) if self.config.fresh else ()
        drawn = normal((len(ids), self.lm.hidden_size), self.config.seed, "subject", row.id, draw, *when)
        return (drawn.to(self.lm.device) * scale).to(table.dtype)

    @contextlib.contextmanager
    def acting(self, where: Tensor, noise: Tensor | None) -> Iterator[None]:
        """Within the block, the embeddings at `where` [B, L] bool get `noise` [n, d] (row-major order of `where`)."""
        if noise is None:
            yield
            return

        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[where] = noise if self.config.corruption == "replace" else output[where] + noise
            return output

        handle = self.lm.embedding.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()
