import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from localized_crops.boxes import coverage, crops_to_xywh, maiou_curve
from localized_crops.crops import random_shapes, ratio_gives_way, sample_crops

THRESHOLDS = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
# maIoU of the published crop on all of CUB, computed before this code was written (published curve: within .003)
REFERENCE = (0.501, 0.601, 0.648, 0.721, 0.788, 0.845, 0.891, 0.930, 0.960, 0.981, 0.994, 0.999)


def random_boxes(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes (N, 4) anywhere in images of any shape, sizes (N, 2); some boxes touch the borders."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(0, np.log(900), (count, 2))).astype(int) + 1
    near = rng.random((count, 2)) * sizes * 0.98 * (rng.random((count, 2)) > 0.2)
    side = (sizes - near) * np.where(rng.random((count, 2)) > 0.2, rng.uniform(0.001, 1, (count, 2)), 1)
    return np.concatenate([near, side], axis=1), sizes


def assert_inside(crops: np.ndarray, sizes: np.ndarray) -> None:
    top, left, height, width = crops.T
    assert crops.dtype == np.int64
    assert (top >= 0).all() and (left >= 0).all() and (height >= 1).all() and (width >= 1).all()
    assert (top + height <= sizes[:, 1]).all() and (left + width <= sizes[:, 0]).all()


def test_reference_mode_reproduces_the_published_curve_on_cub(cub_boxes):
    boxes, sizes = cub_boxes
    measured = maiou_curve(boxes, sizes, THRESHOLDS, mode="reference")
    assert np.abs(measured - REFERENCE).max() < 0.005, measured


def test_the_published_crop_does_not_keep_its_promise_on_cub(cub_boxes):
    boxes, sizes = cub_boxes
    crops = sample_crops(boxes, sizes, 1.0, "reference", rng=np.random.default_rng(0))
    assert 0.025 < (coverage(crops_to_xywh(crops), boxes) < 1).mean() < 0.037  # 3.2% is known


@pytest.mark.parametrize("thr", [0.0, 0.3, 0.7, 0.95, 1.0])
def test_exact_mode_keeps_its_promise_in_a_million_crops_of_cub(cub_boxes, thr):
    boxes, sizes = (np.tile(rows, (17, 1)) for rows in cub_boxes)  # 5 x 200,396 draws
    crops = sample_crops(boxes, sizes, thr, "exact", rng=np.random.default_rng(3))
    assert_inside(crops, sizes)
    assert (coverage(crops_to_xywh(crops), boxes) >= thr).all()
    _, _, height, width = crops.T  # rounded outward: each side grew by less than two pixels
    kept = ~ratio_gives_way(boxes, sizes, thr, (0.08, 1.0), (3 / 4, 4 / 3))
    assert (width[kept] > 3 / 4 * (height[kept] - 2)).all() and (width[kept] - 2 < 4 / 3 * height[kept]).all()


@pytest.mark.parametrize("mode", ["exact", "reference"])
@pytest.mark.parametrize("thr", [-1.0, 0.0, 0.5, 1.0])
def test_any_box_in_any_image(mode, thr):
    boxes, sizes = random_boxes(20_000)
    crops = sample_crops(boxes, sizes, thr, mode, rng=np.random.default_rng(0))
    assert_inside(crops, sizes)
    if mode == "exact":
        assert (coverage(crops_to_xywh(crops), boxes) >= thr).all()


def test_the_drawn_shape_is_in_range_of_scale_and_ratio():
    boxes = np.tile([[3000.0, 2500.0, 900.0, 700.0]], (20_000, 1))  # a huge image: rounding is nothing
    sizes = np.tile([[9000, 7000]], (20_000, 1))
    crops = sample_crops(boxes, sizes, 1.0, scale=(0.1, 0.5), ratio=(0.8, 1.5), rng=np.random.default_rng(1))
    height, width = crops[:, 2:].T
    scale, ratio = height * width / (9000 * 7000), width / height
    assert scale.min() > 0.0999 and scale.max() < 0.5005 and ratio.min() > 0.799 and ratio.max() < 1.502
    assert stats.kstest(scale, stats.uniform(0.1, 0.4).cdf).statistic < 0.012  # nothing else cuts the scale here
    assert stats.kstest(np.log(ratio), stats.uniform(np.log(0.8), np.log(1.5 / 0.8)).cdf).statistic < 0.012


def test_a_ratio_gives_way_only_where_it_must_and_no_further():
    boxes, sizes = np.array([[0.0, 100, 500, 50]]), np.array([[500, 300]])
    ranges = (0.08, 1.0), (3 / 4, 4 / 3)
    assert ratio_gives_way(boxes, sizes, 1.0, *ranges).tolist() == [True]
    assert ratio_gives_way(boxes, sizes, 0.5, *ranges).tolist() == [False]
    crop = sample_crops(np.tile(boxes, (50, 1)), np.tile(sizes, (50, 1)), 1.0, rng=np.random.default_rng(0))
    assert (crop == [0, 0, 300, 500]).all()  # 500 : 300 is the ratio nearest to 4 : 3 that can hold the box


def test_negative_thr_has_the_law_of_torchvisions_crop():
    size, count = (193, 117), 8000
    torch.manual_seed(0)
    image = torch.empty(3, size[1], size[0])
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1], [3 / 4, 4 / 3]) for _ in range(count)])
    ours = sample_crops(np.ones((count, 4)), np.tile([size], (count, 1)), -1.0, rng=np.random.default_rng(0))
    top, left, height, width = np.stack([ours, theirs]).transpose(2, 0, 1).astype(float)
    for value in (width * height, width / height, left / (size[0] - width + 1), top / (size[1] - height + 1)):
        assert stats.ks_2samp(value[0], value[1]).statistic < 0.03  # 1.36 sqrt(2 / n) = .0215, and pixels' ties


def brute_force(box, size, thr, count, rng):
    """Draw exact-mode crops the long way: shapes until one can reach thr, then positions until one does.

    Returns:
        (count, 4) top left height width, rounded outward to whole pixels.
    """
    found = []
    x, y, w, h = box
    while len(found) < count:
        area, r = rng.uniform(0.08, 1) * size[0] * size[1], np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        a, b = np.sqrt(area * r), np.sqrt(area / r)
        if a > size[0] or b > size[1] or min(a, w) * min(b, h) < thr * w * h:
            continue
        while True:
            left, top = rng.uniform(0, size[0] - a), rng.uniform(0, size[1] - b)
            dx = min(left + a, x + w) - max(left, x)
            dy = min(top + b, y + h) - max(top, y)
            if dx > 0 and dy > 0 and dx * dy >= thr * w * h:
                break
        top, left, bottom, right = np.floor(top), np.floor(left), np.ceil(top + b), np.ceil(left + a)
        found.append((top, left, bottom - top, right - left))
    return np.array(found)


@pytest.mark.parametrize(
    ("box", "size", "thr"),
    [
        ((300, 90, 350, 200), (1000, 600), 0.6),
        ((10, 300, 420, 280), (700, 900), 0.9),
        ((40, 60, 300, 120), (640, 400), 1.0),
    ],
)
def test_exact_mode_has_the_law_of_a_brute_force_sampler(box, size, thr):
    count = 4000
    slow = brute_force(box, size, thr, count, np.random.default_rng(0))
    fast = sample_crops(np.tile([box], (count, 1)), np.tile([size], (count, 1)), thr, rng=np.random.default_rng(1))
    for axis in range(4):
        assert stats.ks_2samp(slow[:, axis], fast[:, axis]).statistic < 0.04, axis  # 99.7%: .040
    ratios = slow[:, 3] / slow[:, 2], fast[:, 3] / fast[:, 2]
    assert stats.ks_2samp(*ratios).statistic < 0.04


def test_one_seed_gives_the_same_crops():
    boxes, sizes = random_boxes(100)
    draws = [sample_crops(boxes, sizes, 0.5, rng=np.random.default_rng(7)) for _ in range(2)]
    assert (draws[0] == draws[1]).all()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mode": "other"}, "mode"),
        ({"thr": 1.5}, "thr"),
        ({"thr": float("nan")}, "thr"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"boxes_xywh": [[90, 0, 20, 20]]}, "inside its image"),
        ({"boxes_xywh": [[0, 0, 0, 20]]}, "inside its image"),
        ({"boxes_xywh": [[np.nan, 0, 5, 20]]}, "inside its image"),
        ({"boxes_xywh": [[0, 0, 5]]}, "N, 4"),
        ({"image_sizes": [[0, 5]]}, "under one pixel"),
    ],
)
def test_bad_arguments(change, told):
    arguments = {"boxes_xywh": [[0, 0, 20, 20]], "image_sizes": [[100, 50]], "thr": 0.5} | change
    with pytest.raises(ValueError, match=told):
        sample_crops(**arguments)


# --- RandomResizedCrop --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(200, 150), (90, 400)])
def test_plain_crops_follow_torchvision(size):
    count, scale, ratio = 4_000, (0.08, 1.0), (3 / 4, 4 / 3)
    boxes, sizes = np.zeros((count, 4)), np.tile(size, (count, 1))
    crops = sample_crops(boxes, sizes, -1.0, rng=np.random.default_rng(5))
    torch.manual_seed(0)
    image = torch.zeros(1, *size[::-1], dtype=torch.uint8)
    theirs = np.array([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(count)])
    for column in range(4):
        assert stats.ks_2samp(crops[:, column], theirs[:, column]).pvalue > 0.01
    assert stats.ks_2samp(crops[:, 1] / crops[:, 3], theirs[:, 1] / theirs[:, 3]).pvalue > 0.01


@pytest.mark.parametrize(("size", "shape"), [((500, 30), (40, 30)), ((30, 500), (30, 40)), ((30, 35), (30, 35))])
def test_the_shape_where_no_try_fits_is_torchvisions(size, shape):
    shapes, found = random_shapes(np.tile(size, (3, 1)), (5.0, 6.0), (3 / 4, 4 / 3), np.random.default_rng(6))
    image = torch.zeros(1, *size[::-1])
    assert RandomResizedCrop.get_params(image, (5.0, 6.0), (3 / 4, 4 / 3))[:1:-1] == shape
    assert (shapes == shape).all() and not found.any()
