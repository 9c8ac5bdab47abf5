"""Intervals, paired tests and stopping rules. Sampling error (which rows) and Monte-Carlo error (which masks) stay apart.

A number of this library has up to three errors: rows (another forget set would give another mean), seeds (another training run
would) and masks (another bank would). The first two call for an interval over the thing that varies; the third is no property
of the model and only says whether the bank was large enough, so it is reported beside the interval and never inside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import bootstrap, permutation_test, sem, ttest_rel
from scipy.stats import t as student

from ..errors import RemaskError
from ..random import numpy_generator

RESAMPLES = 2000
PERMUTATIONS = 9999

Method = Literal["percentile", "bca"]


@dataclass(frozen=True)
class Estimate:
    """A mean over n rows (or seeds) with its interval: 95 % percentile bootstrap, 2,000 resamples, unless asked otherwise."""

    mean: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        """JSON form; not-a-number becomes null."""
        clean = lambda x: None if math.isnan(x) else x  # noqa: E731
        return {"mean": clean(self.mean), "low": clean(self.low), "high": clean(self.high), "n": self.n}


def mean_interval(values: Sequence[float], seed: int = 0) -> Estimate:
    """Mean of `values` with its bootstrap interval; NaN for no rows, a point for one row or constant rows."""
    return bootstrap_interval(values, seed=seed)


def bootstrap_interval(
    values: ArrayLike, *, method: Method = "percentile", level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Mean of `values` [n] with a bootstrap interval; NaN for no values, a point for one value or constant values.

    Both kinds are first of all large-sample intervals: docs/metrics.md gives their measured coverage. Under about 20 values
    `t_interval` keeps its promise better.

    Args:
        values: one number a row (or a seed), [n].
        method: `percentile`, or `bca` (bias-corrected and accelerated; Efron, 1987), which follows skewed data better.
        level: confidence, in (0, 1).
        resamples: bootstrap resamples.
        seed: of the resampling, with n.

    Raises:
        RemaskError: unknown method, a level outside of (0, 1), or values that are not one list.
    """
    if method not in ("percentile", "bca"):
        raise RemaskError(f"bootstrap method {method!r} is unknown; choose percentile or bca")
    data = _one_list(values, level)
    if len(data) == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = float(data.mean())
    if len(data) == 1 or np.ptp(data) == 0:
        return Estimate(mean, mean, mean, len(data))
    rng = numpy_generator(seed, "bootstrap", len(data))
    kind = {"percentile": "percentile", "bca": "BCa"}[method]
    result = bootstrap((data,), np.mean, n_resamples=resamples, method=kind, confidence_level=level, rng=rng)
    return Estimate(mean, float(result.confidence_interval.low), float(result.confidence_interval.high), len(data))


def t_interval(values: ArrayLike, *, level: float = 0.95) -> Estimate:
    """Mean of `values` [n] with Student's interval: the one for a handful of seeds. One value has an infinite interval.

    Raises:
        RemaskError: a level outside of (0, 1), or values that are not one list.
    """
    data = _one_list(values, level)
    if len(data) == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = float(data.mean())
    if len(data) == 1:
        return Estimate(mean, -math.inf, math.inf, 1)
    half = float(student.ppf((1 + level) / 2, len(data) - 1) * sem(data))
    return Estimate(mean, mean - half, mean + half, len(data))


def seed_interval(
    values: ArrayLike, *, over: Literal["rows", "seeds"], method: Method | Literal["t"] = "percentile", seed: int = 0
) -> Estimate:
    """Mean of `values` [seeds, rows] with the 95 % interval for one of its two sources of variation.

    Args:
        values: the same rows under every seed, [seeds, rows].
        over: `rows` averages over seeds and resamples rows (would other rows say the same of these runs?); `seeds` averages
            over rows and resamples seeds (would other runs say the same of these rows?).
        method: `percentile`, `bca`, or `t`, which is the one to take over fewer than about 20 seeds.
        seed: of the resampling.

    Raises:
        RemaskError: not a table [seeds, rows], an unknown method or `over`, or one seed where seeds are to vary.
    """
    data = np.asarray(values, dtype=float)
    if data.ndim != 2 or not data.size:
        raise RemaskError(f"seed_interval needs a filled table [seeds, rows], not shape {list(data.shape)}")
    if over not in ("rows", "seeds"):
        raise RemaskError(f"seed_interval varies 'rows' or 'seeds', not {over!r}")
    if over == "seeds" and len(data) < 2:
        raise RemaskError("one seed says nothing about the spread over seeds; run at least two")
    means = data.mean(axis=0 if over == "rows" else 1)
    return t_interval(means) if method == "t" else bootstrap_interval(means, method=method, seed=seed)


def ratio_interval(numerator: Sequence[float], denominator: Sequence[float], seed: int = 0) -> Estimate:
    """|mean(numerator)| / |mean(denominator)|, rows of the two resampled independently."""
    top, bottom = np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float)
    if not len(top) or not len(bottom):
        return Estimate(math.nan, math.nan, math.nan, 0)
    rng = numpy_generator(seed, "bootstrap ratio", len(top), len(bottom))
    tops = np.abs(rng.choice(top, (RESAMPLES, len(top))).mean(axis=1))
    bottoms = np.abs(rng.choice(bottom, (RESAMPLES, len(bottom))).mean(axis=1))
    low, high = np.quantile(tops / np.maximum(bottoms, 1e-12), [0.025, 0.975])
    return Estimate(abs(top.mean()) / max(abs(bottom.mean()), 1e-12), float(low), float(high), len(bottom))


# ------------------------------------------------------------------ tests
@dataclass(frozen=True)
class Comparison:
    """Two methods on the same rows: the mean difference first - second, the test's statistic and its two-sided p-value."""

    difference: float
    statistic: float
    pvalue: float
    n: int


def paired_t(first: ArrayLike, second: ArrayLike) -> Comparison:
    """Paired t-test of two lists [n] over the same rows or seeds; p = 1 where every pair is equal.

    Raises:
        RemaskError: lists that do not pair, or fewer than two pairs.
    """
    difference = _differences(first, second)
    if not difference.any():
        return Comparison(0.0, 0.0, 1.0, len(difference))
    if np.ptp(difference) == 0:  # scipy warns of cancellation here; the limit is certain
        return Comparison(float(difference[0]), math.copysign(math.inf, difference[0]), 0.0, len(difference))
    result = ttest_rel(np.asarray(first, dtype=float), np.asarray(second, dtype=float))
    return Comparison(float(difference.mean()), float(result.statistic), float(result.pvalue), len(difference))


def paired_permutation(first: ArrayLike, second: ArrayLike, *, permutations: int = PERMUTATIONS, seed: int = 0) -> Comparison:
    """Permutation test of the mean paired difference: pairs swap at random. Exact where 2^n <= `permutations`.

    The smallest p-value is 2 / 2^n when exact and about 2 / (`permutations` + 1) otherwise: a test of 4 seeds cannot reach
    0.05. The statistic is the mean difference itself.

    Raises:
        RemaskError: lists that do not pair, or fewer than two pairs.
    """
    difference = _differences(first, second)
    result = permutation_test(
        (difference, np.zeros_like(difference)),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=permutations,
        batch=1000,
        rng=numpy_generator(seed, "permutation", len(difference)),
    )
    mean = float(difference.mean())
    return Comparison(mean, mean, float(result.pvalue), len(difference))


def holm(pvalues: ArrayLike) -> np.ndarray:
    """Holm's adjusted p-values over a whole table of any shape (Holm, 1979); NaN cells are no tests and stay NaN.

    With m tests in ascending order, adjusted p_(i) = max over j <= i of min(1, (m - j + 1) p_(j)): rejecting where it is at
    most alpha keeps the chance of a single false rejection in the table at alpha, under any dependence.

    Raises:
        RemaskError: a value outside of [0, 1].
    """
    table = np.array(pvalues, dtype=float)
    present = ~np.isnan(table)
    flat = table[present]
    if ((flat < 0) | (flat > 1)).any():
        raise RemaskError("p-values lie in 0..1; give holm p-values, not statistics")
    order = np.argsort(flat, kind="stable")
    adjusted = np.empty_like(flat)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, flat[order] * np.arange(len(flat), 0, -1)))
    table[present] = adjusted
    return table


# ------------------------------------------------------------------ sampling error and Monte-Carlo error
@dataclass(frozen=True)
class ErrorParts:
    """Standard error of a mean over rows, in its two parts.

    Attributes:
        mean: over rows and replicates.
        sampling: what other rows would change; would remain with exact scores.
        monte_carlo: what other masks would change; goes down with the size of the bank, not with rows alone.
        total: both, sqrt(sampling^2 + monte_carlo^2); what an interval over row means, such as `mean_interval`, covers.
        rows, replicates: how many.
    """

    mean: float
    sampling: float
    monte_carlo: float
    total: float
    rows: int
    replicates: int


def error_parts(replicates: ArrayLike) -> ErrorParts:
    """Split the standard error of a mean score by its source.

    With e_i the standard error of row i's mean over its R replicates and s^2 the variance of the n row means,
    monte_carlo^2 = sum e_i^2 / n^2, total^2 = s^2 / n, and sampling^2 = total^2 - monte_carlo^2 (0 where that is negative: the
    rows then differ by no more than noise). Rows must have independent masks, as banks keyed by row give them.

    Args:
        replicates: independent estimates of each row, [rows, replicates], e.g. `Likelihood.replicates`.

    Raises:
        RemaskError: fewer than two rows or two replicates.
    """
    data = np.asarray(replicates, dtype=float)
    if data.ndim != 2 or min(data.shape) < 2:
        raise RemaskError(f"error_parts needs [rows, replicates] with two or more of each, not shape {list(data.shape)}")
    rows, count = data.shape
    monte_carlo = float(np.sqrt((data.var(axis=1, ddof=1) / count).sum()) / rows)
    spread = float(data.mean(axis=1).std(ddof=1) / math.sqrt(rows))
    sampling = math.sqrt(max(0.0, spread**2 - monte_carlo**2))
    return ErrorParts(float(data.mean()), sampling, monte_carlo, math.hypot(sampling, monte_carlo), rows, count)


@dataclass(frozen=True)
class Sequential:
    """A mean of independent replicates, its standard error, how many were drawn, and whether the target was reached."""

    mean: float
    stderr: float
    replicates: int
    reached: bool


def until_precise(
    replicate: Callable[[int], float], target: float, *, minimum: int = 8, maximum: int = 256, confirm: int = 2
) -> Sequential:
    """Draw independent replicates until the standard error of their mean is at most `target`.

    Stopping at the first small standard error favours runs whose spread happens to be underestimated. Hence `minimum`
    replicates come first and the target has to hold `confirm` times in a row.

    Args:
        replicate: index -> one independent estimate, e.g. a mean score under `MaskBank(seed=index)`.
        target: standard error to reach, in the estimate's unit.
        minimum: replicates before the first look.
        maximum: replicates after which it gives up (`reached` is False then).
        confirm: looks in a row that have to be under the target.

    Raises:
        RemaskError: a target that is not positive, or bounds that are not 2 <= minimum <= maximum and 1 <= confirm.
    """
    if not target > 0:
        raise RemaskError(f"the target standard error must be positive, not {target}")
    if not 2 <= minimum <= maximum or confirm < 1:
        raise RemaskError(f"need 2 <= minimum <= maximum and confirm >= 1, not {minimum}, {maximum} and {confirm}")
    values = [replicate(index) for index in range(minimum - 1)]
    streak, stderr = 0, math.inf
    while len(values) < maximum and streak < confirm:
        values.append(replicate(len(values)))
        stderr = float(sem(values))
        streak = streak + 1 if stderr <= target else 0
    return Sequential(float(np.mean(values)), stderr, len(values), streak >= confirm)


def _one_list(values: ArrayLike, level: float) -> np.ndarray:
    if not 0 < level < 1:
        raise RemaskError(f"a confidence level lies between 0 and 1, not at {level}")
    data = np.asarray(values, dtype=float)
    if data.ndim != 1:
        raise RemaskError(f"an interval needs one number a row, not an array of shape {list(data.shape)}")
    return data


def _differences(first: ArrayLike, second: ArrayLike) -> np.ndarray:
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise RemaskError(f"a paired test needs two equally long lists of two or more, not {list(a.shape)} and {list(b.shape)}")
    return a - b
