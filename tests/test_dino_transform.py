"""Density-map crops: the law of their centres and shapes, and that they lie inside the image."""

import numpy as np
import PIL.Image
import pytest
import torch
from scipy import stats
from torchvision import tv_tensors
from torchvision.transforms import v2

import dino_transform
from localized_crops.crops import random_shapes
from localized_crops.density import density_points, map_to_density, running_sums, sample_density_crops
from localized_crops.transforms import AttentionMap, DinoRandomResizedCrop
from training import epoch_crops
from training.epoch_crops import MapCrops

IMAGE_SIZE = (53, 37)  # width, height
FEAT = (5, 9)
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def random_density(seed=0):
    density = np.random.default_rng(seed).random(FEAT) ** 2
    density[1, 2] = 0  # a cell that is never drawn
    return density / density.sum()


def test_attention_is_importable_from_here():
    assert dino_transform.cls_attention.__module__ == "localized_crops.attention"
    assert dino_transform.AttentionMap.__module__ == "localized_crops.transforms"


def draw_points(density, num_points, rng):
    one = running_sums(torch.from_numpy(density)[None]), np.array([FEAT]), np.array([IMAGE_SIZE])
    return density_points(*one, rng.random((1, num_points, 3)))[0]


def test_centres_follow_the_density():
    density, num_points = random_density(), 40_000
    points = draw_points(density, num_points, np.random.default_rng(1))
    columns, rows = (points / IMAGE_SIZE * FEAT[::-1]).astype(int).T
    counts = np.zeros(FEAT)
    np.add.at(counts, (rows, columns), 1)
    drawn = density > 0
    assert counts[~drawn].sum() == 0
    assert stats.chisquare(counts[drawn], density[drawn] * num_points).pvalue > 0.01
    transposed = np.ascontiguousarray(density.T).reshape(FEAT)  # a swapped axis must not pass
    assert stats.chisquare(counts[drawn], (transposed[drawn] / transposed[drawn].sum()) * num_points).pvalue < 1e-9


def test_centres_are_uniform_inside_a_cell():
    density = np.zeros(FEAT)
    density[3, 7] = 1
    points = draw_points(density, 5_000, np.random.default_rng(2))
    inside = points / IMAGE_SIZE * FEAT[::-1] - (7, 3)
    for axis in (0, 1):
        assert stats.kstest(inside[:, axis], "uniform").pvalue > 0.01


def test_crops_are_centred_on_the_drawn_points_where_the_border_allows():
    density = np.zeros(FEAT)
    density[2, 4] = 1  # the middle cell
    crops = sample_density_crops(density, (530, 370), 2_000, (0.1, 0.1), RATIO, np.random.default_rng(3))
    top, left, height, width = crops.T
    assert np.abs(left + width / 2 - 265).max() <= 530 / 9 / 2 + 1
    assert np.abs(top + height / 2 - 185).max() <= 370 / 5 / 2 + 1


@pytest.mark.parametrize("image_size", [(53, 37), (37, 53), (1, 1), (500, 3), (3, 500)])
def test_crops_lie_inside_the_image(image_size):
    crops = sample_density_crops(random_density(), image_size, 3_000, SCALE, RATIO, np.random.default_rng(4))
    top, left, height, width = crops.T
    assert crops.dtype == np.int64 and (crops[:, :2] >= 0).all() and (crops[:, 2:] >= 1).all()
    assert (left + width <= image_size[0]).all() and (top + height <= image_size[1]).all()


def test_an_epochs_crops_follow_the_maps_and_are_plain_without_one():
    maps = {1: random_density().astype(np.float16), 3: np.full(FEAT, np.nan, np.float16)}
    ids, sizes = np.array([1, 2, 3] * 4_000), np.tile((530, 370), (12_000, 1))
    crops = MapCrops(maps, ids, sizes, temperature=0.02, scale=(0.01, 0.01))
    drawn = crops.draw(np.random.default_rng(11))
    top, left, height, width = drawn.T
    columns, rows = ((left + width / 2) / 530 * FEAT[1]).astype(int), ((top + height / 2) / 370 * FEAT[0]).astype(int)
    counts = np.zeros((3, *FEAT))
    np.add.at(counts, (ids - 1, rows, columns), 1)
    density = map_to_density(maps[1], 0.02)
    inner = np.zeros(FEAT, bool)
    inner[1:-1, 1:-1] = True  # at the border crops were moved in
    for expected, found in ((density, counts[0]), (np.full(FEAT, 1 / 45), counts[2])):
        share = expected[inner] / expected[inner].sum()
        assert stats.chisquare(found[inner], share * found[inner].sum()).pvalue > 0.01
    plain = drawn[ids == 2]  # uniform over all positions
    assert stats.kstest((plain[:, 1] + 0.5) / (530 - plain[:, 3] + 1), "uniform").pvalue > 0.01


def test_crops_of_maps_of_several_shapes_are_those_of_each_map_by_itself():
    """Maps are padded to a common shape: each crop must be what NumPy makes of its own map and random numbers."""
    rng = np.random.default_rng(12)
    maps = {i: (rng.random((i % 5 + 1, i % 7 + 2)) ** 3).astype(np.float16) for i in range(150)}
    ids, sizes, seeds = np.arange(160), rng.integers(20, 600, (160, 2)), (3, 4, 5)
    crops = [MapCrops(maps, ids, sizes, temperature=0.1).draw(np.random.default_rng(seed)) for seed in seeds]
    for drawn, seed in zip(crops, seeds, strict=True):
        again = np.random.default_rng(seed)
        shapes, _ = random_shapes(sizes, (0.08, 1.0), (3 / 4, 4 / 3), again)
        uniform = again.random((160, 3))
        for i, one in maps.items():
            cell = np.searchsorted(np.cumsum(map_to_density(one, 0.1)), uniform[i, 0], side="right")
            row, column = np.unravel_index(cell, one.shape)
            centre = (np.array([column, row]) + uniform[i, 1:]) * sizes[i] / one.shape[::-1]
            left, top = np.clip(np.rint(centre - shapes[i] / 2), 0, sizes[i] - shapes[i])
            assert drawn[i].tolist() == [top, left, shapes[i, 1], shapes[i, 0]]


class CountedMaps(dict):
    """Maps that count how often one is read."""

    reads = 0

    def get(self, image_id):
        self.reads += 1
        return super().get(image_id)


@pytest.mark.parametrize(("room", "reads"), [(2**20, 200), (64 * 45 * 8, 200 + 3 * 72), (0, 4 * 200)])
def test_running_sums_are_kept_in_bounded_memory_and_change_no_crop(monkeypatch, room, reads):
    maps = CountedMaps({i: np.random.default_rng(i).random(FEAT).astype(np.float16) for i in range(0, 200, 2)})
    about = maps, np.arange(200), np.tile(IMAGE_SIZE, (200, 1))
    expected = [MapCrops(*about, temperature=0.1).draw(np.random.default_rng(seed)) for seed in range(4)]
    monkeypatch.setattr(epoch_crops, "KEPT_BYTES", room)
    crops, maps.reads = MapCrops(*about, temperature=0.1), 0
    drawn = [crops.draw(np.random.default_rng(seed)) for seed in range(4)]
    assert np.array_equal(drawn, expected) and len(np.unique(drawn, axis=0)) == 4
    assert maps.reads == reads
    assert sum(sums.sums.nbytes for sums in crops._kept.values()) <= room


def test_temperature():
    cells = np.random.default_rng(7).random(FEAT)
    assert np.allclose(map_to_density(cells, 2.0), np.exp(cells / 2) / np.exp(cells / 2).sum())
    assert map_to_density(cells, 1e-4).max() == pytest.approx(1)
    assert np.allclose(map_to_density(cells, 1e6), 1 / cells.size, atol=1e-6)
    concentration = [(map_to_density(cells, t) ** 2).sum() for t in (0.05, 0.2, 1.0, 5.0)]
    assert concentration == sorted(concentration, reverse=True)


@pytest.mark.parametrize("value", [0.0, 0.7, np.nan])
def test_blank_maps_give_the_uniform_density(value):
    assert np.allclose(map_to_density(np.full(FEAT, value, dtype=np.float16), 2.0), 1 / 45)


def test_float16_maps_of_a_large_grid_lose_no_cell():
    density = map_to_density(np.random.default_rng(8).random((64, 64)).astype(np.float16), 2.0)
    assert density.sum() == pytest.approx(1) and (density > 0).all()


@pytest.mark.parametrize("make_map", [np.asarray, torch.from_numpy])
def test_transform_on_pil_and_tensor_is_the_same(make_map):
    pixels = np.random.default_rng(9).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    attention_map = make_map(np.random.default_rng(10).random(FEAT).astype(np.float16))
    transform = DinoRandomResizedCrop((16, 24), temperature=0.2)
    torch.manual_seed(3)
    from_pil = transform(PIL.Image.fromarray(pixels), attention_map)
    torch.manual_seed(3)
    from_tensor = transform(torch.from_numpy(pixels).permute(2, 0, 1), attention_map)
    assert from_pil.size == (24, 16) and from_tensor.shape == (3, 16, 24) and from_tensor.dtype == torch.uint8
    difference = v2.functional.pil_to_tensor(from_pil).int() - from_tensor.int()
    assert difference.abs().max() <= 2  # Pillow and torch round their resizing differently


def test_transform_follows_the_seed_and_a_cold_map():
    attention_map = np.zeros(FEAT)
    attention_map[4, 8] = 1  # bottom right
    transform = DinoRandomResizedCrop(8, scale=(0.05, 0.05), temperature=0.01)
    image = torch.zeros(3, 370, 530, dtype=torch.uint8)
    torch.manual_seed(0)
    crops = [transform.make_params([image, AttentionMap(attention_map)]) for _ in range(20)]
    assert all(crop["left"] > 265 and crop["top"] > 185 for crop in crops)
    torch.manual_seed(0)
    assert crops == [transform.make_params([image, AttentionMap(attention_map)]) for _ in range(20)]
    assert len({tuple(crop.values()) for crop in crops}) > 10


def test_a_density_is_taken_as_it_is_without_temperature():
    density = np.zeros(FEAT)
    density[0, 0] = 1
    transform = DinoRandomResizedCrop(8, scale=(0.05, 0.05), temperature=None)
    crop = transform.make_params([PIL.Image.new("RGB", (530, 370)), AttentionMap(density)])
    assert crop["left"] < 60 and crop["top"] < 75


@pytest.mark.parametrize("arguments", [{"temperature": 0.0}, {"scale": (0.0, 1.0)}, {"ratio": (2.0, 1.0)}])
def test_wrong_arguments(arguments):
    with pytest.raises(ValueError, match="got"):
        DinoRandomResizedCrop(8, **arguments)


def test_a_stack_of_heads_is_refused():
    with pytest.raises(ValueError, match="feat_h, feat_w"):
        DinoRandomResizedCrop(8)(PIL.Image.new("RGB", (9, 9)), np.zeros((3, *FEAT)))


def test_it_stands_anywhere_in_a_compose_with_boxes_masks_and_labels():
    """The bright square of the image, its mask, its box and its attention stay together, before and behind it."""
    image = torch.zeros(3, 37, 53, dtype=torch.uint8)
    image[:, 20:30, 30:42] = 255
    cells = torch.zeros(1, 37, 53)
    cells[:, 20:30, 30:42] = 1
    sample = {
        "image": tv_tensors.Image(image),
        "mask": tv_tensors.Mask(image[0] > 0),
        "box": tv_tensors.BoundingBoxes([[30, 20, 12, 10]], format="XYWH", canvas_size=(37, 53)),
        "map": AttentionMap(cells),
        "label": torch.tensor(7),
    }
    compose = v2.Compose(
        [v2.RandomHorizontalFlip(1), DinoRandomResizedCrop(32, (0.3, 1)), v2.RandomCrop(29), v2.Pad(1)]
    )
    torch.manual_seed(0)
    for _ in range(20):
        out = compose(sample)
        assert out["image"].shape == (3, 31, 31) and out["map"].shape == (1, 31, 31) and int(out["label"]) == 7
        assert isinstance(out["map"], AttentionMap)
        bright = out["image"][0] > 127
        assert bright.any() and (bright == out["mask"]).float().mean() > 0.95
        assert (bright == (out["map"][0] > 0.5)).float().mean() > 0.95
        rows, columns = bright.nonzero().T
        edges = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        box = v2.functional.convert_bounding_box_format(out["box"], new_format="XYXY")
        assert (torch.Tensor(box)[0] - edges).abs().max() <= 2.5


def test_a_map_goes_in_as_an_argument_with_a_leading_1_or_among_the_inputs():
    cells, image = random_density(), torch.zeros(3, 37, 53, dtype=torch.uint8)
    image[0] = torch.arange(53)
    crop, results = DinoRandomResizedCrop(16), []
    for call in (
        lambda: crop(image, cells),
        lambda: crop(image, attention_map=cells[None]),
        lambda: crop(image, AttentionMap(cells))[0],
        lambda: crop([AttentionMap(cells), tv_tensors.Image(image)])[1],
    ):
        torch.manual_seed(1)
        results.append(call())
    assert all(torch.equal(torch.Tensor(one), torch.Tensor(results[0])) for one in results)
    assert crop(image, None).shape == (3, 16, 16)  # an image without a map: a plain crop


@pytest.mark.parametrize("change", [lambda d: d * 0, lambda d: d - 0.01, lambda d: d * np.nan, lambda d: d / 0.0])
def test_an_impossible_density_is_refused(change):
    with np.errstate(all="ignore"):
        density = change(random_density())
    with pytest.raises(ValueError):
        DinoRandomResizedCrop(8, temperature=None)(PIL.Image.new("RGB", (9, 9)), density)
    with pytest.raises(ValueError):
        sample_density_crops(density, (9, 9), 1, SCALE, RATIO, np.random.default_rng(5))


@pytest.mark.parametrize("inputs", [(PIL.Image.new("RGB", (9, 9)),), (PIL.Image.new("RGB", (9, 9)), 3)])
def test_a_missing_image_or_map_is_refused(inputs):
    with pytest.raises(ValueError):
        DinoRandomResizedCrop(8)(*inputs)
    with pytest.raises(ValueError, match="Video"):
        DinoRandomResizedCrop(8)(tv_tensors.Video(torch.zeros(2, 3, 9, 9)), AttentionMap(np.ones((3, 4))))


def test_the_transform_and_the_crops_of_an_epoch_have_the_same_law():
    cells = random_density() / random_density().max()
    transform, image, map_input = DinoRandomResizedCrop(8), torch.zeros(3, 37, 53), AttentionMap(cells)
    torch.manual_seed(3)
    params = [transform.make_params([image, map_input]) for _ in range(2_000)]
    one_by_one = np.array([[crop[side] for side in ("top", "left", "height", "width")] for crop in params])
    ids, sizes = np.zeros(2_000, int), np.tile(IMAGE_SIZE, (2_000, 1))
    at_once = MapCrops({0: cells}, ids, sizes, temperature=transform.temperature).draw(np.random.default_rng(4))
    for side in range(4):
        assert stats.ks_2samp(one_by_one[:, side], at_once[:, side]).pvalue > 0.01
    plain = MapCrops({}, ids, sizes, temperature=0.1).draw(np.random.default_rng(5))
    assert min(stats.ks_2samp(one_by_one[:, side], plain[:, side]).pvalue for side in (0, 1)) < 1e-6  # it can fail
