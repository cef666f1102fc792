"""Estimates and their intervals: known answers, scipy as reference, coverage by simulation."""

import math
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from leantrain.measure.statistics import Estimate, mean_interval, median_interval, paired_difference

FINITE = st.floats(-1e6, 1e6, allow_nan=False)


def test_an_exact_value_is_its_own_interval():
    estimate = Estimate.exact(4.0227)
    assert (estimate.low, estimate.value, estimate.high) == (4.0227, 4.0227, 4.0227)
    assert (estimate.n, estimate.method) == (1, "exact")


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(1.234, 1.2, 1.26, n=5), "1.234 [1.200, 1.260] (n=5)"),
        (Estimate(0.02, -1.2, 1.31, n=3), "0.020 [-1.200, 1.310] (n=3)"),
        (Estimate(96.25, 95.1, 97.4, n=5), "96.25 [95.10, 97.40] (n=5)"),
        (Estimate(-1e-9, -1.0, 1.0, n=2), "0.000 [-1.000, 1.000] (n=2)"),
        (Estimate(2.5e-6, 2e-6, 3e-6, n=9), "2.500e-06 [2.000e-06, 3.000e-06] (n=9)"),
        (Estimate(0.0, 0.0, 0.0, n=2), "0.000 [0.000, 0.000] (n=2)"),
        (Estimate.exact(1.234), "1.234"),
        (Estimate.exact(22050664), "22050664"),
    ],
)
def test_the_printed_form(estimate, text):
    assert str(estimate) == text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"value": math.nan}, "value"),
        ({"high": math.inf}, "high"),
        ({"low": -math.inf}, "low"),
        ({"value": 3.0}, "contain its value"),
        ({"low": 1.5}, "contain its value"),
        ({"n": 0}, "n counts"),
        ({"level": 1.0}, "level"),
        ({"level": 95.0}, "level"),
    ],
)
def test_an_impossible_estimate_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Estimate(**({"value": 1.0, "low": 0.0, "high": 2.0, "n": 3} | fields))


def test_the_t_interval_agrees_with_scipy():
    sample = np.random.default_rng(0).normal(90, 2, size=5)
    for level in (0.8, 0.95, 0.99):
        estimate = mean_interval(sample, level)
        expected = stats.ttest_1samp(sample, 0).confidence_interval(level)
        assert estimate.value == pytest.approx(sample.mean(), rel=1e-14)
        assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
        assert (estimate.n, estimate.level, estimate.method) == (5, level, "t")


def test_the_t_interval_known_answer():
    # The tabulated two-sided 95 % quantile with 2 degrees of freedom is 4.3027; s = 1, n = 3.
    estimate = mean_interval([1.0, 2.0, 3.0])
    assert estimate.high - estimate.value == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)


def test_one_measurement_has_no_spread():
    for interval in (mean_interval, median_interval):
        estimate = interval([7.5])
        assert (estimate.low, estimate.value, estimate.high, estimate.n) == (7.5, 7.5, 7.5, 1)
        assert estimate.method == "single"


def test_paired_difference_agrees_with_scipy_and_removes_the_seed_effect():
    rng = np.random.default_rng(1)
    seed_effect = rng.normal(0, 10, size=8)
    a, b = seed_effect + 1 + rng.normal(0, 0.1, 8), seed_effect + rng.normal(0, 0.1, 8)
    estimate = paired_difference(a, b)
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), rel=1e-10)
    assert estimate.low > 0.5, "the pairs share the seed's effect, so it must not widen the interval"


def test_paired_difference_refuses_unpaired_data():
    with pytest.raises(ValueError, match="3 values in a and 2 in b"):
        paired_difference([1, 2, 3], [1, 2])
    a = pd.Series([1.0, 2.0, 3.0], index=[0, 1, 2])
    with pytest.raises(ValueError, match="different order"):
        paired_difference(a, pd.Series([3.0, 1.0, 2.0], index=[2, 0, 1]))
    # Rows filtered out of one tidy table keep their own row numbers: these are not seeds.
    assert paired_difference(a, pd.Series([0.0, 1.0, 2.0], index=[3, 4, 5])).value == 1.0


def test_the_median_interval_known_answer():
    # Tables of the sign test: for n = 10 the 95 % interval runs from the 2nd to the 9th value, for n = 15 from
    # the 4th to the 12th, for n = 6 from the 1st to the 6th.
    for n, k in ((6, 1), (10, 2), (15, 4)):
        estimate = median_interval(np.arange(1, n + 1)[::-1])
        assert (estimate.low, estimate.value, estimate.high) == (k, (n + 1) / 2, n + 1 - k)
        assert estimate.method == "order statistic"


def test_too_few_measurements_for_the_level_are_said_so():
    estimate = median_interval([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (estimate.low, estimate.value, estimate.high) == (1.0, 3.0, 5.0)
    assert "93.8 %" in estimate.method  # 1 - 2 / 2^5


@pytest.mark.parametrize(("n", "coverage"), [(7, 1 - 2 / 2**7), (15, 0.96484375), (40, 0.96152)])
def test_the_median_interval_covers_as_often_as_it_promises(n, coverage):
    # 4000 skewed samples: the standard error of the coverage is below 0.0035; 4 of them decide.
    rng = np.random.default_rng(n)
    samples = rng.lognormal(size=(4000, n))
    estimates = [median_interval(sample) for sample in samples]
    hits = np.mean([estimate.low <= 1.0 <= estimate.high for estimate in estimates])
    assert hits == pytest.approx(coverage, abs=0.014)
    assert hits > 0.95 - 0.014


def test_the_t_interval_covers_as_often_as_it_promises():
    # 4000 normal samples of 5: standard error sqrt(0.95 * 0.05 / 4000) = 0.0034; 4 of them decide.
    samples = np.random.default_rng(5).normal(3.0, 2.0, size=(4000, 5))
    estimates = [mean_interval(sample) for sample in samples]
    hits = np.mean([estimate.low <= 3.0 <= estimate.high for estimate in estimates])
    assert hits == pytest.approx(0.95, abs=0.014)


@given(st.lists(FINITE, min_size=1, max_size=30), st.floats(0.05, 0.98))
def test_the_median_interval_depends_on_order_alone(values, level):
    estimate = median_interval(values, level)
    assert {estimate.low, estimate.high} <= set(map(float, values))
    assert estimate.low <= np.median(values) <= estimate.high
    assert median_interval(values[::-1], level) == estimate
    mirrored = median_interval([-v for v in values], level)
    assert (mirrored.low, mirrored.high) == (-estimate.high, -estimate.low)


@given(st.lists(FINITE, min_size=2, max_size=12))
def test_a_higher_level_never_narrows_an_interval(values):
    for interval in (mean_interval, median_interval):
        estimates = [interval(values, level) for level in (0.5, 0.8, 0.95, 0.99)]
        assert all(wide.low <= tight.low for tight, wide in pairwise(estimates))
        assert all(wide.high >= tight.high for tight, wide in pairwise(estimates))


@pytest.mark.parametrize("interval", [mean_interval, median_interval])
@pytest.mark.parametrize(
    ("sample", "message"),
    [([], "at least one"), ([[1.0, 2.0]], "shape"), ([1.0, math.nan], "diverged"), ([math.inf], "finite")],
)
def test_bad_samples_are_refused(interval, sample, message):
    with pytest.raises(ValueError, match=message):
        interval(sample)
    with pytest.raises(ValueError, match="level"):
        interval([1.0, 2.0], 0)


def test_statistics_are_available_without_torch():
    program = "import sys, leantrain.measure.statistics; sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_package_gives_every_name_that_it_lists():
    from leantrain import measure

    for name in measure.__all__:
        assert getattr(measure, name).__name__ == name
        assert name in dir(measure)
    with pytest.raises(AttributeError, match="mean_interwal"):
        _ = measure.mean_interwal
