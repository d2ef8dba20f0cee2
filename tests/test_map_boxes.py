"""map_boxes.py against SciPy's convolution, direct loops and boxes that can be counted by hand."""

import numpy as np
import pytest
from scipy.signal import convolve2d

from localized_crops import map_boxes
from localized_crops.map_boxes import clean_map, component_box, published_box

FEAT = (7, 11)  # feat_h, feat_w: odd and unequal, so that a swapped axis fails
IMAGE_SIZE = (110, 35)  # width, height: a cell is 10 wide and 5 high


def random_heads(heads=3):
    return np.random.default_rng(0).random((heads, *FEAT))


def block_map(rows=slice(2, 5), columns=slice(3, 9), value=1.0):
    cells = np.zeros(FEAT)
    cells[rows, columns] = value
    return cells


@pytest.mark.parametrize("filter_size", [1, 2, 3, 4, 5])
def test_box_filter_is_a_symmetric_convolution(filter_size):
    heads = random_heads()
    kernel = np.full((filter_size, filter_size), 1 / filter_size**2)
    expected = [convolve2d(cells, kernel, mode="same", boundary="symm") for cells in heads]
    assert np.allclose(map_boxes.box_filter(heads, filter_size), expected)


def test_maximum_becomes_the_mean_of_its_own_map():
    heads = random_heads()
    cleaned = map_boxes.replace_maximum(heads)
    for before, after in zip(heads, cleaned, strict=True):
        place = np.unravel_index(before.argmax(), FEAT)
        assert after[place] == pytest.approx(before.mean())
        assert (after != before).sum() == 1
    assert heads.max() == random_heads().max()  # the input is left alone


def test_min_max():
    cleaned = map_boxes.min_max(random_heads())
    assert np.allclose(cleaned.min((1, 2)), 0) and np.allclose(cleaned.max((1, 2)), 1)
    assert (map_boxes.min_max(np.full(FEAT, 3.0)) == 0).all()


@pytest.mark.parametrize("temperature", [1e-4, 0.1, 2.0, 1e6])
def test_softmax_density_sums_to_one(temperature):
    density = map_boxes.softmax_density(random_heads(), temperature)
    assert np.allclose(density.sum((1, 2)), 1) and np.isfinite(density).all()


def test_softmax_density_by_its_formula():
    cells = random_heads(1)[0]
    assert np.allclose(map_boxes.softmax_density(cells, 2.0), np.exp(cells / 2) / np.exp(cells / 2).sum())
    assert map_boxes.softmax_density(cells, 1e-4).max() == pytest.approx(1)  # cold: all on the largest cell
    assert np.ptp(map_boxes.softmax_density(cells, 1e6)) < 1e-6  # hot: uniform
    with pytest.raises(ValueError, match="above 0"):
        map_boxes.softmax_density(cells, 0)


def test_reduce_heads():
    heads = random_heads()
    assert np.allclose(map_boxes.reduce_heads(heads, "mean"), heads.mean(0))
    assert np.array_equal(map_boxes.reduce_heads(heads, 2), heads[2])
    for wrong in (3, -1, "best"):
        with pytest.raises(ValueError, match="heads="):
            map_boxes.reduce_heads(heads, wrong)


def test_sparsity_weights_prefer_the_peaked_head():
    one_cell, uniform = np.zeros(FEAT), np.full(FEAT, 1 / 77)
    one_cell[2, 3] = 1
    assert map_boxes.sparsity_weights(np.stack([one_cell, uniform])) == pytest.approx([1, 0], abs=1e-7)
    assert map_boxes.sparsity_weights(np.stack([uniform, uniform])).sum() == pytest.approx(1)
    assert map_boxes.sparsity_weights(np.zeros((2, *FEAT))) == pytest.approx([0.5, 0.5])


def test_clean_map_runs_the_steps_in_order():
    heads = random_heads()
    expected = map_boxes.min_max(map_boxes.box_filter(map_boxes.replace_maximum(heads.mean(0)), 3))
    assert np.allclose(clean_map(heads), expected)
    other = map_boxes.softmax_density(map_boxes.replace_maximum(map_boxes.box_filter(heads, 5)).mean(0), 0.5)
    steps = ["filter", "outlier", "heads", "softmax"]
    assert np.allclose(clean_map(heads, steps=steps, filter_size=5, temperature=0.5), other)


@pytest.mark.parametrize("steps", [["filter"], ["heads", "blur"]])
def test_clean_map_refuses_other_steps(steps):
    with pytest.raises(ValueError, match="steps="):
        clean_map(random_heads(), steps=steps)


@pytest.mark.parametrize("seed", range(5))
def test_otsu_is_the_upper_edge_of_the_bin_that_separates_best(seed):
    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.normal(0.2, 0.1, 700), rng.normal(0.8, 0.05, 300 + 97 * seed)]).reshape(-1, 1)
    counts, edges = np.histogram(values, 256)
    centres, n = (edges[:-1] + edges[1:]) / 2, counts.sum()
    between = []
    for cut in range(1, 256):
        below, above = counts[:cut].sum(), counts[cut:].sum()
        means = (counts[:cut] @ centres[:cut]) / below, (counts[cut:] @ centres[cut:]) / above
        between.append(below * above / n**2 * (means[0] - means[1]) ** 2)
    found = map_boxes.resolve_threshold(values, "otsu")
    edge = np.abs(edges[1:-1] - found).argmin()
    assert found == pytest.approx(edges[1 + edge], abs=1e-9)
    assert between[edge] == pytest.approx(max(between), rel=1e-9)  # empty bins separate equally well


def test_otsu_separates_best():
    values = np.concatenate([np.linspace(0, 1, 40), np.linspace(3, 4, 60)])

    def variance_between(threshold):
        low, high = values[values < threshold], values[values >= threshold]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2

    found = map_boxes.resolve_threshold(values, "otsu")
    assert variance_between(found) == pytest.approx(max(map(variance_between, np.linspace(0.01, 4, 500))))
    for word in ("mean", "0.5"):
        with pytest.raises(ValueError, match=f"^threshold='{word}' must be a number or 'otsu'"):
            map_boxes.resolve_threshold(values, word)


def test_boxes_of_a_block():
    for box in (published_box(block_map(), IMAGE_SIZE), component_box(block_map(), IMAGE_SIZE, threshold=0.5)):
        assert box.xywh == pytest.approx((30, 10, 60, 15)) and box.found


def test_published_box_is_centred_on_the_mean_cell():
    cells = block_map()
    cells[0, 0] = 1  # far away: one row and one column more, and the centre moves by a nineteenth
    box = published_box(cells, IMAGE_SIZE)
    assert (box.width, box.height) == (70, 20)
    assert box.x + box.width / 2 == pytest.approx((18 * 6 + 0.5) / 19 * 10)
    assert box.y + box.height / 2 == pytest.approx((18 * 3.5 + 0.5) / 19 * 5)


def test_component_box_takes_one_component():
    cells = block_map(value=0.6)
    cells[0, 0] = 1  # the strongest cell, and light
    assert component_box(cells, IMAGE_SIZE, upsample=1).xywh == pytest.approx((30, 10, 60, 15))
    strongest = component_box(cells, IMAGE_SIZE, upsample=1, choose="strongest")
    assert strongest.xywh == pytest.approx((0, 0, 10, 5))
    with pytest.raises(ValueError, match="choose"):
        component_box(cells, IMAGE_SIZE, choose="largest")


def test_last_component_is_not_skipped():
    cells = np.zeros(FEAT)
    cells[0, 0] = cells[-1, -1] = 0.5
    cells[-1, -2] = 1
    assert component_box(cells, IMAGE_SIZE, upsample=1).xywh == pytest.approx((90, 30, 20, 5))


def test_component_edges_lie_between_cells():
    soft = block_map(rows=slice(2, 3), columns=slice(3, 4))
    box = component_box(soft, IMAGE_SIZE, threshold=0.75, upsample=8)
    assert 0 < box.width < 10 and 0 < box.height < 5
    assert box.x + box.width / 2 == pytest.approx(35, abs=1) and box.y + box.height / 2 == pytest.approx(12.5, abs=0.5)


def test_size_factor_grows_about_the_centre_and_is_clipped():
    box = component_box(block_map(), IMAGE_SIZE, threshold=0.5, size_factor=1.2)
    assert box.xywh == pytest.approx((24, 8.5, 72, 18))
    assert component_box(block_map(), IMAGE_SIZE, threshold=0.5, size_factor=9).xywh == (0, 0, 110, 35)


@pytest.mark.parametrize("method", [published_box, component_box])
@pytest.mark.parametrize("value", [0.0, 0.3, np.nan, np.inf])
def test_blank_maps_give_the_whole_image_and_say_so(method, value):
    cells = np.full(FEAT, value)
    if not np.isfinite(value):
        cells = block_map()
        cells[1, 1] = value
    assert method(cells, IMAGE_SIZE) == (0, 0, 110, 35, False)


@pytest.mark.parametrize("method", [published_box, component_box])
def test_nothing_over_the_threshold(method):
    assert not method(block_map(value=0.4), IMAGE_SIZE, threshold=0.5).found


@pytest.mark.parametrize("method", [published_box, component_box])
def test_boxes_lie_inside_the_image(method):
    rng = np.random.default_rng(1)
    for _ in range(50):
        box = method(rng.random(FEAT), IMAGE_SIZE, threshold="otsu")
        assert box.x >= 0 and box.y >= 0 and box.width > 0 and box.height > 0
        assert box.x + box.width <= 110 + 1e-9 and box.y + box.height <= 35 + 1e-9
