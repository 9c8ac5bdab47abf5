"""How much of what was forgotten an attack brings back.

Three states of the model are asked in the same way: unedited (B), edited (A), and one that never knew (F, the floor). Share of
the knowledge that is left, asked plainly and, with a star, under the attack:

    known = (mean A - mean F) / (mean B - mean F)        known* = (mean A* - mean F*) / (mean B* - mean F*)
    regained = 100 (known* - known) / (1 - known)        per cent of what was forgotten

0 = the attack finds no more than a plain question, 100 = under the attack nothing was forgotten. Below 0 the attack finds less,
above 100 more than the unedited model shows. Every state has its own floor under the attack, so what the attack gives away for
free, such as half of the answer, is no knowledge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ...errors import RemaskError
from ...random import numpy_generator
from ..statistics import RESAMPLES

LEAST_FORGOTTEN = 0.05  # below this share the quotient is noise over noise


@dataclass(frozen=True)
class Levels:
    """One number a row under one way of asking: answer log-probability in nats, or recovered share.

    Attributes:
        ids: of the rows.
        before: unedited model, [n].
        after: edited model, [n].
        floor: never-trained model, [n]; without one the prompt-masked level (log-probability) or 0 (recovered).

    Raises:
        RemaskError: lists of different lengths, ids that repeat, or a value that is not finite.
    """

    ids: Sequence[str]
    before: ArrayLike
    after: ArrayLike
    floor: ArrayLike

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(self.ids))
        for name in ("before", "after", "floor"):
            values = np.asarray(getattr(self, name), dtype=float)
            if values.shape != (len(self.ids),) or not np.isfinite(values).all():
                raise RemaskError(f"levels need one finite number a row in `{name}`, {len(self.ids)} in all")
            object.__setattr__(self, name, values)
        if len(set(self.ids)) != len(self.ids):
            raise RemaskError("levels need ids that are unique")

    def take(self, ids: Sequence[str]) -> Levels:
        """The rows with these ids, in their order."""
        place = {name: i for i, name in enumerate(self.ids)}
        chosen = [place[name] for name in ids]
        return Levels(ids, *(np.asarray(values)[chosen] for values in (self.before, self.after, self.floor)))


@dataclass(frozen=True)
class Regained:
    """What an attack brought back.

    Attributes:
        known: share of the knowledge that is left, asked plainly; None where the unedited model shows none.
        known_attacked: the same under the attack.
        regained: per cent of what was forgotten; low, high: its 95 % interval. None where it cannot be measured.
        n: rows under the attack.
        note: why it cannot be measured, else "".
    """

    known: float | None
    known_attacked: float | None
    regained: float | None
    low: float | None
    high: float | None
    n: int
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return dict(vars(self))


@dataclass(frozen=True)
class _Means:
    """Means of the three states; of all rows, or of each resample, [resamples]."""

    gap: np.ndarray  # B - F
    left: np.ndarray  # A - F

    @property
    def known(self) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.left / self.gap


def regained(plain: Levels, attacked: Levels, *, seed: int = 0) -> Regained:
    """The definition of this module with a 95 % percentile bootstrap over rows (2,000 resamples).

    Where all rows under the attack were asked plainly too, both sides are over exactly these rows (an attack leaves out rows
    that it trained on or that do not fit) and are resampled together; otherwise the two are resampled independently.

    Nothing is regained, and the note says so, where with 95 % confidence

    - the unedited model does not know more than the floor, plainly or under the attack (interval of B - F reaches 0), or
    - nothing was forgotten: 1 - known is below 0.05, or its interval reaches 0.

    Args:
        plain: rows asked as they stand.
        attacked: rows under the attack.
        seed: of the resampling, with the numbers of rows.
    """
    joint = set(attacked.ids) <= set(plain.ids)
    if joint:
        plain = plain.take(attacked.ids)
    n = len(attacked.ids)
    if not n or not plain.ids:
        return Regained(None, None, None, None, None, n, "no rows")
    rng = numpy_generator(seed, "regained", len(plain.ids), n)
    rows = rng.integers(len(plain.ids), size=(RESAMPLES, len(plain.ids)))
    other = rows if joint else rng.integers(n, size=(RESAMPLES, n))
    once, many = _means(plain, None), _means(plain, rows)
    once_attacked, many_attacked = _means(attacked, None), _means(attacked, other)

    shown, shown_attacked = _above_zero(once.gap, many.gap), _above_zero(once_attacked.gap, many_attacked.gap)
    known = float(once.known) if shown else None
    known_attacked = float(once_attacked.known) if shown_attacked else None
    note = ""
    if not shown:
        note = "asked plainly, the unedited model does not know more than the floor"
    elif 1 - once.known < LEAST_FORGOTTEN or not _above_zero(1 - once.known, 1 - many.known):
        note = "nothing was forgotten that could be regained"
    elif not shown_attacked:
        note = "under the attack the unedited model does not show more than the floor"
    if note:
        return Regained(known, known_attacked, None, None, None, n, note)
    low, high = _interval(_share(many.known, many_attacked.known))
    return Regained(known, known_attacked, float(_share(once.known, once_attacked.known)), low, high, n)


def _means(levels: Levels, rows: np.ndarray | None) -> _Means:
    before, after, floor = (np.asarray(values) for values in (levels.before, levels.after, levels.floor))
    gap, left = before - floor, after - floor
    if rows is None:
        return _Means(gap.mean(), left.mean())
    return _Means(gap[rows].mean(axis=1), left[rows].mean(axis=1))


def _share(known: np.ndarray, attacked: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return 100 * (attacked - known) / (1 - known)


def _above_zero(value: np.ndarray, resampled: np.ndarray) -> bool:
    """Whether a number and the lower end of its interval are positive."""
    return bool(value > 0) and _interval(resampled)[0] > 0


def _interval(resampled: np.ndarray) -> tuple[float, float]:
    finite = resampled[np.isfinite(resampled)]
    if not len(finite):
        return math.nan, math.nan
    low, high = np.quantile(finite, [0.025, 0.975])
    return float(low), float(high)
