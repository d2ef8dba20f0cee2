"""Density-map crops: where attention is high, crops are centred more often (DESIGN.md section 3).

An attention map (attention.py) is cleaned (map_boxes.py), made once and read from a cache; here it becomes a density
and a crop. Nothing in this module's transform needs a model or a GPU, so it works in any loader worker.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from attention import cls_attention, cls_attention_and_logits
from crops import plain_corners, random_shapes
from map_boxes import is_blank, softmax_density

__all__ = [
    "DinoRandomResizedCrop",
    "MapCrops",
    "cls_attention",
    "cls_attention_and_logits",
    "density_point",
    "map_to_density",
    "sample_density_crops",
]


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
    shapes, _ = random_shapes(np.tile(image_size, (num_crops, 1)), scale, ratio, rng)
    cumulative, uniform = np.cumsum(density, dtype=np.float64), rng.random((num_crops, 3)).tolist()
    crops = [
        _crop_around(density_point(cumulative, density.shape, image_size, drawn), shape, image_size)
        for shape, drawn in zip(shapes.tolist(), uniform, strict=True)
    ]
    return np.array(crops, dtype=np.int64).reshape(-1, 4)


def density_point(
    cumulative: np.ndarray, feat: tuple[int, int], image_size: tuple[int, int], uniform: Sequence[float]
) -> tuple[float, float]:
    """Return a point of an image, x y in pixels: a cell by its density, then a uniform point inside that cell.

    Args:
        cumulative: (feat_h * feat_w,) float64, running sum over the cells, row-major; need not end at 1.
        feat: (feat_h, feat_w), stretched over the whole image.
        image_size: (width, height) in pixels.
        uniform: three numbers in [0, 1): which cell, where in it along x, along y.
    """
    cell = int(cumulative.searchsorted(uniform[0] * cumulative[-1], side="right"))
    row, column = divmod(min(cell, len(cumulative) - 1), feat[1])
    return (column + uniform[1]) * image_size[0] / feat[1], (row + uniform[2]) * image_size[1] / feat[0]


def _crop_around(
    centre: tuple[float, float], shape: tuple[int, int], image_size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of a crop of (width, height) around a centre, moved inside the image."""
    left, top = (
        min(max(round(middle - side / 2), 0), whole - side)
        for middle, side, whole in zip(centre, shape, image_size, strict=True)
    )
    return top, left, shape[1], shape[0]


def _cumulative_density(attention_map: np.ndarray, temperature: float) -> np.ndarray:
    """Return the running sum, (feat_h * feat_w,) float64, of what `map_to_density` is proportional to."""
    cells = attention_map.ravel().astype(np.float32)
    with np.errstate(invalid="ignore"):  # infinity less infinity is NaN
        weights = np.exp((cells - cells.max()) * np.float32(1 / temperature))
    cumulative = np.cumsum(weights, dtype=np.float64)
    return cumulative if np.isfinite(cumulative[-1]) else np.arange(1.0, len(cells) + 1)  # NaN: uniform


class MapCrops:
    """The density-map crops of a data set, drawn for an epoch at once; a plain crop where an image has no map."""

    def __init__(
        self,
        maps: Mapping[int, np.ndarray],
        ids: np.ndarray,
        image_sizes: np.ndarray,
        *,
        temperature: float,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ) -> None:
        """Keep what crops are drawn from.

        Args:
            maps: image id -> attention map (feat_h, feat_w); read when the image's crop is asked for.
            ids: (N,) image ids.
            image_sizes: (N, 2) width height in pixels.
            temperature, scale, ratio: see `DinoRandomResizedCrop`.
        """
        self.maps, self.ids, self.image_sizes = maps, ids, image_sizes
        self.temperature, self.scale, self.ratio = temperature, scale, ratio

    def draw(self, rng: np.random.Generator) -> "DrawnMapCrops":
        """Draw the crops of an epoch: (top, left, height, width) by row."""
        shapes, found = random_shapes(self.image_sizes, self.scale, self.ratio, rng)
        uniform = rng.random((len(shapes), 3))
        plain = plain_corners(shapes, found, self.image_sizes, uniform[:, 1:])
        return DrawnMapCrops(self, shapes.tolist(), uniform.tolist(), plain.tolist())


class DrawnMapCrops:
    """An epoch's crops: shapes and random numbers are drawn, a map is read when its crop is looked up."""

    def __init__(self, of: MapCrops, shapes: list, uniform: list, plain: list) -> None:
        """Keep, by row: (width, height), three uniform numbers, (left, top) for images without a map."""
        self.of, self.shapes, self.uniform, self.plain = of, shapes, uniform, plain

    def __getitem__(self, row: int) -> tuple[int, int, int, int]:
        """Return the crop of one image: top, left, height, width in pixels."""
        attention_map, (width, height) = self.of.maps.get(int(self.of.ids[row])), self.shapes[row]
        if attention_map is None:
            left, top = self.plain[row]
            return top, left, height, width
        image_size = self.of.image_sizes[row].tolist()
        cumulative = _cumulative_density(attention_map, self.of.temperature)
        centre = density_point(cumulative, attention_map.shape, image_size, self.uniform[row])
        return _crop_around(centre, (width, height), image_size)


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
