"""Push hidden states of forget rows to a fixed random direction (RMU), and hold those of retain rows.

Read at the positions that emit the predictions of hidden tokens, under the states of every other method.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ...errors import RemaskError
from ...random import numpy_generator
from .base import Loss, Options, Quantities, needed


class RepresentationOptions(Options):
    """Options that `rmu` and `adaptive-rmu` share."""

    layer: int | None = Field(
        default=None, ge=0, description="block whose output is read; by default at the depth of block 7 of 32"
    )
    seed: int = Field(default=0, description="of the direction")


class RmuOptions(RepresentationOptions):
    """Options of `rmu`."""

    coefficient: float = Field(default=20.0, gt=0, description="length of the vector hidden states are pushed to (WMDP: 20)")


class AdaptiveRmuOptions(RepresentationOptions):
    """Options of `adaptive-rmu`."""

    scale: float = Field(default=5.0, gt=0, description="that length in mean norms of the first batch (the authors: 5)")
    coefficient: float | None = Field(default=None, gt=0, description="the length itself; measured unless given")


def rmu(quantities: Quantities, options: RmuOptions | AdaptiveRmuOptions) -> Loss:
    """Mean square of h_i - c u over positions and dimensions, u a random unit vector (arXiv 2403.03218).

    Raises:
        RemaskError: a coefficient that was to be measured and was not.
    """
    if options.coefficient is None:
        raise RemaskError("adaptive-rmu: coefficient is not measured yet; pass the first batch to the method's calibrate")
    hidden = needed(quantities.hidden, "hidden")
    towards = options.coefficient * direction(hidden.shape[1], options.seed).to(hidden.device)
    rows = quantities.per_token((_wide(hidden) - towards).square().mean(dim=-1))
    norms = quantities.per_token(_wide(hidden.detach()).norm(dim=-1))
    return Loss(rows, {"distance": rows.detach(), "norm": norms})


def measure(quantities: Quantities, options: AdaptiveRmuOptions) -> AdaptiveRmuOptions:
    """The options with coefficient = scale * mean norm of the batch's hidden states, unless one is given (arXiv 2408.06223)."""
    if options.coefficient is not None:
        return options
    norm = _wide(needed(quantities.hidden, "hidden").detach()).norm(dim=-1).mean()
    return options.model_copy(update={"coefficient": options.scale * float(norm)})


def hold(quantities: Quantities) -> Loss:
    """RMU's retain term: mean square of the change of hidden states."""
    change = _wide(needed(quantities.hidden, "hidden")) - _wide(needed(quantities.hidden_reference, "hidden"))
    rows = quantities.per_token(change.square().mean(dim=-1))
    return Loss(rows, {"distance": rows.detach()})


def direction(width: int, seed: int) -> Tensor:
    """RMU's unit vector [width], fp32: uniform entries in [0, 1), normalised: none is negative (both code bases)."""
    entries = torch.from_numpy(numpy_generator(seed, "rmu direction").random(width))
    return (entries / entries.norm()).float()


def _wide(hidden: Tensor) -> Tensor:
    """In fp32 at least."""
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32))
