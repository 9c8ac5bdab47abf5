"""Divergences between the policy's predictions and fixed ones, with gradients in closed form.

With p = softmax(z) and a fixed distribution q over the vocabulary:

    forward  KL(p || q) = sum_v p log(p / q)                     d/dz = p (log(p / q) - KL(p || q))
    reverse  KL(q || p) = sum_v q log(q / p)                     d/dz = p - q
    js       KL(p || m) / 2 + KL(q || m) / 2,  m = (p + q) / 2   d/dz = p (log(p / m) - KL(p || m)) / 2

"Forward" is MDU's word for the expectation under the trained model. Ids that p gives no probability (logit -inf) add nothing
and get no gradient, which autograd through 0 * log 0 would not find. The gradient takes the place of all intermediates:
beside its two arguments this holds two [n, V] tensors at its peak (js: four) and afterwards one (fp32, V = 126k: 0.5 MB a
position each).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Direction = Literal["forward", "reverse", "js"]


def divergence(logits: Tensor, log_target: Tensor, direction: Direction) -> Tensor:
    """Of every position, [n] in nats; infinite where p has probability that q has not (`forward`), or the other way round.

    Args:
        logits: [n, V] of the policy.
        log_target: [n, V], log q in the same dtype; no gradient goes there.
        direction: which one.
    """
    value: Tensor = _Divergence.apply(logits, log_target, direction)
    return value


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, log_target: Tensor, direction: Direction) -> Tensor:
        log_p = logits.log_softmax(dim=-1)
        if direction == "reverse":
            q = log_target.exp()
            value = _weighted(log_p.neg_().add_(log_target), q).sum(dim=-1)
            del log_p
            gradient = logits.log_softmax(dim=-1).exp_().sub_(q)  # computed as q is: equal logits give exactly 0
        elif direction == "forward":
            value, gradient = _towards(log_p.exp(), log_p.sub_(log_target))
        else:
            p = log_p.exp()
            log_m = torch.logaddexp(log_p, log_target).sub_(math.log(2))
            value, gradient = _towards(p, log_p.sub_(log_m))
            value = (value + _weighted(log_m.neg_().add_(log_target), log_target.exp()).sum(dim=-1)) / 2
            gradient.div_(2)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None], None, None


def _weighted(ratio: Tensor, probability: Tensor) -> Tensor:
    """Probability times log-ratio, in place of the latter, 0 where the probability is."""
    return ratio.mul_(probability).masked_fill_(probability == 0, 0)


def _towards(p: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """KL [n] and p (ratio - KL) [n, V], in place of the log-ratio."""
    gradient = _weighted(ratio, p)
    value = gradient.sum(dim=-1)
    return value, gradient.addcmul_(p, value[:, None], value=-1)
