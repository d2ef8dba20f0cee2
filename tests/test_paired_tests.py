import numpy as np
import pytest
from scipy import stats

from experiments.paired_tests import compare, minimum_detectable_difference


def test_comparison_is_paired():
    rng = np.random.default_rng(0)
    hard = rng.random(400)  # images differ more than methods do
    a, b = (np.stack([rng.random(400) * 0.6 + edge > hard for _ in range(5)]) for edge in (0.45, 0.3))
    result = compare(a, b)
    assert result.difference == pytest.approx(a.mean() - b.mean())
    assert (result.only_a, result.only_b) == ((a & ~b).sum(), (b & ~a).sum())
    assert result.p_images == stats.binomtest(result.only_a, result.only_a + result.only_b).pvalue < 0.001
    assert result.p_seeds == stats.ttest_rel(a.mean(1), b.mean(1)).pvalue


def test_comparison_of_equals_and_of_one_seed():
    a = np.array([[True, False, True]])
    assert compare(a, a).p_images == 1.0 and np.isnan(compare(a, a).p_seeds)


def test_the_t_test_finds_the_minimum_detectable_difference_in_four_of_five_experiments():
    rng, n, spread = np.random.default_rng(0), 5, 0.03
    differences = rng.normal(minimum_detectable_difference(spread, n), spread, (4000, n))
    found = stats.ttest_1samp(differences, 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.05)


def test_mcnemar_finds_the_minimum_detectable_difference_in_four_of_five_experiments():
    rng, n, discordant = np.random.default_rng(1), 600, 0.2
    a, b = np.zeros((1, n), bool), np.zeros((1, n), bool)
    a[0, :60], b[0, 60:120] = True, True  # as many pairs on either side: no difference, 20% of pairs differ
    shift = compare(a, b).detectable_images
    found = 0
    for _ in range(400):
        u = rng.random(n)
        only_a, only_b = u < (discordant + shift) / 2, u > 1 - (discordant - shift) / 2
        found += compare(only_a[None], only_b[None]).p_images < 0.05
    assert found / 400 == pytest.approx(0.8, abs=0.08)
