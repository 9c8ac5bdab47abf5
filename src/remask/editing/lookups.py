"""Where a locate-then-edit method looks facts up: the last subject token of canvases with the new object in its place.

Attention is not causal, so the masks of the object reach the subject's key. Keys and values are therefore read with as many
masks as at inference, and are means over states: everything hidden, as at the first denoising step, and partly revealed.

Shapes: n facts, B canvases, d hidden size, m MLP size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..backbones.model import Encoded, MaskedDiffusionLM, Site, capture
from ..diffusion.canvas import CanvasBatch, canvas_batches
from ..diffusion.masks import stratified_masks
from ..facts import Fact
from .config import PRESETS
from .mlp import mlp_keys


class LookupConfig(BaseModel):
    """The canvases of a fact and their states."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    states: Literal["partial", "full-mask"] = Field(
        default="partial", description="states of the object: partly revealed ones too, or only the fully masked one (naive)"
    )
    draws: int = Field(default=4, ge=1, description="partial states a step, stratified")
    ends: int = Field(default=1, ge=0, description="end tokens that belong to the new object")
    prefixes: tuple[str, ...] = Field(default=(), description="texts before the prompt, beside the bare one [5 sampled ones]")
    refusal: str = Field(default=PRESETS["default"].refusal, description="new object of a fact that has no target")
    seed: int = Field(default=0, description="seed of all masks")


@dataclass(frozen=True)
class LookupBatch:
    """Canvases of one length.

    Attributes:
        canvas: the clean canvases and their masks.
        ids: the canvases as the model sees them, [B, L].
        facts: index of each canvas's fact; last: its last subject token; share: its part in that fact's mean; [B] each.
    """

    canvas: CanvasBatch
    ids: Tensor
    facts: Tensor
    last: Tensor
    share: Tensor


@dataclass(frozen=True)
class Lookups:
    """Where values are looked up: the canvases of each fact, one a wording, each with the new object in its place.

    Attributes:
        rows: of all facts; owner: index of each row's fact.
        facts: their number, n.
    """

    rows: list[Encoded]
    owner: list[int]
    facts: int

    @classmethod
    def of(cls, lm: MaskedDiffusionLM, facts: Sequence[Fact], config: LookupConfig) -> Lookups:
        """Every wording of every fact.

        Raises:
            RemaskError: a new object without tokens, or too long a canvas; names the fact.
        """
        rows, owner = [], []
        for index, fact in enumerate(facts):
            for wording in (fact.prompt, *(f"{prefix} {fact.prompt}" for prefix in config.prefixes)):
                row = lm.encode(fact, prompt=wording, answer=config.refusal if fact.target is None else fact.target)
                rows.append(replace(row, answer_ids=row.answer_ids + (lm.spec.eos_id,) * config.ends))
                owner.append(index)
        return cls(rows, owner, len(facts))

    @classmethod
    def essence(cls, lm: MaskedDiffusionLM, facts: Sequence[Fact]) -> Lookups:
        """The prompt "{subject} is a" and one mask slot."""
        rows = [lm.encode(fact, prompt=f"{fact.subject} is a") for fact in facts]
        return cls([replace(row, answer_ids=(lm.spec.mask_id,)) for row in rows], list(range(len(facts))), len(facts))

    def bare(self) -> Lookups:
        """Without the prefixed wordings."""
        first = [self.owner.index(fact) for fact in range(self.facts)]
        return Lookups([self.rows[i] for i in first], list(range(self.facts)), self.facts)

    def without(self, done: Sequence[bool]) -> Lookups:
        """Without the rows of facts that are done; the facts keep their indices."""
        kept = [i for i, fact in enumerate(self.owner) if not done[fact]]
        return Lookups([self.rows[i] for i in kept], [self.owner[i] for i in kept], self.facts)

    def hidden(self) -> list[np.ndarray]:
        """The fully masked state of each row."""
        return [np.ones((1, len(row.answer_ids)), dtype=bool) for row in self.rows]

    def states(self, config: LookupConfig, step: int = 0) -> list[np.ndarray]:
        """The states of each row at a step of the optimisation, bool [draws, answer length]."""
        if config.states == "full-mask":
            return self.hidden()
        seed, draws = config.seed, config.draws
        drawn = (stratified_masks(len(row.answer_ids), draws, 1, seed, f"{row.id}/value/{step}") for row in self.rows)
        return list(drawn)

    def batches(self, lm: MaskedDiffusionLM, states: Sequence[np.ndarray]) -> Iterator[LookupBatch]:
        """All canvases, each distinct state once."""
        wordings = np.bincount(self.owner, minlength=self.facts)
        for canvas in canvas_batches(lm, self.rows, states):
            facts = [self.owner[row] for row in canvas.rows]
            drawn = zip(canvas.rows, facts, canvas.draws, strict=True)
            share = [len(draws) / len(states[row]) / wordings[fact] for row, fact, draws in drawn]
            yield LookupBatch(
                canvas,
                canvas.clean.masked_fill(canvas.masked, lm.spec.mask_id),
                torch.tensor(facts, device=lm.device),
                torch.tensor([self.rows[row].subject[1] - 1 for row in canvas.rows], device=lm.device),
                torch.tensor(share, dtype=torch.float64, device=lm.device),
            )


@torch.no_grad()
def read_subjects(
    lm: MaskedDiffusionLM, lookups: Lookups, states: Sequence[np.ndarray], layers: Sequence[int], site: Site
) -> tuple[dict[int, Tensor], Tensor]:
    """Mean keys [n, m] of each layer and mean outputs [n, d] of `site` at the last subject token, fp64 on lm's device."""
    sums: dict[Any, Tensor] = {}
    for batch in lookups.batches(lm, states):
        with mlp_keys(lm, layers) as keys, capture(lm, [site]) as outputs:
            lm.run_to(max([*layers, site.layer]), batch.ids)
        for name, hidden in (*keys.items(), (site, outputs[site])):
            read = hidden[torch.arange(len(hidden)), batch.last].double() * batch.share[:, None]
            sums.setdefault(name, read.new_zeros(lookups.facts, read.shape[1])).index_add_(0, batch.facts, read)
    return {layer: sums[layer] for layer in layers}, sums[site]


def key_states(lookups: Lookups, config: LookupConfig) -> list[np.ndarray]:
    """The states that keys are means over: everything masked, as at the first denoising step, and the partial ones."""
    if config.states == "full-mask":
        return lookups.hidden()
    return [np.concatenate(pair) for pair in zip(lookups.hidden(), lookups.states(config), strict=True)]
