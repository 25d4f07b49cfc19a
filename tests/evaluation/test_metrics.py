"""Means, errors and paired differences, by hand and against scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from recursivemas.evaluation.metrics import mean, paired_difference


def test_a_mean_and_its_error_by_hand() -> None:
    found = mean([0.0, 1.0, 1.0, 1.0])
    assert (found.value, found.n) == (0.75, 4)
    # Variance 0.1875 * 4/3 = 0.25.
    assert found.stderr == pytest.approx(math.sqrt(0.25 / 4))


def test_mean_and_paired_difference_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(40), rng.random(40)
    assert mean(list(a)).stderr == pytest.approx(stats.sem(a))
    found = paired_difference(list(a), list(b))
    assert found.value == pytest.approx(a.mean() - b.mean())
    assert found.stderr == pytest.approx(stats.sem(a - b))
    assert found.p_value == pytest.approx(stats.ttest_rel(a, b).pvalue)
    other = paired_difference(list(b), list(a))
    assert (other.value, other.p_value) == (pytest.approx(-found.value), pytest.approx(found.p_value))


def test_one_score_has_no_error() -> None:
    assert math.isnan(mean([1.0]).stderr)
    found = paired_difference([1.0], [0.0])
    assert found.value == 1
    assert math.isnan(found.stderr)
    assert math.isnan(found.p_value)


def test_equal_arms_do_not_differ() -> None:
    assert paired_difference([1.0, 0.0, 1.0], [1.0, 0.0, 1.0]) == (0, 0, 1)


# Differences that are equal but for rounding must not make scipy warn of lost precision.
@pytest.mark.parametrize(("a", "b"), [([1.0, 1.0, 1.0], [0.0, 0.0, 0.0]), ([0.3, 0.6], [0.1, 0.4])])
def test_the_same_difference_everywhere_is_no_chance(a: list[float], b: list[float]) -> None:
    found = paired_difference(a, b)
    assert found.value == pytest.approx(a[0] - b[0])
    assert (found.stderr, found.p_value) == (0, 0)


def test_scores_of_other_questions_are_not_paired() -> None:
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired_difference([1.0, 0.0], [1.0])
    with pytest.raises(ValueError, match="no scores"):
        mean([])
