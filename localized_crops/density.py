"""Density-map crops: where attention is high, crops are centred more often."""

from collections.abc import Sequence

import numpy as np
import torch

from localized_crops.crops import random_shapes

FLAT = 1e-8  # a map whose values differ by less, relative to their size, says nothing about where the object is


def is_blank(attention_map: np.ndarray) -> bool:
    """Tell whether a map points nowhere: it is constant, or holds NaN or infinity."""
    values = np.asarray(attention_map, dtype=np.float64)
    return not np.isfinite(values).all() or np.ptp(values) <= FLAT * np.abs(values).max(initial=0)


def softmax_density(maps: np.ndarray, temperature: float) -> np.ndarray:
    """Return exp(map / temperature) / sum over its cells, a density that sums to 1 for each map."""
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    scaled = np.asarray(maps, dtype=np.float64) / temperature
    weights = np.exp(scaled - scaled.max(axis=(-2, -1), keepdims=True))  # at most 1: no overflow at low temperature
    return weights / weights.sum(axis=(-2, -1), keepdims=True)


def map_to_density(attention_map: np.ndarray, temperature: float) -> np.ndarray:
    """Return the softmax with ``temperature`` of a map; a constant map, or one with NaN, gives the uniform density.

    Args:
        attention_map: (feat_h, feat_w) float, cleaned (`map_boxes.clean_map`).
        temperature: > 0; towards 0 all mass sits on the largest cell, towards infinity it is uniform.
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
        density: (feat_h, feat_w), non-negative, with a sum above 0 (1 or not); stretched over the whole image.
        image_size: (width, height) in pixels.
        scale, ratio: as of `sample_crops`.

    Returns:
        (num_crops, 4) int64, top left height width in pixels, inside the image.

    Raises:
        ValueError: if the density holds a negative value, NaN or infinity, or nothing but zeros.
    """
    density = np.asarray(density, dtype=np.float64)
    if density.ndim != 2 or not (np.isfinite(density).all() and (density >= 0).all() and density.any()):
        raise ValueError(
            f"a density must be (feat_h, feat_w) numbers from 0 on, not all 0; got a shape of {density.shape} and "
            f"values from {density.min(initial=0)} to {density.max(initial=0)}"
        )
    rng = rng if rng is not None else np.random.default_rng()
    image_sizes = np.tile(image_size, (num_crops, 1))
    shapes, _ = random_shapes(image_sizes, scale, ratio, rng)
    sums = running_sums(torch.from_numpy(np.array(density, order="C"))[None])
    centres = density_points(sums, np.array([density.shape]), image_sizes[:1], rng.random((1, num_crops, 3)))
    return crops_around(centres[0], shapes, image_sizes)


def running_sums(densities: torch.Tensor) -> torch.Tensor:
    """Return the running sums over the cells of densities (B, feat_h, feat_w), row by row: the same shape, float64."""
    return densities.flatten(1).cumsum(1, dtype=torch.float64).view_as(densities)


def density_points(sums: torch.Tensor, feats: np.ndarray, image_sizes: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Return points of B images, (B, K, 2) x y in pixels: a cell by its density, then a uniform point in that cell.

    Args:
        sums: (B, feat_h, feat_w), the `running_sums` of densities that are not negative and need not sum to 1, zero
            where a map has fewer cells.
        feats: (B, 2), feat_h and feat_w of each map, which is stretched over the whole of its image.
        image_sizes: (B, 2), width and height in pixels.
        uniform: (B, K, 3) numbers in [0, 1): which cell, where in it along x, along y.
    """
    flat = sums.flatten(1)
    cells = torch.searchsorted(flat, torch.from_numpy(uniform[..., 0]) * flat[:, -1:], right=True).numpy()
    row_column = np.stack(np.divmod(cells, sums.shape[2]), axis=-1)
    cell = np.minimum(row_column, feats[:, None] - 1)  # what is searched for may be rounded to the whole sum
    return (cell[..., ::-1] + uniform[..., 1:]) * image_sizes[:, None] / feats[:, None, ::-1]


def crops_around(centres: np.ndarray, shapes: np.ndarray, image_sizes: np.ndarray) -> np.ndarray:
    """Return crops, (..., 4) int64 top left height width, of (width, height) around centres, moved into the images."""
    near = np.clip(np.rint(centres - shapes / 2).astype(np.int64), 0, image_sizes - shapes)
    return np.concatenate([near[..., ::-1], shapes[..., ::-1]], axis=-1)


def unnormalised_densities(maps: Sequence[np.ndarray], feats: np.ndarray, temperature: float) -> torch.Tensor:
    """Return what `map_to_density` of each map is proportional to: (B, most feat_h, most feat_w), zero beyond a map."""
    padded = np.full((len(maps), *feats.max(axis=0)), -np.inf, dtype=np.result_type(*{cells.dtype for cells in maps}))
    for place, cells in zip(padded, maps, strict=True):
        place[: cells.shape[0], : cells.shape[1]] = cells
    cells = torch.from_numpy(padded).float()
    largest = cells.amax((1, 2), keepdim=True)
    weights = cells.sub_(largest).mul_(1 / temperature).exp_()
    for place in (~largest.isfinite()).flatten().nonzero().flatten().tolist():  # NaN or infinity: uniform
        weights[place] = 0
        weights[place, : feats[place, 0], : feats[place, 1]] = 1
    return weights
