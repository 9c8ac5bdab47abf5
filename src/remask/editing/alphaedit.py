"""AlphaEdit (arXiv 2410.02355): MEMIT whose change cannot be seen from the preserved keys.

    dW_l = R K^T P (K_all K_all^T P + lambda I)^-1,    P the projector onto the null space of C_l

K holds the facts' keys and K_all those of all earlier batches too (C_prev = K_prev K_prev^T), so that later facts leave
earlier ones alone. With U an orthonormal basis of the null space and Q = U^T K_all this is  R (Q^T Q + lambda I)^-1 Q^T U^T,
restricted to the batch's rows of the inverse: a system as large as the number of facts, not as the MLP.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..backbones.model import Encoded, MaskedDiffusionLM
from ..backbones.weight_edit import WeightEdit
from ..errors import RemaskError
from ..facts import Fact
from .covariance import second_moments
from .memit import SpreadConfig, spread
from .mlp import Changes, require_editable


class AlphaEditConfig(SpreadConfig):
    """Settings of AlphaEdit, with the peers' in brackets."""

    # Eigenvalues of C scale with the keys, so an absolute threshold means another null space in every layer of every model.
    energy: float = Field(default=0.02, gt=0, lt=1, description="share of C's trace that the null space may hold")
    threshold: float | None = Field(default=None, gt=0, description="instead: eigenvalues of C below it are null [0.02]")
    # lambda is compared with |P k|^2, whose scale is the model's own.
    weight: float = Field(default=0.1, gt=0, description="lambda / mean |P k|^2 [lambda 10, EasyEdit 1]")
    batch: int = Field(default=100, ge=1, description="facts that are told at once; batches follow one another [100]")


def alphaedit(
    lm: MaskedDiffusionLM,
    facts: Sequence[Fact],
    text: Sequence[Encoded],
    config: AlphaEditConfig | None = None,
    *,
    cache: Path | None = None,
) -> WeightEdit:
    """Tell `lm` new objects, batch by batch; arguments and errors are those of `rome`, and a null space that is empty.

    The rank of each layer's null space is in the details, as `null_space`.
    """
    config = config or AlphaEditConfig()
    layers = config.chosen(lm)
    require_editable(lm, facts, layers, "AlphaEdit")
    started, forwards = time.perf_counter(), lm.counters.forwards
    moments = second_moments(lm, layers, text, config, cache)
    bases = {layer: null_space(moments[layer].to(lm.device), config, layer) for layer in layers}
    seen: dict[int, Tensor] = {}

    def solve(layer: int, keys: Tensor) -> Tensor:
        before = seen.get(layer, keys[:0])
        seen[layer] = torch.cat([before, keys])
        return alphaedit_readout(keys, before, bases[layer], config.weight)

    changes, reports = Changes(lm, "alphaedit"), dict[str, Mapping[str, Any]]()
    for start in range(0, len(facts), config.batch):
        reports |= spread(lm, facts[start : start + config.batch], layers, solve, changes, config)
    cost = {"seconds": time.perf_counter() - started, "forwards": lm.counters.forwards - forwards}
    ranks = {str(layer): {"rank": basis.shape[1], "of": basis.shape[0]} for layer, basis in bases.items()}
    details = {"layers": layers, "null_space": ranks, "facts": reports, "cost": cost}
    return changes.edit(options=config.model_dump(mode="json"), **details)


def null_space(moment: Tensor, config: AlphaEditConfig, layer: int) -> Tensor:
    """Orthonormal basis U [m, r] of what C [m, m] hardly uses, so that P = U U^T; r is the null-space rank.

    Raises:
        RemaskError: it is empty; names the layer.
    """
    values, vectors = torch.linalg.eigh(moment)  # in increasing order
    values = values.clamp(min=0)
    if config.threshold is None:
        null = values.cumsum(0) <= config.energy * values.sum()
        remedy = f"raise energy ({config.energy})"
    else:
        null = values < config.threshold
        remedy = f"raise threshold ({config.threshold}; the smallest eigenvalue is {float(values[0]):.2g})"
    if not null.any():
        raise RemaskError(f"layer {layer}: no direction of the MLP keys is unused by the text; {remedy}")
    return vectors[:, null]


def alphaedit_readout(keys: Tensor, before: Tensor, basis: Tensor, weight: float) -> Tensor:
    """K^T P (K_all K_all^T P + lambda I)^-1, [n, m] fp64, of keys [n, m] and earlier ones [p, m] (rows).

    Args:
        basis: U [m, r]; weight: lambda in units of the keys' mean |P k|^2.

    Raises:
        RemaskError: keys without any part in the null space.
    """
    shadow = torch.cat([keys, before]) @ basis
    scale = weight * shadow[: len(keys)].square().sum(dim=1).mean()
    if not scale > 0:
        raise RemaskError("the facts' keys have no part in the null space; raise energy or threshold")
    system = shadow @ shadow.T + scale * torch.eye(len(shadow), dtype=shadow.dtype, device=shadow.device)
    return torch.linalg.solve(system, shadow)[: len(keys)] @ basis.T
