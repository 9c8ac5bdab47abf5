"""The rows of a run: checked, encoded, and dealt out in paired batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...backbones.model import Encoded, MaskedDiffusionLM
from ...errors import RemaskError
from ...facts import Fact, check_unique_ids
from ...random import digest, numpy_generator
from ..states import Noise, States, draw_states
from ..trainer import TAIL_SHORT
from .config import UnlearnConfig

EVALUATED = 64  # rows of a set that a point of the curve is measured on, at most


@dataclass(frozen=True)
class Rows:
    """Encoded rows; `refusals` are the forget rows with a refusal as answer, in their order."""

    forget: list[Encoded]
    refusals: list[Encoded]
    retain: list[Encoded]
    validation: list[Encoded]

    @property
    def digest(self) -> str:
        """Tells data apart."""
        groups = (self.forget, self.refusals, self.retain, self.validation)
        return digest(*(digest(*((row.id, row.prompt_ids, row.answer_ids) for row in group)) for group in groups))


@dataclass(frozen=True)
class Batch:
    """States of one step, or of a share of it; `preferred` and `retain` where the method and its term read them."""

    forget: States
    preferred: States | None
    retain: States | None


def prepare_rows(
    lm: MaskedDiffusionLM, forget: Sequence[Fact], retain: Sequence[Fact], validation: Sequence[Fact], config: UnlearnConfig
) -> Rows:
    """Check and encode the sets of a run.

    Raises:
        RemaskError: an empty forget set, no retain rows for a term that reads them, or a row that is in two sets.
    """
    if not forget:
        raise RemaskError("the forget set is empty; give it at least one row")
    needs = config.definition.needs_retain or config.retain not in ("default", "none")
    if needs and not retain:
        what = config.method if config.definition.needs_retain else f"retain term {config.retain}"
        raise RemaskError(f"{what} needs retain rows and the retain set is empty; give it rows")
    named = {"forget": forget, "retain": retain, "validation": validation}
    for name, facts in named.items():
        check_unique_ids(facts, f"{name} set")
    _check_disjoint(named)
    refused = "preferred" in config.definition.needs
    return Rows(
        [lm.encode(fact) for fact in forget],
        [lm.encode(fact, answer=config.refusal) for fact in forget] if refused else [],
        [lm.encode(fact) for fact in retain],
        [lm.encode(fact) for fact in validation],
    )


def _check_disjoint(named: dict[str, Sequence[Fact]]) -> None:
    ids: dict[str, str] = {}
    texts: dict[tuple[str, str], tuple[str, str]] = {}
    for name, facts in named.items():
        for fact in facts:
            if (other := ids.setdefault(fact.id, name)) != name:
                raise RemaskError(f"row {fact.id!r} is in the {other} set and in the {name} set; take it out of one")
            known, twin = texts.setdefault((fact.prompt, fact.answer), (name, fact.id))
            if known != name:
                raise RemaskError(
                    f"row {fact.id!r} of the {name} set has prompt and answer of {twin!r} of the {known} set; take one out"
                )


def epoch_order(total: int, first: int, size: int, seed: int, purpose: str) -> np.ndarray:
    """Indices of draws `first` .. `first + size - 1` of `total` rows that are shuffled anew in every epoch, [size]."""
    epochs = range(first // total, (first + size - 1) // total + 1)
    order = np.concatenate([numpy_generator(seed, purpose, epoch).permutation(total) for epoch in epochs])
    return order[first - epochs[0] * total :][:size]


@dataclass(frozen=True)
class Dealer:
    """Deals the batches of a phase: as many retain rows as forget rows, each set in shuffles of its own.

    Every draw is keyed by (seed, phase, step) and the row: neither the number of shares nor a resumed run changes one.
    """

    lm: MaskedDiffusionLM
    rows: Rows
    config: UnlearnConfig
    phase: str
    noise: Noise
    with_preferred: bool
    with_retain: bool

    def names(self, step: int) -> tuple[list[str], list[str]]:
        """Ids of the step's forget and retain rows, over all processes."""
        forget, retain = self._chosen(step)
        return [self.rows.forget[i].id for i in forget], [self.rows.retain[i].id for i in retain]

    def batch(self, step: int, share: int = 0, shares: int = 1) -> Batch:
        """Every `shares`-th row of a step from row `share` on: a process's share, or a piece of it; on the model's device."""
        forget, retain = self._chosen(step)
        tail = self._tail(step, [self.rows.forget[i] for i in forget] + [self.rows.retain[i] for i in retain])
        mine = forget[share::shares]
        return Batch(
            self._states([self.rows.forget[i] for i in mine], self.noise, "forget", step, tail),
            self._states([self.rows.refusals[i] for i in mine], self.noise, "forget", step, tail)
            if self.with_preferred
            else None,
            self._states([self.rows.retain[i] for i in retain[share::shares]], self.config.retain_noise, "retain", step, tail)
            if self.with_retain
            else None,
        )

    def _chosen(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        size, seed = self.config.batch_size, self.config.seed
        forget = epoch_order(len(self.rows.forget), step * size, size, seed, f"{self.phase} forget order")
        if not self.with_retain:
            return forget, np.zeros(0, dtype=int)
        return forget, epoch_order(len(self.rows.retain), step * size, size, seed, f"{self.phase} retain order")

    def _states(self, rows: Sequence[Encoded], noise: Noise, side: str, step: int, tail: int) -> States:
        key = (self.config.seed, self.phase, side, step)
        return draw_states(self.lm.spec, rows, noise, key, tail).to(self.lm.device)

    def _tail(self, step: int, rows: Sequence[Encoded]) -> int:
        """End tokens behind the first one, as in teaching: none, a few, or as many as generation has slots."""
        rng = numpy_generator(self.config.seed, "tail", self.phase, step)
        kind = rng.choice(3, p=self.config.tails)
        if kind == 1:
            return int(rng.integers(1, TAIL_SHORT + 1))
        filled = max(len(row.prompt_ids) for row in rows) + self.lm.spec.gen_length
        return max(0, filled - max(len(row.ids) for row in rows) - 1) if kind == 2 else 0


def evaluated(rows: Sequence[Encoded], seed: int, purpose: str) -> list[Encoded]:
    """At most `EVALUATED` of the rows, the same ones for every method."""
    if len(rows) <= EVALUATED:
        return list(rows)
    return [rows[i] for i in sorted(numpy_generator(seed, purpose).permutation(len(rows))[:EVALUATED])]


def finite_rows(values: torch.Tensor, names: Sequence[str]) -> list[str]:
    """Names of the rows whose value is not finite."""
    return [name for name, value in zip(names, values.tolist(), strict=True) if not math.isfinite(value)]
