"""Intervals over rows. Sampling error (which rows) and Monte-Carlo error (which masks) are reported apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from ..random import numpy_generator

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean over rows with its 95 % percentile-bootstrap interval (2,000 resamples of rows)."""

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
    data = np.asarray(values, dtype=float)
    if len(data) == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = float(data.mean())
    if len(data) == 1 or np.ptp(data) == 0:
        return Estimate(mean, mean, mean, len(data))
    rng = numpy_generator(seed, "bootstrap", len(data))
    result = bootstrap((data,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=rng)
    return Estimate(mean, float(result.confidence_interval.low), float(result.confidence_interval.high), len(data))


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
