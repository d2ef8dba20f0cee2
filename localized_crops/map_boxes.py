"""From attention maps to boxes: cleaning steps, thresholds, and the box methods. NumPy, SciPy and scikit-image.

Cleaning works on the last two axes, so a stack of heads goes through the same lines as one map. Maps are stretched over
the whole image; boxes are (x, y, width, height) in pixels of the original image.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from localized_crops.density import is_blank, softmax_density

DEFAULT_STEPS = ("heads", "outlier", "filter", "min_max")  # the published order


class MapBox(NamedTuple):
    """A box, and whether the map gave it: ``found`` is False where the whole image stands in for one."""

    x: float
    y: float
    width: float
    height: float
    found: bool = True

    @property
    def xywh(self) -> tuple[float, float, float, float]:
        """Return (x, y, width, height) in pixels of the original image."""
        return self[:4]


# --- cleaning -----------------------------------------------------------------------------------------------------


def clean_map(
    attn_heads: np.ndarray,
    *,
    heads: str | int = "mean",
    steps: Sequence[str] = DEFAULT_STEPS,
    filter_size: int = 3,
    temperature: float = 2.0,
) -> np.ndarray:
    """Run the cleaning steps in the given order.

    Args:
        attn_heads: (heads, feat_h, feat_w), an image's attention per head.
        heads: how the step "heads" reduces: "mean", "sparsity", or the number of one head.
        steps: names out of "heads", "outlier", "filter", "min_max", "softmax" in any order, "heads" among them.
        filter_size: side of the box filter in cells.

    Returns:
        (feat_h, feat_w) float64; NaN in the input stays NaN (`is_blank` is then true).

    Raises:
        ValueError: on an unknown step, or steps without "heads".
    """
    known: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "heads": lambda maps: reduce_heads(maps, heads),
        "outlier": replace_maximum,
        "filter": lambda maps: box_filter(maps, filter_size),
        "min_max": min_max,
        "softmax": lambda maps: softmax_density(maps, temperature),
    }
    unknown = [step for step in steps if step not in known]
    if unknown or "heads" not in steps:
        raise ValueError(f"steps={list(steps)} must hold 'heads' and nothing but {', '.join(known)}")
    cleaned = np.asarray(attn_heads, dtype=np.float64)
    for step in steps:
        cleaned = known[step](cleaned)
    return cleaned


def reduce_heads(attn_heads: np.ndarray, heads: str | int) -> np.ndarray:
    """Reduce (heads, feat_h, feat_w) to one map: "mean", "sparsity" (weighted mean), or the head of that number."""
    if heads == "mean":
        return attn_heads.mean(axis=0)
    if heads == "sparsity":
        return np.tensordot(sparsity_weights(attn_heads), attn_heads, axes=1)
    if isinstance(heads, int) and 0 <= heads < len(attn_heads):
        return attn_heads[heads]
    raise ValueError(f"heads={heads!r} must be 'mean', 'sparsity' or a head from 0 to {len(attn_heads) - 1}")


def sparsity_weights(attn_heads: np.ndarray) -> np.ndarray:
    """Return a weight per head, (heads,), summing to 1: how far its map is from uniform (Hoyer's sparsity).

    Hoyer (JMLR 2004): (sqrt(n) - L1 / L2) / (sqrt(n) - 1), 0 for a uniform map and 1 for a single cell. A head that
    looks at everything says nothing about the object.
    """
    flat = attn_heads.reshape(len(attn_heads), -1)
    norm = np.linalg.norm(flat, axis=1)
    root = np.sqrt(flat.shape[1])
    peaked = root - np.abs(flat).sum(axis=1) / np.where(norm > 0, norm, 1)
    weights = np.where(norm > 0, np.maximum(peaked, 0), 0)
    total = weights.sum()
    return weights / total if total > 0 else np.full(len(flat), 1 / len(flat))


def replace_maximum(maps: np.ndarray) -> np.ndarray:
    """Put each map's mean in place of its (first) maximum, which sits on the same few cells in every image."""
    flat = maps.reshape(*maps.shape[:-2], -1).copy()
    where = flat.argmax(axis=-1)[..., None]
    np.put_along_axis(flat, where, flat.mean(axis=-1, keepdims=True), axis=-1)
    return flat.reshape(maps.shape)


def box_filter(maps: np.ndarray, filter_size: int) -> np.ndarray:
    """Average each cell with its filter_size x filter_size neighbourhood, the border mirrored (symmetric).

    An even size has no middle cell; the neighbourhood then reaches further to the top left, as in
    scipy.signal.convolve2d(mode="same").
    """
    size = min(filter_size, *maps.shape[-2:])
    return ndimage.uniform_filter(maps, size, mode="reflect", axes=(-2, -1))


def min_max(maps: np.ndarray) -> np.ndarray:
    """Scale each map to [0, 1]; a constant map becomes all zeros, so that no threshold above 0 finds anything.

    A map with an infinite value becomes NaN (`is_blank` is then true).
    """
    low = maps.min(axis=(-2, -1), keepdims=True)
    with np.errstate(invalid="ignore"):  # infinity less infinity
        spread = maps.max(axis=(-2, -1), keepdims=True) - low
        return (maps - low) / np.where(spread == 0, 1, spread)


def resolve_threshold(attention_map: np.ndarray, threshold: float | str) -> float:
    """Return a fixed threshold as it is; for "otsu" the one that separates the values best in two groups (Otsu 1979).

    Otsu's is the upper edge of one of 256 equal bins between the least and the largest value.
    """
    if threshold != "otsu":
        if isinstance(threshold, str):
            raise ValueError(f"threshold={threshold!r} must be a number or 'otsu'")
        return float(threshold)
    from skimage.filters import threshold_otsu  # here: it takes half a second, and few need it

    centre = threshold_otsu(np.asarray(attention_map, dtype=np.float64), 256)
    return float(centre + np.ptp(attention_map) / 256 / 2)


# --- boxes --------------------------------------------------------------------------------------------------------


def published_box(attention_map: np.ndarray, image_size: tuple[int, int], *, threshold: float | str = 0.5) -> MapBox:
    """Return the published box: centred on the mean True cell, its sides the counts of rows and columns with one.

    Args:
        attention_map: (feat_h, feat_w), cleaned.
        image_size: (width, height) of the original image in pixels.
        threshold: a cell is True from here on; a number or "otsu".
    """
    if is_blank(attention_map):
        return whole_image(image_size)
    mask = attention_map >= resolve_threshold(attention_map, threshold)
    if not mask.any():
        return whole_image(image_size)
    rows, columns = np.nonzero(mask)
    sides = np.array([len(np.unique(columns)), len(np.unique(rows))], dtype=np.float64)
    near = np.array([columns.mean(), rows.mean()]) + 0.5 - sides / 2  # a cell's middle lies half a cell in
    return _scaled_box(near, near + sides, mask.shape, image_size)


def component_box(
    attention_map: np.ndarray,
    image_size: tuple[int, int],
    *,
    threshold: float | str = 0.15,
    upsample: int = 4,
    choose: str = "heaviest",
    size_factor: float = 1.0,
) -> MapBox:
    """Return the tight box of one connected component of the upsampled map.

    Args:
        attention_map: (feat_h, feat_w), cleaned.
        image_size: (width, height) of the original image in pixels.
        threshold: a pixel belongs to a component from here on; a number or "otsu".
        upsample: by this factor the map grows (bilinear) before it is cut, so that edges lie between cells.
        choose: "heaviest" (largest sum of the map) or "strongest" (the one that holds the maximum).
        size_factor: both sides are multiplied by it, about the box's centre.
    """
    if is_blank(attention_map):
        return whole_image(image_size)
    cells = np.asarray(attention_map, dtype=np.float64)
    fine = ndimage.zoom(cells, upsample, order=1, mode="nearest", grid_mode=True)  # cells stay where they are
    mask = component_mask(fine, resolve_threshold(fine, threshold), choose)
    if not mask.any():
        return whole_image(image_size)
    rows, columns = np.nonzero(mask)
    near = np.array([columns.min(), rows.min()], dtype=np.float64)
    far = np.array([columns.max() + 1, rows.max() + 1], dtype=np.float64)
    margin = (size_factor - 1) * (far - near) / 2
    return _scaled_box(near - margin, far + margin, fine.shape, image_size)


def component_mask(values: np.ndarray, threshold: float, choose: str = "heaviest") -> np.ndarray:
    """Return one connected component of the cells from ``threshold`` on, (feat_h, feat_w) bool; none: all False.

    Args:
        values: (feat_h, feat_w).
        choose: "heaviest" (largest sum of ``values``) or "strongest" (the component that holds the maximum).
    """
    labels, count = ndimage.label(values >= threshold, np.ones((3, 3)))
    if count == 0:
        return labels > 0
    if choose == "strongest":
        return labels == labels.flat[values.argmax()]
    if choose != "heaviest":
        raise ValueError(f"choose={choose!r} must be 'heaviest' or 'strongest'")
    return labels == np.bincount(labels.ravel(), weights=values.ravel())[1:].argmax() + 1


def whole_image(image_size: tuple[int, int]) -> MapBox:
    """Return the box that stands in where a map gives none."""
    return MapBox(0.0, 0.0, float(image_size[0]), float(image_size[1]), found=False)


def _scaled_box(near: np.ndarray, far: np.ndarray, map_shape: tuple[int, int], image_size: tuple[int, int]) -> MapBox:
    """Scale corners (x, y) in cells of a (height, width) map to pixels of the image, and clip them to it."""
    size = np.asarray(image_size, dtype=np.float64)
    scale = size / map_shape[::-1]
    near, far = np.clip(near * scale, 0, size), np.clip(far * scale, 0, size)
    return MapBox(*near.tolist(), *(far - near).tolist())
