"""Batches for loader processes: whole images for the mask generators, and candidate boxes cut out of their images.

A module of its own, since loader processes import what their data set needs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch.utils.data import Dataset

from localized_crops.boxes import expand_boxes
from localized_crops.files import UserError
from readers.data_set import DataSet
from readers.images import read_image


def as_it_is(batch: Any) -> Any:
    """Return the batch (images of different sizes cannot be stacked, and stay arrays)."""
    return batch


class ImageBatches(Dataset):
    """Whole batches of decoded images of any size."""

    def __init__(self, units: Sequence[Sequence[int]], data: DataSet) -> None:
        """Keep the rows of each batch."""
        self.units, self.ids, self.paths = units, data.ids, data.paths

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, number: int) -> tuple[list[np.ndarray | None], dict[str, str]]:
        """Return (H, W, 3) uint8 images, None where one cannot be read, and why, by id."""
        images, errors = [], {}
        for row in self.units[number]:
            try:
                images.append(np.asarray(read_image(self.paths[row])))
            except UserError as error:
                images.append(None)
                errors[str(self.ids[row])] = str(error)
        return images, errors


class CutOuts(ImageBatches):
    """Boxes of whole units, cut out of their images and resized."""

    def __init__(
        self, units: Sequence[Sequence[int]], data: DataSet, boxes: Sequence[np.ndarray], padding: float, size: int
    ) -> None:
        """Keep rows of units; ``boxes`` (N, 4) of each image; ``padding`` a share of a box's side on each side."""
        super().__init__(units, data)
        self.image_sizes, self.boxes, self.padding, self.size = data.image_sizes, boxes, padding, size

    def __getitem__(self, number: int) -> tuple[torch.Tensor, dict[str, str]]:
        """Return the cut-outs of a unit, (B, 3, size, size) uint8; and why images have none, by id."""
        crops, errors = [torch.zeros(0, 3, self.size, self.size, dtype=torch.uint8)], {}
        for row in self.units[number]:
            try:
                crops.append(self._crops(row) if len(self.boxes[row]) else crops[0])
            except UserError as error:
                crops.append(crops[0].new_zeros(len(self.boxes[row]), 3, self.size, self.size))
                errors[str(self.ids[row])] = str(error)
        return torch.cat(crops), errors

    def _crops(self, row: int) -> torch.Tensor:
        image, boxes = read_image(self.paths[row]), self.boxes[row]
        pixels = np.zeros((len(boxes), self.size, self.size, 3), dtype=np.uint8)
        padded = expand_boxes(boxes, np.tile(self.image_sizes[row], (len(boxes), 1)), self.padding)
        for place, (x, y, width, height) in zip(pixels, padded.tolist(), strict=True):
            left, top = int(x), int(y)
            crop = image.crop((left, top, max(left + 1, round(x + width)), max(top + 1, round(y + height))))
            place[:] = crop.resize((self.size, self.size), PIL.Image.Resampling.BILINEAR)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)
