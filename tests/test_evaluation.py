import pytest
import torch
from torch import nn

from training.evaluation import AVERAGE, loss_and_top1, predict
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
    answers, labels = predict({"one": Net(), "two": Net()}, batches(), ["a", "b"], torch.device("cpu"))
    log_probs, again = answers["one"], answers["two"]
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
    answers, _ = predict({"one": Net()}, [((black,), torch.zeros(2).long())], ["a"], torch.device("cpu"))
    assert list(answers["one"]) == ["a"]
