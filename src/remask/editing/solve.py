"""The closed-form solve behind every memory, in fp64.

With keys K [n, d], deltas D [n, d] and retain keys R [m, d] as rows, the memory is the d x d map

    W = argmin ||K W - D||^2 + mu (n/m) ||R W||^2 + lambda ||W||^2  =  A^T D,   A = K (K^T K + mu (n/m) R^T R + lambda I)^-1

so that the edit is  h <- h + alpha S_q(A h) D.  With mu = 0 the identity  A = (K K^T + lambda I)^-1 K  makes A h the paper's
coefficients G K^T h (equations 11 and 12); the smaller of the two systems is solved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RemaskError

MAX_CONDITION = 1e13  # beyond this an fp64 solve keeps fewer than three digits
FLOOR = 1e-3  # of the mean eigenvalue: directions in which retain keys hardly vary are not blown up without bound


@dataclass(frozen=True)
class Solution:
    """Readout A [n, d] in fp32 and the condition number of the system that gave it."""

    readout: Tensor
    condition: float


def ridge_scale(keys: Tensor, ridge: float, relative: bool) -> float:
    """lambda: as given, or times the mean squared key norm (dimensionless ridge)."""
    return ridge * float(keys.double().square().sum(dim=1).mean()) if relative else ridge


def solve_readout(
    keys: Tensor,
    ridge: float,
    *,
    relative: bool = True,
    retain_moment: Tensor | None = None,
    mu: float = 0.0,
    weights: Tensor | None = None,
) -> Solution:
    """A = W K (K^T W K + mu n M + lambda I)^-1 with M = R^T R / m the retain keys' second moment [d, d].

    Args:
        weights: of the keys, [n]; W is diagonal. None = all 1.

    Raises:
        RemaskError: singular or near-singular system, with the remedy.
    """
    root = torch.ones(len(keys), 1, dtype=torch.float64) if weights is None else weights.double().sqrt().unsqueeze(1)
    wide = root * keys.double()
    n, d = wide.shape
    scale = ridge_scale(keys, ridge, relative)
    if mu > 0 and retain_moment is None:
        raise RemaskError("a retain-aware memory (mu > 0) needs retain facts; pass --retain or set mu = 0")
    if mu == 0 and n <= d:
        system = wide @ wide.T + scale * torch.eye(n, dtype=torch.float64)
        readout, condition = factor_solve(system, wide)
        return Solution((root * readout).float(), condition)
    system = wide.T @ wide + scale * torch.eye(d, dtype=torch.float64)
    if mu > 0 and retain_moment is not None:
        system += mu * n * retain_moment.double()
    readout, condition = factor_solve(system, wide.T)
    return Solution((root * readout.T).float(), condition)


def second_moment(keys: Tensor) -> Tensor:
    """R^T R / m in fp64, [d, d]."""
    wide = keys.double()
    return wide.T @ wide / len(wide)


def whitening(mean: Tensor, moment: Tensor) -> Tensor:
    """(C + eps I)^(-1/2), symmetric, [d, d] in fp64, with C = M - mean mean^T and eps = FLOOR tr(C) / d.

    Args:
        mean, moment: first and second moment of the retain keys, [d] and [d, d].

    Raises:
        RemaskError: the keys do not vary.
    """
    covariance = moment.double() - torch.outer(mean.double(), mean.double())
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=0)  # the moment is kept in fp32
    if not values.mean() > 1e-6 * moment.diagonal().mean():
        raise RemaskError("the retain keys do not vary, so they cannot be whitened; give more retain facts or whiten=False")
    return vectors @ torch.diag((values + FLOOR * values.mean()).rsqrt()) @ vectors.T


def factor_solve(system: Tensor, right: Tensor) -> tuple[Tensor, float]:
    """Cholesky solution of a symmetric positive system, and its condition number.

    Raises:
        RemaskError: singular to working precision, with the remedy.
    """
    condition = float(torch.linalg.cond(system))
    factor, info = torch.linalg.cholesky_ex(system)
    if int(info) or not condition <= MAX_CONDITION:
        raise RemaskError(
            "the keys' Gram matrix is singular to working precision (near-duplicate facts?); raise ridge or drop duplicates"
        )
    return torch.cholesky_solve(right, factor), condition
