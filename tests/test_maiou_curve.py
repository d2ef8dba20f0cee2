"""benchmarks/maiou_curve.py reads any folder in CUB's format."""

import numpy as np

from benchmarks.maiou_curve import read_boxes
from datasets import read_dataset


def test_boxes_are_read_with_and_without_the_images(few_birds, tmp_path):
    data = read_dataset("cub", few_birds)
    boxes, sizes = read_boxes(few_birds)
    assert np.array_equal(boxes, data.boxes) and np.array_equal(sizes, data.image_sizes)
    (tmp_path / "bounding_boxes.txt").write_text((few_birds / "bounding_boxes.txt").read_text())
    ids = data.ids.tolist()
    lines = [f"{i} {w} {h}\n" for i, (w, h) in zip(ids, data.image_sizes.tolist(), strict=True)]
    (tmp_path / "image_sizes.txt").write_text("".join(lines))
    assert all(np.allclose(a, b) for a, b in zip(read_boxes(tmp_path), (boxes, sizes), strict=True))
