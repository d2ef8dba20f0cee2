"""mask_generator.py against the package's own generator, same random weights, same settings."""

from functools import partial

import numpy as np
import pytest
import torch
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.utils.amg import batched_mask_to_box, remove_small_regions
from segment_anything.utils.transforms import ResizeLongestSide

from mask_speed import build_small_sam, mask_iou, set_thresholds
from masks import mask_generator
from masks.mask_generator import MaskGenerator
from measuring import build_images

SIZES = ((90, 160), (37, 53), (120, 75))  # height, width
LOOSE = {"points_per_side": 7, "stability_score_thresh": 0.3}  # lets about one mask in ten through


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sam():
    """A network of 256 px: encoder of width 128 and depth 2 (one windowed block, one global), decoder as published."""
    return random_sam(256)


@pytest.fixture(scope="module")
def images():
    return build_images(3, SIZES)


def random_sam(side, seed=0):
    torch.manual_seed(seed)
    sam = build_small_sam(side, width=128, depth=2)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sam.image_encoder.named_parameters():
        if "pos" in name:  # zero before training: mistakes would not show
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return set_thresholds(sam, build_images(1)[0])


def assert_same(ours, theirs, nearby=lambda number: []):
    """The same masks in the same order; returns how many. ``nearby`` gives other stability scores that are right."""
    assert len(ours) == len(theirs)
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert one.keys() == other.keys()
        for key in ("bbox", "point_coords", "crop_box"):
            assert one[key] == other[key]
        assert one["predicted_iou"] == pytest.approx(other["predicted_iou"], abs=1e-5)
        pixels = max(1, other["area"])  # rounding may move a pixel or two over one of its two thresholds
        near = pytest.approx(one["stability_score"], abs=1e-6 + 2 / pixels, nan_ok=True)
        assert other["stability_score"] == near or near in nearby(number)
        assert one["segmentation"].shape == other["segmentation"].shape and one["segmentation"].dtype == bool
        differing = (one["segmentation"] ^ other["segmentation"]).sum()
        assert mask_iou(one["segmentation"], other["segmentation"]) >= 0.999 or differing == 1  # 1 of under 1000 pixels
        assert one["area"] == one["segmentation"].sum() == pytest.approx(other["area"], rel=1e-3, abs=1)
    return len(ours)


def same_as_official(sam, images, ours=None, **settings):
    """Compare both on each image; return the number of masks in all."""
    official = SamAutomaticMaskGenerator(sam, **settings)
    found = MaskGenerator(sam, **settings, **(ours or {})).generate(images)
    offset = settings.get("stability_score_offset", 1.0)

    def nearby(image, number):  # a plateau of equal logits lies on this or that side of a threshold, by a rounding
        moved = ({"stability_score_offset": offset * (1 + shift)} for shift in (-1e-5, 1e-5))
        records = [SamAutomaticMaskGenerator(sam, **settings | one).generate(image) for one in moved]
        return [record[number]["stability_score"] for record in records]

    return sum(
        assert_same(own, official.generate(image), partial(nearby, image))
        for own, image in zip(found, images, strict=True)
    )


# --- the same as the official generator ---------------------------------------------------------------------------


def test_same_masks_as_official(images):
    assert same_as_official(random_sam(256, seed=2), images, **LOOSE) >= 15  # the other tests: seed 0


@pytest.mark.parametrize("batch", [{}, {"image_batch": 2, "chunk_megabytes": 0}])
def test_same_masks_with_crops(sam, images, batch):
    settings = LOOSE | {"points_per_side": 4, "crop_n_layers": 1, "crop_n_points_downscale_factor": 2}
    assert same_as_official(sam, images[:2], batch, **settings) >= 10


def test_crop_edges_cut_masks_off(sam):
    """At 20 pixels from a crop's edge everything in a small crop is near it: so one large enough."""
    image = build_images(1, ((150, 210),))[0]
    settings = LOOSE | {"points_per_side": 5, "crop_n_layers": 1, "crop_nms_thresh": 0.5, "crop_overlap_ratio": 0.2}
    records = MaskGenerator(sam, **settings).generate([image])[0]
    inner = [record for record in records if record["crop_box"] != [0, 0, 210, 150]]
    assert len(inner) >= 3 and same_as_official(sam, [image], **settings) == len(records)


@pytest.mark.parametrize(
    "settings",
    [
        {"pred_iou_thresh": 0.0, "points_per_side": 4},
        {"stability_score_thresh": 0.0, "points_per_side": 4},
        {"stability_score_offset": 2.0, "stability_score_thresh": 0.1},
        {"box_nms_thresh": 0.2, "points_per_batch": 5},
        {"points_per_side": None, "point_grids": [np.random.default_rng(0).random((11, 2))]},
    ],
)
def test_same_masks_with_other_settings(sam, images, settings):
    assert same_as_official(sam, images[:1], **(LOOSE | {"stability_score_thresh": 0.2} | settings)) >= 3


def test_same_masks_at_the_published_size():
    assert same_as_official(random_sam(1024), build_images(1), **(LOOSE | {"points_per_side": 2})) >= 1


def test_same_masks_without_relative_positions(images):
    sam = random_sam(256)
    for block in sam.image_encoder.blocks:
        block.attn.use_rel_pos = False
    assert same_as_official(sam, images[:1], **(LOOSE | {"points_per_side": 4})) >= 3


def test_embeddings_are_the_encoder_s(sam, images):
    embeddings = MaskGenerator(sam).embed(images)
    assert embeddings.shape == (3, 256, 16, 16)
    for image, own in zip(images, embeddings, strict=True):
        resized = torch.from_numpy(ResizeLongestSide(256).apply_image(image)).permute(2, 0, 1)
        with torch.no_grad():
            expected = sam.image_encoder(sam.preprocess(resized)[None])
        torch.testing.assert_close(own[None], expected, atol=1e-4, rtol=1e-4)


def test_an_encoder_of_another_kind_is_called(images):
    sam = random_sam(256)
    expected = MaskGenerator(sam, **LOOSE).generate(images[:1])[0]
    sam.image_encoder = type("OtherEncoder", (type(sam.image_encoder),), {})(img_size=256, out_chans=256, depth=0)
    own = MaskGenerator(sam, **LOOSE).embed(images[:1])
    assert own.shape == (1, 256, 16, 16) and len(expected) >= 3


# --- batches, outputs ---------------------------------------------------------------------------------------------


def test_batches_change_nothing(sam, images):
    single = [MaskGenerator(sam, **LOOSE).generate([image])[0] for image in images]
    for settings in ({"image_batch": 3}, {"image_batch": 2, "chunk_megabytes": 1, "points_per_batch": 3}):
        together = MaskGenerator(sam, **LOOSE, **settings).generate(images)
        assert sum(assert_same(*pair) for pair in zip(together, single, strict=True)) >= 15


def test_a_compiled_encoder_sees_batches_of_one_size_alone(sam, images, monkeypatch):
    seen = []

    def compile_spy(function, dynamic):
        assert not dynamic
        return lambda encoder, inputs: seen.append(len(inputs)) or function(encoder, inputs)

    monkeypatch.setattr(torch, "compile", compile_spy)
    generator = MaskGenerator(sam, image_batch=2, compile_encoder=True)
    embeddings = [generator.embed(images[:2]), generator.embed(images[2:])]
    assert seen == [2, 2] and [len(part) for part in embeddings] == [2, 1]
    torch.testing.assert_close(torch.cat(embeddings), MaskGenerator(sam).embed(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("min_area", [0, 30])
def test_masks_may_be_left_out(sam, images, min_area):
    generator = MaskGenerator(sam, **LOOSE, min_mask_region_area=min_area)
    whole, lean = (generator.generate(images[:1], with_masks=with_masks)[0] for with_masks in (True, False))
    assert len(lean) == len(whole) >= 3
    for record, expected in zip(lean, whole, strict=True):
        assert record == {key: value for key, value in expected.items() if key != "segmentation"}
        assert [type(value) for value in record["bbox"] + record["crop_box"]] == [int] * 8


@pytest.mark.parametrize("settings", [{"pred_iou_thresh": 100.0}, {"stability_score_thresh": 2.0}])
@pytest.mark.parametrize("crop_n_layers", [0, 1])
def test_no_mask(sam, images, settings, crop_n_layers):
    settings = {"points_per_side": 2, "crop_n_layers": crop_n_layers, "min_mask_region_area": 5} | settings
    assert MaskGenerator(sam, **settings).generate(images[:1]) == [[]]


def test_no_image(sam):
    assert MaskGenerator(sam).generate([]) == []


# --- small regions ------------------------------------------------------------------------------------------------


def blobs(seed, height=37, width=53, share=0.4):
    return np.random.default_rng(seed).random((height, width)) < share


def slow_remove_small_regions(mask, min_area):
    """Flood fill, pixel by pixel: the definition."""

    def regions(wanted):
        left, found = {tuple(place) for place in np.argwhere(wanted)}, []
        while left:
            stack, region = [left.pop()], []
            while stack:
                row, col = stack.pop()
                region.append((row, col))
                near = {(row + down, col + right) for down in (-1, 0, 1) for right in (-1, 0, 1)} & left
                left -= near
                stack += near
            found.append(region)
        return found

    mask = mask.copy()
    for region in regions(~mask):
        if len(region) < min_area:
            mask[tuple(np.array(region).T)] = True
    islands = regions(mask)
    large = [region for region in islands if len(region) >= min_area] or [max(islands, key=len)]
    kept = np.zeros_like(mask)
    for region in large:
        kept[tuple(np.array(region).T)] = True
    return kept


@pytest.mark.parametrize("share", [0.02, 0.15, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("min_area", [1, 4, 12])
def test_small_regions_by_flood_fill(share, min_area):
    mask = blobs(seed=int(100 * share), share=share)
    if share == 0.02:
        mask[3:5, 7:10] = True  # one largest island, where all may be small
    ours = mask.copy()
    changed = mask_generator.remove_small_regions(ours, min_area)
    assert np.array_equal(ours, slow_remove_small_regions(mask, min_area))
    assert changed or np.array_equal(ours, mask)


@pytest.mark.parametrize("value", [False, True])
def test_small_regions_of_a_constant_mask(value):
    mask = np.full((37, 53), value)
    assert not mask_generator.remove_small_regions(mask, 50) and (mask == value).all()


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.9])
def test_small_regions_as_official(share):
    pytest.importorskip("cv2")
    mask = blobs(seed=3, share=share)
    filled, holes = remove_small_regions(mask, 9, mode="holes")
    expected, islands = remove_small_regions(filled, 9, mode="islands")
    ours = mask.copy()
    assert mask_generator.remove_small_regions(ours, 9) == (holes or islands) and np.array_equal(ours, expected)


@pytest.mark.parametrize("crop_n_layers", [0, 1])
def test_min_mask_region_area_as_official(sam, images, crop_n_layers):
    pytest.importorskip("cv2")
    settings = LOOSE | {"points_per_side": 5, "crop_n_layers": crop_n_layers}
    without = sum(map(len, MaskGenerator(sam, **settings).generate(images[:2])))
    assert 6 <= same_as_official(sam, images[:2], **settings, min_mask_region_area=60) <= without


def test_min_mask_region_area_without_cv2(sam, images):
    """Every mask is one of those without it, cleaned; each has a box and an area of its own."""
    plain = [
        record["segmentation"] for record in MaskGenerator(sam, **LOOSE, box_nms_thresh=1.0).generate(images[:1])[0]
    ]
    cleaned = {slow_remove_small_regions(mask, 60).tobytes() for mask in plain}
    (records,) = MaskGenerator(sam, **LOOSE, min_mask_region_area=60).generate(images[:1])
    masks = np.stack([record["segmentation"] for record in records])
    assert len(records) >= 3 and not {mask.tobytes() for mask in masks} <= {mask.tobytes() for mask in plain}
    boxes = batched_mask_to_box(torch.from_numpy(masks))
    for mask, record, xyxy in zip(masks, records, boxes.tolist(), strict=True):
        assert mask.tobytes() in cleaned and record["area"] == mask.sum()
        assert record["bbox"] == [*xyxy[:2], xyxy[2] - xyxy[0], xyxy[3] - xyxy[1]]


# --- parts --------------------------------------------------------------------------------------------------------


def test_boxes_of_masks():
    masks = torch.stack([torch.from_numpy(blobs(seed, share=0.002)) for seed in range(20)])
    masks[3] = False
    assert torch.equal(mask_generator.masks_to_boxes(masks), batched_mask_to_box(masks))
    assert mask_generator.masks_to_boxes(masks[:0]).shape == (0, 4)


@pytest.mark.parametrize("size", [(37, 53), (53, 37), (300, 200), (16, 700), (1, 1)])
def test_one_product_is_the_two_resizes(sam, size):
    frame = mask_generator._Frame.build(size, sam)
    low = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    inner = ResizeLongestSide.get_preprocess_shape(*size, 256)
    expected = sam.postprocess_masks(low[None], inner, size)[0]
    rows, cols = (4 * cells for cells in frame.cells)
    torch.testing.assert_close(frame.upsample(low[:, :rows, :cols]), expected, atol=1e-5, rtol=1e-5)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([np.zeros((37, 53), np.uint8)], r"images\[0\] must be .* uint8 of shape \(37, 53\)"),
        ([np.zeros((37, 53, 4), np.uint8)], r"got uint8 of shape \(37, 53, 4\)"),
        ([np.zeros((37, 53, 3))], "got float64"),
        ([torch.zeros(37, 53, 3, dtype=torch.uint8)], "got Tensor"),
        ([np.zeros((37, 53, 3), np.uint8), np.zeros((0, 53, 3), np.uint8)], r"images\[1\] must be .* with pixels"),
    ],
)
def test_wrong_images_are_refused(sam, images, message):
    with pytest.raises(ValueError, match=message) as error:
        MaskGenerator(sam, points_per_side=1).generate(images)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"points_per_side": None}, "exactly one of points_per_side"),
        ({"point_grids": [np.zeros((1, 2))]}, "exactly one of points_per_side"),
        ({"points_per_side": None, "point_grids": [np.zeros((1, 2))], "crop_n_layers": 1}, "point_grids"),
        ({"precision": "int8"}, "float32, bf16, fp16"),
    ],
)
def test_wrong_settings_are_refused(sam, settings, message):
    with pytest.raises(ValueError, match=message):
        MaskGenerator(sam, **settings)


# --- CUDA ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_on_cuda(images, precision):
    sam = random_sam(256).cuda()
    if precision == "float32":
        assert same_as_official(sam, images, {"image_batch": 2}, **LOOSE) >= 15
    else:
        found = MaskGenerator(sam, **LOOSE, image_batch=2, precision=precision).generate(images)
        assert sum(map(len, found)) >= 10
