"""SAM's automatic masks: those of `segment_anything.SamAutomaticMaskGenerator`, several times faster.

What makes it faster changes no mask (differences are float rounding):

- images are encoded together, and the points of all images of a batch decoded together;
- what all points of an image share is computed once, and the image tokens (4096 to a point) are no longer projected:
  in ``u · (W k) = (Wᵀ u) · k`` it is the seven prompt tokens that go through the weight;
- a mask whose predicted IoU fails is never upscaled, the padding below and right of the image never at all;
- the two bilinear resizes of the official generator are one product with two small matrices;
- masks wait for non-maximum suppression as low-resolution logits (their size does not grow with the image's), so there
  are no run lengths, no deep copies, and only the masks that are returned exist at full size.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from segment_anything.modeling import Sam
from segment_anything.utils.amg import build_all_layer_point_grids, generate_crop_boxes, is_box_near_crop_edge
from segment_anything.utils.transforms import ResizeLongestSide
from torchvision.ops import batched_nms, box_area, box_convert

from masks.sam_networks import UPSCALING, ImageTokens, decode_prompts, encode, upscale_masks
from utils import autocast

PRECISIONS = ("float32", "bf16", "fp16")
CPU_POINTS = 4  # points decoded at once on a CPU: 64 take a quarter longer, as their tokens outgrow the caches


@dataclass
class ImageMasks:
    """The N masks of one image, in the official order (by non-maximum suppression), on the CPU."""

    masks: torch.Tensor | None  # (N, H, W) bool, True is object; None: left out
    boxes_xywh: np.ndarray  # (N, 4) int64, pixels; as the official ones, the last row and column are not counted in
    area: np.ndarray  # (N,) int64, pixels
    predicted_iou: np.ndarray  # (N,) float32
    stability_score: np.ndarray  # (N,) float32
    point_coords: np.ndarray  # (N, 2) float64, x and y of the prompt in pixels
    crop_boxes_xywh: np.ndarray  # (N, 4) int64, the part of the image that was shown to the network

    def __len__(self) -> int:
        return len(self.area)

    def records(self) -> list[dict[str, Any]]:
        """Return the official records; without ``segmentation`` where the masks were left out."""
        records = [
            {
                "area": int(self.area[row]),
                "bbox": self.boxes_xywh[row].tolist(),
                "predicted_iou": float(self.predicted_iou[row]),
                "point_coords": [self.point_coords[row].tolist()],
                "stability_score": float(self.stability_score[row]),
                "crop_box": self.crop_boxes_xywh[row].tolist(),
            }
            for row in range(len(self))
        ]
        if self.masks is None:
            return records
        return [{"segmentation": mask} | record for mask, record in zip(self.masks.numpy(), records, strict=True)]


def _check_choices(output_mode: str, precision: str, **counts: int) -> None:
    """Raise ValueError for an output or precision that is not known, or a count below 1."""
    if output_mode != "binary_mask":
        raise ValueError(f"output_mode={output_mode!r}: only 'binary_mask' is known here")
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: known are {', '.join(PRECISIONS)}")
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value}: at least 1 is needed")


class MaskGenerator:
    """Masks for whole lists of images. The settings are the official generator's, and some of our own."""

    def __init__(
        self,
        sam: Sam,
        points_per_side: int | None = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        point_grids: list[np.ndarray] | None = None,
        min_mask_region_area: int = 0,
        output_mode: str = "binary_mask",
        *,
        image_batch: int = 1,
        chunk_megabytes: int = 32,
        precision: str = "float32",
        compile_encoder: bool = False,
        resize_threads: int = 1,
    ) -> None:
        """Take a network and its settings; those not named here are as in the official generator.

        Args:
            sam: the network, on the device that it shall run on.
            points_per_batch: points decoded at once, of all images of a batch together (on a CPU 4 at the most).
            output_mode: "binary_mask" only.
            image_batch: images (or crops of images) that are encoded at once.
            chunk_megabytes: bound of the logits that are held at full size, 4 bytes a pixel and mask.
            precision: float32, bf16 or fp16: autocast on CUDA; a CPU always computes in float32.
            compile_encoder: compile the image encoder (minutes at the first batch).
            resize_threads: threads that bring the images of a batch to the network's size.

        Raises:
            ValueError: for settings that cannot be met.
        """
        if (points_per_side is None) == (point_grids is None):
            raise ValueError("exactly one of points_per_side and point_grids must be given")
        if point_grids is not None and len(point_grids) <= crop_n_layers:
            raise ValueError(
                f"crop_n_layers={crop_n_layers}: {len(point_grids)} point_grids are too few, one more is needed"
            )
        _check_choices(output_mode, precision, points_per_batch=points_per_batch, image_batch=image_batch)
        if point_grids is None:
            point_grids = build_all_layer_point_grids(points_per_side, crop_n_layers, crop_n_points_downscale_factor)
        self.sam, self.point_grids = sam, point_grids
        self.points_per_batch = min(points_per_batch, CPU_POINTS) if sam.device.type == "cpu" else points_per_batch
        self.pred_iou_thresh = pred_iou_thresh
        self.stability_score_thresh, self.stability_score_offset = stability_score_thresh, stability_score_offset
        self.box_nms_thresh, self.crop_nms_thresh = box_nms_thresh, crop_nms_thresh
        self.crop_n_layers, self.crop_overlap_ratio = crop_n_layers, crop_overlap_ratio
        self.min_mask_region_area = min_mask_region_area
        self.image_batch, self.chunk_megabytes, self.resize_threads = image_batch, chunk_megabytes, resize_threads
        self.compile_encoder, self.precision = compile_encoder, precision
        self._encode = torch.compile(encode, dynamic=False) if compile_encoder else encode
        self._transform = ResizeLongestSide(sam.image_encoder.img_size)

    def generate(self, images: Sequence[np.ndarray]) -> list[list[dict[str, Any]]]:
        """Return the official records of each image, in the official order.

        Args:
            images: (H, W, 3) uint8 RGB arrays of any sizes.

        Returns:
            For each image a list of dicts with ``segmentation`` (H, W) bool, ``area`` in pixels, ``bbox`` xywh,
            ``predicted_iou``, ``point_coords`` [[x, y]], ``stability_score``, ``crop_box`` xywh.

        Raises:
            ValueError: for anything else than such images.
        """
        return [found.records() for found in self.generate_tensors(images)]

    @torch.no_grad()
    def generate_tensors(self, images: Sequence[np.ndarray], *, masks: bool = True) -> list[ImageMasks]:
        """Return the masks of each image as one tensor; with ``masks`` off, only what is known about them."""
        _check_images(images)
        groups = (images[start : start + self.image_batch] for start in range(0, len(images), self.image_batch))
        return [found for group in groups for found in self._generate_group(group, masks)]

    @torch.no_grad()
    def embed(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """Return the image embeddings (B, C, grid, grid) of ``images``, (H, W, 3) uint8 of any sizes."""
        with ThreadPoolExecutor(self.resize_threads) as pool:
            resized = list(pool.map(self._transform.apply_image, images))
        pixels = [torch.from_numpy(image).to(self.sam.device).permute(2, 0, 1) for image in resized]
        inputs = torch.stack([self.sam.preprocess(image) for image in pixels])
        if self.compile_encoder:  # one shape, compiled once
            inputs = torch.cat([inputs, inputs[:1].expand(self.image_batch - len(images), -1, -1, -1)])
        with self._autocast():
            return self._encode(self.sam.image_encoder, inputs)[: len(images)]

    def _autocast(self) -> torch.autocast:
        """Return the context of half precision, or one that does nothing."""
        return autocast(self.sam.device, self.precision)

    def _generate_group(self, images: Sequence[np.ndarray], masks: bool) -> list[ImageMasks]:
        """Return the masks of as many images as are encoded at once: all their crops, layer by layer."""
        found = [[] for _ in images]
        for batch, layer in self._crop_batches(images):
            crops = [images[index][y0:y1, x0:x1] for index, (x0, y0, x1, y1) in batch]
            candidates = self._candidates(crops, self.point_grids[layer])
            for (index, box), own in zip(batch, candidates, strict=True):
                found[index].append(self._place_crop(own, box, images[index].shape[:2]))
        return [self._merge_crops(own, image.shape[:2], masks) for own, image in zip(found, images, strict=True)]

    def _crop_batches(self, images: Sequence[np.ndarray]) -> Iterator[tuple[list[tuple[int, list[int]]], int]]:
        """Yield up to ``image_batch`` crops of one layer as (index of the image, xyxy box), and the layer."""
        by_layer = [[] for _ in range(self.crop_n_layers + 1)]
        for index, image in enumerate(images):
            boxes, layers = generate_crop_boxes(image.shape[:2], self.crop_n_layers, self.crop_overlap_ratio)
            for box, layer in zip(boxes, layers, strict=True):
                by_layer[layer].append((index, box))
        for layer, crops in enumerate(by_layer):
            for start in range(0, len(crops), self.image_batch):
                yield crops[start : start + self.image_batch], layer

    # --- from points to candidates --------------------------------------------------------------------------------

    def _candidates(self, crops: list[np.ndarray], grid: np.ndarray) -> list["_Candidates"]:
        """Return, for each crop, the masks that pass both scores, in the order of the points.

        Args:
            crops: (H, W, 3) uint8 arrays.
            grid: (P, 2), x and y of the points as fractions of the crop's sides.
        """
        embeddings, found = self.embed(crops), []
        frames = [_Frame.build(crop.shape[:2], self.sam) for crop in crops]
        together = max(1, self.points_per_batch // len(grid))  # crops whose points are decoded at once
        for first in range(0, len(crops), together):
            part = slice(first, first + together)
            found += self._decode(embeddings[part], frames[part], grid)
        return found

    def _decode(self, embeddings: torch.Tensor, frames: list["_Frame"], grid: np.ndarray) -> list["_Candidates"]:
        """Return the candidates of B embeddings (B, C, h, w) and their frames, ``points_per_batch`` points at once."""
        points = [grid * np.array(frame.size[::-1]) for frame in frames]  # (P, 2) pixels
        prompts, dense = self._embed_points(points, frames)
        position = self.sam.prompt_encoder.get_dense_pe()  # as the points', outside autocast: a sine of large angles
        found = [[] for _ in frames]
        with self._autocast():
            image = ImageTokens.build(self.sam.mask_decoder, embeddings + dense, position)
            for start in range(0, len(grid), self.points_per_batch):
                chunk = slice(start, start + self.points_per_batch)
                tokens, keys, iou = decode_prompts(self.sam.mask_decoder, image, prompts[:, chunk])
                for row, frame in enumerate(frames):
                    found[row].append(self._select(tokens[row], keys[row], iou[row], frame, points[row][chunk]))
        return [_Candidates.concatenate(own) for own in found]

    def _embed_points(self, points: list[np.ndarray], frames: list["_Frame"]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the prompt encoder's tokens (B, P, 2, C) of B lists of P points, and its dense part (1, C, h, w)."""
        scaled = [self._transform.apply_coords(own, frame.size) for own, frame in zip(points, frames, strict=True)]
        coords = torch.from_numpy(np.concatenate(scaled)).to(self.sam.device)[:, None]  # (B * P, 1, 2) float64
        labels = torch.ones(coords.shape[:2], dtype=torch.int, device=coords.device)
        sparse, dense = self.sam.prompt_encoder(points=(coords, labels), boxes=None, masks=None)
        return sparse.unflatten(0, (len(points), -1)), dense[:1]

    def _select(
        self, tokens: torch.Tensor, keys: torch.Tensor, iou: torch.Tensor, frame: "_Frame", points: np.ndarray
    ) -> "_Candidates":
        """Return one crop's masks that pass both scores; shapes as of `decode_prompts` without B, points (P, 2)."""
        good = (iou > self.pred_iou_thresh) | (self.pred_iou_thresh <= 0)  # (P, K)
        promising = good.any(dim=1)
        low = upscale_masks(self.sam.mask_decoder, tokens[promising], keys[promising], frame.grid, frame.cells)
        low = low[good[promising]].float()
        with torch.autocast(low.device.type, enabled=False):  # the resizes stay in float32
            parts = [self._measure(part, frame) for part in low.split(self._masks_per_chunk(frame.size))]
        stable, stability, area, boxes = (torch.cat(column) for column in zip(*parts, strict=True))
        points = torch.from_numpy(points).to(good.device)[good.nonzero()[:, 0]]
        return _Candidates(frame, low[stable], iou[good][stable], points[stable], stability, area, boxes)

    def _measure(self, low: torch.Tensor, frame: "_Frame") -> tuple[torch.Tensor, ...]:
        """Return which of (M, rows, cols) masks are stable (M,), and stability, area and xyxy boxes of those."""
        logits = frame.upsample(low)
        threshold, offset = self.sam.mask_threshold, self.stability_score_offset
        stability = _count(logits > threshold + offset) / _count(logits > threshold - offset)
        stable = (stability >= self.stability_score_thresh) | (self.stability_score_thresh <= 0)
        masks = (logits > threshold)[stable]
        return stable, stability[stable], _count(masks), masks_to_boxes(masks)

    def _masks_per_chunk(self, size: tuple[int, int]) -> int:
        """Return how many masks of a crop of ``size`` (H, W) are held at full size at once."""
        return max(1, int(self.chunk_megabytes * 1e6 / (4 * size[0] * size[1])))

    # --- from candidates to masks ---------------------------------------------------------------------------------

    def _place_crop(self, own: "_Candidates", crop: list[int], size: tuple[int, int]) -> "_Candidates":
        """Drop duplicates and what the crop's edge cuts off; then boxes and points are the image's, on the CPU."""
        cut = is_box_near_crop_edge(own.boxes, crop, [0, 0, size[1], size[0]])
        own = own.take((~cut).nonzero()[:, 0])
        own = own.take(_suppress(own.boxes, own.predicted_iou, self.box_nms_thresh)).info_to_cpu()
        corner = torch.tensor(crop[:2])
        own.boxes, own.points, own.crop = own.boxes + corner.repeat(2), own.points + corner, crop
        return own

    def _merge_crops(self, crops: list["_Candidates"], size: tuple[int, int], with_masks: bool) -> ImageMasks:
        """Return the masks of an image from those of its crops, the smallest crop preferred."""
        crop_boxes = torch.cat([torch.tensor([own.crop]).expand(len(own), -1) for own in crops])
        names = ("boxes", "area", "predicted_iou", "stability_score", "points")
        info = {name: torch.cat([getattr(own, name) for own in crops]) for name in names} | {"crops": crop_boxes}
        kept = torch.arange(len(crop_boxes))
        if len(crops) > 1:
            kept = _suppress(info["boxes"], 1 / box_area(crop_boxes), self.crop_nms_thresh)
        info = {name: column[kept] for name, column in info.items()}
        masks = self._full_masks(crops, kept, size) if with_masks or self.min_mask_region_area > 0 else None
        if self.min_mask_region_area > 0:
            masks, info = self._without_small_regions(masks, info)
        return _image_masks(info, masks if with_masks else None)

    def _full_masks(self, crops: list["_Candidates"], kept: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Return masks (N, H, W) bool on the CPU of the candidates numbered ``kept`` (N,) over all ``crops``."""
        masks, first = torch.zeros((len(kept), *size), dtype=torch.bool), 0
        for own in crops:
            x0, y0, x1, y1 = own.crop
            places = ((kept >= first) & (kept < first + len(own))).nonzero()[:, 0]
            for part in places.split(self._masks_per_chunk(own.frame.size)):
                logits = own.frame.upsample(own.low[(kept[part] - first).to(own.low.device)])
                masks[part, y0:y1, x0:x1] = (logits > self.sam.mask_threshold).cpu()
            first += len(own)
        return masks

    def _without_small_regions(
        self, masks: torch.Tensor, info: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Fill small holes, drop small islands, and drop what became a duplicate: untouched masks are preferred."""
        touched = torch.zeros(len(masks), dtype=torch.bool)
        for row, mask in enumerate(masks.numpy()):
            touched[row] = remove_small_regions(mask, self.min_mask_region_area)
        boxes = masks_to_boxes(masks)
        kept = _suppress(boxes, (~touched).float(), max(self.box_nms_thresh, self.crop_nms_thresh))
        info["boxes"] = torch.where(touched[:, None], boxes, info["boxes"])
        info["area"] = torch.where(touched, _count(masks), info["area"])
        return masks[kept], {name: column[kept] for name, column in info.items()}


# --- what is known of the masks -----------------------------------------------------------------------------------


@dataclass
class _Frame:
    """How the masks of a crop of ``size`` (H, W) lie on the grid of image tokens."""

    size: tuple[int, int]
    grid: tuple[int, int]  # image tokens of the whole network input
    cells: tuple[int, int]  # those, from the top left, that the crop's pixels are made from
    vertical: torch.Tensor  # (H, 4 * cells[0]) weights of the low-resolution rows in each row of the crop
    horizontal: torch.Tensor  # (4 * cells[1], W)

    @classmethod
    def build(cls, size: tuple[int, int], sam: Sam) -> "_Frame":
        side, grid = sam.image_encoder.img_size, sam.prompt_encoder.image_embedding_size
        inner = ResizeLongestSide.get_preprocess_shape(*size, side)
        matrices = [
            _resize_matrix(UPSCALING * cells, side, *axis) for cells, *axis in zip(grid, inner, size, strict=True)
        ]
        used = [int(matrix.any(dim=0).nonzero().max()) + 1 for matrix in matrices]
        cells = [-(-pixels // UPSCALING) for pixels in used]
        vertical, horizontal = (
            matrix[:, : UPSCALING * count].to(sam.device) for matrix, count in zip(matrices, cells, strict=True)
        )
        return cls(tuple(size), tuple(grid), tuple(cells), vertical, horizontal.T.contiguous())

    def upsample(self, low: torch.Tensor) -> torch.Tensor:
        """Return the logits (M, H, W) of low-resolution ones (M, 4 * cells[0], 4 * cells[1])."""
        return self.vertical @ (low @ self.horizontal)


@dataclass
class _Candidates:
    """Masks of one crop on their way through the filters; boxes xyxy in pixels of the crop, later of the image."""

    frame: _Frame
    low: torch.Tensor  # (M, 4 * cells[0], 4 * cells[1]) float32 logits
    predicted_iou: torch.Tensor  # (M,) float32
    points: torch.Tensor  # (M, 2) float64
    stability_score: torch.Tensor  # (M,) float32
    area: torch.Tensor  # (M,) int32, pixels
    boxes: torch.Tensor  # (M, 4) int64
    crop: list[int] | None = None  # xyxy in the image

    COLUMNS = ("low", "predicted_iou", "points", "stability_score", "area", "boxes")

    def __len__(self) -> int:
        return len(self.area)

    @classmethod
    def concatenate(cls, parts: list["_Candidates"]) -> "_Candidates":
        columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in cls.COLUMNS}
        return cls(parts[0].frame, **columns)

    def take(self, rows: torch.Tensor) -> "_Candidates":
        return _Candidates(self.frame, **{name: getattr(self, name)[rows] for name in self.COLUMNS})

    def info_to_cpu(self) -> "_Candidates":
        return _Candidates(self.frame, self.low, **{name: getattr(self, name).cpu() for name in self.COLUMNS[1:]})


def masks_to_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Return xyxy boxes (N, 4) int64 of the first and last True pixels; zeros for an empty mask.

    Args:
        masks: (N, H, W) bool.
    """
    rows, cols = (masks.view(torch.uint8).amax(dim=dim) for dim in (2, 1))  # (N, H), (N, W): any() is ten times slower
    first = [line.argmax(dim=1) for line in (cols, rows)]
    last = [line.shape[1] - 1 - line.flip(1).argmax(dim=1) for line in (cols, rows)]
    return torch.stack(first + last, dim=1) * rows.amax(dim=1, keepdim=True)


def remove_small_regions(mask: np.ndarray, min_area: int) -> bool:
    """Fill holes and drop islands of less than ``min_area`` pixels in place; return whether there were any.

    Regions touch at corners too. If all islands are small the largest stays.

    Args:
        mask: (H, W) bool, changed.
    """
    holes, sizes = _regions(~mask)
    small = sizes < min_area
    mask |= small[holes]
    filled = small.any()
    islands, sizes = _regions(mask)
    small = sizes < min_area
    dropped = small.any()
    if dropped and small[1:].all():
        small[1 + sizes[1:].argmax()] = False
    mask &= ~small[islands]
    return bool(filled or dropped)


def _regions(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each pixel's region (0: none), and the regions' sizes; that of 0 is infinite."""
    regions, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    sizes = np.bincount(regions.ravel()).astype(float)
    sizes[0] = np.inf
    return regions, sizes


def _suppress(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return the rows that survive non-maximum suppression, best first; as the official call, for its order of ties."""
    return batched_nms(boxes.float(), scores, torch.zeros(len(boxes)), iou_threshold=threshold)


def _count(masks: torch.Tensor) -> torch.Tensor:
    """Return the number of True pixels of (N, H, W) masks, (N,) int32; 16 bits hold a row and are faster."""
    return masks.sum(-1, dtype=torch.int16).sum(-1, dtype=torch.int32)


def _resize_matrix(low: int, side: int, inner: int, out: int) -> torch.Tensor:
    """Return (out, low), one axis of the official way from logits to pixels: enlarge to side, cut at inner, resize."""
    enlarged = F.interpolate(torch.eye(low)[None], size=side, mode="linear", align_corners=False)
    return F.interpolate(enlarged[..., :inner], size=out, mode="linear", align_corners=False)[0].T


def _image_masks(info: dict[str, torch.Tensor], masks: torch.Tensor | None) -> ImageMasks:
    """Return the columns as arrays, boxes as xywh."""
    columns = {name: column.numpy() for name, column in info.items()}
    boxes, crops = (box_convert(info[name], "xyxy", "xywh").numpy() for name in ("boxes", "crops"))
    scores = columns["predicted_iou"], columns["stability_score"]
    return ImageMasks(masks, boxes, columns["area"].astype(np.int64), *scores, columns["points"], crops)


def _check_images(images: Sequence[np.ndarray]) -> None:
    """Raise ValueError, with what was received, unless all are (H, W, 3) uint8."""
    if isinstance(images, np.ndarray):
        raise ValueError(f"images must be a list of (H, W, 3) arrays, got one array of shape {images.shape}")
    for index, image in enumerate(images):
        kind = f"{image.dtype} of shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"images[{index}] must be a (H, W, 3) uint8 array, got {kind}")
        if image.size == 0:
            raise ValueError(f"images[{index}] has no pixels: {kind}")
