"""Random crops as torchvision v2 transforms: held to a box, or centred by an attention map."""

from collections.abc import Sequence
from types import NoneType
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch.nn.functional import interpolate
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from localized_crops.boxes import clip_boxes
from localized_crops.crops import check_settings, sample_crops
from localized_crops.density import map_to_density, sample_density_crops

CROP_SIDES = ("top", "left", "height", "width")
SHARES_FROM = 64  # pixels: in an image of such sides a box within the first pixel is one in shares of the image


class AttentionMap(tv_tensors.Mask):
    """An attention map or density (feat_h, feat_w), or with a leading 1, stretched over the whole of its image.

    As a mask it follows its image through v2 transforms that need no pixel coordinates (flips, `Resize`); the
    others refuse it until it has its image's size, as it has behind `DinoRandomResizedCrop`.
    """


class _RandomCrop(v2.Transform):
    """Draws one crop for all inputs of a sample and resizes it to ``size``."""

    def __init__(self, size: int | Sequence[int], interpolation: v2.InterpolationMode) -> None:
        super().__init__()
        self.size = [size, size] if isinstance(size, int) else list(size)
        self.interpolation = interpolation

    def check_inputs(self, flat_inputs: list[Any]) -> None:
        """Raise ValueError unless there is an image and no video (a hook of v2 transforms)."""
        name = type(self).__name__
        if any(isinstance(item, tv_tensors.Video) for item in flat_inputs):
            raise ValueError(f"{name} crops images, got a Video: give it the frames one by one")
        if not any(map(_is_image, flat_inputs)):
            raise ValueError(f"{name} needs an image (PIL or tensor), got {[type(i).__name__ for i in flat_inputs]}")

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Apply the drawn crop to one input (a hook of v2 transforms)."""
        settings = {"size": self.size, "interpolation": self.interpolation, "antialias": True}
        return self._call_kernel(F.resized_crop, inpt, *(params[side] for side in CROP_SIDES), **settings)

    def _forward_with(self, inputs: tuple[Any, ...], guide: tv_tensors.TVTensor) -> Any:
        """Crop ``inputs`` by a box or map that is not to be in the output."""
        *outputs, _ = super().forward(*inputs, guide)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


class LocalizedRandomResizedCrop(_RandomCrop):
    """Crop at random so that the crop keeps at least ``thr`` of a box, then resize.

    A v2 transform: ``crop(image, boxes)`` with a ``tv_tensors.BoundingBoxes`` of one box; further inputs (masks,
    keypoints, labels) go along. Or ``crop(image, box=(x, y, width, height))``, without the box in the output.
    Images are PIL images or tensors. A box that reaches past its image is cut there. Randomness is torch's.

    train.py draws the crops of a whole epoch at once, by the same `sample_crops` and so by the same law; this class
    draws one image's crop when it is called, for other programs' data loading.

    Args:
        size: of the output in pixels, a side or (height, width).
        thr: share of the box that the crop keeps, 0 to 1; negative: the law of RandomResizedCrop, no box is needed.
        mode: "exact" (every crop keeps its share) or "reference" (the published crop, which nearly does).
        scale, ratio: as of `sample_crops`.
        interpolation: of the resizing, antialiased.

    Raises:
        ValueError: on a wrong argument, or when called without an image and exactly one box that has an area in it.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        thr: float,
        mode: str = "exact",
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: v2.InterpolationMode = v2.InterpolationMode.BILINEAR,
    ) -> None:
        super().__init__(size, interpolation)
        check_settings(thr, mode, scale, ratio)
        self.thr, self.mode, self.scale, self.ratio = thr, mode, tuple(scale), tuple(ratio)

    def forward(self, *inputs: Any, box: Sequence[float] | None = None) -> Any:
        """Crop and resize; ``box`` is (x, y, width, height) in pixels where no BoundingBoxes is among the inputs."""
        if box is None:
            return super().forward(*inputs)
        if not inputs or not _is_image(inputs[0]):
            raise ValueError("box= goes with crop(image, box=...); in a dict or list give a tv_tensors.BoundingBoxes")
        try:
            xywh = np.asarray(box, dtype=np.float64).reshape(1, 4)
        except (TypeError, ValueError):
            raise ValueError(f"box must be four numbers x y width height, got {str(box)[:80]}") from None
        canvas_size = tuple(F.get_size(inputs[0]))
        return self._forward_with(inputs, tv_tensors.BoundingBoxes(xywh, format="XYWH", canvas_size=canvas_size))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
        """Draw the crop for one sample (a hook of v2 transforms)."""
        height, width = F.get_size(next(filter(_is_image, flat_inputs)))
        box = (0, 0, width, height) if self.thr < 0 else _box_inside(_only_box(flat_inputs), (width, height))
        about = np.array([box], float), np.array([(width, height)])
        crop = sample_crops(*about, self.thr, self.mode, self.scale, self.ratio, _torch_rng())[0]
        return dict(zip(CROP_SIDES, crop.tolist(), strict=True))


def _torch_rng() -> np.random.Generator:
    """Return a generator seeded by torch's global one, which a DataLoader seeds in each worker."""
    return np.random.default_rng(int(torch.randint(2**63 - 1, ())))


def _is_image(item: Any) -> bool:
    return isinstance(item, (PIL.Image.Image, tv_tensors.Image)) or type(item) is torch.Tensor


def _only_box(flat_inputs: list[Any]) -> np.ndarray:
    """Return the one box among the inputs, (4,) x y width height; ValueError if there are none or several."""
    boxes = [item for item in flat_inputs if isinstance(item, tv_tensors.BoundingBoxes)]
    if len(boxes) != 1 or boxes[0].shape[-2:] not in ((1, 4), (4,)):
        shapes = [tuple(item.shape) for item in boxes]
        raise ValueError(
            f"LocalizedRandomResizedCrop needs one box an image, got BoundingBoxes of shapes {shapes}; choose one of "
            "several, or give box="
        )
    xywh = F.convert_bounding_box_format(boxes[0], new_format=tv_tensors.BoundingBoxFormat.XYWH)
    return torch.Tensor(xywh).double().reshape(4).numpy()


def _box_inside(box_xywh: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Return the part of a box inside its image of (width, height) pixels.

    Raises:
        ValueError: if nothing is left, or the box seems to be given in shares of the image instead of pixels.
    """
    box, size = box_xywh.tolist(), np.array(image_size)
    inside = clip_boxes(box_xywh, size)
    if not (inside[2:] > 0).all():  # NaN too
        raise ValueError(f"box xywh {box} has no area inside its image of {image_size} (width, height) pixels")
    if (box_xywh[:2] + box_xywh[2:] <= 1).all() and (size >= SHARES_FROM).all():
        raise ValueError(f"box xywh {box} must be in pixels; in shares of the image? multiply by its size")
    return inside


class DinoRandomResizedCrop(_RandomCrop):
    """RandomResizedCrop whose centre is drawn from an image's attention map.

    A v2 transform: one input is an `AttentionMap`; it comes out cropped and resized like the image, to the output's
    size. Boxes, masks, keypoints and labels go along. Or ``crop(image, attention_map=map)``, or ``crop(image, map)``
    with a NumPy array or plain tensor: then the map is not in the output. ``crop(image, None)`` is a plain
    RandomResizedCrop, for an image without a map. Randomness is torch's.

    train.py draws the crops of a whole epoch at once (`training.epoch_crops.MapCrops`), by the same functions and so by
    the same law; this class draws one image's crop when it is called, for other programs' data loading.

    Args:
        size: of the output in pixels, a side or (height, width).
        scale, ratio: as of `sample_crops`.
        temperature: of the softmax that turns the map into a density; None: what is given is a density already. The
            default fits maps that were scaled to [0, 1], as `map_boxes.clean_map` scales them: the largest cell is
            then exp(10), some 22,000 times, as likely as the least one. The published temperature of 2 belongs to
            unscaled attention scores (q·k); on a scaled map it makes the largest cell only 1.65 times as likely,
            hardly another crop than RandomResizedCrop's.
        interpolation: of the resizing, antialiased.

    Raises:
        ValueError: on a wrong argument, or when called without an image and exactly one map, or with a map that
            holds NaN or infinity, or with a density that has a negative value or no mass.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        temperature: float | None = 0.1,
        interpolation: v2.InterpolationMode = v2.InterpolationMode.BILINEAR,
    ) -> None:
        super().__init__(size, interpolation)
        if not 0 < scale[0] <= scale[1] or not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"scale and ratio must be (least, largest), both above 0; got {scale} and {ratio}")
        if temperature is not None and not temperature > 0:
            raise ValueError(f"temperature must be above 0, or None for a map that is a density; got {temperature}")
        self.scale, self.ratio, self.temperature = tuple(scale), tuple(ratio), temperature
        self.plain = v2.RandomResizedCrop(self.size, self.scale, self.ratio, interpolation)

    def forward(self, *inputs: Any, attention_map: np.ndarray | torch.Tensor | None = None) -> Any:
        """Crop and resize; ``attention_map`` (feat_h, feat_w) where no `AttentionMap` is among the inputs."""
        if len(inputs) == 2 and _is_image(inputs[0]) and type(inputs[1]) in (np.ndarray, torch.Tensor, NoneType):
            inputs, attention_map = inputs[:1], inputs[1]
            if attention_map is None:
                return self.plain(inputs[0])
        if attention_map is None:
            return super().forward(*inputs)
        return self._forward_with(inputs, AttentionMap(attention_map))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the crop for one sample (a hook of v2 transforms)."""
        height, width = F.get_size(next(filter(_is_image, flat_inputs)))
        density = _only_map(flat_inputs)
        if self.temperature is not None:
            density = map_to_density(density, self.temperature)
        crop = sample_density_crops(density, (width, height), 1, self.scale, self.ratio, _torch_rng())[0]
        return dict(zip(CROP_SIDES, crop.tolist(), strict=True)) | {"canvas": (height, width)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Apply the drawn crop to one input; a map is first enlarged to its image's size."""
        if not isinstance(inpt, AttentionMap):
            return super().transform(inpt, params)
        cells = inpt.as_subclass(torch.Tensor).reshape(1, 1, *inpt.shape[-2:]).float()
        pixels = interpolate(cells, params["canvas"], mode="bilinear")
        return AttentionMap(super().transform(pixels, params).reshape(*inpt.shape[:-2], *self.size))


def _only_map(flat_inputs: list[Any]) -> np.ndarray:
    """Return the one finite map among the inputs, (feat_h, feat_w); ValueError if there is no such map, or several."""
    maps = [item for item in flat_inputs if isinstance(item, AttentionMap)]
    if len(maps) != 1:
        raise ValueError(f"DinoRandomResizedCrop needs one AttentionMap an image, got {len(maps)}")
    cells = np.asarray(maps[0].as_subclass(torch.Tensor).cpu())
    cells = cells[0] if cells.ndim == 3 and len(cells) == 1 else cells
    if cells.ndim != 2 or not np.isfinite(cells).all():
        raise ValueError(f"attention_map must be (feat_h, feat_w) finite numbers, got a shape of {cells.shape}")
    return cells
