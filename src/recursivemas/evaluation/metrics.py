"""Means with their standard errors, and differences between two arms on the same questions."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats


class Mean(NamedTuple):
    """A mean with its standard error."""

    value: float
    stderr: float
    n: int


class Difference(NamedTuple):
    """The mean difference a - b on the same questions, its standard error, and the p-value of a paired t-test."""

    value: float
    stderr: float
    p_value: float


def mean(values: Sequence[float] | NDArray[np.float64]) -> Mean:
    """The mean of scores; its standard error is not known (nan) for fewer than two."""
    if len(values) == 0:
        raise ValueError("there is no mean of no scores")
    array = np.asarray(values, dtype=float)
    stderr = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else math.nan
    return Mean(float(array.mean()), stderr, len(array))


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """How much better a is than b, question by question. Two arms with equal scores everywhere have p = 1."""
    if len(a) != len(b):
        raise ValueError(f"paired scores must be of the same questions, got {len(a)} and {len(b)}")
    difference = mean(np.subtract(a, b, dtype=np.float64))
    if len(a) < 2:
        return Difference(difference.value, math.nan, math.nan)
    if difference.stderr <= 1e-12 * abs(difference.value):
        # The same difference everywhere: nothing, or nothing that chance explains.
        return Difference(difference.value, 0.0, 1.0 if difference.value == 0 else 0.0)
    return Difference(difference.value, difference.stderr, float(stats.ttest_rel(a, b).pvalue))
