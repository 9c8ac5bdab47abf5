"""Losses that stop by themselves: a log-sigmoid of how much less likely a row has become.

One sigmoid a row, of the row's mean over its draws. The bound is an estimate, and its noise becomes bias in the log-sigmoid;
policy and reference see the same states, so that the noise they have in common cancels, and a row has several draws.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from .base import Loss, Options, Quantities, needed


class NpoOptions(Options):
    """Options of `npo`."""

    beta: float = Field(default=0.1, gt=0, description="how soon a row is left alone, per nat (the authors: 0.1)")
    normalised: bool = Field(default=False, description="differences in nats a token instead of nats a row")


class SimNpoOptions(Options):
    """Options of `simnpo`."""

    beta: float = Field(default=4.5, gt=0, description="how soon a row is left alone, per nat a token (the authors: 4.5)")
    delta: float = Field(default=0.0, description="nats a token that a row is pushed beyond (the authors: 0)")


class DpoOptions(Options):
    """Options of `dpo`."""

    beta: float = Field(default=0.1, gt=0, description="how soon a row is left alone, per nat (TOFU: 0.1)")


def npo(quantities: Quantities, options: NpoOptions) -> Loss:
    """-(2 / beta) log sigmoid(beta (B - B_ref)), B the bound (arXiv 2404.05868); as beta -> 0 its gradient becomes GA's."""
    bound = quantities.bound()
    gap = bound - quantities.bound("reference")
    scaled = gap / quantities.length if options.normalised else gap
    return Loss(_preference(scaled, options.beta), _parts(quantities, bound, gap))


def simnpo(quantities: Quantities, options: SimNpoOptions) -> Loss:
    """-(2 / beta) log sigmoid(beta (B / L - delta)): no reference, rows of any length alike (arXiv 2410.07163)."""
    nats = quantities.bound() / quantities.length
    return Loss(_preference(nats - options.delta, options.beta), {"nats": nats.detach()})


def dpo(quantities: Quantities, options: DpoOptions) -> Loss:
    """-(2 / beta) log sigmoid(beta [(B_ref - B)(refusal) - (B_ref - B)(answer)]) (arXiv 2305.18290, as TOFU uses it)."""
    refusal = needed(quantities.preferred, "preferred")
    bound = quantities.bound()
    gap = bound - quantities.bound("reference")
    gain = refusal.bound("reference") - refusal.bound()
    parts = _parts(quantities, bound, gap) | {"gain": gain.detach()}
    return Loss(_preference(gain + gap, options.beta), parts)


def _preference(margin: Tensor, beta: float) -> Tensor:
    return -2 / beta * logsigmoid(beta * margin)


def _parts(quantities: Quantities, bound: Tensor, gap: Tensor) -> dict[str, Tensor]:
    return {"nats": bound.detach() / quantities.length, "gap": gap.detach()}
