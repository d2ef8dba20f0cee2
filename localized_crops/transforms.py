"""Random crops as torchvision v2 transforms: held to a box, or centred by an attention map."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from localized_crops.crops import MODES, sample_crops
from localized_crops.density import map_to_density, sample_density_crops


class LocalizedRandomResizedCrop(v2.Transform):
    """Crop at random so that the crop keeps at least ``thr`` of a box, then resize.

    Called as ``crop(image, boxes)`` with a ``tv_tensors.BoundingBoxes`` of one box, or ``crop(image, box=xywh)``.
    Takes PIL images and tensors; further inputs (masks, boxes) are cropped alike. Randomness is torch's.

    Args:
        size: of the output in pixels, a side or (height, width).
        thr: share of the box kept, 0 to 1; negative: the law of RandomResizedCrop, and no box is needed.
        mode: "exact" (every crop keeps its share) or "reference" (the published crop, which nearly does).
        scale: least and largest area, as shares of the image's.
        ratio: least and largest width / height.
        interpolation: of the resizing, antialiased.

    Raises:
        ValueError: on a wrong argument, or when called without exactly one box.
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
        super().__init__()
        if mode not in MODES or not thr <= 1:
            raise ValueError(f"mode={mode!r} must be one of {', '.join(MODES)}, thr={thr} at most 1")
        self.size = [size, size] if isinstance(size, int) else list(size)
        self.thr, self.mode, self.scale, self.ratio = thr, mode, tuple(scale), tuple(ratio)
        self.interpolation = interpolation

    @staticmethod
    def get_params(
        image_size: tuple[int, int],
        box_xywh: Sequence[float],
        thr: float,
        mode: str = "exact",
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        rng: np.random.Generator | None = None,
    ) -> tuple[int, int, int, int]:
        """Return (top, left, height, width) of one crop of an image of (width, height) pixels."""
        crop = sample_crops(np.array([box_xywh], float), np.array([image_size]), thr, mode, scale, ratio, rng)
        return tuple(crop[0].tolist())

    def forward(self, *inputs, box: Sequence[float] | None = None):
        """Crop and resize; ``box`` is (x, y, width, height) in pixels where no BoundingBoxes is among the inputs."""
        if box is None:
            return super().forward(*inputs)
        *outputs, _ = super().forward(*inputs, as_bounding_boxes(box, F.get_size(inputs[0])))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def make_params(self, flat_inputs: list) -> dict[str, int]:
        """Draw the crop for one sample (the hook of v2 transforms)."""
        height, width = F.get_size(next(item for item in flat_inputs if _is_image(item)))
        box = (0, 0, width, height) if self.thr < 0 else _only_box(flat_inputs)
        rng = np.random.default_rng(int(torch.randint(2**63 - 1, ())))
        params = self.get_params((width, height), box, self.thr, self.mode, self.scale, self.ratio, rng)
        return dict(zip(("top", "left", "height", "width"), params, strict=True))

    def transform(self, inpt, params: dict[str, int]):
        """Apply the drawn crop to one input."""
        return self._call_kernel(
            F.resized_crop, inpt, **params, size=self.size, interpolation=self.interpolation, antialias=True
        )

    def extra_repr(self) -> str:
        """Return the arguments, for printing."""
        return f"size={self.size}, thr={self.thr}, mode={self.mode}, scale={self.scale}, ratio={self.ratio}"


def _is_image(item) -> bool:
    return isinstance(item, (PIL.Image.Image, tv_tensors.Image)) or type(item) is torch.Tensor


def _only_box(flat_inputs: list) -> Sequence[float]:
    boxes = [item for item in flat_inputs if isinstance(item, tv_tensors.BoundingBoxes)]
    if len(boxes) != 1 or boxes[0].shape[-2:] not in ((1, 4), (4,)):
        found = [tuple(item.shape) for item in boxes]
        raise ValueError(f"LocalizedRandomResizedCrop needs one box an image, found BoundingBoxes of shapes {found}")
    xywh = F.convert_bounding_box_format(boxes[0], new_format=tv_tensors.BoundingBoxFormat.XYWH)
    return torch.Tensor(xywh).double().reshape(4).tolist()


def as_bounding_boxes(box_xywh: Sequence[float], canvas_size: Sequence[int]) -> tv_tensors.BoundingBoxes:
    """Wrap one (x, y, width, height) for v2 transforms; ``canvas_size`` is (height, width) of its image."""
    box = torch.as_tensor(np.asarray(box_xywh, dtype=np.float64)).reshape(1, 4)
    return tv_tensors.BoundingBoxes(box, format="XYWH", canvas_size=tuple(canvas_size))


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
