"""attention_maps.py: how images are cut into batches of one shape."""

import numpy as np
import pytest

from localizer.attention_maps import input_shape, plan_batches


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((500, 375), (518, 686)),  # 518 / 375 * 500 = 690.7 = 49.3 patches
        ((375, 500), (686, 518)),
        ((40, 40), (518, 518)),
        ((10, 4000), (2072, 518)),  # cut at four times the short side
    ],
)
def test_input_shape(size, expected):
    assert input_shape(size, 518, (14, 14)) == expected


def test_batches_hold_every_image_once_and_one_shape_each():
    sizes = np.random.default_rng(0).integers(30, 90, (200, 2))
    batches = plan_batches(sizes, 32, (8, 8), 6)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(200))
    assert all(1 <= len(batch.rows) <= 6 for batch in batches)
    for batch in batches:
        shapes = {input_shape(tuple(sizes[row]), 32, (8, 8)) for row in batch.rows}
        assert shapes == {(batch.height, batch.width)}
