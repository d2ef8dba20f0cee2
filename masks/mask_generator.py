"""SAM's automatic masks: those of `segment_anything.SamAutomaticMaskGenerator`, several times faster.

What makes it faster changes no mask (differences are float rounding):

- images are encoded together, and the points of all images of a batch decoded together;
- encoder and decoder multiply in another order (sam_networks.py);
- a mask whose predicted IoU fails is never upscaled, the padding below and right of the image never at all;
- the two bilinear resizes of the official generator are one product with two small matrices;
- masks wait for non-maximum suppression as low-resolution logits (their size does not grow with the image's), so there
  are no run lengths, no deep copies, and only the masks that are returned exist at full size.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from segment_anything.modeling import Sam
from segment_anything.utils.amg import (
    MaskData,
    build_all_layer_point_grids,
    calculate_stability_score,
    generate_crop_boxes,
    is_box_near_crop_edge,
    uncrop_boxes_xyxy,
    uncrop_points,
)
from segment_anything.utils.transforms import ResizeLongestSide
from torchvision.ops import batched_nms, box_area, box_convert

from masks.sam_networks import UPSCALING, ImageTokens, decode_prompts, encode, upscale_masks
from utils import autocast, batched

PRECISIONS = ("float32", "bf16", "fp16")
CPU_POINTS = 4  # points decoded at once on a CPU: 64 take a quarter longer, as their tokens outgrow the caches


@dataclass(eq=False)
class MaskGenerator:
    """Masks for whole lists of images. The settings are the official generator's, and some of our own.

    Args:
        sam: the network, on the device that it shall run on.
        points_per_batch: points decoded at once, of all images of a batch together (on a CPU 4 at the most).
        image_batch: images (or crops of images) that are encoded at once.
        chunk_megabytes: bound of the logits that are held at full size, 4 bytes a pixel and mask.
        precision: float32, bf16 or fp16: autocast on CUDA; a CPU always computes in float32.
        compile_encoder: compile the image encoder (minutes at the first batch).

    Raises:
        ValueError: for settings that cannot be met.
    """

    sam: Sam
    points_per_side: int | None = 32
    points_per_batch: int = 64
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    crop_n_layers: int = 0
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    point_grids: list[np.ndarray] | None = None
    min_mask_region_area: int = 0
    _: KW_ONLY
    image_batch: int = 1
    chunk_megabytes: int = 32
    precision: str = "float32"
    compile_encoder: bool = False

    def __post_init__(self) -> None:
        """Check the settings and lay the grids of points."""
        if (self.points_per_side is None) == (self.point_grids is None):
            raise ValueError("exactly one of points_per_side and point_grids must be given")
        if self.point_grids is None:
            self.point_grids = build_all_layer_point_grids(
                self.points_per_side, self.crop_n_layers, self.crop_n_points_downscale_factor
            )
        if len(self.point_grids) <= self.crop_n_layers:
            raise ValueError(f"crop_n_layers={self.crop_n_layers}: one more of point_grids is needed")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r}: known are {', '.join(PRECISIONS)}")
        if self.sam.device.type == "cpu":
            self.points_per_batch = min(self.points_per_batch, CPU_POINTS)
        self._encode = torch.compile(encode, dynamic=False) if self.compile_encoder else encode
        self._transform = ResizeLongestSide(self.sam.image_encoder.img_size)

    @torch.no_grad()
    def generate(self, images: Sequence[np.ndarray], *, with_masks: bool = True) -> list[list[dict[str, Any]]]:
        """Return the official records of each image, in the official order (by non-maximum suppression).

        Args:
            images: (H, W, 3) uint8 RGB arrays of any sizes.
            with_masks: make the masks themselves too, not only what is known of them.

        Returns:
            For each image a list of dicts with ``segmentation`` (H, W) bool (only with masks), ``area`` in pixels,
            ``bbox`` xywh (as the official one, without the last row and column), ``predicted_iou``, ``point_coords``
            [[x, y]], ``stability_score``, ``crop_box`` xywh.

        Raises:
            ValueError: for anything else than such images.
        """
        _check_images(images)
        groups = batched(images, self.image_batch)
        return [records for group in groups for records in self._generate_group(group, with_masks)]

    @torch.no_grad()
    def embed(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """Return the image embeddings (B, C, grid, grid) of ``images``, (H, W, 3) uint8 of any sizes."""
        resized = [torch.from_numpy(self._transform.apply_image(image)).to(self.sam.device) for image in images]
        inputs = torch.stack([self.sam.preprocess(image.permute(2, 0, 1)) for image in resized])
        if self.compile_encoder:  # one shape, compiled once
            inputs = torch.cat([inputs, inputs[:1].expand(self.image_batch - len(images), -1, -1, -1)])
        with autocast(self.sam.device, self.precision):
            return self._encode(self.sam.image_encoder, inputs)[: len(images)]

    def _generate_group(self, images: Sequence[np.ndarray], with_masks: bool) -> list[list[dict[str, Any]]]:
        """Return the records of as many images as are encoded at once: of all their crops, layer by layer."""
        candidates, crops = [[] for _ in images], [[] for _ in range(self.crop_n_layers + 1)]  # by image; by layer
        for index, image in enumerate(images):
            boxes = generate_crop_boxes(image.shape[:2], self.crop_n_layers, self.crop_overlap_ratio)
            for box, layer in zip(*boxes, strict=True):
                crops[layer].append((index, box))
        for crops_of_layer, grid in zip(crops, self.point_grids, strict=False):
            for batch in batched(crops_of_layer, self.image_batch):
                pixels = [images[index][y0:y1, x0:x1] for index, (x0, y0, x1, y1) in batch]
                frames = [_Frame.build(crop.shape[:2], self.sam) for crop in pixels]
                found = self._candidates(pixels, frames, grid)
                for (index, box), frame, data in zip(batch, frames, found, strict=True):
                    self._place_crop(data, box, images[index].shape[:2])
                    candidates[index].append((frame, data))
        return [
            self._merge_crops(parts, image.shape[:2], with_masks)
            for parts, image in zip(candidates, images, strict=True)
        ]

    # --- from points to candidates --------------------------------------------------------------------------------
    # Candidates are M masks of one crop: low (M, 4 * cells[0], 4 * cells[1]) float32 logits, predicted_iou and
    # stability_score (M,), area (M,) in pixels, points (M, 2) x y and boxes (M, 4) xyxy in pixels of the crop.

    def _candidates(self, crops: list[np.ndarray], frames: list["_Frame"], grid: np.ndarray) -> list[MaskData]:
        """Return, for each crop (H, W, 3) uint8, the masks that pass both scores, in the order of the points.

        ``grid`` (P, 2) holds x and y of the points as fractions of the crop's sides.
        """
        together = max(1, self.points_per_batch // len(grid))  # crops whose points are decoded at once
        parts = zip(self.embed(crops).split(together), batched(frames, together), strict=True)
        return [data for embeddings, some in parts for data in self._decode(embeddings, some, grid)]

    def _decode(self, embeddings: torch.Tensor, frames: Sequence["_Frame"], grid: np.ndarray) -> list[MaskData]:
        """Return the candidates of B embeddings (B, C, h, w) and their frames, ``points_per_batch`` points at once."""
        points = [grid * np.array(frame.size[::-1]) for frame in frames]  # (P, 2) pixels
        scaled = [self._transform.apply_coords(part, frame.size) for part, frame in zip(points, frames, strict=True)]
        coords = torch.from_numpy(np.concatenate(scaled)).to(self.sam.device)[:, None]  # (B * P, 1, 2) float64
        labels = torch.ones(coords.shape[:2], dtype=torch.int, device=coords.device)
        sparse, dense = self.sam.prompt_encoder(points=(coords, labels), boxes=None, masks=None)
        prompts = sparse.unflatten(0, (len(frames), -1))  # (B, P, 2, C)
        position = self.sam.prompt_encoder.get_dense_pe()  # as the points', outside autocast: a sine of large angles
        candidates = [MaskData() for _ in frames]
        with autocast(self.sam.device, self.precision):
            image = ImageTokens.build(self.sam.mask_decoder, embeddings + dense[:1], position)
            for start in range(0, len(grid), self.points_per_batch):
                chunk = slice(start, start + self.points_per_batch)
                tokens, keys, iou = decode_prompts(self.sam.mask_decoder, image, prompts[:, chunk])
                for row, frame in enumerate(frames):
                    found = self._select(tokens[row], keys[row], iou[row], frame, points[row][chunk])
                    candidates[row].cat(found)
        return candidates

    def _select(
        self, tokens: torch.Tensor, keys: torch.Tensor, iou: torch.Tensor, frame: "_Frame", points: np.ndarray
    ) -> MaskData:
        """Return one crop's masks that pass both scores; shapes as of `decode_prompts` without B, points (P, 2)."""
        good = (iou > self.pred_iou_thresh) | (self.pred_iou_thresh <= 0)  # (P, K)
        promising = good.any(dim=1)
        low = upscale_masks(self.sam.mask_decoder, tokens[promising], keys[promising], frame.grid, frame.cells)
        low = low[good[promising]].float()
        data = MaskData()
        with torch.autocast(low.device.type, enabled=False):  # the resizes stay in float32
            for part in low.split(self._masks_per_chunk(frame.size)):
                data.cat(self._measure(part, frame))
        data["low"], data["predicted_iou"] = low, iou[good]
        data["points"] = torch.from_numpy(points).to(good.device)[good.nonzero()[:, 0]]
        data.filter((data["stability_score"] >= self.stability_score_thresh) | (self.stability_score_thresh <= 0))
        return data

    def _measure(self, low: torch.Tensor, frame: "_Frame") -> MaskData:
        """Return stability, area and boxes of the masks of low-resolution logits (M, rows, cols)."""
        logits = frame.upsample(low)
        masks = logits > self.sam.mask_threshold
        return MaskData(
            stability_score=calculate_stability_score(logits, self.sam.mask_threshold, self.stability_score_offset),
            area=_count(masks),
            boxes=masks_to_boxes(masks),
        )

    def _masks_per_chunk(self, size: tuple[int, int]) -> int:
        """Return how many masks of a crop of ``size`` (H, W) are held at full size at once."""
        return max(1, int(self.chunk_megabytes * 1e6 / (4 * size[0] * size[1])))

    # --- from candidates to masks ---------------------------------------------------------------------------------

    def _place_crop(self, data: MaskData, crop: list[int], size: tuple[int, int]) -> None:
        """Drop duplicates and what the crop's edge cuts off; then boxes and points are the image's."""
        data.filter(~is_box_near_crop_edge(data["boxes"], crop, [0, 0, size[1], size[0]]))
        data.filter(_suppress(data["boxes"], data["predicted_iou"], self.box_nms_thresh))
        data["boxes"], data["points"] = uncrop_boxes_xyxy(data["boxes"], crop), uncrop_points(data["points"], crop)
        data["crops"] = torch.tensor([crop]).expand(len(data["boxes"]), -1)

    def _merge_crops(
        self, crops: list[tuple["_Frame", MaskData]], size: tuple[int, int], with_masks: bool
    ) -> list[dict[str, Any]]:
        """Return the records of an image from the candidates of its crops, the smallest crop preferred."""
        data = MaskData()
        for _, part in crops:
            data.cat(MaskData(**{name: column.cpu() for name, column in part.items() if name != "low"}))
        data["number"] = torch.arange(len(data["boxes"]))
        if len(crops) > 1:
            data.filter(_suppress(data["boxes"], 1 / box_area(data["crops"]), self.crop_nms_thresh))
        if with_masks or self.min_mask_region_area > 0:
            data["masks"] = self._full_masks(crops, data["number"], size)
        if self.min_mask_region_area > 0:
            self._remove_small_regions(data)
        columns = {"segmentation": data["masks"].numpy()} if with_masks else {}
        columns |= {
            "area": data["area"].tolist(),
            "bbox": box_convert(data["boxes"], "xyxy", "xywh").tolist(),
            "predicted_iou": data["predicted_iou"].tolist(),
            "point_coords": data["points"][:, None].tolist(),
            "stability_score": data["stability_score"].tolist(),
            "crop_box": box_convert(data["crops"], "xyxy", "xywh").tolist(),
        }
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def _full_masks(
        self, crops: list[tuple["_Frame", MaskData]], kept: torch.Tensor, size: tuple[int, int]
    ) -> torch.Tensor:
        """Return masks (N, H, W) bool on the CPU of the candidates numbered ``kept`` (N,) over all ``crops``."""
        masks, first = torch.zeros((len(kept), *size), dtype=torch.bool), 0
        for frame, data in crops:
            low, numbers = data["low"], kept - first
            places = ((numbers >= 0) & (numbers < len(low))).nonzero()[:, 0]
            for part in places.split(self._masks_per_chunk(frame.size)) if len(places) else ():
                x0, y0, x1, y1 = data["crops"][0].tolist()
                logits = frame.upsample(low[numbers[part].to(low.device)])
                masks[part, y0:y1, x0:x1] = (logits > self.sam.mask_threshold).cpu()
            first += len(low)
        return masks

    def _remove_small_regions(self, data: MaskData) -> None:
        """Fill small holes, drop small islands, and drop what became a duplicate: untouched masks are preferred."""
        masks = data["masks"]
        touched = [remove_small_regions(mask, self.min_mask_region_area) for mask in masks.numpy()]
        touched, boxes = torch.tensor(touched, dtype=torch.bool), masks_to_boxes(masks)
        data["boxes"] = torch.where(touched[:, None], boxes, data["boxes"])
        data["area"] = torch.where(touched, _count(masks), data["area"])
        data.filter(_suppress(boxes, (~touched).float(), max(self.box_nms_thresh, self.crop_nms_thresh)))


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


def masks_to_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Return xyxy boxes (N, 4) int64 of the first and last True pixels of masks (N, H, W) bool; zeros where none is.

    As the package's batched_mask_to_box, in a quarter of its time: it looks for maxima of bool, which are slow.
    """
    rows, cols = (masks.view(torch.uint8).amax(dim=dim) for dim in (2, 1))  # (N, H), (N, W)
    first = [line.argmax(dim=1) for line in (cols, rows)]
    last = [line.shape[1] - 1 - line.flip(1).argmax(dim=1) for line in (cols, rows)]
    return torch.stack(first + last, dim=1) * rows.amax(dim=1, keepdim=True)


def remove_small_regions(mask: np.ndarray, min_area: int) -> bool:
    """Fill holes and drop islands of less than ``min_area`` pixels of a mask (H, W) bool in place; tell if any were.

    Regions touch at corners too. If all islands are small the largest stays.
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
    """Return the rows that survive non-maximum suppression, best first; ties are ordered as by the official call."""
    return batched_nms(boxes.float(), scores, torch.zeros(len(boxes)), iou_threshold=threshold)


def _count(masks: torch.Tensor) -> torch.Tensor:
    """Return the number of True pixels of (N, H, W) masks, (N,) int32; 16 bits hold a row and are faster."""
    return masks.sum(-1, dtype=torch.int16).sum(-1, dtype=torch.int32)


def _resize_matrix(low: int, side: int, inner: int, out: int) -> torch.Tensor:
    """Return (out, low), one axis of the official way from logits to pixels: enlarge to side, cut at inner, resize."""
    enlarged = F.interpolate(torch.eye(low)[None], size=side, mode="linear", align_corners=False)
    return F.interpolate(enlarged[..., :inner], size=out, mode="linear", align_corners=False)[0].T


def _check_images(images: Sequence[np.ndarray]) -> None:
    """Raise ValueError, with what was received, unless all are (H, W, 3) uint8 with pixels."""
    for index, image in enumerate(images):
        is_array = isinstance(image, np.ndarray)
        if not is_array or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            received = f"{image.dtype} of shape {image.shape}" if is_array else type(image).__name__
            raise ValueError(f"images[{index}] must be a (H, W, 3) uint8 array with pixels, got {received}")
