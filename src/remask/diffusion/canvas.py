"""Masked canvases of many rows in exact-length batches: the loop that likelihoods and captures share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..backbones.model import Encoded, MaskedDiffusionLM, length_batches

TOKEN_BUDGET = 8192  # tokens a forward: large enough to be compute-bound, small enough for a laptop's memory


@dataclass(frozen=True)
class CanvasBatch:
    """Canvases of one length.

    Attributes:
        rows: index of each canvas's row, [B].
        draws: for each canvas the indices of the row's masks that it stands for.
        clean: ids with nothing masked, [B, L].
        masked: masked response positions, bool [B, L].
        prompt, subject: prompt and subject positions, bool [B, L].
    """

    rows: np.ndarray
    draws: list[np.ndarray]
    clean: Tensor
    masked: Tensor
    prompt: Tensor
    subject: Tensor


def canvas_batches(
    lm: MaskedDiffusionLM, rows: Sequence[Encoded], masks: Sequence[np.ndarray], token_budget: int = TOKEN_BUDGET
) -> Iterator[CanvasBatch]:
    """All distinct (row, mask) canvases, batched by exact length; short answers repeat masks, one canvas serves them all.

    Args:
        masks: bool [draws, answer length] for each row.
    """
    jobs = []
    for index, mask in enumerate(masks):
        unique, inverse = np.unique(mask, axis=0, return_inverse=True)
        jobs += [(index, m, np.nonzero(inverse.reshape(-1) == u)[0]) for u, m in enumerate(unique)]
    for batch in length_batches([len(rows[row].ids) for row, _, _ in jobs], token_budget):
        chosen = [jobs[i] for i in batch]
        length = len(rows[chosen[0][0]].ids)
        masked, prompt, subject = (np.zeros((len(chosen), length), dtype=bool) for _ in range(3))
        for i, (row, mask, _) in enumerate(chosen):
            start = len(rows[row].prompt_ids)
            masked[i, start:] = mask
            prompt[i, :start] = True
            subject[i, slice(*rows[row].subject)] = True
        yield CanvasBatch(
            rows=np.array([row for row, _, _ in chosen]),
            draws=[draws for _, _, draws in chosen],
            clean=torch.tensor([rows[row].ids for row, _, _ in chosen], device=lm.device),
            masked=torch.from_numpy(masked).to(lm.device),
            prompt=torch.from_numpy(prompt).to(lm.device),
            subject=torch.from_numpy(subject).to(lm.device),
        )
