"""Batches of whole images for loader processes; a module of its own, since these import what their data set needs."""

from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from localized_crops.files import UserError
from localized_crops.image_ids import ImageId
from readers.images import read_image


def as_it_is(batch: Any) -> Any:
    """Return the batch (images of different sizes cannot be stacked, and stay arrays)."""
    return batch


class ImageBatches(Dataset):
    """Whole batches of decoded images of any size."""

    def __init__(self, batches: list[list[tuple[ImageId, Path]]]) -> None:
        """Keep (id, path) of the images of each batch."""
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[list[np.ndarray | None], dict[str, str]]:
        """Return (H, W, 3) uint8 images, None where one cannot be read, and why, by id."""
        images, errors = [], {}
        for image_id, path in self.batches[number]:
            try:
                images.append(np.asarray(read_image(path)))
            except UserError as error:
                images.append(None)
                errors[str(image_id)] = str(error)
        return images, errors
