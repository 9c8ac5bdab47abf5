"""Fewer keys a fact: centres of k-means over its keys, each with the mean delta and the number of keys that it stands for.

Every fact is compressed by itself, so that facts can still come and go without a trace.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from .capture import Captured


def compressed(captured: Captured, limit: int) -> Captured:
    """At most `limit` rows a fact; what is lost is kept beside them (`Captured.lost`)."""
    parts = [_of_fact(captured, captured.owner == fact, limit) for fact in range(int(captured.owner.max()) + 1)]
    fields = ("keys", "deltas", "owner", "counts", "lost")
    return Captured(*(torch.cat([getattr(part, name) for part in parts]) for name in fields))


def lost_share(keys: Tensor, deltas: Tensor, counts: Tensor, lost: Tensor) -> tuple[float, float]:
    """Share of the squared norm of keys and of deltas that compression has lost, 0 to 1.

    Args:
        keys, deltas: [n, d]; counts: [n]; lost: [n, 2], as in `Captured`.
    """
    kept = [float((counts.double() * part.double().square().sum(dim=1)).sum()) for part in (keys, deltas)]
    gone = lost.double().sum(dim=0).tolist()
    return gone[0] / (gone[0] + kept[0]), gone[1] / (gone[1] + kept[1])


def _of_fact(captured: Captured, rows: Tensor, limit: int) -> Captured:
    keys, deltas, owner = captured.keys[rows], captured.deltas[rows], captured.owner[rows]
    if len(keys) <= limit or not keys.isfinite().all():  # a memory refuses such keys by name
        return Captured(keys, deltas, owner)
    labels = torch.from_numpy(_labels(keys.double().numpy(), limit))
    groups = [labels == label for label in labels.unique()]  # a centre that lost all its keys is gone
    (near, key_lost), (moved, delta_lost) = _means(keys, groups), _means(deltas, groups)
    counts = torch.stack([group.sum() for group in groups]).float()
    return Captured(near, moved, owner[: len(groups)], counts, torch.stack([key_lost, delta_lost], dim=1))


def _means(rows: Tensor, groups: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean of each group of rows in fp32, [groups, d], and the sum of squared distances of its rows from it, [groups]."""
    means = torch.stack([rows[group].double().mean(dim=0) for group in groups]).float()
    pairs = zip(groups, means, strict=True)
    return means, torch.stack([(rows[group].double() - mean.double()).square().sum() for group, mean in pairs]).float()


def _labels(keys: np.ndarray, limit: int) -> np.ndarray:
    """Cluster of each key [n]; starts from evenly spread keys, so that nothing is drawn. Equal keys count as one."""
    places: dict[bytes, int] = {}
    place = np.array([places.setdefault(key.tobytes(), len(places)) for key in keys])
    distinct = keys[np.unique(place, return_index=True)[1]]
    if len(distinct) <= limit:
        return place
    start = distinct[np.arange(limit) * len(distinct) // limit]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "One of the clusters is empty")
        found = kmeans2(distinct, start, minit="matrix", missing="warn")[1]
    return np.asarray(found)[place]
