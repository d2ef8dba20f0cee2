import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from figures.plots import draw_curves, draw_sweep, fit_line
from training.evaluation import AVERAGE, compare, detectable, loss_and_top1, predict
from transforms import normalize


class Net(nn.Module):
    """Give the channel means as logits."""

    def forward(self, images):
        return images.mean((2, 3))


def batches():
    generator = torch.Generator().manual_seed(0)
    for count in (4, 3):  # the last batch is short
        views = (torch.randint(0, 256, (count, 3, s, s), dtype=torch.uint8, generator=generator) for s in (8, 12))
        yield tuple(views), torch.arange(count) % 3


def test_predictions_count_images_and_average_probabilities():
    (log_probs, again), labels = predict([Net(), Net()], batches(), ["a", "b"], torch.device("cpu"))
    assert all(torch.equal(log_probs[view], again[view]) for view in log_probs)
    assert labels.tolist() == [0, 1, 2, 0, 0, 1, 2]
    expected = [torch.cat([normalize(views[n]).mean((2, 3)).softmax(1) for views, _ in batches()]) for n in (0, 1)]
    torch.testing.assert_close(log_probs["a"].exp(), expected[0])
    torch.testing.assert_close(log_probs[AVERAGE].exp(), (expected[0] + expected[1]) / 2)
    loss, top1 = loss_and_top1(log_probs["b"], labels)
    assert loss == pytest.approx(nn.functional.cross_entropy(expected[1].log(), labels).item())
    assert top1 == pytest.approx((expected[1].argmax(1) == labels).sum().item() / 7)


def test_a_single_view_has_no_average():
    black = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    (log_probs,), _ = predict([Net()], [((black,), torch.zeros(2).long())], ["a"], torch.device("cpu"))
    assert list(log_probs) == ["a"]


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


def test_a_line_is_fitted_as_numpy_does():
    x, y = [0.5, 0.7, 0.9, 1.0], [0.1, 0.35, 0.4, 0.5]
    fit = fit_line(x, y)
    slope, intercept = np.polyfit(x, y, 1)
    assert fit["slope"] == pytest.approx(slope) and fit["intercept"] == pytest.approx(intercept)
    assert fit["r2"] == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)
    assert fit_line([0.5, 0.5], [1, 2]) is None and fit_line([0.5, 0.6], [1.0, 1.0])["r2"] == 0


def test_pictures_are_drawn(tmp_path):
    keys = ("train_loss", "train_top1", "loss", "top1", "ema_loss", "ema_top1", "lr", "maiou")
    draw_curves([{"epoch": n, **dict.fromkeys(keys, 0.1 * n)} for n in (1, 2)], tmp_path / "curves.png")
    rows = [{"value": v, "maiou": 0.6 + 0.2 * abs(v), "top1": 0.5 + 0.1 * v} for v in (-1, 0, 0.5, 1)]
    draw_sweep(rows, tmp_path / "sweep.png", "title")
    for name in ("curves.png", "sweep.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and (tmp_path / name).stat().st_size > 10_000


def test_the_difference_that_is_told_as_seen_is_found_in_four_of_five_experiments():
    rng, n, spread = np.random.default_rng(0), 5, 0.03
    differences = rng.normal(detectable(spread, n), spread, (4000, n))
    found = stats.ttest_1samp(differences, 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.05)


def test_mcnemar_finds_the_difference_that_is_told_as_seen_in_four_of_five_experiments():
    rng, n, discordant = np.random.default_rng(1), 600, 0.2
    a, b = np.zeros((1, n), bool), np.zeros((1, n), bool)
    a[0, :60], b[0, 60:120] = True, True  # as many pairs on either side: no difference, 20% of pairs differ
    shift = compare(a, b).seen_images
    found = 0
    for _ in range(400):
        u = rng.random(n)
        only_a, only_b = u < (discordant + shift) / 2, u > 1 - (discordant - shift) / 2
        found += compare(only_a[None], only_b[None]).p_images < 0.05
    assert found / 400 == pytest.approx(0.8, abs=0.08)
