"""Candidate boxes cut out of their images, in batches, for loader processes."""

from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch.utils.data import Dataset

from localized_crops.boxes import expand_boxes
from localized_crops.files import UserError
from readers.data_set import DataSet
from readers.images import read_image


class CutOuts(Dataset):
    """Boxes of whole units, cut out of their images and resized."""

    def __init__(
        self, units: list[list[int]], data: DataSet, boxes: dict[int, np.ndarray], padding: float, size: int
    ) -> None:
        """Keep the units' images: ``boxes`` is row -> (N, 4); ``padding`` a share of a box's side on each side."""
        self.units = [
            [
                (data.ids[row].item(), data.paths[row], boxes[row], data.image_sizes[row])
                for row in rows
                if len(boxes[row])
            ]
            for rows in units
        ]
        self.padding, self.size = padding, size

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, dict[str, str]]:
        """Return the cut-outs of a unit, (B, 3, size, size) uint8; and why images have none, by id."""
        crops, errors = [torch.zeros(0, 3, self.size, self.size, dtype=torch.uint8)], {}
        for image_id, path, boxes, image_size in self.units[number]:
            try:
                crops.append(self._crops(path, boxes, image_size))
            except UserError as error:
                crops.append(crops[0].new_zeros(len(boxes), 3, self.size, self.size))
                errors[str(image_id)] = str(error)
        return torch.cat(crops), errors

    def _crops(self, path: Path, boxes: np.ndarray, image_size: np.ndarray) -> torch.Tensor:
        image = read_image(path)
        made = np.zeros((len(boxes), self.size, self.size, 3), dtype=np.uint8)
        padded = expand_boxes(boxes, np.tile(image_size, (len(boxes), 1)), self.padding)
        for place, (x, y, width, height) in zip(made, padded.tolist(), strict=True):
            left, top = int(x), int(y)
            crop = image.crop((left, top, max(left + 1, round(x + width)), max(top + 1, round(y + height))))
            place[:] = crop.resize((self.size, self.size), PIL.Image.Resampling.BILINEAR)
        return torch.from_numpy(made).permute(0, 3, 1, 2)
