"""What a memory is made of: keys (residuals that say *when* to act) and deltas (shifts that say *what* to write).

Two readings. The paper's (equations 6-9): one key a fact, the mean residual of the subject, and one delta, target value minus
original value at the object positions. The library's: a key at every masked answer position of partial states, where the
prediction is made, and a delta towards the *anchor*: the same state with the subject (or the whole prompt) hidden, or under a
name that the model never met, as the model itself represents it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from ..backbones.model import Encoded, MaskedDiffusionLM, Site, capture, length_batches
from ..diffusion.canvas import TOKEN_BUDGET, canvas_batches
from ..diffusion.masks import MaskBank
from ..errors import RemaskError
from .config import Anchor


@dataclass(frozen=True)
class Captured:
    """Keys and deltas [n, d] in fp32 on the CPU, and the index of the fact that owns each row [n].

    counts: captured keys that each row stands for, [n]; lost: what each row hides of them, the sums of squared distances of
    their keys and of their deltas from its own, [n, 2].
    """

    keys: Tensor
    deltas: Tensor
    owner: Tensor
    counts: Tensor = field(default_factory=lambda: torch.empty(0))
    lost: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        if not len(self.counts):
            object.__setattr__(self, "counts", torch.ones(len(self.keys)))
        if not len(self.lost):
            object.__setattr__(self, "lost", torch.zeros(len(self.keys), 2))

    @classmethod
    def joined(cls, parts: Sequence[Captured]) -> Captured:
        """The rows of all parts, in their order; owners stay as they are."""
        return cls(*(torch.cat([getattr(part, column.name) for part in parts]) for column in fields(cls)))

    def of_facts(self, order: Sequence[int]) -> Captured:
        """The rows of these facts, which are numbered anew in this order; the rows of a fact keep theirs."""
        place = torch.full((self._facts,), len(order))
        place[list(order)] = torch.arange(len(order))
        owner = place[self.owner]
        rows = owner.argsort(stable=True)[: int((owner < len(order)).sum())]
        return Captured(self.keys[rows], self.deltas[rows], owner[rows], self.counts[rows], self.lost[rows])

    def weights(self, balance: float) -> Tensor:
        """How much each row counts, [n]: its count times (mean keys a fact / keys of its fact) ** balance; of mean 1 a key."""
        held = torch.zeros(self._facts).index_add_(0, self.owner, self.counts)
        return self.counts * (held.mean() / held)[self.owner] ** balance

    @property
    def _facts(self) -> int:
        return len(self.owner.bincount())


def site_output(lm: MaskedDiffusionLM, site: Site, ids: Tensor) -> Tensor:
    """Output of `site` [B, L, d] in fp32; blocks above it do not run."""
    with capture(lm, [site]) as store:
        lm.run_to(site.layer, ids)
    return store[site].float()


@torch.inference_mode()
def capture_anchor(
    lm: MaskedDiffusionLM,
    site: Site,
    rows: Sequence[Encoded],
    states: MaskBank,
    anchor: Anchor = "subject",
    unknown: Sequence[Sequence[Encoded]] = (),
    anchors: Sequence[Encoded] = (),
) -> Captured:
    """Keys at the masked answer positions of partial states; deltas = anchor residual - conditional residual.

    Args:
        states: bank whose masks are the partial states.
        anchor: what is hidden in the anchor state: the whole `prompt`, or its `subject`; or nothing, with the subject replaced
            by names that the model was never taught (`unknown`), so that the anchor state is one the model answers fluently.
        unknown: for anchor `unknown`, each row again under each such name; anchor residuals are their mean.
        anchors: for the other anchors, each row as it stands in its anchor state before anything is hidden, with the same
            answer; the rows themselves where none are given.
    """
    require_bare(lm)
    masks = [states.masks(row.id, len(row.answer_ids)) for row in rows]
    keys, owner = _answer_residuals(lm, site, rows, masks)
    if anchor == "unknown":
        targets = torch.stack([_answer_residuals(lm, site, other, masks)[0] for other in unknown]).mean(dim=0)
    else:
        targets, _ = _answer_residuals(lm, site, anchors or rows, masks, hide=anchor)
    return Captured(keys, targets - keys, owner)


@torch.inference_mode()
def capture_keys(lm: MaskedDiffusionLM, site: Site, rows: Sequence[Encoded], states: MaskBank) -> Tensor:
    """Residuals [m, d] at the masked answer positions of partial states: what a memory must leave alone."""
    require_bare(lm)
    return _answer_residuals(lm, site, rows, [states.masks(row.id, len(row.answer_ids)) for row in rows])[0]


def _answer_residuals(
    lm: MaskedDiffusionLM, site: Site, rows: Sequence[Encoded], masks: Sequence[np.ndarray], hide: Anchor | None = None
) -> tuple[Tensor, Tensor]:
    """Residuals [n, d] that emit the masked answer tokens, ordered by (row, mask, position), and the owner row of each [n]."""
    found: list[list[Tensor]] = [[] for _ in rows]
    for batch in canvas_batches(lm, rows, masks):
        canvas = batch.clean.masked_fill(batch.masked, lm.spec.mask_id)
        if hide is not None:
            canvas = canvas.masked_fill(batch.prompt if hide == "prompt" else batch.subject, lm.spec.mask_id)
        hidden = site_output(lm, site, canvas)
        for row, states, emitting in zip(batch.rows, hidden, lm.emitting(batch.masked), strict=True):
            found[row].append(states[emitting].cpu())
    parts = [torch.cat(states) for states in found]
    owner = torch.cat([torch.full((len(part),), index) for index, part in enumerate(parts)])
    return torch.cat(parts), owner


@torch.inference_mode()
def capture_subject(
    lm: MaskedDiffusionLM, site: Site, original: Sequence[Encoded], values: Tensor, pooling: str = "subject-mean"
) -> Captured:
    """Equations (6)-(9): keys at the subject, delta = value - mean object residual, objects fully revealed.

    Args:
        original: facts with their own answers.
        values: [facts, d], what the object's mean residual is to become.
        pooling: `subject-mean`, `subject-last`, or `subject-all`: every subject token is a key with the fact's delta.
    """
    require_bare(lm)
    states = _revealed(lm, site, original)
    keys, owner = [], []
    for index, (row, hidden) in enumerate(zip(original, states, strict=True)):
        subject = hidden[slice(*row.subject)]
        picked = {"subject-mean": subject.mean(0, keepdim=True), "subject-last": subject[-1:], "subject-all": subject}[pooling]
        keys.append(picked)
        owner += [index] * len(picked)
    deltas = values - torch.stack([_object(row, hidden) for row, hidden in zip(original, states, strict=True)])
    return Captured(torch.cat(keys), deltas[owner], torch.tensor(owner))


@torch.inference_mode()
def object_values(lm: MaskedDiffusionLM, site: Site, rows: Sequence[Encoded], *, masked: bool = False) -> Tensor:
    """Mean residual at the object positions, [rows, d], fp32: revealed, or left as masks."""
    require_bare(lm)
    states = _revealed(lm, site, rows, masked=masked)
    return torch.stack([_object(row, hidden) for row, hidden in zip(rows, states, strict=True)])


def _object(row: Encoded, hidden: Tensor) -> Tensor:
    return hidden[len(row.prompt_ids) :].mean(dim=0)


def _revealed(lm: MaskedDiffusionLM, site: Site, rows: Sequence[Encoded], *, masked: bool = False) -> list[Tensor]:
    """Residuals [L, d] of every row's whole canvas, on the CPU."""
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    for batch in length_batches([len(row.ids) for row in rows], TOKEN_BUDGET):
        ids = torch.tensor([rows[i].ids for i in batch], device=lm.device)
        if masked:
            for line, i in enumerate(batch):
                ids[line, len(rows[i].prompt_ids) :] = lm.spec.mask_id
        for index, states in zip(batch, site_output(lm, site, ids).cpu(), strict=True):
            found[index] = states
    return found


def require_bare(lm: MaskedDiffusionLM) -> None:
    """Keys must not depend on what was installed before: capture on the unedited model only."""
    if lm.attached:
        kinds = ", ".join(intervention.kind for intervention in lm.attached)
        raise RemaskError(f"{lm.name} has {kinds} attached; detach before capturing keys")
