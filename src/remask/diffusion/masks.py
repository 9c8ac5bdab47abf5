"""Masks: which response tokens of a canvas are hidden, as a function of keys alone.

A *bank* is a fixed, seeded set of masks per row that every model and method under comparison shares. That pairing (common
random numbers) removes most of the estimator's noise from a difference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import RemaskError
from ..random import numpy_generator

MIN_SHARE = 1e-3  # of Bernoulli masks: their weight 1 / p is at most 1000 (Dream's and LLaDA's training value)
MAX_ANSWER = 2048  # uniforms are drawn for this many positions, so that answers of any length share their randomness


def stratified_masks(length: int, draws: int, replicates: int, seed: int, row: str) -> np.ndarray:
    """Exact-count masks over `length` tokens: bool [replicates * draws, length], at least one True in each.

    The draws of a replicate depend on one another; the mean over them is unbiased all the same. Over the draws every count
    1..length has the same expected share, and each draw given its count is a uniform subset of that size.

    - Counts are stratified and mirrored. With one offset u, count_s = ceil(((u + s) / draws) * length) in the lower half of
      the strata s = 0..draws-1 (for odd `draws` the middle one is in it), and count_(draws-1-s) = length + 1 - count_s.
    - Positions are balanced. From the smallest count up to the middle, a draw hides the tokens that were hidden least often;
      from the largest count down, it leaves visible the tokens that were left visible least often. Ties go to the smallest
      uniforms. Where few tokens are hidden, these draws hide different ones; where few are visible, different ones are.

    The two halves are balanced apart from each other: balanced jointly, the tokens hidden at low counts would be the visible
    ones again and again (docs/likelihood.md). Keys are (seed, row, replicate), not model, answer or batch.
    """
    masks = np.zeros((replicates, draws, length), dtype=bool)
    lower = (draws + 1) // 2
    for replicate in range(replicates):
        rng = numpy_generator(seed, "bank", row, replicate)
        counts = np.maximum(1, np.ceil((rng.random() + np.arange(lower)) / draws * length)).astype(int)
        hidden, visible = np.zeros(length, dtype=int), np.zeros(length, dtype=int)
        for draw, count in enumerate(counts):
            chosen = _rarest(hidden, int(count), rng)
            masks[replicate, draw, chosen] = True
            hidden[chosen] += 1
        for draw, count in zip(range(draws - 1, lower - 1, -1), length + 1 - counts, strict=False):
            chosen = _rarest(visible, length - int(count), rng)
            masks[replicate, draw] = True
            masks[replicate, draw, chosen] = False
            visible[chosen] += 1
    return masks.reshape(replicates * draws, length)


def _rarest(used: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """The `count` positions that were used least often, ties at random."""
    return np.lexsort((rng.random(MAX_ANSWER)[: len(used)], used))[:count]


def bernoulli_masks(length: int, draws: int, replicates: int, seed: int, row: str) -> tuple[np.ndarray, np.ndarray]:
    """Independent masks over `length` tokens: bool [replicates * draws, length], and their probabilities p, fp64 [same].

    Within a replicate p is stratified, p_s = (1 - MIN_SHARE) (u + s) / draws + MIN_SHARE with one offset u. Each token is
    masked with probability p, so a mask can be empty. Keyed like `stratified_masks`, with uniforms of its own.
    """
    masks = np.zeros((replicates * draws, length), dtype=bool)
    shares = np.zeros(replicates * draws)
    for replicate in range(replicates):
        rng = numpy_generator(seed, "bernoulli", row, replicate)
        chosen = slice(replicate * draws, (replicate + 1) * draws)
        shares[chosen] = (1 - MIN_SHARE) * (rng.random() + np.arange(draws)) / draws + MIN_SHARE
        masks[chosen] = rng.random((draws, MAX_ANSWER))[:, :length] < shares[chosen, None]
    return masks, shares


@dataclass(frozen=True)
class MaskBank:
    """Masks per row id, shared by everything that is compared.

    Attributes:
        draws: draws per replicate.
        replicates: independent repetitions; the Monte-Carlo standard error comes from their spread.
        seed: seed of all masks.
    """

    draws: int = 4
    replicates: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.draws < 1 or self.replicates < 1:
            raise RemaskError(f"a mask bank needs draws >= 1 and replicates >= 1, not {self.draws} and {self.replicates}")

    def masks(self, row: str, length: int) -> np.ndarray:
        """Exact-count masks for one row, bool [replicates * draws, length].

        Raises:
            RemaskError: longer than MAX_ANSWER.
        """
        self._check(row, length)
        return stratified_masks(length, self.draws, self.replicates, self.seed, row)

    def bernoulli(self, row: str, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Bernoulli masks for one row, bool [replicates * draws, length], and their probabilities, fp64 [replicates * draws].

        Raises:
            RemaskError: longer than MAX_ANSWER.
        """
        self._check(row, length)
        return bernoulli_masks(length, self.draws, self.replicates, self.seed, row)

    def fingerprint(self, lengths: Mapping[str, int] | Sequence[tuple[str, int]]) -> str:
        """Hash of the exact-count masks of these (row id, answer length) pairs; recorded with every number."""
        digest = hashlib.blake2b(digest_size=8)
        for row, length in lengths.items() if isinstance(lengths, Mapping) else lengths:
            digest.update(f"{row}:{length}".encode())
            digest.update(np.packbits(self.masks(row, length)).tobytes())
        return digest.hexdigest()

    @staticmethod
    def _check(row: str, length: int) -> None:
        if length > MAX_ANSWER:
            raise RemaskError(f"row {row!r}: {length} answer tokens; mask banks hold at most {MAX_ANSWER}")
