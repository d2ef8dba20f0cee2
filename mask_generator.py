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

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, Sam
from segment_anything.modeling.image_encoder import get_rel_pos, window_partition, window_unpartition
from segment_anything.utils.amg import (
    batched_mask_to_box,
    build_all_layer_point_grids,
    generate_crop_boxes,
    is_box_near_crop_edge,
)
from segment_anything.utils.transforms import ResizeLongestSide
from torch import nn
from torchvision.ops import batched_nms, box_area, box_convert

PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_POINTS = 8  # points decoded at once on a CPU: 64 take a quarter longer, as their tokens outgrow the caches
UPSCALING = 4  # pixels of a low-resolution mask along one side of an image token


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
            points_per_batch: points decoded at once, of all images of a batch together (on a CPU 8 at the most).
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
            raise ValueError(f"{len(point_grids)} point_grids given: crop_n_layers={crop_n_layers} needs one more than it")
        if output_mode != "binary_mask":
            raise ValueError(f"output_mode={output_mode!r}: only 'binary_mask' is known here")
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision!r}: known are {', '.join(PRECISIONS)}")
        for name, value in (("points_per_batch", points_per_batch), ("image_batch", image_batch)):
            if value < 1:
                raise ValueError(f"{name}={value}: at least 1 is needed")
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
        self._resize = ResizeLongestSide(sam.image_encoder.img_size).apply_image

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

    def generate_tensors(self, images: Sequence[np.ndarray], *, masks: bool = True) -> list[ImageMasks]:
        """Return the masks of each image as one tensor; with ``masks`` off, only what is known about them."""
        _check_images(images)
        groups = (images[start : start + self.image_batch] for start in range(0, len(images), self.image_batch))
        return [found for group in groups for found in self._generate_group(group, masks)]

    @torch.no_grad()
    def embed(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """Return the image embeddings (B, C, grid, grid) of ``images``, (H, W, 3) uint8 of any sizes."""
        with ThreadPoolExecutor(self.resize_threads) as pool:
            resized = list(pool.map(self._resize, images))
        pixels = [torch.from_numpy(image).to(self.sam.device).permute(2, 0, 1) for image in resized]
        inputs = torch.stack([self.sam.preprocess(image) for image in pixels])
        if self.compile_encoder:  # one shape, compiled once
            inputs = torch.cat([inputs, inputs[:1].expand(self.image_batch - len(images), -1, -1, -1)])
        with self._autocast():
            return self._encode(self.sam.image_encoder, inputs)[: len(images)]

    def _autocast(self) -> torch.autocast:
        """Return the context of half precision, or one that does nothing."""
        dtype = PRECISIONS[self.precision]
        return torch.autocast("cuda", dtype, enabled=dtype is not None and self.sam.device.type == "cuda")

    def _generate_group(self, images: Sequence[np.ndarray], masks: bool) -> list[ImageMasks]:
        """Return the masks of as many images as are encoded at once: all their crops, layer by layer."""
        found = [[] for _ in images]
        for batch, layer in self._crop_batches(images):
            crops = [images[index][y0:y1, x0:x1] for index, (x0, y0, x1, y1) in batch]
            candidates = self._candidates(crops, self.point_grids[layer])
            for (index, box), own in zip(batch, candidates, strict=True):
                found[index].append(self._filter_crop(own, box, images[index].shape[:2]))
        return [self._merge(own, image.shape[:2], masks) for own, image in zip(found, images, strict=True)]

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

    @torch.no_grad()
    def _candidates(self, crops: list[np.ndarray], grid: np.ndarray) -> list["_Candidates"]:
        """Return, for each crop, the masks that are good and stable enough, in the order of the points.

        Args:
            crops: B arrays (H, W, 3) uint8.
            grid: (P, 2), x and y of the points as fractions of the crop's sides.
        """
        frames = [_Frame.build(crop.shape[:2], self.sam) for crop in crops]
        embeddings = self.embed(crops)
        points = [grid * np.array(frame.size[::-1]) for frame in frames]  # (P, 2) in pixels of the crop
        found = [[] for _ in crops]
        step = max(1, self.points_per_batch // len(crops))
        for start in range(0, len(grid), step):
            chunk = [own[start : start + step] for own in points]
            tokens, keys, iou = self._decode(embeddings, frames, chunk)
            for row, frame in enumerate(frames):
                found[row].append(self._select(tokens[row], keys[row], iou[row], frame, chunk[row]))
        return [_Candidates.concatenate(own) for own in found]

    def _decode(
        self, embeddings: torch.Tensor, frames: list["_Frame"], points: list[np.ndarray]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run the prompt encoder and the transformer for the same number P of points in each of B crops.

        Returns:
            mask tokens (B, P, K, C), image tokens (B, P, N, C), predicted IoU (B, P, K) float32; K = 3 masks a point.
        """
        encoder, decoder = self.sam.prompt_encoder, self.sam.mask_decoder
        scaled = np.concatenate([frame.to_input(own) for frame, own in zip(frames, points, strict=True)])
        coords = torch.from_numpy(scaled).to(self.sam.device)[:, None]  # (B * P, 1, 2)
        labels = torch.ones(coords.shape[:2], dtype=torch.int, device=coords.device)
        with self._autocast():
            sparse, dense = encoder(points=(coords, labels), boxes=None, masks=None)
            image = _image_tokens(embeddings + dense[:1])
            prompts = sparse.unflatten(0, (len(frames), -1))
            tokens, keys = decode_prompts(decoder, image, _image_tokens(encoder.get_dense_pe()), prompts)
            iou = decoder.iou_prediction_head(tokens[:, :, 0])
        return tokens[:, :, 1:], keys, iou[..., 1:].float()

    def _select(
        self, tokens: torch.Tensor, keys: torch.Tensor, iou: torch.Tensor, frame: "_Frame", points: np.ndarray
    ) -> "_Candidates":
        """Return one crop's masks that pass both scores; shapes as `_decode`'s without B, points (P, 2)."""
        keep = iou > self.pred_iou_thresh if self.pred_iou_thresh > 0 else torch.ones_like(iou, dtype=torch.bool)
        passing = keep.any(dim=1)
        with self._autocast():
            low = upscale_masks(self.sam.mask_decoder, tokens[passing], keys[passing], frame.grid, frame.cells)
        low = low[keep[passing]].float()
        which = keep.nonzero()[:, 0]
        fields = {"predicted_iou": iou[keep], "points": torch.from_numpy(points).to(which.device)[which]}
        parts = [self._measure(part, frame) for part in low.split(self._masks_per_chunk(frame.size))]
        stable, *measured = (torch.cat(column) for column in zip(*parts, strict=True))
        stability, area, boxes = (column[stable] for column in measured)
        fields = {name: column[stable] for name, column in fields.items()}
        return _Candidates(frame, low[stable], stability_score=stability, area=area, boxes=boxes, **fields)

    def _measure(self, low: torch.Tensor, frame: "_Frame") -> tuple[torch.Tensor, ...]:
        """Return for masks (M, rows, cols): passes?, stability score, area, xyxy box (zeros where it did not pass)."""
        logits = frame.upsample(low)
        threshold, offset = self.sam.mask_threshold, self.stability_score_offset
        stability = _count(logits > threshold + offset) / _count(logits > threshold - offset)
        stable = stability >= self.stability_score_thresh if self.stability_score_thresh > 0 else stability == stability
        masks = logits > threshold
        return stable, stability, _count(masks), masks_to_boxes(masks)

    def _masks_per_chunk(self, size: tuple[int, int]) -> int:
        """Return how many masks of a crop of ``size`` (H, W) are held at full size at once."""
        return max(1, int(self.chunk_megabytes * 1e6 / (4 * size[0] * size[1])))

    # --- from candidates to masks ---------------------------------------------------------------------------------
