"""Intervals over rows: against an independent resampling, exact small cases, the t interval, and their coverage."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

from remask.evaluation.statistics import Estimate, mean_interval, ratio_interval

# Twelve per-row log-probability changes; skewed, so that a normal interval would be wrong.
SAMPLE = [-0.1, -0.3, -0.2, -4.9, -0.4, -1.7, -0.6, -12.0, -2.2, -0.8, -0.1, -3.1]


def every_resample(values: list[float]) -> np.ndarray:
    """Means of all n^n resamples: the bootstrap distribution itself."""
    return np.array([np.mean(pick) for pick in itertools.product(values, repeat=len(values))])


def test_interval_is_the_percentile_bootstrap_of_the_mean() -> None:
    """A percentile bootstrap by scipy with fifty times as many resamples and an unrelated generator."""
    estimate = mean_interval(SAMPLE)
    peer = stats.bootstrap(
        (np.array(SAMPLE),), np.mean, n_resamples=100_000, batch=10_000, method="percentile", rng=np.random.default_rng(7)
    ).confidence_interval
    width = peer.high - peer.low
    assert estimate.mean == pytest.approx(sum(SAMPLE) / 12)
    assert estimate.n == 12
    assert abs(estimate.low - peer.low) < 0.06 * width
    assert abs(estimate.high - peer.high) < 0.06 * width
    assert estimate.low < estimate.mean < estimate.high


def test_interval_matches_full_enumeration() -> None:
    values = [0.0, 1.0, 2.0, 4.0, 9.0]
    means = every_resample(values)  # 3,125
    estimate = mean_interval(values)
    for bound, level in ((estimate.low, 0.025), (estimate.high, 0.975)):
        # The bound's place in the exact distribution is right within four binomial standard errors of 2,000 resamples.
        share = ((means < bound - 1e-9).mean() + (means <= bound + 1e-9).mean()) / 2
        assert abs(share - level) < 4 * math.sqrt(0.025 * 0.975 / 2000)


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_normal_sample_gives_about_the_t_interval(scale: float) -> None:
    values = 3.0 + scale * np.random.default_rng(11).standard_normal(200)
    estimate = mean_interval(list(values))
    t = stats.t.interval(0.95, 199, loc=values.mean(), scale=stats.sem(values))
    width = t[1] - t[0]
    assert estimate.high - estimate.low == pytest.approx(width, rel=0.07)
    assert abs(estimate.low - t[0]) < 0.05 * width
    assert abs(estimate.high - t[1]) < 0.05 * width


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """300 samples of 40: a percentile bootstrap at this size covers a little less than 95 %."""
    samples = np.random.default_rng(3).standard_normal((300, 40))
    covered = [(e := mean_interval(list(row))).low <= 0.0 <= e.high for row in samples]
    assert 0.90 <= np.mean(covered) <= 0.98


def test_interval_moves_and_scales_with_the_data() -> None:
    one, other = mean_interval(SAMPLE), mean_interval([2.0 * value + 5.0 for value in SAMPLE])
    for name in ("mean", "low", "high"):
        assert getattr(other, name) == pytest.approx(2.0 * getattr(one, name) + 5.0)


def test_interval_is_a_function_of_data_and_seed() -> None:
    np.random.seed(0)
    first = mean_interval(SAMPLE)
    np.random.seed(1)
    mean_interval([1.0, 2.0])
    assert mean_interval(SAMPLE) == first
    assert mean_interval(SAMPLE, seed=1) != first
    assert mean_interval(SAMPLE, seed=1).mean == first.mean


@pytest.mark.parametrize("values", [[2.5], [2.5] * 7, [0.0, 0.0], [0.1] * 3])
def test_constant_rows_are_a_point(values: list[float]) -> None:
    estimate = mean_interval(values)
    assert estimate.low == estimate.mean == estimate.high == pytest.approx(values[0])
    assert estimate.n == len(values)


def test_no_rows_are_not_a_number_and_json_null() -> None:
    estimate = mean_interval([])
    assert estimate.n == 0
    assert all(math.isnan(value) for value in (estimate.mean, estimate.low, estimate.high))
    assert json.loads(json.dumps(estimate.to_dict(), allow_nan=False)) == {"mean": None, "low": None, "high": None, "n": 0}


def test_dict_form_keeps_every_number() -> None:
    assert Estimate(1.5, 1.0, 2.0, 4).to_dict() == {"mean": 1.5, "low": 1.0, "high": 2.0, "n": 4}


# ------------------------------------------------------------------ ratios
@pytest.mark.parametrize(
    ("top", "bottom", "ratio"),
    [([6.0], [2.0], 3.0), ([-6.0, -6.0], [2.0, 2.0, 2.0], 3.0), ([-6.0], [-0.5, -0.5], 12.0), ([0.0, 0.0], [1.0], 0.0)],
)
def test_ratio_of_constants_is_a_point(top: list[float], bottom: list[float], ratio: float) -> None:
    estimate = ratio_interval(top, bottom)
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((ratio, ratio, ratio))


def test_ratio_is_of_means_not_a_mean_of_ratios() -> None:
    assert ratio_interval([-2.0, -4.0, -12.0], [-1.0, 0.5, -2.5]).mean == pytest.approx(6.0)


def test_ratio_interval_on_hand_numbers() -> None:
    """Resampled means of [1, 3] are 1, 2, 3 with chances 1/4, 1/2, 1/4: the 95 % interval over a constant 2 is [0.5, 1.5]."""
    estimate = ratio_interval([1.0, 3.0], [2.0, 2.0])
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((1.0, 0.5, 1.5))
    # And below the line: 2 / {1, 2, 3}.
    estimate = ratio_interval([2.0, 2.0], [1.0, 3.0])
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((1.0, 2 / 3, 2.0))


def test_ratio_rows_are_resampled_independently() -> None:
    """The same list twice: paired resampling would give the point 1."""
    estimate = ratio_interval([1.0, 3.0], [1.0, 3.0])
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((1.0, 1 / 3, 3.0))


def test_ratio_against_delta_method() -> None:
    """Large samples: the interval's width is that of the first-order expansion."""
    rng = np.random.default_rng(5)
    top, bottom = rng.normal(-20, 4, 400), rng.normal(-2, 0.5, 300)
    estimate = ratio_interval(list(top), list(bottom))
    ratio = top.mean() / bottom.mean()
    error = ratio * math.hypot(stats.sem(top) / top.mean(), stats.sem(bottom) / bottom.mean())
    assert estimate.mean == pytest.approx(ratio)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * error, rel=0.08)
    assert estimate.low < ratio < estimate.high


def test_ratio_without_any_change_below_stays_finite() -> None:
    estimate = ratio_interval([-5.0, -6.0], [0.0, 0.0])
    assert all(math.isfinite(value) for value in (estimate.mean, estimate.low, estimate.high))
    assert estimate.mean > 1e6
    json.dumps(ratio_interval([0.0], [0.0]).to_dict(), allow_nan=False)


@pytest.mark.parametrize(("top", "bottom"), [([], [1.0]), ([1.0], [])])
def test_ratio_without_rows_is_null(top: list[float], bottom: list[float]) -> None:
    assert ratio_interval(top, bottom).to_dict()["mean"] is None
