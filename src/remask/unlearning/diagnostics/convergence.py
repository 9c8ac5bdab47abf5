"""KL from the anchor on a fixed set of masks (MDU's figure 4; D2), and what the anchor itself says (D3).

For a row with answer a of L tokens and a mask M of it, noise level t = |M| / L, the *state's* value is the mean over the masked
tokens; a row's value is the mean over the bank's masks, and a set's value the mean over its rows. The masks are those of a
`MaskBank`: with one bank, models and training steps are compared under the same randomness.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ...backbones.model import Encoded, MaskedDiffusionLM
from ...diffusion.canvas import TOKEN_BUDGET, canvas_batches
from ...diffusion.masks import MaskBank
from .anchors import Anchor, check, compare

BINS = ((0.0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0))  # of the noise level; each holds its upper end
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Spread:
    """Mean and quantiles (`QUANTILES`) of a value over rows; None where there is no row."""

    rows: int
    mean: float | None
    quantiles: tuple[float, ...] | None


@dataclass(frozen=True)
class ByNoise:
    """A quantity over rows, at all noise levels and in each of `BINS`.

    Attributes:
        values: one a row.
        overall: over all rows.
        bins: over the rows that have a mask in the bin; short answers lack some. A row's value is its mean over those masks.
    """

    values: tuple[float, ...]
    overall: Spread
    bins: tuple[Spread, ...]


@dataclass(frozen=True)
class Convergence:
    """How far a model is from the anchor on a bank.

    Attributes:
        ids: of the rows; tau: inverse temperature of the anchor; bank: fingerprint of the masks.
        kl: KL(p_c || p*) in nats a masked token. By noise level it is the signal map E[KL | t]: where the loss pulls.
        leakage: p_u(gold) under the plain anchor, 0..1, and leakage_logprob: its logarithm, nats a token. An anchor that says
            the answer cannot teach a model to forget it.
    """

    ids: tuple[str, ...]
    tau: float
    bank: str
    kl: ByNoise
    leakage: ByNoise
    leakage_logprob: ByNoise

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "edges": [list(edges) for edges in BINS], "quantiles": list(QUANTILES)}


@torch.inference_mode()
def convergence(
    lm: MaskedDiffusionLM,
    rows: Sequence[Encoded],
    bank: MaskBank,
    *,
    anchor: Anchor = None,
    tau: float = 1.0,
    token_budget: int = TOKEN_BUDGET,
    done: Callable[[int], object] = lambda states: None,
) -> Convergence:
    """Compare policy and anchor at the masked answer tokens of every row, under the bank; two forwards a state.

    Call it with the forget set and with the retain set, before and after training: retain flat while forget falls is targeted.
    Before training, with the anchor's own model as `lm`, it is the signal map and the leakage.

    Args:
        lm: the policy, with whatever is attached to it. Interventions that are limited to steps do not act outside of sampling.
        rows: answers of any lengths.
        bank: exact-count masks, by row id.
        anchor: see `Anchor`; give the unedited model where something is attached.
        tau: inverse temperature of the anchor.
        token_budget: tokens a forward.
        done: called with the number of (row, mask) states that each batch has finished.

    Raises:
        RemaskError: rows, an anchor or a tau that cannot be measured, or an answer longer than the bank's masks.
    """
    check(lm, anchor, rows, tau)
    masks = [bank.masks(row.id, len(row.answer_ids)) for row in rows]
    values = np.zeros((3, len(rows), bank.replicates * bank.draws))  # KL, p_u, log p_u
    for batch in canvas_batches(lm, rows, masks, token_budget):
        canvas, gold = batch.clean.masked_fill(batch.masked, lm.spec.mask_id), batch.clean[batch.masked]
        readings = compare(lm, anchor, canvas, batch.masked, batch.prompt, gold, tau).double()
        kept = torch.stack([readings[:, 0], readings[:, 2].exp(), readings[:, 2]], dim=1)
        owner = batch.masked.nonzero()[:, 0]
        sums = kept.new_zeros(len(canvas), 3).index_add_(0, owner, kept)
        means = (sums / batch.masked.sum(dim=1, keepdim=True)).cpu().numpy()
        for row, draws, mean in zip(batch.rows, batch.draws, means, strict=True):
            values[:, row, draws] = mean[:, None]
        done(sum(map(len, batch.draws)))
    places = np.stack([_bins(mask) for mask in masks])
    lengths = [(row.id, len(row.answer_ids)) for row in rows]
    parts = (_by_noise(value, places) for value in values)
    return Convergence(tuple(row.id for row in rows), tau, bank.fingerprint(lengths), *parts)


def _bins(masks: np.ndarray) -> np.ndarray:
    """Index into BINS of the noise level of each mask, int [draws]; in integers, where 3/5 is not above 0.6."""
    return (len(BINS) * masks.sum(axis=1) - 1) // masks.shape[1]


def _by_noise(values: np.ndarray, places: np.ndarray) -> ByNoise:
    """Values and their bins [rows, draws] over rows."""
    rows = values.mean(axis=1)
    bins = []
    for index in range(len(BINS)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a row without a mask in the bin: NaN, left out
            means = np.nanmean(np.where(places == index, values, np.nan), axis=1)
        bins.append(_spread(means[~np.isnan(means)]))
    return ByNoise(tuple(rows.tolist()), _spread(rows), tuple(bins))


def _spread(values: np.ndarray) -> Spread:
    if not len(values):
        return Spread(0, None, None)
    return Spread(len(values), float(values.mean()), tuple(np.quantile(values, QUANTILES).tolist()))
