"""Decoded and resized images of one shape, in batches, for loader processes."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch.utils.data import Dataset

from localized_crops.files import UserError
from readers.images import read_image


class Batch(NamedTuple):
    """Images of one shape that go through the network together."""

    rows: list[int]  # of the data set
    height: int  # of the network's input, pixels
    width: int


class BatchImages(Dataset):
    """Whole batches of decoded and resized images."""

    def __init__(
        self, batches: Sequence[Batch], paths: Sequence[Path], patch: tuple[int, int], autocontrast: bool
    ) -> None:
        """Keep the image files by row; an image smaller than ``patch`` (height, width) is an error."""
        self.batches, self.paths, self.patch, self.autocontrast = batches, paths, patch, autocontrast

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, list[str | None]]:
        """Return images (B, H, W, 3) uint8 of the batch, zeros where one failed, and the error of each (None: none)."""
        batch = self.batches[number]
        pixels = np.zeros((len(batch.rows), batch.height, batch.width, 3), dtype=np.uint8)
        errors = []
        for place, row in zip(pixels, batch.rows, strict=True):
            try:
                place[:] = self.read(self.paths[row], batch)
                errors.append(None)
            except Exception as error:  # one image must not stop the others; decoders raise many kinds
                errors.append(" ".join(str(error).split())[:300] or type(error).__name__)
        return torch.from_numpy(pixels), errors

    def read(self, path: Path, batch: Batch) -> np.ndarray:
        """Return one image as the network's input, (H, W, 3) uint8."""
        image = read_image(path)
        if image.height < self.patch[0] or image.width < self.patch[1]:
            raise UserError(
                f"{path}: {image.width} x {image.height} pixels, smaller than one patch of {max(self.patch)}"
            )
        image = image.resize((batch.width, batch.height), PIL.Image.Resampling.BICUBIC)
        return np.asarray(PIL.ImageOps.autocontrast(image) if self.autocontrast else image)
