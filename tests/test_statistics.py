"""Intervals, tests and stopping: against independent resampling, exact enumeration, known variances, and their coverage."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

from remask.errors import RemaskError
from remask.evaluation.statistics import (
    Estimate,
    bootstrap_interval,
    error_parts,
    holm,
    mean_interval,
    paired_permutation,
    paired_t,
    ratio_interval,
    seed_interval,
    t_interval,
    until_precise,
)

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


# ------------------------------------------------------------------ other intervals
@pytest.mark.parametrize("method", ["percentile", "bca"])
@pytest.mark.parametrize("skewed", [False, True])
def test_bootstrap_intervals_cover_the_truth_as_often_as_they_say(method, skewed: bool) -> None:
    """400 samples of 200 rows: 95 % within the binomial error of the simulation (three standard errors)."""
    rng = np.random.default_rng(17)
    samples = rng.exponential(1.0, (400, 200)) - 1 if skewed else rng.standard_normal((400, 200))
    covered = [(e := bootstrap_interval(row, method=method, resamples=1000)).low <= 0.0 <= e.high for row in samples]
    assert abs(np.mean(covered) - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 400)


@pytest.mark.parametrize("n", [3, 5, 20])
def test_t_interval_covers_a_handful_of_seeds(n: int) -> None:
    samples = np.random.default_rng(n).standard_normal((3000, n))
    covered = [(e := t_interval(row)).low <= 0.0 <= e.high for row in samples]
    assert abs(np.mean(covered) - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 3000)


def test_percentile_bootstrap_of_five_seeds_is_too_narrow() -> None:
    """Why `t` is there: about 83 % instead of 95 %."""
    samples = np.random.default_rng(2).standard_normal((300, 5))
    covered = [(e := seed_interval(row[:, None], over="seeds")).low <= 0.0 <= e.high for row in samples]
    assert np.mean(covered) < 0.90


def test_bca_is_the_textbook_formula() -> None:
    """Efron's z0 and acceleration by hand, on resamples of its own."""
    data = np.array(SAMPLE)
    means = np.random.default_rng(4).choice(data, (200_000, 12)).mean(axis=1)
    z0 = stats.norm.ppf((means < data.mean()).mean() + (means == data.mean()).mean() / 2)
    jackknife = (data.sum() - data) / 11
    centred = jackknife.mean() - jackknife
    a = (centred**3).sum() / (6 * (centred**2).sum() ** 1.5)
    levels = [stats.norm.cdf(z0 + (z0 + z) / (1 - a * (z0 + z))) for z in stats.norm.ppf([0.025, 0.975])]
    low, high = np.quantile(means, levels)
    estimate = bootstrap_interval(SAMPLE, method="bca", resamples=20_000)
    assert abs(estimate.low - low) < 0.05 * (high - low)
    assert abs(estimate.high - high) < 0.05 * (high - low)
    assert estimate.low < mean_interval(SAMPLE).low  # the long tail is on the left


def test_plain_bootstrap_interval_is_mean_interval() -> None:
    assert bootstrap_interval(SAMPLE, seed=3) == mean_interval(SAMPLE, seed=3)


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_degenerate_samples_are_points_or_null(method) -> None:
    assert bootstrap_interval([1.5] * 4, method=method) == Estimate(1.5, 1.5, 1.5, 4)
    assert bootstrap_interval([1.5], method=method) == Estimate(1.5, 1.5, 1.5, 1)
    assert math.isnan(bootstrap_interval([], method=method).mean)


def test_wider_level_wider_interval() -> None:
    for make in (bootstrap_interval, t_interval):
        narrow, wide = make(SAMPLE, level=0.5), make(SAMPLE, level=0.99)
        assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


def test_t_interval_is_scipys() -> None:
    low, high = stats.t.interval(0.95, 11, loc=np.mean(SAMPLE), scale=stats.sem(SAMPLE))
    assert (t_interval(SAMPLE).low, t_interval(SAMPLE).high) == pytest.approx((low, high))
    assert t_interval([2.0]) == Estimate(2.0, -math.inf, math.inf, 1)
    assert t_interval([]).n == 0


def test_rows_and_seeds_are_resampled_apart() -> None:
    table = np.array([[0.0, 10.0, 20.0, 30.0], [1.0, 11.0, 21.0, 31.0], [2.0, 12.0, 22.0, 32.0]])
    rows, seeds = seed_interval(table, over="rows"), seed_interval(table, over="seeds")
    assert rows.mean == seeds.mean == 16.0
    assert (rows.n, seeds.n) == (4, 3)
    assert rows == mean_interval([1.0, 11.0, 21.0, 31.0])
    assert seeds == mean_interval([15.0, 16.0, 17.0])
    assert seed_interval(table, over="seeds", method="t") == t_interval([15.0, 16.0, 17.0])


def test_bad_interval_input_is_named() -> None:
    with pytest.raises(RemaskError, match="percentile or bca"):
        bootstrap_interval(SAMPLE, method="basic")
    with pytest.raises(RemaskError, match="level"):
        t_interval(SAMPLE, level=95)
    with pytest.raises(RemaskError, match="one number a row"):
        bootstrap_interval([SAMPLE, SAMPLE])
    with pytest.raises(RemaskError, match="at least two"):
        seed_interval([SAMPLE], over="seeds")
    with pytest.raises(RemaskError, match="seeds, rows"):
        seed_interval(SAMPLE, over="rows")
    with pytest.raises(RemaskError, match="'rows' or 'seeds'"):
        seed_interval([SAMPLE], over="columns")


# ------------------------------------------------------------------ paired tests
FIRST, SECOND = [2.1, 3.3, 1.9, 4.0, 3.6, 2.8, 5.1, 3.0], [1.8, 3.4, 1.2, 3.1, 3.0, 2.9, 4.2, 2.4]


def test_paired_t_from_its_definition() -> None:
    d = np.array(FIRST) - np.array(SECOND)
    t = d.mean() / (d.std(ddof=1) / math.sqrt(8))
    result = paired_t(FIRST, SECOND)
    assert (result.difference, result.statistic, result.n) == (pytest.approx(d.mean()), pytest.approx(t), 8)
    assert result.pvalue == pytest.approx(2 * stats.t.sf(abs(t), 7))
    assert paired_t(SECOND, FIRST).pvalue == pytest.approx(result.pvalue)


def test_exact_permutation_is_the_enumeration_of_signs() -> None:
    d = np.array(FIRST) - np.array(SECOND)
    signed = np.array([np.mean(d * signs) for signs in itertools.product([-1, 1], repeat=8)])
    assert paired_permutation(FIRST, SECOND).pvalue == pytest.approx((np.abs(signed) >= d.mean() - 1e-12).mean())


def test_sampled_permutation_is_near_the_exact_one_and_keyed() -> None:
    rng = np.random.default_rng(8)
    a, b = rng.normal(0.5, 1, 60), rng.normal(0, 1, 60)
    result = paired_permutation(a, b)
    assert result.pvalue == pytest.approx(paired_t(a, b).pvalue, abs=0.01)  # normal data: the two agree
    assert paired_permutation(a, b) == result
    assert paired_permutation(a, b, seed=1) != result


@pytest.mark.parametrize("test", [paired_t, paired_permutation])
def test_rejections_under_the_null_are_as_rare_as_said(test) -> None:
    samples = np.random.default_rng(6).standard_normal((400, 2, 9))
    rejected = np.mean([test(a, b).pvalue <= 0.05 for a, b in samples])
    assert rejected <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)
    assert rejected >= 0.02


@pytest.mark.parametrize("test", [paired_t, paired_permutation])
def test_equal_lists_do_not_differ(test) -> None:
    assert test(FIRST, FIRST).pvalue == 1.0
    assert test(FIRST, FIRST).difference == 0.0
    with pytest.raises(RemaskError, match="equally long"):
        test(FIRST, SECOND[:-1])
    with pytest.raises(RemaskError, match="two or more"):
        test([1.0], [2.0])


def test_constant_difference_is_certain_to_the_t_test() -> None:
    assert paired_t([2.0, 3.0, 4.0], [1.0, 2.0, 3.0]).pvalue == 0.0


# ------------------------------------------------------------------ many tests
def test_holm_by_hand() -> None:
    """R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") is 0.03 0.06 0.06 0.02."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_keeps_the_tables_shape_and_its_gaps() -> None:
    table = holm([[0.01, math.nan], [0.5, 0.04]])
    assert table.shape == (2, 2)
    assert math.isnan(table[0, 1])
    assert [table[0, 0], table[1, 1], table[1, 0]] == pytest.approx([0.03, 0.08, 0.5])
    assert holm([]).size == 0
    with pytest.raises(RemaskError, match=r"0\.\.1"):
        holm([1.2])


def test_holm_rejects_what_the_step_down_procedure_rejects() -> None:
    rng = np.random.default_rng(9)
    for _ in range(50):
        p = rng.random(7) ** 4
        rejected = set()
        for step, index in enumerate(np.argsort(p)):
            if p[index] > 0.05 / (7 - step):
                break
            rejected.add(index)
        assert set(np.nonzero(holm(p) <= 0.05)[0]) == rejected


def test_holm_keeps_the_chance_of_any_false_rejection() -> None:
    tables = np.random.default_rng(10).random((2000, 12))
    assert np.mean([holm(table).min() <= 0.05 for table in tables]) == pytest.approx(0.05, abs=0.015)


# ------------------------------------------------------------------ two kinds of error
def test_error_parts_find_both_variances() -> None:
    """Rows with standard deviation 3, masks with 2 over 4 replicates, 50 rows: sqrt(9 / 50) and sqrt(4 / 200)."""
    rng = np.random.default_rng(12)
    parts = [error_parts(rng.normal(0, 3, (50, 1)) + rng.normal(0, 2, (50, 4))) for _ in range(300)]
    assert np.sqrt(np.mean([part.sampling**2 for part in parts])) == pytest.approx(math.sqrt(9 / 50), rel=0.03)
    assert np.sqrt(np.mean([part.monte_carlo**2 for part in parts])) == pytest.approx(math.sqrt(4 / 200), rel=0.03)
    means = [part.mean for part in parts]
    assert np.std(means) == pytest.approx(np.mean([part.total for part in parts]), rel=0.12)


def test_error_parts_add_up_and_more_masks_change_only_one() -> None:
    rng = np.random.default_rng(13)
    rows = rng.normal(0, 3, (400, 1))
    few, many = (error_parts(rows + rng.normal(0, 2, (400, count))) for count in (4, 64))
    for part in (few, many):
        assert part.total == pytest.approx(math.hypot(part.sampling, part.monte_carlo))
    assert many.monte_carlo == pytest.approx(few.monte_carlo / 4, rel=0.1)
    assert many.sampling == pytest.approx(few.sampling, rel=0.05)


def test_rows_that_differ_by_noise_alone_have_no_sampling_error() -> None:
    assert error_parts([[0.0, 2.0], [2.0, 0.0], [0.0, 2.0]]).sampling == 0.0
    exact = error_parts([[1.0, 1.0], [3.0, 3.0]])
    assert (exact.monte_carlo, exact.sampling) == (0.0, pytest.approx(1.0))
    with pytest.raises(RemaskError, match="replicates"):
        error_parts([[1.0], [2.0]])


def test_sequential_stopping_reaches_its_target() -> None:
    """Spread 1, target 0.2: about 25 replicates, and a true error near the target in spite of the data-dependent stop."""
    results = []
    for run in range(300):
        rng = np.random.default_rng(run)
        results.append(until_precise(lambda _index, rng=rng: rng.normal(5.0, 1.0), 0.2))
    assert all(result.reached and result.stderr <= 0.2 for result in results)
    assert np.mean([result.replicates for result in results]) == pytest.approx(25, abs=4)
    assert math.sqrt(np.mean([(result.mean - 5.0) ** 2 for result in results])) < 0.25


def test_sequential_stopping_gives_up_and_says_so() -> None:
    seen: list[int] = []
    result = until_precise(lambda index: seen.append(index) or (-1.0) ** index, 1e-3, minimum=4, maximum=10)
    assert seen == list(range(10))
    assert not result.reached
    assert result.replicates == 10
    assert result.stderr == pytest.approx(stats.sem([(-1.0) ** index for index in range(10)]))


def test_sequential_stopping_of_a_constant_ends_at_once() -> None:
    result = until_precise(lambda _index: 2.0, 0.1, minimum=4, confirm=1)
    assert (result.mean, result.stderr, result.replicates, result.reached) == (2.0, 0.0, 4, True)
    with pytest.raises(RemaskError, match="positive"):
        until_precise(lambda _index: 2.0, 0.0)
    with pytest.raises(RemaskError, match="minimum"):
        until_precise(lambda _index: 2.0, 0.1, minimum=1)
