"""Gradient ascent on the mask loss of forget rows, plain, capped or weighted."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from .base import Loss, Options, Quantities


class AscentOptions(Options):
    """Options of `ga`, `graddiff` and `kl`."""

    normalised: bool = Field(default=True, description="nats a token (TOFU); otherwise nats a row, as in NPO")


class CappedOptions(Options):
    """Options of `capped`."""

    cap: float = Field(default=5.0, gt=0, description="nats at which a token is left alone (MDU's release: 5, open-dlu: 1)")


class WgaOptions(Options):
    """Options of `wga`."""

    beta: float = Field(default=1.0, ge=0, description="weight p^beta of a token of probability p (Open-Unlearning: 1)")


class SatImpOptions(Options):
    """Options of `satimp`."""

    beta1: float = Field(default=5.0, ge=0, description="saturation, p^beta1 (Open-Unlearning: 5)")
    beta2: float = Field(default=1.0, ge=0, description="importance, (1 - p)^beta2 (Open-Unlearning: 1)")


def ga(quantities: Quantities, options: AscentOptions) -> Loss:
    """Minus the bound. Unbounded: a run needs a stop. `graddiff` and `kl` are the same loss with a retain term."""
    tokens = quantities.cross_entropy()
    rows = quantities.per_token(tokens) if options.normalised else quantities.per_row(tokens)
    return Loss(-rows, {"nats": quantities.per_token(tokens.detach())})


def capped(quantities: Quantities, options: CappedOptions) -> Loss:
    """Minus the mean of min(c_i, cap): tokens that are unlikely enough get no gradient."""
    tokens = quantities.cross_entropy()
    return Loss(-quantities.per_token(tokens.clamp(max=options.cap)), {"nats": quantities.per_token(tokens.detach())})


def wga(quantities: Quantities, options: WgaOptions) -> Loss:
    """Minus the mean of sg(p_i^beta) c_i (arXiv 2502.19301)."""
    tokens = quantities.cross_entropy()
    return _weighted(quantities, tokens, (-options.beta * tokens.detach()).exp())


def satimp(quantities: Quantities, options: SatImpOptions) -> Loss:
    """Minus the mean of sg(p_i^beta1 (1 - p_i)^beta2) c_i (arXiv 2505.11953)."""
    tokens = quantities.cross_entropy()
    nats = tokens.detach()
    return _weighted(quantities, tokens, (-options.beta1 * nats).exp() * (-(-nats).expm1()) ** options.beta2)


def _weighted(quantities: Quantities, tokens: Tensor, weights: Tensor) -> Loss:
    parts = {"nats": quantities.per_token(tokens.detach()), "weight": quantities.per_token(weights)}
    return Loss(-quantities.per_token(weights * tokens), parts)
