"""From images to cleaned attention maps, in batches: decoding ahead of the network, one shape a batch."""

from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from jobs.loader import build_loader
from localized_crops import map_boxes
from localized_crops.attention import cls_attention, cls_attention_and_logits, nearest_patch_size
from localizer.batches import Batch, BatchImages
from localizer.networks import Localizer
from utils import autocast, batched, memory_errors

LONGEST = 4  # an image's long side is cut to this many times the short one: memory stays bounded


# --- batches of one shape -----------------------------------------------------------------------------------------


def plan_batches(image_sizes: np.ndarray, side: int, patch: tuple[int, int], batch_size: int) -> list[Batch]:
    """Group images by the shape of their input and cut the groups into batches; depends on the sizes alone.

    Args:
        image_sizes: (N, 2) width height in pixels.
        side: of the input's short side, pixels.
        patch: (height, width) in pixels.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for row, size in enumerate(image_sizes.tolist()):
        groups.setdefault(input_shape(size, side, patch), []).append(row)
    return [Batch(list(part), *shape) for shape, rows in sorted(groups.items()) for part in batched(rows, batch_size)]


def input_shape(image_size: tuple[int, int], side: int, patch: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of the network's input: short side near ``side``, whole patches, aspect kept.

    ``image_size`` is (width, height), ``patch`` (height, width), all in pixels.
    """
    width, height = image_size
    scale = side / min(width, height)
    sides = (min(length * scale, LONGEST * side) for length in (height, width))
    return tuple(map(nearest_patch_size, sides, patch))


# --- maps ---------------------------------------------------------------------------------------------------------


class MappedBatch(NamedTuple):
    """The maps of the images of a batch."""

    rows: list[int]  # of the data set
    maps: np.ndarray  # (B, feat_h, feat_w) float16, cleaned; failed and blank ones are zeros
    logits: torch.Tensor | None  # (B, K)
    errors: list[str | None]  # why an image could not be read


def map_batches(
    localizer: Localizer,
    batches: list[Batch],
    paths: Sequence[Path],
    settings: dict[str, Any],
    *,
    amp: str,
    num_workers: int,
    with_logits: bool = False,
) -> Iterator[MappedBatch]:
    """Yield the maps of each batch.

    Args:
        paths: the images of the data set, by row.
        settings: the section ``dino`` of the config: autocontrast, and what `clean` reads.
        amp: precision on CUDA: none | bf16 | fp16.
        with_logits: also return the network's output.
    """
    loaded = load_batches(localizer, batches, paths, num_workers, localizer.patch, settings["autocontrast"])
    attended = ((batch.rows, errors, *_attend(localizer, images, amp, with_logits)) for batch, images, errors in loaded)
    # one batch late: the device computes the next while this one is cleaned
    for (rows, errors, attention, logits), _ in pairwise(chain(attended, [None])):
        maps = np.stack([clean(heads, settings) for heads in attention.cpu().numpy()]).astype(np.float16)
        maps[[bool(error) or map_boxes.is_blank(cells) for error, cells in zip(errors, maps, strict=True)]] = 0
        yield MappedBatch(rows, maps, logits, errors)


def load_batches(
    network: Localizer,
    batches: list[Batch],
    paths: Sequence[Path],
    num_workers: int,
    smallest: tuple[int, int] = (1, 1),
    autocontrast: bool = False,
) -> Iterator[tuple[Batch, torch.Tensor, list[str | None]]]:
    """Yield each batch, its images (B, 3, H, W) uint8 on the network's device, and why any could not be read."""
    images, pin = BatchImages(batches, paths, smallest, autocontrast), network.device.type == "cuda"
    loader = build_loader(images, num_workers=num_workers, pin_memory=pin, batch_size=None)
    for batch, (pixels, errors) in zip(batches, loader, strict=True):
        yield batch, pixels.to(network.device, non_blocking=True).permute(0, 3, 1, 2), errors


def _attend(
    localizer: Localizer, images: torch.Tensor, amp: str, with_logits: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return attention (B, heads, feat_h, feat_w) and, with ``with_logits``, logits; on CUDA they may not be ready."""
    what = f"attention maps, {len(images)} images of {images.shape[3]} x {images.shape[2]} pixels"
    less = memory_errors(what, "lower dino.batch_size or dino.image_size")
    with less, torch.inference_mode(), autocast(images.device, amp):
        images = localizer.normalize(images)
        if with_logits:
            return cls_attention_and_logits(localizer.model, images)
        return cls_attention(localizer.model, images), None


def clean(attention: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """Return the map (feat_h, feat_w) of an image's attention (heads, feat_h, feat_w), cleaned as the config says."""
    heads = settings["heads"]
    return map_boxes.clean_map(
        attention,
        heads=int(heads) if heads.isdecimal() else heads,
        steps=settings["steps"],
        filter_size=settings["filter_size"] or max(3, round(0.1 * min(attention.shape[1:]))),
    )


def map_to_box(attention_map: np.ndarray, image_size: tuple[int, int], settings: dict[str, Any]) -> map_boxes.MapBox:
    """Return the box that the configured method finds in a cleaned map (feat_h, feat_w)."""
    cells = map_boxes.min_max(np.asarray(attention_map, dtype=np.float64))  # thresholds are shares of the maximum
    threshold = "otsu" if settings["otsu"] else settings["threshold"]
    if settings["method"] == "published":
        return map_boxes.published_box(cells, image_size, threshold=threshold)
    options = {key: settings[key] for key in ("upsample", "choose", "size_factor")}
    return map_boxes.component_box(cells, image_size, threshold=threshold, **options)
