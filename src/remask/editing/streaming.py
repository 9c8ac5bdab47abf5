"""The readout of a memory kept solved while facts come and go, in fp64, at a fraction of a new solve's cost.

The system is that of `solve`: n x n (K K^T + lambda I) while n <= d and mu = 0, else d x d (K^T K + mu n M + lambda I). Its
Gram part is kept and changed by the rows that come or go; the other rows are never touched. The rest decides what follows:

- Absolute ridge, mu = 0: a change of low rank. The inverse is updated, by Schur complement or Woodbury's identity.
- Relative ridge or mu > 0: lambda and mu n M move with every row, by full rank and however the system is scaled; updating an
  eigen-decomposition costs its size cubed as well. So the kept Gram matrix is factored anew, which is exact.

All of the readout changes with every row. `coefficients` applies it as two products, by the keys and by the inverse or factor;
`readout` forms it when read (half of a solve).

Operations of one row, checks and copies included, and of `solve_readout` without its condition number (last row by formula):

    d      n       solve    low rank  factored         d      n       solve    low rank  factored
    192    40      1.3e6    7.8e4     8.3e4            4096   40      2.7e7    9.9e5     8.3e5
    192    400     6.2e7    7.1e5     2.8e6            4096   400     2.7e9    1.2e7     3.1e7
    192    10,000  1.5e9    7.4e5     2.9e6            4096   10,000  6.9e11   3.3e8     2.4e10
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import RemaskError
from ..random import normal
from .rows import Rows, State, bordered, grown, shrunk, woodbury
from .solve import MAX_CONDITION, Solution, factor_solve, ridge_scale

_DOUBT = 0.1 * MAX_CONDITION  # the estimate is a lower bound: from here on the solve itself decides


class StreamingSolver:
    """`solve_readout` for rows that come and go; exact in every setting, with a drift that is watched.

    Args:
        keys: [n, d], n >= 1; ridge, relative, retain_moment, mu: as for `solve_readout`.
        refresh: updates after which the rows are solved anew.
        tolerance: `residual` above which they are solved anew at once. A new solve's own is about 1e-16 times the condition:
            beyond a condition of 1e10 the default is met by solving anew every time.

    Attributes:
        updates_since_refresh: inserts and removals since the last new solve; refreshes: new solves after the first.

    Raises:
        RemaskError: singular or near-singular system, mu > 0 without retain moment, keys not finite rows.
    """

    _rows: Rows
    _state: State

    def __init__(
        self,
        keys: Tensor,
        ridge: float,
        *,
        relative: bool = True,
        retain_moment: Tensor | None = None,
        mu: float = 0.0,
        refresh: int = 256,
        tolerance: float = 1e-6,
    ) -> None:
        if mu > 0 and retain_moment is None:
            raise RemaskError("a streaming solver with mu > 0 needs the retain keys' second moment; pass it or set mu = 0")
        self._ridge, self._relative, self._mu = ridge, relative, mu
        self._moment = retain_moment.double() if mu > 0 and retain_moment is not None else None
        self._kept = not relative and mu == 0
        self._every, self._tolerance = refresh, tolerance
        self.updates_since_refresh = self.refreshes = 0
        self._width = keys.shape[-1]
        rows = _checked(keys, self._width)
        if not len(rows):
            raise RemaskError("a streaming solver needs at least one row of keys to start from")
        self._become(rows)

    @property
    def keys(self) -> Tensor:
        """The present rows [n, d] in their order, in fp64."""
        return self._rows.data[self._state.order]

    @property
    def readout(self) -> Tensor:
        """A [n, d] in fp32, as `solve_readout` gives it for the present rows in their order; half of a solve's work."""
        keys, state = self.keys, self._state
        return (state.solve(keys) if state.dual else state.solve(keys.T).T).float().contiguous()

    @property
    def condition(self) -> float:
        """Condition number of the system: exact after a refresh, else an estimate from below (within a few per cent)."""
        return self._state.estimate if self._state.condition is None else self._state.condition

    @property
    def solution(self) -> Solution:
        """What `solve_readout` returns."""
        return Solution(self.readout, self.condition)

    @property
    def residual(self) -> float:
        """Relative error of the solution for a random right-hand side, against one step of iterative refinement."""
        return self._drift(self._state)

    def coefficients(self, hidden: Tensor) -> Tensor:
        """A h: [..., n] for residuals [..., d], computed in fp64, in the residuals' dtype; never forms the readout."""
        state, columns = self._state, hidden.reshape(-1, hidden.shape[-1]).to(self._state.gram).T
        found = state.solve(self.keys @ columns) if state.dual else (self._rows.data @ state.solve(columns))[state.order]
        return found.T.reshape(*hidden.shape[:-1], -1).to(hidden)

    def insert(self, keys: Tensor) -> None:
        """Append rows [r, d].

        Raises:
            RemaskError: as for the constructor; the solver is then as before.
        """
        rows = _checked(keys, self._width)
        if not len(rows):
            return
        slots = self._rows.put(rows)
        try:
            self._advance(torch.cat([self._state.order, slots]), len(rows), lambda: self._inserted(slots, rows))
        except RemaskError:
            self._rows.clear(slots)
            raise

    def remove(self, index: Sequence[int], *, exact: bool = False) -> None:
        """Drop the rows at these positions; the others keep their order.

        What stays of a dropped row is rounding (1e-16 of the Gram matrix, times the condition in the inverse); with `exact` the
        survivors are solved anew, and nothing stays.

        Raises:
            RemaskError: unknown position, nothing would be left, survivors' system singular; the solver is then as before.
        """
        drop, count = sorted(set(index)), len(self._state.order)
        unknown = [i for i in drop if not 0 <= i < count]
        if unknown:
            raise RemaskError(f"there is no row {unknown[0]} among {count}; name rows by their positions 0 to {count - 1}")
        if len(drop) == count:
            raise RemaskError("removing every row leaves nothing to solve; drop the solver instead")
        if not drop:
            return
        keep = torch.ones(count, dtype=torch.bool)
        keep[drop] = False
        rows, gone = self._rows, self._state.order[~keep]
        self._advance(self._state.order[keep], count if exact else len(drop), lambda: self._removed(keep))
        if self._rows is rows:  # else they were copied without these
            rows.clear(gone)

    def refresh(self) -> None:
        """Solve the present rows anew: the state of a solver that never saw any others, bit for bit."""
        self._renew(self._state.order)

    # ---------------------------------------------------------------- control
    def _dual(self, count: int) -> bool:
        return self._mu == 0 and count <= self._width

    def _renew(self, order: Tensor) -> None:
        self._become(self._rows.data[order])
        self.refreshes += 1
        self.updates_since_refresh = 0

    def _advance(self, order: Tensor, changed: int, update: Callable[[], State]) -> None:
        """Become the rows in `order` by the cheap update, or by a new solve where that is due, cheaper or safer."""
        due = self.updates_since_refresh + 1 >= self._every or 2 * changed > min(len(order), self._width)
        if not due and self._dual(len(order)) == self._state.dual:
            with contextlib.suppress(torch.linalg.LinAlgError):
                state = update()
                if (state.bound <= _DOUBT or state.estimate <= _DOUBT) and self._drift(state) <= self._tolerance:
                    self._state = state
                    self.updates_since_refresh += 1
                    return
        self._renew(order)

    def _drift(self, state: State) -> float:
        right = normal((self._width, 1), 0, "drift", len(state.order), self.updates_since_refresh).to(state.gram)
        if state.dual:
            right = self._rows.data[state.order] @ right
        found, better = state.solve(right), state.refined(right)
        return float((found - better).norm() / better.norm().clamp_min(torch.finfo(torch.float64).tiny))

    # ---------------------------------------------------------------- algebra
    def _become(self, keys: Tensor) -> None:
        """The state from the keys alone; the conditions and the errors are the batch solve's."""
        dual = self._dual(len(keys))
        right = keys if dual else keys.T
        ridge = ridge_scale(keys, self._ridge, self._relative)
        state = State(dual, self._kept, torch.arange(len(keys)), right @ right.T, ridge, self._retain(len(keys)), keys[:0])
        eye = torch.eye(len(state.gram)).to(keys)
        system = state.times(eye)
        inverse, condition = factor_solve(system, eye if self._kept else right[:, :1])
        inverse = inverse.clone(memory_format=torch.contiguous_format) if self._kept else torch.linalg.cholesky(system)
        self._rows, self._state = Rows(keys), replace(state, inverse=inverse, condition=condition)

    def _retain(self, count: int) -> Tensor | None:
        return None if self._moment is None else self._mu * count * self._moment

    def _inserted(self, slots: Tensor, rows: Tensor) -> State:
        """The state after appending `rows`, which are in `slots`."""
        old, order = self._state, torch.cat([self._state.order, slots])
        if old.dual:
            keys = self.keys
            cross = keys @ rows.T
            gram = bordered(old.gram, cross, rows @ rows.T)
            return self._finished(order, gram, lambda: grown(old, keys, rows, cross))
        return self._finished(order, torch.addmm(old.gram, rows.T, rows), lambda: woodbury(old, rows, 1))

    def _removed(self, keep: Tensor) -> State:
        """The state after dropping the rows outside `keep` [n] bool."""
        old, order = self._state, self._state.order[keep]
        if old.dual:
            return self._finished(order, old.gram[keep][:, keep], lambda: shrunk(old.inverse, keep))
        rows = self._rows.data[old.order[~keep]]
        return self._finished(order, torch.addmm(old.gram, rows.T, rows, alpha=-1), lambda: woodbury(old, rows, -1))

    def _finished(self, order: Tensor, gram: Tensor, update: Callable[[], Tensor]) -> State:
        """The state with the inverse by `update`, or with a new factor."""
        ridge = self._ridge * float(gram.trace()) / len(order) if self._relative else self._ridge
        state = State(self._state.dual, self._kept, order, gram, ridge, self._retain(len(order)), gram)
        if self._kept:
            return replace(state, inverse=update())
        system = gram.clone() if state.retain is None else gram + state.retain
        system.diagonal().add_(ridge)
        return replace(state, inverse=torch.linalg.cholesky(system))


def _checked(keys: Tensor, width: int) -> Tensor:
    """A copy of the rows in fp64, so that no later change of the caller's reaches the state."""
    if keys.ndim != 2 or keys.shape[1] != width or not keys.isfinite().all():
        raise RemaskError(f"keys must be finite rows [r, {width}]; these are {list(keys.shape)}, or not finite")
    return keys.to(torch.float64, copy=True)
