"""Transforms of one image: the localized crop, colour-only augmentation, training transform and test views."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import PIL.Image
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.nn.functional import interpolate
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from localized_crops.boxes import expand_boxes
from localized_crops.crops import sample_crops as sample_crops  # for users, as the class below
from localized_crops.transforms import LocalizedRandomResizedCrop as LocalizedRandomResizedCrop
from utils import torch_seed

VIEWS = ("full", "center", "whole", "box")


@dataclass(frozen=True)
class TrainTransform:
    """Cut a drawn crop out of a training image, resize and recolour it; the last fields are config keys."""

    size: int  # side of the result in pixels
    interpolation: str = "bilinear"  # of the resizing, antialiased: bilinear | bicubic
    augment: bool = False
    augment_p: float = 1.0
    augment_strength: float = 1.0
    use_augment_mix: bool = False

    @cached_property
    def colour(self) -> v2.Transform | None:
        """The colour-only augmentation after the crop: AugMix, or one of five, drawn per image."""
        if not (self.augment or self.use_augment_mix):
            return None
        kinds = [
            v2.ColorJitter(*(share * self.augment_strength for share in (0.5, 0.5, 0.5, 0.1))),
            v2.RandomChoice([v2.RandomPosterize(bits, p=1.0) for bits in (4, 3, 2)]),
            v2.RandomChoice([v2.RandomSolarize(threshold, p=1.0) for threshold in (192, 230)]),
            v2.RandomEqualize(p=1.0),
            v2.RandomAutocontrast(p=1.0),
        ]
        colour = v2.AugMix() if self.use_augment_mix else v2.RandomChoice(kinds)
        return v2.RandomApply([colour], self.augment_p) if self.augment_p < 1 else colour

    def __call__(
        self, image: torch.Tensor | PIL.Image.Image, crop: Sequence[float], seed: Callable[[], int]
    ) -> torch.Tensor:
        """Return the crop as (3, size, size) uint8.

        Args:
            image: the whole image, (3, H, W) uint8; or, where crops may begin within a pixel, Pillow's, RGB.
            crop: top, left, height, width in its pixels.
            seed: gives the seed of the colours, asked for only where there are any to draw.
        """
        if isinstance(image, PIL.Image.Image):
            top, left, height, width = crop
            resample, edges = PIL.Image.Resampling[self.interpolation.upper()], (left, top, left + width, top + height)
            image = F.pil_to_tensor(image.resize((self.size, self.size), resample, edges))
        else:
            image = resized_crop(image, crop, self.size, self.interpolation)
        if self.colour is not None:
            with torch_seed(seed()):
                image = self.colour(image.contiguous())  # 1.5 times as fast as channels last
        return image


def resized_crop(image: torch.Tensor, crop: Sequence[int], size: int, interpolation: str = "bilinear") -> torch.Tensor:
    """Return a crop (top, left, height, width) of an image (3, H, W) uint8, resized to a square of ``size`` pixels.

    The pixels of torchvision's ``resized_crop``, antialiased, which loses the channels-last order on its way to the
    kernel and so takes 1.5 times as long.
    """
    top, left, height, width = crop
    cut = image.permute(1, 2, 0)[None, top : top + height, left : left + width].permute(0, 3, 1, 2)
    return interpolate(cut, (size, size), mode=interpolation, antialias=True)[0]


def flip_images(images: torch.Tensor, flips: torch.Tensor) -> torch.Tensor:
    """Return a batch (B, 3, H, W) with the images flipped left to right where ``flips`` (B,) bool says so."""
    return torch.where(flips[:, None, None, None], images.flip(3), images)


# --- test views ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """One way to show a test image to the network.

    full: the short side resized to ``size``, the middle square. center: the middle square of ``crop_pct`` times the
    short side. whole: the whole image, squeezed into a square. box: a square around the image's box with a margin.
    """

    kind: str
    size: int  # pixels, both sides of the network's input
    crop_pct: float = 0.875
    box_margin: float = 0.1  # on each side, as a share of the box's side
    interpolation: str = "bilinear"  # of the resizing, antialiased: bilinear | bicubic

    def __call__(self, image: torch.Tensor, box_xywh: np.ndarray) -> torch.Tensor:
        """Return the view, (3, size, size) uint8, of an image (3, H, W) uint8."""
        _, height, width = image.shape
        if self.kind == "whole":
            return resized_crop(image, (0, 0, height, width), self.size, self.interpolation)
        if self.kind == "box":
            crop = square_crop(box_xywh, (width, height), self.box_margin)
            return resized_crop(image, crop, self.size, self.interpolation)
        short = self.size if self.kind == "full" else round(self.size / self.crop_pct)
        resized = F.resize(image, [short], v2.InterpolationMode(self.interpolation), antialias=True)
        return F.center_crop(resized, [self.size, self.size])


def square_crop(box_xywh: Sequence[float], image_size: tuple[int, int], margin: float) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) around a box with a margin, widened towards a square inside the image.

    The box is not distorted: its short side grows to the length of the long side, as far as the image allows.

    Args:
        box_xywh: in pixels, inside the image.
        image_size: width, height.
        margin: on each side, as a share of the box's side.
    """
    size = np.array(image_size)
    box = expand_boxes(box_xywh, size, margin)
    near, far = np.floor(box[:2]), np.ceil(box[:2] + box[2:])
    side = np.minimum((far - near).max(), size)
    near = np.clip(np.round((near + far - side) / 2), 0, size - side)
    left, top, width, height = (int(n) for n in (*near, *side))
    return top, left, height, width


def build_views(
    names: Sequence[str], size: int, crop_pct: float, box_margin: float, interpolation: str = "bilinear"
) -> dict[str, View]:
    """Build test views by name, one of VIEWS or ``VIEW@SIZE``; raise ValueError on another name."""
    views = {}
    for name in names:
        match = re.fullmatch(rf"({'|'.join(VIEWS)})(?:@([1-9][0-9]{{0,3}}))?", name)
        if not match:
            raise ValueError(f"eval.views: {name!r} is not understood; write {', '.join(VIEWS)}, or such as full@96")
        views[name] = View(match[1], int(match[2] or size), crop_pct, box_margin, interpolation)
    return views


def normalize(
    images: torch.Tensor,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> torch.Tensor:
    """Return a batch (B, 3, H, W) uint8 as float32, on its device, with the mean and deviation of the network's input.

    Args:
        images: red, green and blue from 0 to 255.
        mean, std: of each colour, in [0, 1]; ImageNet's by default.
    """
    return F.normalize(images.float().div_(255), list(mean), list(std), inplace=True)
