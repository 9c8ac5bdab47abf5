"""The readout of a memory kept solved while facts come and go, in fp64, at a fraction of a new solve's cost.

The system is that of `solve`: n x n (K K^T + lambda I) while n <= d and mu = 0, else d x d (K^T K + mu n M + lambda I). Its
Gram part is kept and changed by the rows that come or go. The rest decides what follows:

- Absolute ridge, mu = 0: a change of low rank. Inverse and readout are updated, by Schur complement or Woodbury's identity.
- Relative ridge or mu > 0: lambda and mu n M move with every row, by full rank and however the system is scaled; updating an
  eigen-decomposition costs its size cubed as well. So the kept Gram matrix is factored anew, which is exact. Then all of the
  readout changes: `coefficients` applies it through the factor, `readout` forms it when read (half of a solve).

Operations of one row, checks and copies included, and of `solve_readout` without its condition number (last row by formula):

    d      n       solve    low rank  factored         d      n       solve    low rank  factored
    192    40      1.3e6    3.5e5     3.1e5            4096   40      2.7e7    2.4e6     1.4e6
    192    400     6.2e7    3.9e6     5.4e6            4096   400     2.7e9    3.3e7     4.3e7
    192    10,000  1.5e9    2.5e7     1.2e7            4096   10,000  6.9e11   1.7e9     2.4e10
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import RemaskError
from ..random import normal
from .solve import MAX_CONDITION, Solution, _solve, ridge_scale

_KRYLOV = 12  # steps of the condition estimate
_DOUBT = 0.1 * MAX_CONDITION  # the estimate is a lower bound: from here on the solve itself decides


@dataclass(frozen=True)
class _State:
    """Everything that depends on keys, in fp64.

    Attributes:
        dual: whether the system is n x n; kept: whether its inverse and the readout are.
        keys: [n, d]; gram: K K^T if dual, else K^T K; system: with ridge and retain term.
        inverse, readout: the system's inverse and A [n, d]; if they are not kept, its Cholesky factor and nothing [0, d].
    """

    dual: bool
    kept: bool
    keys: Tensor
    gram: Tensor
    system: Tensor
    inverse: Tensor
    readout: Tensor
    condition: float

    def solve(self, right: Tensor) -> Tensor:
        """The system's solution for right-hand sides [m, r]."""
        return self.inverse @ right if self.kept else torch.cholesky_solve(right, self.inverse)

    def refined(self, right: Tensor) -> Tensor:
        """The solution after one step of iterative refinement, which squares the inverse's relative error."""
        found = self.solve(right)
        return found + self.solve(right - self.system @ found)

    def apply(self, hidden: Tensor) -> Tensor:
        """A h for columns h: [n, r] from [d, r]."""
        if self.kept:
            return self.readout @ hidden
        return self.solve(self.keys @ hidden) if self.dual else self.keys @ self.solve(hidden)

    def formed(self) -> Tensor:
        """A, [n, d]."""
        if self.kept:
            return self.readout
        return self.solve(self.keys) if self.dual else self.solve(self.keys.T).T


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
        self._state = self._solved(rows)

    @property
    def readout(self) -> Tensor:
        """A [n, d] in fp32, as `solve_readout` gives it for the present rows in their order."""
        return self._state.formed().float().contiguous()

    @property
    def condition(self) -> float:
        """Condition number of the system: exact after a refresh, else an estimate from below (within a few per cent)."""
        return self._state.condition

    @property
    def solution(self) -> Solution:
        """What `solve_readout` returns."""
        return Solution(self.readout, self.condition)

    @property
    def residual(self) -> float:
        """Relative error of A z for a random z (of S^-1 z where A is not kept), against one step of iterative refinement."""
        return self._drift(self._state)

    def coefficients(self, hidden: Tensor) -> Tensor:
        """A h: [..., n] for residuals [..., d], computed in fp64, in the residuals' dtype; never forms the readout."""
        flat = hidden.reshape(-1, hidden.shape[-1]).to(self._state.keys)
        return self._state.apply(flat.T).T.reshape(*hidden.shape[:-1], -1).to(hidden)

    def insert(self, keys: Tensor) -> None:
        """Append rows [r, d].

        Raises:
            RemaskError: as for the constructor; the solver is then as before.
        """
        rows = _checked(keys, self._width)
        self._advance(torch.cat([self._state.keys, rows]), len(rows), lambda wide: self._inserted(wide, rows))

    def remove(self, index: Sequence[int], *, exact: bool = False) -> None:
        """Drop the rows at these positions; the others keep their order.

        What stays of a dropped row is rounding (1e-16 of the Gram matrix, times the condition in the inverse); with `exact` the
        survivors are solved anew, and nothing stays.

        Raises:
            RemaskError: unknown position, nothing would be left, survivors' system singular; the solver is then as before.
        """
        drop, count = sorted(set(index)), len(self._state.keys)
        unknown = [i for i in drop if not 0 <= i < count]
        if unknown:
            raise RemaskError(f"there is no row {unknown[0]} among {count}; name rows by their positions 0 to {count - 1}")
        if len(drop) == count:
            raise RemaskError("removing every row leaves nothing to solve; drop the solver instead")
        keep = torch.ones(count, dtype=torch.bool)
        keep[drop] = False
        self._advance(self._state.keys[keep], count if exact else len(drop), lambda left: self._removed(left, keep))

    def refresh(self) -> None:
        """Solve the present rows anew: the state of a solver that never saw any others, bit for bit."""
        self._renew(self._state.keys)

    # ---------------------------------------------------------------- control
    def _dual(self, keys: Tensor) -> bool:
        return self._mu == 0 and len(keys) <= keys.shape[1]

    def _renew(self, keys: Tensor) -> None:
        self._state = self._solved(keys)
        self.refreshes += 1
        self.updates_since_refresh = 0

    def _advance(self, keys: Tensor, changed: int, update: Callable[[Tensor], _State]) -> None:
        """Become `keys` by the cheap update, or by a new solve where that is due, cheaper or safer."""
        if changed == 0:
            return
        due = self.updates_since_refresh + 1 >= self._every or 2 * changed > min(keys.shape)
        if not due and self._dual(keys) == self._state.dual:
            with contextlib.suppress(torch.linalg.LinAlgError):
                state = update(keys)
                if state.condition <= _DOUBT and self._drift(state) <= self._tolerance:
                    self._state = state
                    self.updates_since_refresh += 1
                    return
        self._renew(keys)

    def _drift(self, state: _State) -> float:
        probe = normal((self._width, 1), 0, "drift", len(state.keys), self.updates_since_refresh).to(state.keys)
        right = state.keys @ probe if state.dual else probe
        better = state.refined(right)
        found = state.readout @ probe if state.kept else state.solve(right)
        if state.kept and not state.dual:
            better = state.keys @ better
        return float((found - better).norm() / better.norm().clamp_min(torch.finfo(torch.float64).tiny))

    # ---------------------------------------------------------------- algebra
    def _system(self, gram: Tensor, keys: Tensor) -> Tensor:
        system = gram.clone()
        system.diagonal().add_(ridge_scale(keys, self._ridge, self._relative))
        return system if self._moment is None else system.add_(self._moment, alpha=self._mu * len(keys))

    def _solved(self, keys: Tensor) -> _State:
        """The state from the keys alone; the conditions and the errors are the batch solve's."""
        dual = self._dual(keys)
        right = keys if dual else keys.T
        gram = right @ right.T
        system = self._system(gram, keys)
        if not self._kept:
            condition = _solve(system, right[:, :1])[1]
            return _State(dual, False, keys, gram, system, torch.linalg.cholesky(system), keys[:0].clone(), condition)
        size = len(system)
        solved, condition = _solve(system, torch.cat([torch.eye(size).to(system), right], dim=1))
        parts = solved[:, :size], solved[:, size:] if dual else solved[:, size:].T
        inverse, readout = (part.clone(memory_format=torch.contiguous_format) for part in parts)
        return _State(dual, True, keys, gram, system, inverse, readout, condition)

    def _inserted(self, keys: Tensor, rows: Tensor) -> _State:
        """The state after appending `rows`, which gives `keys`."""
        old = self._state
        if old.dual:
            cross = old.keys @ rows.T
            gram = _bordered(old.gram, cross, rows @ rows.T)
            return self._finished(keys, gram, lambda: _grown(old, rows, cross, self._ridge))
        return self._finished(keys, old.gram + rows.T @ rows, lambda: _woodbury(old, old.readout, rows, 1))

    def _removed(self, keys: Tensor, keep: Tensor) -> _State:
        """The state after dropping the rows outside `keep` [n] bool, which leaves `keys`."""
        old, rows = self._state, self._state.keys[~keep]
        if old.dual:
            return self._finished(keys, old.gram[keep][:, keep], lambda: _shrunk(old, keep))
        return self._finished(keys, old.gram - rows.T @ rows, lambda: _woodbury(old, old.readout[keep], rows, -1))

    def _finished(self, keys: Tensor, gram: Tensor, update: Callable[[], tuple[Tensor, Tensor]]) -> _State:
        """The state with inverse and readout by `update`, or with a new factor; its condition is estimated."""
        system = self._system(gram, keys)
        inverse, readout = update() if self._kept else (torch.linalg.cholesky(system), keys[:0].clone())
        state = _State(self._state.dual, self._kept, keys, gram, system, inverse, readout, 0.0)
        return replace(state, condition=_largest(system.matmul, system) * _largest(state.solve, system))


def _checked(keys: Tensor, width: int) -> Tensor:
    """A copy of the rows in fp64, so that no later change of the caller's reaches the state."""
    if keys.ndim != 2 or keys.shape[1] != width or not keys.isfinite().all():
        raise RemaskError(f"keys must be finite rows [r, {width}]; these are {list(keys.shape)}, or not finite")
    return keys.to(torch.float64, copy=True)


def _bordered(block: Tensor, side: Tensor, corner: Tensor) -> Tensor:
    return torch.cat([torch.cat([block, side], dim=1), torch.cat([side.T, corner], dim=1)])


def _grown(old: _State, rows: Tensor, cross: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Inverse and readout of the n x n system with `rows` more, by the Schur complement of the new corner."""
    reach = old.refined(cross)
    beyond = rows - reach.T @ old.keys
    # k.k + ridge - b.S b in a form without cancellation, in which an error of b counts only squared
    schur = beyond @ beyond.T + ridge * (torch.eye(len(rows)).to(rows) + reach.T @ reach)
    right = torch.cat([reach.T, torch.eye(len(rows)).to(rows), beyond], dim=1)
    solved = torch.linalg.solve_triangular(torch.linalg.cholesky(schur), right, upper=False)
    side, root, fresh = solved.split([len(old.keys), *rows.shape], dim=1)
    grown = _bordered(old.inverse + side.T @ side, -side.T @ root, root.T @ root)
    return grown, torch.cat([old.readout - side.T @ fresh, root.T @ fresh])


def _shrunk(old: _State, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse and readout of the n x n system without the rows outside `keep`."""
    lower = torch.linalg.cholesky(old.inverse[~keep][:, ~keep])
    right = torch.cat([old.inverse[~keep][:, keep], old.readout[~keep]], dim=1)
    solved = torch.linalg.solve_triangular(lower, right, upper=False)
    side, gone = solved[:, : -old.keys.shape[1]], solved[:, -old.keys.shape[1] :]
    return old.inverse[keep][:, keep] - side.T @ side, old.readout[keep] - side.T @ gone


def _woodbury(old: _State, readout: Tensor, rows: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    """Inverse and readout of the d x d system with `rows` more (sign 1) or less (-1); `readout` is without them."""
    reach = old.refined(rows.T).T
    lower = torch.linalg.cholesky(torch.eye(len(rows)).to(rows) + sign * reach @ rows.T)
    side = torch.linalg.solve_triangular(lower, reach, upper=False)
    fresh = torch.linalg.solve_triangular(lower.T, side, upper=True)
    changed = readout - sign * (readout @ rows.T) @ fresh
    return old.inverse - sign * side.T @ side, torch.cat([changed, fresh]) if sign > 0 else changed


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
