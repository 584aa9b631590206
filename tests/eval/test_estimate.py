import math

import numpy as np
import pytest

from dit_video.eval.estimate import Estimate, bootstrap, bootstrap_mean, fraction, wilson


def test_wilson_agrees_with_published_values():
    # Newcombe 1998, table I: 81/263, 15/148, 0/20, 1/29
    for successes, count, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        found = wilson(successes, count)
        assert (round(found.low, 4), round(found.high, 4)) == (low, high)


@pytest.mark.parametrize("truth", [0.5, 0.9, 0.98])
def test_wilson_covers_the_truth(truth):
    rng = np.random.default_rng(0)
    found = [wilson(int(successes), 200) for successes in rng.binomial(200, truth, 4000)]
    assert 0.93 <= np.mean([each.low <= truth <= each.high for each in found]) <= 0.98


def test_wilson_contains_its_value_at_the_ends():
    for count in (1, 7, 512):
        assert wilson(0, count).low == 0 == wilson(0, count).value
        assert wilson(count, count).high == 1 == wilson(count, count).value
        assert wilson(count, count).low < 1
    assert wilson(50, 100, level=0.5).high < wilson(50, 100, level=0.99).high


def test_bootstrap_covers_the_mean():
    rng = np.random.default_rng(1)
    found = [bootstrap_mean(rng.exponential(2.0, 80), seed=index) for index in range(120)]
    assert 0.87 <= np.mean([each.low <= 2.0 <= each.high for each in found]) <= 0.98


def test_bootstrap_depends_on_nothing_but_its_seed():
    values = np.random.default_rng(2).normal(size=50)
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


def test_bootstrap_of_pairs_keeps_them_together():
    ones = np.random.default_rng(0).uniform(1, 9, 40)
    ratio = bootstrap(np.stack([2 * ones, ones], 1), lambda rows: rows[:, 0].mean() / rows[:, 1].mean(), seed=0)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2, 2, 2)) and ratio.count == 40


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf], 3.0])
def test_bootstrap_refuses_what_has_no_mean(values):
    with pytest.raises(ValueError, match="cannot estimate"):
        bootstrap_mean(values, seed=0)


@pytest.mark.parametrize("successes, count", [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_fraction(successes, count):
    with pytest.raises(ValueError, match="successes"):
        wilson(successes, count)
    with pytest.raises(ValueError):
        fraction([])


def test_levels_and_values_are_checked():
    with pytest.raises(ValueError, match="confidence"):
        wilson(1, 2, level=95)
    with pytest.raises(ValueError, match="finite"):
        Estimate(math.nan, 0, 1, 3)
    with pytest.raises(ValueError, match="sample"):
        Estimate(0, 0, 1, 0)
