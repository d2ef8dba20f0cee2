"""Density-map crops: where attention is high, crops are centred more often (DESIGN.md section 3).

An attention map (attention.py) is cleaned (map_boxes.py), made once and read from a cache; here it becomes a density
and a crop. Nothing in this module's transform needs a model or a GPU, so it works in any loader worker.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from attention import cls_attention, cls_attention_and_logits
from map_boxes import is_blank, softmax_density

__all__ = [
    "DinoRandomResizedCrop",
    "cls_attention",
    "cls_attention_and_logits",
    "draw_crop_shapes",
    "draw_density_points",
    "map_to_density",
    "sample_density_crops",
]

SHAPE_TRIES = 10  # as torchvision's RandomResizedCrop: then the centre crop of the nearest ratio is taken


def map_to_density(attention_map: np.ndarray, temperature: float) -> np.ndarray:
    """Return the softmax with ``temperature`` of a map; a constant map, or one with NaN, gives the uniform density.

    Args:
        attention_map: (feat_h, feat_w) float, cleaned (`map_boxes.clean_map`).
        temperature: > 0; towards 0 all mass sits on the largest cell, towards infinity it is uniform. On a map that
            was scaled to [0, 1], T = 2 makes the largest cell only exp(1/2) = 1.65 times as likely as the least one.
    """
    if is_blank(attention_map):
        return np.full(attention_map.shape, 1 / attention_map.size)
    return softmax_density(attention_map, temperature)


def sample_density_crops(
    density: np.ndarray,
    image_size: tuple[int, int],
    num_crops: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Draw crops of one image: shape as RandomResizedCrop, centre from ``density``, then moved inside the image.

    Args:
        density: (feat_h, feat_w), non-negative, sums to 1; stretched over the whole image.
        image_size: (width, height) in pixels.
        num_crops: how many crops to draw.
        scale: least and largest area of the crop, as shares of the image's area.
        ratio: least and largest width / height; its logarithm is uniform.
        rng: source of randomness; None: a fresh one.

    Returns:
        (num_crops, 4) int64, top left height width in pixels, inside the image.
    """
    rng = rng if rng is not None else np.random.default_rng()
    shapes = draw_crop_shapes(image_size, num_crops, scale, ratio, rng)  # (n, 2) width, height
    centres = draw_density_points(density, image_size, num_crops, rng)
    corners = np.rint(centres - shapes / 2).astype(np.int64)
    left, top = np.clip(corners, 0, np.asarray(image_size) - shapes).T
    return np.stack([top, left, shapes[:, 1], shapes[:, 0]], axis=1)


def draw_density_points(
    density: np.ndarray, image_size: tuple[int, int], num_points: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw points of an image: a cell by its density, then a uniform point inside that cell.

    Args:
        density: (feat_h, feat_w), non-negative, sums to 1; row-major, stretched over the whole image.
        image_size: (width, height) in pixels.
        num_points: how many points to draw.
        rng: source of randomness.

    Returns:
        (num_points, 2) float, x y in pixels.
    """
    feat_h, feat_w = density.shape
    cumulative = np.cumsum(density, dtype=np.float64)  # float16 would lose the small cells
    drawn = rng.random(num_points) * cumulative[-1]
    cells = np.minimum(np.searchsorted(cumulative, drawn, side="right"), density.size - 1)
    rows, columns = np.divmod(cells, feat_w)
    cell_xy = np.stack([columns, rows], axis=1) + rng.random((num_points, 2))
    return cell_xy * (np.asarray(image_size) / (feat_w, feat_h))


def draw_crop_shapes(
    image_size: tuple[int, int],
    num_crops: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> np.ndarray:
    """Draw (width, height) by the law of torchvision's RandomResizedCrop, all crops at once.

    Returns:
        (num_crops, 2) int64, width height in pixels; each side between 1 and the image's.
    """
    width, height = image_size
    tries = (num_crops, SHAPE_TRIES)
    areas = rng.uniform(*scale, tries) * width * height
    ratios = np.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1]), tries))
    shapes = np.rint(np.sqrt(np.stack([areas * ratios, areas / ratios], axis=-1))).astype(np.int64)
    fits = ((shapes > 0) & (shapes <= (width, height))).all(axis=-1)  # (n, tries)
    first = shapes[np.arange(num_crops), fits.argmax(axis=1)]
    return np.where(fits.any(axis=1)[:, None], first, _fallback_shape(image_size, ratio))


def _fallback_shape(image_size: tuple[int, int], ratio: tuple[float, float]) -> tuple[int, int]:
    """Return the largest (width, height) inside the image whose ratio is in range, as torchvision does."""
    width, height = image_size
    if width / height < ratio[0]:
        return width, max(1, min(height, round(width / ratio[0])))
    if width / height > ratio[1]:
        return max(1, min(width, round(height * ratio[1]))), height
    return width, height


class DinoRandomResizedCrop(v2.Transform):
    """RandomResizedCrop whose centre is drawn from an image's attention map.

    The random numbers come from torch's global generator, which DataLoader seeds per worker.

    Args:
        size: (height, width) of the output in pixels; one number makes a square.
        scale: least and largest area of the crop, as shares of the image's area.
        ratio: least and largest width / height; its logarithm is uniform.
        temperature: of the softmax that turns the map into a density; None: what is given is a density already.
        interpolation: of the resize.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        temperature: float | None = 2.0,
        interpolation: v2.InterpolationMode = v2.InterpolationMode.BILINEAR,
    ) -> None:
        super().__init__()
        if not 0 < scale[0] <= scale[1] or not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"scale and ratio must be (least, largest), both above 0; got {scale} and {ratio}")
        if temperature is not None and not temperature > 0:
            raise ValueError(f"temperature must be above 0, or None for a map that is a density; got {temperature}")
        self.size = [size, size] if isinstance(size, int) else list(size)
        self.scale, self.ratio = tuple(scale), tuple(ratio)
        self.temperature, self.interpolation = temperature, interpolation
        self.plain = v2.RandomResizedCrop(self.size, self.scale, self.ratio)

    def forward(self, image: Any, attention_map: np.ndarray | torch.Tensor | None) -> Any:
        """Return the crop of ``image``, resized to ``size``.

        Args:
            image: PIL image, or uint8 or float tensor (..., H, W).
            attention_map: (feat_h, feat_w), the map of this image, stretched over the whole of it; None: a plain
                RandomResizedCrop.
        """
        return self.transform(image, self.make_params([image, attention_map]))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
        """Draw the crop for [image, attention_map]: top, left, height, width (the hook of v2 transforms)."""
        if flat_inputs[1] is None:
            return self.plain.make_params(flat_inputs[:1])
        image, attention_map = flat_inputs[0], np.asarray(flat_inputs[1])
        if attention_map.ndim != 2:
            raise ValueError(f"attention_map must be (feat_h, feat_w), got a shape of {attention_map.shape}")
        density = attention_map if self.temperature is None else map_to_density(attention_map, self.temperature)
        height, width = F.get_size(image)
        rng = np.random.default_rng(int(torch.randint(2**63 - 1, ())))
        crop = sample_density_crops(density, (width, height), 1, self.scale, self.ratio, rng)[0]
        return dict(zip(("top", "left", "height", "width"), crop.tolist(), strict=True))

    def transform(self, inpt: Any, params: dict[str, int]) -> Any:
        """Apply the drawn crop to one image."""
        return self._call_kernel(
            F.resized_crop, inpt, **params, size=self.size, interpolation=self.interpolation, antialias=True
        )

    def extra_repr(self) -> str:
        """Return the settings, for printing."""
        return f"size={self.size}, scale={self.scale}, ratio={self.ratio}, temperature={self.temperature}"
