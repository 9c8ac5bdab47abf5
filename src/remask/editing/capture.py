"""What a memory is made of: keys (residuals that say *when* to act) and deltas (shifts that say *what* to write).

Two readings. The paper's (equations 6-9): one key a fact, the mean residual of the subject, and one delta, target value minus
original value at the object positions. The library's: a key at every masked answer position of partial states, where the
prediction is made, and a delta towards the *anchor*: the same state with the subject (or the whole prompt) hidden, or under a
name that the model never met, as the model itself represents it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..backbones.model import Encoded, MaskedDiffusionLM, Site, capture, length_batches
from ..diffusion.canvas import TOKEN_BUDGET, canvas_batches
from ..diffusion.masks import MaskBank
from ..errors import RemaskError

Anchor = Literal["prompt", "subject", "unknown"]


@dataclass(frozen=True)
class Captured:
    """Keys and deltas [n, d] in fp32 on the CPU, and the index of the fact that owns each row [n]."""

    keys: Tensor
    deltas: Tensor
    owner: Tensor


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
) -> Captured:
    """Keys at the masked answer positions of partial states; deltas = anchor residual - conditional residual.

    Args:
        states: bank whose masks are the partial states.
        anchor: what is hidden in the anchor state: the whole `prompt`, or its `subject`; or nothing, with the subject replaced
            by names that the model was never taught (`unknown`), so that the anchor state is one the model answers fluently.
        unknown: for anchor `unknown`, each row again under each such name; anchor residuals are their mean.
    """
    _require_bare(lm)
    masks = [states.masks(row.id, len(row.answer_ids)) for row in rows]
    keys, owner = _answer_residuals(lm, site, rows, masks)
    if anchor == "unknown":
        targets = torch.stack([_answer_residuals(lm, site, other, masks)[0] for other in unknown]).mean(dim=0)
    else:
        targets, _ = _answer_residuals(lm, site, rows, masks, hide=anchor)
    return Captured(keys, targets - keys, owner)


@torch.inference_mode()
def capture_keys(lm: MaskedDiffusionLM, site: Site, rows: Sequence[Encoded], states: MaskBank) -> Tensor:
    """Residuals [m, d] at the masked answer positions of partial states: what a memory must leave alone."""
    _require_bare(lm)
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
def capture_paper(lm: MaskedDiffusionLM, site: Site, original: Sequence[Encoded], target: Sequence[Encoded]) -> Captured:
    """Equations (6)-(9): k = mean subject residual, delta = mean object residual, target placed minus original placed.

    Args:
        original: facts with their own answers; target: the same prompts with the target answers. Objects fully revealed.
    """
    _require_bare(lm)
    keys = _pooled(lm, site, original, "subject")
    deltas = _pooled(lm, site, target, "object") - _pooled(lm, site, original, "object")
    return Captured(keys, deltas, torch.arange(len(original)))


def _pooled(lm: MaskedDiffusionLM, site: Site, rows: Sequence[Encoded], where: str) -> Tensor:
    """Mean residual over the subject or the object positions of fully revealed canvases, [N, d]."""
    result = torch.zeros(len(rows), lm.hidden_size)
    for batch in length_batches([len(row.ids) for row in rows], TOKEN_BUDGET):
        hidden = site_output(lm, site, torch.tensor([rows[i].ids for i in batch], device=lm.device))
        for index, states in zip(batch, hidden.cpu(), strict=True):
            row = rows[index]
            span = slice(*row.subject) if where == "subject" else slice(len(row.prompt_ids), None)
            result[index] = states[span].mean(dim=0)
    return result


def _require_bare(lm: MaskedDiffusionLM) -> None:
    """Keys must not depend on what was installed before: capture on the unedited model only."""
    if lm.attached:
        kinds = ", ".join(intervention.kind for intervention in lm.attached)
        raise RemaskError(f"{lm.name} has {kinds} attached; detach before capturing keys")
