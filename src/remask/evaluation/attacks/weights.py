"""Quantisation: the weights are rounded, as whoever serves the model in 8 or 4 bits does, and plain questions are asked.

Forgetting that was trained in by small weight changes can be rounded away (Zhang et al., 2024).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...backbones.model import MaskedDiffusionLM
from ...errors import RemaskError
from ...facts import Fact
from .asking import ask, encode
from .base import Attack, Attempt, Terms

BITS = (8, 4)
GROUP = 64


def round_to_nearest(weight: Tensor, bits: int, group_size: int = GROUP) -> Tensor:
    """Symmetric absmax rounding of a weight [..., out, in], in groups of `group_size` neighbouring inputs (the last shorter).

    For a group w: s = max|w| / (2^(bits-1) - 1), w' = s round(w / s); a group of zeros stays. Computed in fp32, returned in the
    weight's dtype.
    """
    columns = weight.shape[-1]
    groups = nn.functional.pad(weight.detach().float(), (0, -columns % group_size)).unflatten(-1, (-1, group_size))
    scale = groups.abs().amax(dim=-1, keepdim=True) / (2 ** (bits - 1) - 1)
    scale = scale.masked_fill(scale == 0, 1.0)
    return ((groups / scale).round() * scale).flatten(-2)[..., :columns].to(weight.dtype).contiguous()


def block_weights(lm: MaskedDiffusionLM) -> list[tuple[nn.Parameter, bool]]:
    """Weights of the blocks' linear layers and experts, each once, and whether it is stored as [in, out] (GPT-2).

    Embeddings, head, norms and routers are not among them.
    """
    found: dict[int, tuple[nn.Parameter, bool]] = {}
    for module in lm.blocks.modules():
        for parameter in module.parameters(recurse=False):
            linear = isinstance(module, nn.Linear | Conv1D) and parameter is module.weight
            if linear or parameter.ndim == 3:  # 3-D: the experts of a mixture, [experts, out, in]
                found[id(parameter)] = (parameter, isinstance(module, Conv1D))
    return list(found.values())


def quantisable(lm: MaskedDiffusionLM) -> bool:
    """Whether the blocks have weights that can be rounded: not where they are stored as integers already."""
    weights = block_weights(lm)
    return bool(weights) and all(weight.is_floating_point() for weight, _ in weights)


@contextlib.contextmanager
def quantised(lm: MaskedDiffusionLM, bits: int, group_size: int = GROUP) -> Iterator[None]:
    """Inside the block every weight of `block_weights` is rounded; on the way out the very tensors that were there are back.

    Whatever is attached stays attached and acts. Attach before: edits are tied to the fingerprint of the unrounded weights.

    Raises:
        RemaskError: bits that are not 8 or 4, a group below 1, or a model that is quantised already.
    """
    _check(bits, group_size)
    if not quantisable(lm):
        raise RemaskError(f"{lm.name} has no floating-point block weights to round; load the unquantised checkpoint")
    saved = [(weight, weight.data) for weight, _ in block_weights(lm)]
    try:
        for weight, transposed in block_weights(lm):
            data = weight.data.T if transposed else weight.data
            rounded = round_to_nearest(data, bits, group_size)
            weight.data = rounded.T if transposed else rounded
        yield
    finally:
        for weight, data in saved:
            weight.data = data


def _check(bits: int, group_size: int) -> None:
    if bits not in BITS or group_size < 1:
        raise RemaskError(
            f"weights are rounded to 8 or 4 bits in groups of at least 1, not {bits} bits, groups of {group_size}"
        )


class Quantised(Attack):
    """Block weights rounded to nearest, `group_size` inputs a scale: a simulation of weight-only quantisation.

    Activations, embeddings and head keep their precision, and no integer kernel runs, so the numbers say what rounding does and
    not how a given runtime computes. An edit is attached to the unrounded model first and acts on the rounded one.

    Args:
        bits: 8 or 4.
        group_size: input columns that share a scale.
    """

    def __init__(self, bits: int, group_size: int = GROUP) -> None:
        _check(bits, group_size)
        self.bits, self.group_size = bits, group_size
        self.name = f"{bits}-bit weights"

    def describe(self) -> dict[str, Any]:
        """Kind and parameters."""
        return {"kind": "quantised", "bits": self.bits, "group_size": self.group_size}

    def run(self, lm: MaskedDiffusionLM, facts: Sequence[Fact], terms: Terms) -> list[Attempt]:
        """Score and answer every fact as it stands."""
        with quantised(lm, self.bits, self.group_size):
            return ask(lm, encode(lm, facts, terms.sampler), terms)
