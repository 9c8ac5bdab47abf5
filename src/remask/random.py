"""Counter-based randomness: a generator is a function of its keys, never of what ran before it.

Every draw in the library is keyed by (seed, purpose, row, draw), so that results do not depend on batch size,
device, order or the number of processes, and two models can be compared under the same randomness.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def digest(*parts: object) -> str:
    """Short stable hash (16 hex digits) of the textual form of `parts`."""
    return hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).hexdigest()


def numpy_generator(seed: int, purpose: str, *keys: object) -> np.random.Generator:
    """A Philox generator keyed by (seed, purpose, keys)."""
    key = int.from_bytes(hashlib.blake2b(digest(seed, purpose, *keys).encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))


def normal(shape: tuple[int, ...], seed: int, purpose: str, *keys: object) -> torch.Tensor:
    """Standard normal fp32 tensor on the CPU, a function of its keys alone."""
    return torch.from_numpy(numpy_generator(seed, purpose, *keys).standard_normal(shape, dtype=np.float32))
