"""Paired tests: whether two methods differ on the same test images, and which difference could have been found."""

import math
from typing import NamedTuple

import numpy as np
import scipy

LEVEL, POWER = 0.05, 0.8  # of the tests: probability of a false alarm, and of finding a true difference


class Comparison(NamedTuple):
    """Difference of two methods on the same test images, over paired seeds. All accuracies are fractions."""

    difference: float  # mean top-1 of a minus that of b
    p_seeds: float  # paired t-test over the seeds' accuracies; nan for fewer than two
    p_images: float  # exact McNemar test over (seed, image) pairs
    only_a: int  # pairs that only a classifies correctly
    only_b: int
    detectable_seeds: float  # minimum detectable difference of the t-test at 80% power; nan where p_seeds is
    detectable_images: float  # the same of McNemar's test


def compare(correct_a: np.ndarray, correct_b: np.ndarray) -> Comparison:
    """Compare two methods by their correct answers, (seeds, images) bool arrays.

    The t-test asks whether another set of seeds would show the difference, McNemar's test whether another set of
    images would. McNemar's test takes the pairs as independent, which repeated seeds on the same images are not: its
    p-values are too small where there are several seeds.
    """
    a, b = correct_a.mean(1), correct_b.mean(1)
    p_seeds = detectable_seeds = math.nan
    if len(a) > 1 and np.ptp(a - b) > 0:
        p_seeds = float(scipy.stats.ttest_rel(a, b).pvalue)
        detectable_seeds = minimum_detectable_difference(float((a - b).std(ddof=1)), len(a))
    only_a, only_b = int((correct_a & ~correct_b).sum()), int((~correct_a & correct_b).sum())
    p_images = scipy.stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    quantiles = scipy.stats.norm.ppf(1 - LEVEL / 2) + scipy.stats.norm.ppf(POWER)
    return Comparison(
        difference=float((a - b).mean()),
        p_seeds=p_seeds,
        p_images=float(p_images),
        only_a=only_a,
        only_b=only_b,
        detectable_seeds=detectable_seeds,
        detectable_images=float(quantiles * math.sqrt(only_a + only_b)) / correct_a.size,
    )


def minimum_detectable_difference(deviation: float, n: int) -> float:
    """Return the mean of n >= 2 paired differences, of this deviation, that a t-test at LEVEL finds with POWER."""
    return float(scipy.stats.t.ppf(1 - LEVEL / 2, n - 1) + scipy.stats.t.ppf(POWER, n - 1)) * deviation / math.sqrt(n)
