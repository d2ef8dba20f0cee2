import numpy as np
import PIL.Image
import pytest
import torch
from scipy import stats
from torchvision import tv_tensors
from torchvision.transforms import v2

from localized_crops.boxes import coverage, crops_to_xywh
from localized_crops.transforms import DinoRandomResizedCrop, LocalizedRandomResizedCrop
from training.epoch_crops import BoxCrops
from transforms import TrainTransform, build_views, flip_images, normalize, square_crop

WIDTH, HEIGHT = 53, 37
BOX = (20.0, 10.0, 15.5, 12.25)  # xywh
CROP = (5, 7, 20, 31)  # top left height width
COLOUR = {"augment": True, "augment_p": 1.0, "use_augment_mix": False}


def picture(width=WIDTH, height=HEIGHT, seed=0) -> PIL.Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.Resampling.BICUBIC)


def tensor(width=WIDTH, height=HEIGHT) -> torch.Tensor:
    return v2.functional.pil_to_tensor(picture(width, height))


def tv_box(box=BOX, box_format="XYWH"):
    return tv_tensors.BoundingBoxes(np.array([box]), format=box_format, canvas_size=(HEIGHT, WIDTH))


def test_a_box_goes_in_as_bounding_boxes_or_as_an_argument():
    crop = LocalizedRandomResizedCrop(24, 0.7)
    x, y, w, h = BOX
    results = []
    for call in (
        lambda: crop(picture(), tv_box())[0],
        lambda: crop(picture(), tv_box((x, y, x + w, y + h), "XYXY"))[0],
        lambda: crop(picture(), box=BOX),
        lambda: crop({"image": picture(), "box": tv_box()})["image"],
    ):
        torch.manual_seed(5)
        results.append(np.asarray(call()))
    assert results[0].shape == (24, 24, 3)
    assert all((result == results[0]).all() for result in results)


def test_a_transform_prints_its_settings():
    held = LocalizedRandomResizedCrop(24, 0.7, mode="reference", ratio=(1, 1))
    assert "thr=0.7, mode=reference, scale=(0.08, 1.0), ratio=(1, 1)" in repr(held)
    centred = DinoRandomResizedCrop((11, 17), scale=(0.2, 0.9), ratio=(1, 1), temperature=0.25)
    assert "size=[11, 17]" in repr(centred) and "temperature=0.25" in repr(centred)


def test_the_crop_is_torchvisions_resized_crop_of_the_drawn_params():
    torch.manual_seed(1)
    params = LocalizedRandomResizedCrop((11, 17), 0.5).make_params([picture(), tv_box()])
    torch.manual_seed(1)
    image, box = LocalizedRandomResizedCrop((11, 17), 0.5)(picture(), tv_box())
    expected = v2.functional.resized_crop(picture(), **params, size=[11, 17], antialias=True)
    assert image.size == (17, 11) and (np.asarray(image) == np.asarray(expected)).all()
    assert box.canvas_size == (11, 17)  # the box is cropped along
    expected = v2.functional.resized_crop(tv_box(), **params, size=[11, 17])
    assert torch.equal(torch.Tensor(box), torch.Tensor(expected))


def test_pil_images_and_uint8_tensors_give_the_same_pixels():
    crop = LocalizedRandomResizedCrop(24, 0.7)
    image = picture()
    torch.manual_seed(2)
    from_pil = v2.functional.pil_to_tensor(crop(image, box=BOX)).int()
    torch.manual_seed(2)
    from_tensor = crop(v2.functional.pil_to_tensor(image), box=BOX)
    assert from_tensor.dtype == torch.uint8
    assert (from_pil - from_tensor.int()).abs().max() <= 1  # rounding of the two resizers


@pytest.mark.parametrize("mode", ["exact", "reference"])
def test_params_keep_the_box(mode):
    kept = []
    torch.manual_seed(0)
    for _ in range(200):
        crop = list(LocalizedRandomResizedCrop(16, 0.9, mode).make_params([picture(), tv_box()]).values())
        top, left, height, width = crop
        assert top >= 0 and top + height <= HEIGHT and left >= 0 and left + width <= WIDTH
        kept.append(coverage(crops_to_xywh(np.array(crop)), np.array(BOX)))
    assert min(kept) >= 0.9 if mode == "exact" else np.mean(kept) > 0.95


def test_it_stands_in_a_compose_and_needs_exactly_one_box():
    pipeline = v2.Compose([LocalizedRandomResizedCrop(16, 1.0), v2.RandomHorizontalFlip(0.5)])
    image, _ = pipeline(picture(), tv_box())
    assert image.size == (16, 16)
    with pytest.raises(ValueError, match="one box an image"):
        LocalizedRandomResizedCrop(16, 1.0)(picture())
    two = tv_tensors.BoundingBoxes([BOX, BOX], format="XYWH", canvas_size=(HEIGHT, WIDTH))
    with pytest.raises(ValueError, match="one box an image"):
        LocalizedRandomResizedCrop(16, 1.0)(picture(), two)
    assert LocalizedRandomResizedCrop(16, -1.0)(picture()).size == (16, 16)  # no box, none needed
    with pytest.raises(ValueError, match="mode"):
        LocalizedRandomResizedCrop(16, 0.5, mode="best")
    with pytest.raises(ValueError, match="thr=2"):
        LocalizedRandomResizedCrop(16, 2)


def test_boxes_that_were_rounded_as_label_files_do_are_cut_at_the_image():
    """YOLO's six digits: at an image's edge half of such boxes reach past it by some ten thousandths of a pixel."""
    rng, past = np.random.default_rng(0), 0
    crop, size = LocalizedRandomResizedCrop(8, 1.0), np.array([500, 375])
    for _ in range(300):
        near = rng.integers(0, 200, 2)
        centre, sides = np.round((near + size) / 2 / size, 6), np.round((size - near) / size, 6)
        box = np.concatenate([(centre - sides / 2) * size, sides * size])
        past += (box[:2] + box[2:] > size).any()
        params = crop.make_params([torch.zeros(3, 375, 500), tv_box(box)])
        assert params["top"] + params["height"] == 375 and params["left"] + params["width"] == 500
    assert past > 50


@pytest.mark.parametrize(
    ("inputs", "box"),
    [
        ((picture(),), {"x": 1, "y": 2}),
        ((picture(),), (1, 2, 3)),
        (({"image": picture()},), BOX),
        ((picture(),), [BOX, BOX]),
        ((picture(530, 370),), (0.1, 0.2, 0.5, 0.5)),
        ((picture(),), (WIDTH, 3, 5, 5)),
        ((picture(),), (float("nan"), 3, 5, 5)),
        ((tv_tensors.Video(torch.zeros(2, 3, HEIGHT, WIDTH)), tv_box()), None),
        ((tv_box(),), None),
    ],
)
def test_what_cannot_be_cropped_is_one_clear_error(inputs, box):
    with pytest.raises(ValueError) as error:
        LocalizedRandomResizedCrop(16, 0.7)(*inputs, box=box)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["exact", "reference"])
def test_the_transform_and_the_crops_of_an_epoch_have_the_same_law(mode):
    transform = LocalizedRandomResizedCrop(8, 0.6, mode)
    torch.manual_seed(3)
    params = [transform.make_params([tensor(), tv_box()]) for _ in range(2_000)]
    one_by_one = np.array([[crop[side] for side in ("top", "left", "height", "width")] for crop in params])
    about = np.tile(BOX, (2_000, 1)), np.tile((WIDTH, HEIGHT), (2_000, 1))
    at_once = BoxCrops(*about, thr=0.6, mode=mode).draw(np.random.default_rng(4))
    other = BoxCrops(*about, thr=1.0, mode=mode).draw(np.random.default_rng(4))
    for side in range(4):
        assert stats.ks_2samp(one_by_one[:, side], at_once[:, side]).pvalue > 0.01
    assert stats.ks_2samp(one_by_one[:, 1], other[:, 1]).pvalue < 1e-6  # it can fail


def test_the_training_transform_is_torchvisions_resized_crop():
    transform = TrainTransform(24, "bicubic", augment=False, augment_p=1.0, use_augment_mix=False)
    bicubic = v2.InterpolationMode.BICUBIC
    about = {"size": [24, 24], "interpolation": bicubic, "antialias": True}
    image = transform(tensor(), CROP, seed=None)  # nothing is drawn: no seed is asked for
    assert image.dtype == torch.uint8 and torch.equal(image, v2.functional.resized_crop(tensor(), *CROP, **about))
    assert_close_to_pillow(image, v2.functional.resized_crop(picture(), *CROP, **about))


def assert_close_to_pillow(image, expected):
    """Torch rounds otherwise than Pillow between the two passes of a resizing: 2 grey levels, under .5 on average."""
    difference = (image.int() - v2.functional.pil_to_tensor(expected).int()).abs()
    assert difference.max() <= 2 and difference.float().mean() < 0.5


def test_the_crops_of_an_epoch_are_those_of_one_image_after_the_other():
    boxes, sizes = np.tile(BOX, (300, 1)), np.tile((WIDTH, HEIGHT), (300, 1))
    crops = BoxCrops(boxes, sizes, thr=0.8).draw(np.random.default_rng(0))
    assert (coverage(crops_to_xywh(crops), boxes) >= 0.8).all() and len({tuple(crop) for crop in crops}) > 200


def test_flips_are_torchvisions():
    images, flips = torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8), torch.tensor([1, 0, 0, 1, 0]) > 0
    for image, flipped, flip in zip(images, flip_images(images, flips), flips, strict=True):
        assert torch.equal(flipped, v2.functional.horizontal_flip(image) if flip else image)


@pytest.mark.parametrize("change", [{}, {"augment": False, "use_augment_mix": True}])
def test_augmentation_repeats_with_its_seed_and_leaves_torchs_generator(change):
    transform = TrainTransform(24, "bilinear", **COLOUR | change)
    before = torch.get_rng_state()
    seen = [transform(tensor(), CROP, lambda seed=seed: seed) for seed in (0, 0, 1, 2, 3)]
    assert all(image.shape == (3, 24, 24) and image.dtype == torch.uint8 for image in seen)
    assert torch.equal(seen[0], seen[1]) and not all(torch.equal(seen[1], image) for image in seen[2:])
    assert torch.equal(before, torch.get_rng_state())


def test_augment_p_is_the_probability_of_augmenting():
    plain = TrainTransform(24, "bilinear", augment=False)(tensor(), CROP, lambda: 0)
    changed = []
    for p in (0.0, 0.3):
        transform = TrainTransform(24, "bilinear", augment=True, augment_p=p)
        seen = [transform(tensor(), CROP, lambda seed=seed: seed) for seed in range(200)]
        changed.append(sum(not torch.equal(image, plain) for image in seen) / len(seen))
    assert changed[0] == 0 and 0.15 < changed[1] < 0.4


def test_colour_augmentation_changes_colours_and_moves_nothing():
    flat = torch.tensor([200, 90, 40], dtype=torch.uint8)[:, None, None].expand(3, HEIGHT, WIDTH)
    transform = TrainTransform(24, "bilinear", **COLOUR)
    colours = set()
    for seed in range(40):
        image = transform(flat, CROP, lambda seed=seed: seed)
        assert (image == image[:, :1, :1]).all()  # a flat image stays flat
        colours.add(tuple(image[:, 0, 0].tolist()))
    assert len(colours) > 8 and (200, 90, 40) in colours


# --- test views ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(61, 40), (400, 301)])
def test_views_are_torchvisions_and_close_to_pillows(size):
    views = build_views(["full", "center", "whole@30", "box@20"], 28, 0.875, 0.0)
    top, left, height, width = square_crop(BOX, size, 0.0)
    expected = {
        "full": v2.Compose([v2.Resize(28), v2.CenterCrop(28)]),
        "center": v2.Compose([v2.Resize(32), v2.CenterCrop(28)]),
        "whole@30": v2.Resize([30, 30]),
        "box@20": lambda image: v2.functional.resized_crop(image, top, left, height, width, [20, 20], antialias=True),
    }
    for name, view in views.items():
        image = view(tensor(*size), np.array(BOX))
        assert torch.equal(image, expected[name](tensor(*size)))
        assert_close_to_pillow(image, expected[name](picture(*size)))


@pytest.mark.parametrize(
    ("box", "margin", "expected"),  # top, left, height, width
    [
        ((20, 10, 10, 6), 0.0, (8, 20, 10, 10)),  # widened to a square, concentric
        ((0, 0, 10, 6), 0.0, (0, 0, 10, 10)),  # moved in from the corner
        ((5, 5, 40, 20), 0.1, (0, 1, 37, 48)),  # as square as the image allows
        ((20, 10, 10, 10), 0.5, (5, 15, 20, 20)),
        ((0, 0, WIDTH, HEIGHT), 1.0, (0, 0, HEIGHT, WIDTH)),
    ],
)
def test_a_box_view_is_square_and_inside(box, margin, expected):
    assert square_crop(box, (WIDTH, HEIGHT), margin) == expected


@pytest.mark.parametrize("name", ["ful", "full@", "full@0", "full@x", "box@-3", ""])
def test_an_unknown_view_is_refused(name):
    with pytest.raises(ValueError, match="not understood"):
        build_views([name], 64, 0.875, 0.1)


def test_normalize_is_torchvisions():
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    steps = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    )
    torch.testing.assert_close(normalize(images), steps(images))
