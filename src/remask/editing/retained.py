"""What a memory keeps of the retain set: never a text, and single keys only where the readout looks at them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import MemoryConfig
from .kernel import spread
from .solve import second_moment


@dataclass(frozen=True)
class Retained:
    """How many keys the retain set had, their mean [d] and second moment [d, d], fp32.

    `keys` [m, d] are kept, evenly spread over all of them, only where the readout looks at them; [0, d] otherwise.
    """

    count: int
    mean: Tensor
    moment: Tensor
    keys: Tensor

    @classmethod
    def of(cls, keys: Tensor, config: MemoryConfig) -> Retained:
        """From all retain keys."""
        kept = spread(keys, config.retain_keys if config.keeps_keys else 0)
        return cls(len(keys), keys.mean(0), second_moment(keys).float(), kept)

    def equals(self, other: Retained) -> bool:
        """Whether both came from the same keys."""
        mine, theirs = ((kept.mean, kept.moment, kept.keys) for kept in (self, other))
        return self.count == other.count and all(map(torch.equal, mine, theirs))


def pooled(one: Retained | None, other: Retained | None) -> Retained | None:
    """The retain sets of two memories together, weighed by their sizes; of each the keys stay that it had.

    One that both share counts once. What has been pooled is one set: a part of it that comes again counts again.
    """
    if one is None or other is None or one.equals(other):
        return one or other
    one, other = sorted((one, other), key=lambda kept: kept.keys.numpy().tobytes())  # a + b is b + a
    total = one.count + other.count
    mean = (one.count * one.mean + other.count * other.mean) / total
    moment = (one.count * one.moment + other.count * other.moment) / total
    return Retained(total, mean, moment, torch.cat([one.keys, other.keys]))
