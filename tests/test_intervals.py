"""Statistics on numbers whose answers are known."""

import math

import numpy as np
import pytest

from vtok.eval.intervals import Interval, mean_stderr, paired_ratio, spread


def test_equal_ratios_have_no_width():
    assert paired_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == Interval(2.0, 2.0, 2.0)


def test_pairing_removes_what_both_halves_share():
    drift = np.linspace(1, 5, 30)  # the machine slows down fivefold
    found = paired_ratio(1.5 * drift, drift)
    assert found == pytest.approx((1.5, 1.5, 1.5))


def test_point_is_the_median_ratio_and_inside():
    rng = np.random.default_rng(0)
    a, b = rng.lognormal(0.5, 0.2, 25), rng.lognormal(0, 0.2, 25)
    found = paired_ratio(a, b)
    assert found.point == np.median(a / b)
    assert found.low < found.point < found.high
    assert paired_ratio(a, b) == found
    wide = paired_ratio(a, b, level=0.99)
    assert wide.low <= found.low and wide.high >= found.high


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(200):
        found = paired_ratio(1.3 * rng.lognormal(0, 0.1, 20), np.ones(20), seed=i)
        hits += found.low <= 1.3 <= found.high
    assert 0.9 <= hits / 200 <= 0.99


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0])])
def test_refuses_numbers_without_partner(a, b):
    with pytest.raises(ValueError, match="pairs"):
        paired_ratio(a, b)


def test_scaling():
    assert Interval(2.0, 1.0, 4.0).scaled(0.5) == Interval(1.0, 0.5, 2.0)


def test_spread_is_the_quartile_distance():
    assert spread([1, 2, 3, 4, 5]) == pytest.approx(2 / 3)
    assert spread([7.0] * 4) == 0


def test_standard_error():
    mean, error = mean_stderr([0, 1, 1, 0])
    assert (mean, error) == pytest.approx((0.5, math.sqrt(1 / 3 / 4)))
    assert math.isnan(mean_stderr([1.0])[1]) and mean_stderr([1.0])[0] == 1
    assert math.isnan(mean_stderr([])[0])
