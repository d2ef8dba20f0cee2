"""segments.py: classical candidates, against drawings whose regions are known."""

import numpy as np
import pytest
import torch
from torchvision.ops import box_convert, box_iou, masks_to_boxes

from masks.mask_files import info_entry
from masks.segments import SAME_IOU, SETTINGS, boundary_score, segment_image, touching

HEIGHT, WIDTH = 37, 53


def drawing(seed=0):
    """Return a noisy grey image with a red rectangle beside a blue one, and the masks of both."""
    image = np.random.default_rng(seed).normal(120, 6, (HEIGHT, WIDTH, 3))
    left, right = np.zeros((2, HEIGHT, WIDTH), dtype=bool)
    left[9:28, 11:24], right[9:28, 24:39] = True, True
    image[left] += (90, -60, -60)
    image[right] += (-60, -60, 90)
    return image.clip(0, 255).astype(np.uint8), left, right


def mask_iou(a, b):
    return (a & b).sum() / (a | b).sum()


def test_parts_and_the_whole_that_they_make_are_candidates():
    image, left, right = drawing()
    records = segment_image(image, SETTINGS | {"min_size": 10})
    for wanted in (left, right, left | right):
        assert max(mask_iou(record["segmentation"], wanted) for record in records) > 0.9
    assert len(records) < 30


def test_records_are_as_those_of_sam():
    records = segment_image(drawing()[0], SETTINGS | {"min_size": 10})
    scores = [record["predicted_iou"] for record in records]
    assert scores == sorted(scores, reverse=True) and min(scores) >= 0 and max(scores) <= 1
    for record in records:
        mask = record["segmentation"]
        assert record.keys() == {*info_entry(record), "segmentation"}
        assert mask.shape == (HEIGHT, WIDTH) and mask.dtype == bool and mask.sum() == record["area"]
        near_far = masks_to_boxes(torch.from_numpy(mask)[None])[0].tolist()  # its far corner is the last pixel
        x, y, width, height = record["bbox"]
        assert [x, y, x + width - 1, y + height - 1] == near_far
        ((column, row),) = record["point_coords"]
        assert mask[int(row), int(column)]


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 300), (HEIGHT, WIDTH)])
def test_images_without_structure(shape):
    assert segment_image(np.full((*shape, 3), 77, np.uint8)) == []  # the only region is the whole image


def test_limits():
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    records = segment_image(image, SETTINGS | {"min_size": 4, "max_masks": 7, "min_area": 0.02, "max_area": 0.3})
    assert len(records) == 7
    assert all(0.02 <= record["area"] / image[..., 0].size <= 0.3 for record in records)


def test_neighbours_against_brute_force():
    labels = np.random.default_rng(1).integers(0, 9, (11, 7))
    labels.ravel()[:9] = range(9)
    expected = [set() for _ in range(9)]
    for row, column in np.ndindex(labels.shape):
        for down, right in ((1, 0), (0, 1)):
            if row + down < 11 and column + right < 7:
                a, b = int(labels[row, column]), int(labels[row + down, column + right])
                if a != b:
                    expected[a].add(b)
                    expected[b].add(a)
    assert touching(labels, 9) == expected


def test_a_score_looks_at_the_boundary_only():
    mask = np.zeros((9, 9), dtype=bool)
    mask[3:6, 2:7] = True
    edges = np.full((9, 9), 0.25)
    assert boundary_score(mask, edges) == pytest.approx(0.25 * np.sqrt(15 / 81))
    edges[4, 3:6] = edges[0] = 1.0  # inside and outside, not on the boundary
    assert boundary_score(mask, edges) == pytest.approx(0.25 * np.sqrt(15 / 81))


def test_repeated_boxes_are_left_out():
    records = segment_image(drawing()[0], SETTINGS | {"min_size": 10})
    xyxy = box_convert(torch.tensor([record["bbox"] for record in records]), "xywh", "xyxy")
    assert len(records) > 2 and box_iou(xyxy, xyxy).fill_diagonal_(0).max() <= SAME_IOU
