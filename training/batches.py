"""Batches of training crops and of test views."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL.Image import Image
from torch.utils.data import Dataset, Sampler
from torchvision.transforms.v2.functional import pil_to_tensor

from localized_crops.boxes import coverage, crops_to_xywh
from localized_crops.image_ids import compact_ids, listed_ids
from readers.data_set import DataSet
from readers.image_cache import ImageCache
from readers.images import read_image, read_reduced
from training.epoch_crops import Crops, draw_seed
from transforms import TrainTransform

LARGEST_WHOLE = 512  # pixels, short side of a crop: up to this size JPEGs are decoded at full resolution


class Batch(NamedTuple):
    """Training images of one step, or this process's part of them."""

    images: torch.Tensor  # (B, 3, size, size) uint8, not yet flipped
    labels: torch.Tensor  # (B,) int64
    flips: torch.Tensor  # (B,) bool, which images to flip
    coverage: torch.Tensor  # (B,) float64, the share of the reference box that each crop keeps; NaN: no such box
    real: int  # number of images that count; the others pad a part that would be too small for BatchNorm
    whole: int  # images of the whole step, over all its parts


@dataclass(eq=False)
class TrainImages(Dataset):
    """Batches of randomly cropped training images.

    Crops and flips depend on (seed, epoch) and the training images alone, not on batches and workers: a worker draws
    those of a whole epoch when it loads its first batch of the epoch.
    """

    data: InitVar[DataSet]
    rows: InitVar[np.ndarray]  # of ``data``, which images
    crops: Crops  # of these images
    transform: TrainTransform
    _: KW_ONLY
    flip: float  # probability of a horizontal flip
    seed: int  # of crops, flips and colours
    decoded: ImageCache | None = None  # None: files are read
    reference: np.ndarray | None = None  # boxes (N, 4) that coverage is measured on, NaN for none; None: the true boxes
    epoch: int | None = None  # the epoch whose crops and flips were drawn last

    def __post_init__(self, data: DataSet, rows: np.ndarray) -> None:
        self.paths, self.ids, self.labels = data.paths[rows], compact_ids(data.ids[rows]), data.labels[rows]
        if self.ids.dtype.kind == "S" and np.array_equal(self.ids, self.paths.names):
            self.ids = self.paths.names  # one array for a loader process, not two
        if self.reference is None:
            self.reference = data.boxes[rows]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: "BatchKey") -> Batch:
        """Return the batch of a key that ``EpochBatches`` gives."""
        epoch, rows, real, whole = key
        if epoch != self.epoch:
            of_crops, of_flips = np.random.default_rng([self.seed, epoch]).spawn(2)
            self.drawn, self.flips = self.crops.draw(of_crops), of_flips.random(len(self)) < self.flip
            self.epoch = epoch
        crops, images = self.drawn[rows], []
        for row, image_id, crop in zip(rows, listed_ids(self.ids[rows]), crops.tolist(), strict=True):
            seed = partial(draw_seed, self.seed, epoch, image_id)
            images.append(self.transform(*self._load(row, image_id, crop), seed))
        kept = coverage(crops_to_xywh(crops), self.reference[rows])
        labels, flips, kept = (torch.from_numpy(values) for values in (self.labels[rows], self.flips[rows], kept))
        channels_last = torch.stack([image.permute(1, 2, 0) for image in images])
        return Batch(channels_last.permute(0, 3, 1, 2), labels, flips, kept, real, whole)

    def _load(self, row: int, image_id: int | str, crop: list[int]) -> tuple[torch.Tensor | Image, Sequence[float]]:
        """Return an image, at reduced resolution where crop and file are large, and the crop in its pixels."""
        if self.decoded is not None:
            return self.decoded[image_id], self.decoded.crop_as_stored(image_id, crop)
        image, reduction = read_reduced(self.paths[row], reduction_for(crop, self.transform.size))
        if reduction == 1:
            return pil_to_tensor(image), crop
        return image, [side / reduction for side in crop]


def reduction_for(crop: Sequence[int], size: int) -> int:
    """Return the factor, 1, 2, 4 or 8, by which a JPEG may be reduced if a crop shall keep ``size`` pixels a side.

    Images with small crops are not reduced: those of the size of CUB's are decoded fast at full resolution.
    """
    if min(crop[2:]) <= LARGEST_WHOLE:
        return 1
    return next(reduction for reduction in (8, 4, 2, 1) if reduction == 1 or min(crop[2:]) >= reduction * size)


BatchKey = tuple[int, list[int], int, int]  # epoch, rows, number of them that count, images of the whole step


@dataclass(eq=False)
class EpochBatches(Sampler):
    """Batches, shuffled each epoch by (seed, epoch) alone, each cut into parts for accumulation and processes."""

    size: int  # images
    batch_size: int  # images of a step, over all processes and parts
    seed: int
    parts: int = 1  # of one step in each process (gradient accumulation)
    rank: int = 0  # of this process
    world_size: int = 1
    epoch: int = 0  # the one that is to come

    def __len__(self) -> int:
        return len(self._starts()) * self.parts

    def __iter__(self) -> Iterator[BatchKey]:
        order, starts = np.random.default_rng([self.seed, self.epoch]).permutation(self.size), self._starts()
        mine = slice(self.rank * self.parts, (self.rank + 1) * self.parts)
        for start, end in zip(starts, [*starts[1:], self.size], strict=True):
            for part in np.array_split(order[start:end], self.parts * self.world_size)[mine]:
                rows = part.tolist()
                missing = 0 if len(rows) == end - start else max(0, 2 - len(rows))  # BatchNorm needs two
                yield self.epoch, rows + [int(order[start])] * missing, len(rows), end - start

    def _starts(self) -> list[int]:
        """Return where the batches start; one image left over joins the last batch (BatchNorm needs two)."""
        starts = list(range(0, self.size, self.batch_size))
        return starts[:-1] if len(starts) > 1 and self.size - starts[-1] == 1 else starts


@dataclass(eq=False)
class ViewImages(Dataset):
    """Test images, each in several views."""

    data: InitVar[DataSet]
    rows: InitVar[np.ndarray]  # of ``data``, which images
    boxes: np.ndarray  # (N, 4), of all images of ``data``, then of these; for views that look at a box
    views: list[Callable]
    decoded: ImageCache | None = None

    def __post_init__(self, data: DataSet, rows: np.ndarray) -> None:
        self.paths, self.ids, self.labels = data.paths[rows], data.ids[rows].tolist(), data.labels[rows]
        self.boxes = self.boxes[rows]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[tuple[torch.Tensor, ...], int]:
        """Return the views, each (3, size, size) uint8, and the label."""
        if self.decoded is None:
            image, box = pil_to_tensor(read_image(self.paths[row])), self.boxes[row]
        else:
            image, box = self.decoded[self.ids[row]], self.decoded.box_as_stored(self.ids[row], self.boxes[row])
        return tuple(view(image, box) for view in self.views), int(self.labels[row])
