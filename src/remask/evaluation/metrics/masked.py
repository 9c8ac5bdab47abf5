"""What a model predicts at masked answer positions, and masks that hit every token equally often."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ...backbones.model import Encoded, MaskedDiffusionLM
from ...diffusion.canvas import TOKEN_BUDGET, CanvasBatch, canvas_batches
from ...diffusion.masks import MAX_ANSWER
from ...errors import RemaskError
from ...random import numpy_generator


@torch.inference_mode()
def predictions(
    lm: MaskedDiffusionLM, rows: Sequence[Encoded], masks: Sequence[np.ndarray], token_budget: int = TOKEN_BUDGET
) -> Iterator[tuple[CanvasBatch, Tensor, Tensor]]:
    """Run every (row, mask) canvas once.

    Args:
        lm: the model.
        rows: encoded facts.
        masks: bool [draws, answer length] for each row.
        token_budget: tokens a forward.

    Yields:
        The batch, the masked canvas [B, L], and log-probabilities fp32 [n, V] at its n masked positions in row-major order.

    Raises:
        RemaskError: an answer starts at position 0 of a family with shifted logits, or exceeds the masks.
    """
    for row in rows:
        if lm.spec.shift and not row.prompt_ids:
            raise RemaskError(
                f"row {row.id!r} has no prompt, and {lm.name} never predicts position 0; start it with a BOS token"
            )
    for batch in canvas_batches(lm, rows, masks, token_budget):
        canvas = batch.clean.masked_fill(batch.masked, lm.spec.mask_id)
        yield batch, canvas, lm.logits(canvas, positions=batch.masked).float().log_softmax(dim=-1)


def shuffled(length: int, seed: int, purpose: str, row: str, draw: int) -> np.ndarray:
    """A random order of the answer's positions, [length]; answers of any length share its randomness.

    Raises:
        RemaskError: longer than MAX_ANSWER.
    """
    if length > MAX_ANSWER:
        raise RemaskError(f"row {row!r}: {length} answer tokens; orders are drawn for at most {MAX_ANSWER}")
    return np.argsort(numpy_generator(seed, purpose, row, draw).random(MAX_ANSWER)[:length], kind="stable")


def balanced_masks(length: int, draws: int, folds: Sequence[int], seed: int, row: str) -> np.ndarray:
    """Masks that hit each token equally often: bool [draws * sum(min(f, length) for f in folds), length].

    In each draw the tokens are shuffled once, and for each f of `folds` cut into f parts of (nearly) equal size, each of which
    is masked alone; so every token is masked len(folds) times a draw, at the mask ratios 1 / f.

    Raises:
        RemaskError: no folds, or one below 1; an answer that is too long.
    """
    if not folds or min(folds) < 1:
        raise RemaskError(f"folds {tuple(folds)} must be one or more positive numbers")
    masks = []
    for draw in range(draws):
        order = shuffled(length, seed, "balanced", row, draw)
        for part in (part for fold in folds for part in np.array_split(order, min(fold, length))):
            mask = np.zeros(length, dtype=bool)
            mask[part] = True
            masks.append(mask)
    return np.array(masks)
