"""What a streaming solver holds, and how its inverse follows rows that come or go.

Shapes: n rows, d hidden size, m the size of the system (n or d).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..random import normal

_KRYLOV = 12  # steps of the condition estimate


class Rows:
    """Rows [slots, d] in fp64 that come and go without copying the others; a slot without a row is zero."""

    def __init__(self, rows: Tensor) -> None:
        self.data = rows
        self._free: list[int] = []

    def put(self, rows: Tensor) -> Tensor:
        """Slots [r] that the rows are in now; where there is no room, it is doubled."""
        missing = len(rows) - len(self._free)
        if missing > 0:
            start = len(self.data)
            self.data = torch.cat([self.data, self.data.new_zeros(max(missing, start), self.data.shape[1])])
            self._free += range(len(self.data) - 1, start - 1, -1)
        slots = torch.tensor([self._free.pop() for _ in rows])
        self.data[slots] = rows
        return slots

    def clear(self, slots: Tensor) -> None:
        """Leave nothing of these rows."""
        self.data[slots] = 0.0
        self._free += slots.tolist()


@dataclass(frozen=True)
class State:
    """Everything that depends on keys, in fp64.

    Attributes:
        dual: whether the system is n x n; kept: whether its inverse is.
        order: [n], slots of the keys; gram: K K^T if dual, else K^T K.
        ridge: lambda; retain: mu n M, None for mu = 0. The system is their sum with the Gram matrix.
        inverse: of the system; if it is not kept, the system's Cholesky factor.
        condition: of a new solve; None after an update.
    """

    dual: bool
    kept: bool
    order: Tensor
    gram: Tensor
    ridge: float
    retain: Tensor | None
    inverse: Tensor
    condition: float | None = None

    def times(self, right: Tensor) -> Tensor:
        """The system times columns [m, r]."""
        result = (self.gram @ right).add_(right, alpha=self.ridge)
        return result if self.retain is None else result.addmm_(self.retain, right)

    def solve(self, right: Tensor) -> Tensor:
        """The system's solution for right-hand sides [m, r]."""
        return self.inverse @ right if self.kept else torch.cholesky_solve(right, self.inverse)

    def refined(self, right: Tensor) -> Tensor:
        """The solution after one step of iterative refinement, which squares the inverse's relative error."""
        found = self.solve(right)
        return found + self.solve(right - self.times(found))

    @property
    def bound(self) -> float:
        """An upper bound of the condition: trace over lambda."""
        trace = float(self.gram.trace()) + (0.0 if self.retain is None else float(self.retain.trace()))
        return trace / self.ridge + len(self.gram) if self.ridge > 0 else math.inf

    @property
    def estimate(self) -> float:
        """The condition, by Lanczos steps from below."""
        return _largest(self.times, self.gram) * _largest(self.solve, self.gram)


def bordered(block: Tensor, side: Tensor, corner: Tensor) -> Tensor:
    """[[block, side], [side^T, corner]]."""
    return torch.cat([torch.cat([block, side], dim=1), torch.cat([side.T, corner], dim=1)])


def grown(old: State, keys: Tensor, rows: Tensor, cross: Tensor) -> Tensor:
    """Inverse of the n x n system with `rows` more, by the Schur complement of the new corner."""
    reach, eye = old.refined(cross), torch.eye(len(rows)).to(rows)
    beyond = rows - reach.T @ keys
    # k.k + ridge - b.S b in a form without cancellation, in which an error of b counts only squared
    schur = beyond @ beyond.T + old.ridge * (eye + reach.T @ reach)
    solved = torch.linalg.solve_triangular(torch.linalg.cholesky(schur), torch.cat([reach.T, eye], dim=1), upper=False)
    side, root = solved.split([len(keys), len(rows)], dim=1)
    return bordered(old.inverse + side.T @ side, -side.T @ root, root.T @ root)


def shrunk(inverse: Tensor, keep: Tensor) -> Tensor:
    """Inverse of the n x n system without the rows outside `keep`."""
    lower = torch.linalg.cholesky(inverse[~keep][:, ~keep])
    side = torch.linalg.solve_triangular(lower, inverse[~keep][:, keep], upper=False)
    return inverse[keep][:, keep] - side.T @ side


def woodbury(old: State, rows: Tensor, sign: int) -> Tensor:
    """Inverse of the d x d system with `rows` more (sign 1) or less (-1)."""
    reach = old.refined(rows.T).T
    lower = torch.linalg.cholesky(torch.eye(len(rows)).to(rows) + sign * reach @ rows.T)
    side = torch.linalg.solve_triangular(lower, reach, upper=False)
    return torch.addmm(old.inverse, side.T, side, alpha=-sign)


def _largest(apply: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """Largest eigenvalue of a positive definite map of the size of `like`, from below, by Lanczos steps kept orthogonal."""
    start = normal((len(like), 1), 0, "condition").to(like)
    basis, images = [start / start.norm()], []
    for _ in range(min(_KRYLOV, len(like))):
        images.append(apply(basis[-1]))
        span, rest = torch.cat(basis, dim=1), images[-1]
        for _ in range(2):
            rest = rest - span @ (span.T @ rest)
        if not rest.norm() > 1e-12 * images[-1].norm():
            break
        basis.append(rest / rest.norm())
    span, image = (torch.cat(parts[: len(images)], dim=1) for parts in (basis, images))
    return float(torch.linalg.eigvalsh(span.T @ image)[-1])
