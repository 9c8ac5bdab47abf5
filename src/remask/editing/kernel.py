"""The kernel readout: ridge regression in a space of smooth functions, solved in closed form over landmarks.

A linear map cannot tell apart residuals that differ only in what surrounds them; a retrieval (softmax) does not generalise
beyond its keys. Between them: with the kernel k(x, y) = exp(beta (cos(x, y) - 1)), cosines taken after a centre is subtracted,
and features phi(x) = k(x, Z) at landmarks Z [M, d] (Nystroem's method), the memory is the function

    f(h) = phi(h) B,   B = argmin  sum_i w_i |f(k_i) - d_i|^2 + mu (n/m) sum_j |f(r_j)|^2 + lambda |f|^2

over forget keys k with deltas d, retain keys r, and the kernel's own norm |f|^2 = tr(B^T k(Z, Z) B). Small beta: nearly linear.
Large beta: nearly a look-up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import RemaskError
from .solve import factor_solve

DEPENDENT = 1e-6  # directions of k(Z, Z) below this share of the largest eigenvalue are noise in an fp32 forward


@dataclass(frozen=True)
class KernelSolution:
    """Landmarks Z, unit vectors [M, d], values B [M, d], both fp32; the condition number of the system that gave B."""

    landmarks: Tensor
    values: Tensor
    condition: float


def solve_kernel(
    keys: Tensor,
    deltas: Tensor,
    weights: Tensor,
    retain: Tensor,
    centre: Tensor,
    *,
    beta: float,
    mu: float,
    ridge: float,
    landmarks: int,
) -> KernelSolution:
    """B and Z, solved in fp64.

    Args:
        keys, deltas: [n, d]; weights: [n], w; retain: [m, d]; centre: [d].
        landmarks: M at most; half of them forget keys and half retain keys, evenly spread over the rows.

    Raises:
        RemaskError: singular system, with the remedy.
    """
    n, half = len(keys), landmarks // 2
    unit = lambda rows: nn.functional.normalize(rows.double() - centre.double(), dim=-1)  # noqa: E731
    points, kept = unit(keys), unit(retain)
    if not points.any():
        raise RemaskError("all keys equal the retain keys' mean, so no direction tells them apart; choose another layer")
    chosen = torch.cat([spread(points, half), spread(kept, landmarks - half)])
    basis = _basis(_kernel(chosen, chosen, beta))
    features, quiet = _kernel(points, chosen, beta) @ basis, _kernel(kept, chosen, beta) @ basis
    weighted = features.T * weights.double()
    system = weighted @ features + ridge * torch.eye(basis.shape[1], dtype=torch.float64)
    if mu > 0:
        system += mu * n / len(kept) * (quiet.T @ quiet)
    solved, condition = factor_solve(system, weighted @ deltas.double())
    return KernelSolution(chosen.float(), (basis @ solved).float(), condition)


def spread(rows: Tensor, count: int) -> Tensor:
    """At most `count` rows, evenly spread over their order."""
    if len(rows) <= count:
        return rows
    return rows[torch.arange(count) * len(rows) // count]


def _kernel(one: Tensor, other: Tensor, beta: float) -> Tensor:
    """The kernel between unit vectors, [n, m]."""
    return (beta * (one @ other.T - 1)).exp()


def _basis(gram: Tensor) -> Tensor:
    """T [M, r] with T^T gram T = I over the directions that are not noise: phi T are orthonormal coordinates."""
    values, vectors = torch.linalg.eigh(gram)
    good = values > DEPENDENT * values[-1]
    return vectors[:, good] / values[good].sqrt()
