"""JPEGs that are larger than a crop needs are decoded at a reduced scale: the same crops, nearly the same pixels."""

import numpy as np
import PIL.Image
import pytest
import torch
from torchvision.transforms.v2.functional import pil_to_tensor

from readers.data_set import DataSet, ImagePaths, no_boxes
from readers.images import ORIENTATION, read_image, read_reduced
from training import batches
from training.batches import TrainImages, reduction_for
from transforms import TrainTransform

SIZE = 32  # pixels of the result
PLAIN = TrainTransform(SIZE, "bilinear", augment=False)


@pytest.fixture
def small_is_large(monkeypatch):
    """Let small images be treated as large ones are."""
    monkeypatch.setattr(batches, "LARGEST_WHOLE", 0)


class OneCrop:
    """The same crop of each image in each epoch."""

    def __init__(self, crop):
        self.crop = crop

    def draw(self, rng):
        return np.array([self.crop])


def photo(width, height):
    """Return an image of smooth colours with a light square whose left top corner is at a third of each side."""
    coarse = np.random.default_rng(0).integers(0, 200, (5, 7, 3), dtype=np.uint8)
    pixels = np.array(PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.Resampling.BICUBIC))
    pixels[height // 3 : height // 2, width // 3 : width // 2] = 250
    return PIL.Image.fromarray(pixels)


def loaded(path, size, crop, upright=False):
    """Return what a training is given of one image."""
    paths = ImagePaths(path.parent, [path.name], upright=upright)
    about = (np.array([0]), ["a"], no_boxes(1), np.array(["train"]), np.array([size]))
    data = DataSet("photos", path.parent, np.array([1]), paths, *about)
    return TrainImages(data, np.array([0]), OneCrop(crop), PLAIN, flip=0.0, seed=0)[0, [0], 1, 1].images[0]


def exact(path, crop):
    return PLAIN(pil_to_tensor(read_image(path)), crop, None)


@pytest.mark.parametrize(
    ("crop", "reduction"),
    [((0, 0, 31, 500), 1), ((0, 0, 63, 500), 1), ((0, 0, 64, 500), 2), ((0, 0, 500, 255), 4), ((5, 9, 256, 256), 8)],
)
def test_no_crop_falls_under_the_size(small_is_large, crop, reduction):
    assert reduction_for(crop, SIZE) == reduction


def test_images_as_large_as_cubs_are_decoded_whole():
    assert reduction_for((0, 0, 500, 500), SIZE) == 1 and reduction_for((0, 0, 600, 800), SIZE) == 8


@pytest.mark.parametrize("size", [(640, 480), (637, 475)])
@pytest.mark.parametrize("crop", [(0, 0, 470, 630), (101, 203, 270, 301), (130, 180, 64, 64), (150, 200, 131, 133)])
def test_a_large_jpeg_gives_nearly_the_same_crop(small_is_large, tmp_path, size, crop):
    path = tmp_path / "photo.jpg"
    photo(*size).save(path, quality=95)
    found, expected = loaded(path, size, crop).float(), exact(path, crop).float()
    assert reduction_for(crop, SIZE) > 1
    assert (found - expected).abs().mean() < 2.5  # grey levels
    shifted = torch.roll(expected, 1, 2)
    assert (found - expected).abs().mean() < 0.5 * (shifted - expected).abs().mean()


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_small_jpegs_and_other_formats_are_as_they_were(small_is_large, tmp_path, kind):
    size, crop = {"png": ((640, 480), (0, 0, 470, 630)), "jpg": ((60, 50), (3, 4, 45, 50))}[kind]
    path = tmp_path / f"photo.{kind}"
    photo(*size).save(path)
    assert torch.equal(loaded(path, size, crop), exact(path, crop))


@pytest.mark.parametrize("orientation", [3, 6, 8])
@pytest.mark.parametrize("size", [(640, 480), (637, 475)])
def test_turned_photographs_are_cropped_upright(small_is_large, tmp_path, size, orientation):
    path, exif = tmp_path / "photo.jpg", PIL.Image.Exif()
    exif[ORIENTATION] = orientation
    photo(*size).save(path, quality=95, exif=exif)
    (upright,) = ImagePaths(tmp_path, ["photo.jpg"], upright=True)
    shown = read_image(upright).size
    crop = (90, 70, 300, 280)
    found, expected = loaded(path, shown, crop, upright=True).float(), exact(upright, crop).float()
    assert (found - expected).abs().mean() < 1.5


def test_a_side_is_rounded_up_and_pixels_keep_their_places(tmp_path):
    photo(637, 475).save(tmp_path / "photo.jpg")
    image, reduction = read_reduced(tmp_path / "photo.jpg", 8)
    assert (image.size, reduction) == ((80, 60), 8)
    photo(637, 475).save(tmp_path / "photo.png")
    assert read_reduced(tmp_path / "photo.png", 8)[1] == 1
