"""Statistics on numbers whose answers are known."""

import math

import numpy as np
import pytest

from vtok.eval.common.statistics import (
    FEWEST,
    Interval,
    in_brackets,
    mean_interval,
    mean_stderr,
    paired_difference,
    paired_ratio,
    share,
    spread,
    with_error,
)


def test_equal_ratios_have_no_width():
    assert paired_ratio([2.0, 4.0, 6.0, 8.0, 2.0], [1.0, 2.0, 3.0, 4.0, 1.0]) == Interval(2.0, 2.0, 2.0)


def test_a_handful_of_pairs_has_no_interval():
    for n in range(1, FEWEST):
        assert paired_ratio([0.99] * n, [1.0] * n) == Interval(0.99)
        assert not share([1] * n).known and not paired_difference([0] * n).known and not mean_interval([1.0] * n).known
    assert paired_ratio([0.99] * FEWEST, [1.0] * FEWEST).known
    assert Interval(0.99).ends is None and Interval(0.99).sign == 0 and Interval(0.99).scaled(2) == Interval(1.98)


def test_shares_have_score_intervals():
    # 81 of 263 and 15 of 148: Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3
    for right, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = share([1] * right + [0] * (n - right))
        assert found == pytest.approx((right / n, low, high), abs=5e-5)
    assert share([1] * 20) == pytest.approx((1, 0.8389, 1), abs=5e-5)


def test_paired_differences_have_score_intervals():
    # 12 changed one way, 2 the other, of 50: the example of Newcombe, Statistics in Medicine 17 (1998) 2635, by Tango's score
    assert paired_difference([1] * 12 + [-1] * 2 + [0] * 36) == pytest.approx((0.2, 0.0611, 0.3447), abs=5e-5)
    for n in (5, 20, 1000):  # nothing changed: z^2 / (n + z^2)
        edge = 1.959964**2 / (n + 1.959964**2)
        assert paired_difference([0] * n) == pytest.approx((0, -edge, edge), abs=1e-6)
    assert paired_difference([1] * 9).high == 1 and paired_difference([1] * 9).low < 1
    up, down = paired_difference([1, 0, 0, 0, 1, -1, 0, 0]), paired_difference([-1, 0, 0, 0, -1, 1, 0, 0])
    assert up == pytest.approx((-down.point, -down.high, -down.low))


@pytest.mark.parametrize(("p", "q"), [(0.02, 0.02), (0.1, 0.02), (0.0, 0.03)])
def test_paired_differences_cover_the_truth(p, q):
    rng = np.random.default_rng(0)
    found = [paired_difference(rng.choice([-1, 0, 1], p=[p, 1 - p - q, q], size=80)) for _ in range(600)]
    assert np.mean([f.low <= q - p <= f.high for f in found]) > 0.93
    assert all(f.low <= f.point <= f.high for f in found)


def test_what_goes_together_counts_less():
    values = np.array([1, 0, 1, 1, 0, 1, 0, 1, 1, 1], float)
    alone, twice = share(values), share(np.repeat(values, 2), np.repeat(np.arange(10), 2))
    assert twice == pytest.approx(alone)
    assert share(np.repeat(values, 2)).high - share(np.repeat(values, 2)).low < alone.high - alone.low
    assert not share(np.ones(40), np.repeat(np.arange(4), 10)).known
    # scores between 0 and 1: close to the normal interval where there are many
    soft = np.random.default_rng(1).choice([0, 0.3, 0.6, 0.9, 1], size=4000)
    mean, error = mean_stderr(soft)
    assert share(soft) == pytest.approx((mean, mean - 1.96 * error, mean + 1.96 * error), abs=0.005)


def test_a_metric_in_words():
    m = {"a": 0.5, "a_stderr": 0.01, "a_ci": [0.4, 0.6], "b": 1.0, "b_stderr": 0.0, "b_ci": [0.839, 1.0]}
    m |= {"c": 1.0, "c_stderr": 0.2, "c_ci": None, "old": 0.5, "old_stderr": 0.01, "bare": 0.25, "not": None}
    assert with_error(m, "a", 100) == "50.0 ± 1.0" and with_error(m, "b", 100) == "100.0 [83.9, 100.0]"
    assert with_error(m, "c", 100) == "100.0" and with_error(m, "old", 100, 2) == "50.00 ± 1.00"
    assert with_error(m, "bare", sign="+", digits=2) == "+0.25" and with_error(m, "not") == with_error(m, "gone") == "-"
    assert in_brackets(None) == "" and in_brackets([1.0, 2.0]) == " [1.00, 2.00]"


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
