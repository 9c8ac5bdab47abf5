"""From the rows of a memory to what it adds to a residual: one class a readout, solved once and read at any strength.

| readout | shift of a residual h | what is solved for |
|---|---|---|
| `kernel` | exp(beta (cos(h, Z) - 1)) B | B, at landmarks Z (kernel.py) |
| `ridge` | S_q(A (h - c)) D | A (solve.py, equation 12 and its retain-aware form) |
| `softmax` | V softmax(beta cos(K, h)) over forget and retain keys K | nothing |
| `gated` | g(h) delta of a single key (equation 10) | nothing |

Whitened, keys and residuals are multiplied by P = (C + eps I)^(-1/2) first, with C the retain keys' covariance (solve.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..errors import RemaskError
from .capture import Captured
from .config import MemoryConfig
from .kernel import KernelSolution, solve_kernel
from .retained import Retained
from .shift import GatedShift, KernelShift, LinearShift, Shift, SoftmaxShift, TopShift, WhitenedShift
from .solve import Solution, solve_readout, whitening


def require_retained(retained: Retained | None, config: MemoryConfig) -> None:
    """Refuse a retain set that the readout cannot be solved or read with.

    Raises:
        RemaskError: none where one is needed, or single keys where the readout does not look at them, or too few of them.
    """
    looked_up = config.keeps_keys
    if retained is not None:
        held, most = len(retained.keys), retained.count if looked_up else 0
        if not min(most, config.retain_keys) <= held <= most:
            raise RemaskError(f"the readout {config.readout!r} does not fit the {held} retain keys of the memory")
    elif looked_up or config.whiten:
        what = "whitening" if config.whiten else f"the readout {config.readout!r}"
        raise RemaskError(f"{what} needs retain keys; build the memory with retain facts")


@dataclass(frozen=True)
class Frame:
    """How a readout sees residuals: as they are or, whitened, as (h - centre) P.

    Attributes:
        centre: [d].
        matrix: P, [d, d] fp64; None where residuals stay as they are.
    """

    centre: Tensor
    matrix: Tensor | None

    @property
    def origin(self) -> Tensor:
        """The centre as the readout sees it, [d]."""
        return self.centre if self.matrix is None else torch.zeros_like(self.centre)

    def seen(self, rows: Tensor) -> Tensor:
        """Residuals [n, d] as the readout sees them."""
        return rows if self.matrix is None else (rows.double() - self.centre.double()) @ self.matrix

    def shift(self, inner: Shift) -> Shift:
        """The shift for residuals as they are, from one for residuals as the readout sees them."""
        return inner if self.matrix is None else WhitenedShift(inner, self.matrix, self.centre)


class Readout(ABC):
    """The rows of a memory, solved.

    Attributes:
        rows: [n, d] keys and deltas, in the order in which they are solved.
        retained: of the retain set, as `require_retained` lets it pass.
        config: the memory's settings.
        weights: how much each row counts, [n].
        solution: of the system; None where nothing is solved.

    Raises:
        RemaskError: a system that cannot be solved, with the remedy.
    """

    def __init__(self, rows: Captured, retained: Retained | None, config: MemoryConfig) -> None:
        self.rows, self.retained, self.config = rows, retained, config
        self.weights = rows.weights(config.balance)
        self.solution = self._solve()

    def _solve(self) -> Solution | KernelSolution | None:
        return None

    @abstractmethod
    def shift(self, alpha: float) -> Shift:
        """What the memory adds to a residual at strength `alpha`."""

    @cached_property
    def centre(self) -> Tensor:
        """What is subtracted from keys and residuals, [d]."""
        if not self.config.centre:
            return torch.zeros(self.rows.keys.shape[1])
        return self.rows.keys.mean(0) if self.retained is None else self.retained.mean

    @cached_property
    def whitening(self) -> Tensor | None:
        """P, [d, d] fp64; None where keys and residuals stay as they are."""
        if not self.config.whiten or self.retained is None:
            return None
        return whitening(self.retained.mean, self.retained.moment)


class KernelReadout(Readout):
    """Ridge regression in smooth features of the residual."""

    retained: Retained
    solution: KernelSolution

    @cached_property
    def frame(self) -> Frame:
        """From the retain keys' mean."""
        return Frame(self.retained.mean, self.whitening)

    def _solve(self) -> KernelSolution:
        config, frame = self.config, self.frame
        return solve_kernel(
            frame.seen(self.rows.keys),
            self.rows.deltas,
            self.weights,
            frame.seen(self.retained.keys),
            frame.origin,
            beta=config.beta,
            mu=config.mu,
            ridge=config.ridge,
            landmarks=config.landmarks,
        )

    def shift(self, alpha: float) -> Shift:
        """exp(beta (cos(h, Z) - 1)) B times alpha."""
        landmarks, values = self.solution.landmarks, self.solution.values * alpha
        return self.frame.shift(KernelShift(landmarks, values, self.config.beta, self.frame.origin))


class RidgeReadout(Readout):
    """Ridge regression in the residual itself."""

    solution: Solution

    def _solve(self) -> Solution:
        config, white, moment = self.config, self.whitening, self._moment()
        keys = self.rows.keys - self.centre
        if not keys.any():
            raise RemaskError("centring leaves nothing of the keys: all are equal; set centre=False, or give retain facts")
        if white is not None:
            keys, moment = keys.double() @ white, None if moment is None else white @ moment.double() @ white
        solution = solve_readout(
            keys, config.ridge, relative=config.relative, retain_moment=moment, mu=config.mu, weights=self.weights
        )
        return solution if white is None else replace(solution, readout=(solution.readout.double() @ white).float())

    def _moment(self) -> Tensor | None:
        """E[(r - c)(r - c)^T] of the retain keys, [d, d]; None where they are not in the system."""
        if self.config.mu == 0 or self.retained is None:
            return None
        if not self.config.centre:
            return self.retained.moment
        return self.retained.moment.double() - torch.outer(self.centre.double(), self.centre.double())  # c is the mean of r

    def shift(self, alpha: float) -> Shift:
        """S_q(A (h - c)) D times alpha; folded to one matrix where all coefficients act."""
        readout, deltas = self.solution.readout, self.rows.deltas
        if self.config.q == 1:
            return LinearShift(readout.double().T @ deltas.double() * alpha, self.centre)
        count = -(-int(self.config.q * len(readout) * 1_000_000) // 1_000_000)  # ceil without float dust
        return TopShift(readout, deltas * alpha, max(1, count), self.centre)


class SoftmaxReadout(Readout):
    """Retrieval among forget keys, whose values are the deltas, and retain keys, whose value is nothing."""

    retained: Retained

    def shift(self, alpha: float) -> Shift:
        """V softmax(beta cos(K, h)) times alpha; cosines from the centre or, without one, from the mean of all keys K."""
        kept = self.retained.keys
        keys = torch.cat([self.rows.keys, kept])
        values = torch.cat([self.rows.deltas * alpha, torch.zeros_like(kept)])
        weights = torch.cat([self.weights, torch.full((len(kept),), self.retained.count / len(kept))])
        frame = Frame(self.centre if self.config.centre else keys.mean(0), self.whitening)
        return frame.shift(SoftmaxShift(frame.seen(keys), values, weights, self.config.beta, frame.origin))


class GatedReadout(Readout):
    """One key, one delta."""

    def shift(self, alpha: float) -> Shift:
        """g(h) delta times alpha."""
        key, delta = self.rows.keys[0], self.rows.deltas[0]
        eps = self.config.ridge * (float(key.square().sum()) if self.config.relative else 1.0)
        return GatedShift(key, delta * alpha, eps, self.config.cap)


READOUTS: dict[str, type[Readout]] = {
    "kernel": KernelReadout,
    "ridge": RidgeReadout,
    "softmax": SoftmaxReadout,
    "gated": GatedReadout,
}
