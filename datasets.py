"""Data sets in CUB-200-2011's file format: reading and checking them, their images, the loaders.

Pixels and boxes: boxes are in the stored pixel grid, as CUB's are, so an EXIF orientation is not applied. Ids and
classes are taken as they are in the files (neither need be contiguous); labels count the classes that classes.txt
names, in its order.
"""

import hashlib
import json
import math
import multiprocessing.connection
import multiprocessing.context
import os
import shutil
import signal
import tarfile
import urllib.error
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import PIL.Image
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets.utils import check_integrity, download_url
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

import toybirds
from boxes import boxes_for_images, center_boxes, clip_boxes, coverage, crops_to_xywh, whole_image_boxes
from image_cache import ImageCache
from utils import UserError, read_text, user_errors, whole_file

DEFAULT_ROOTS = {"toybirds": "data/toybirds", "cub": "data/CUB_200_2011"}
CUB_URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1"
CUB_ARCHIVE, CUB_MD5 = "CUB_200_2011.tgz", "97eceeb196236b17998738112f37df78"
TRAIN_SHARE = 0.7  # of the 70/30 split
LARGEST_PIXEL = 1e9  # coordinate; farther than any image reaches
# Such images are refused here, by their size: a filter set for each image would be undone by other threads.
warnings.filterwarnings("ignore", category=PIL.Image.DecompressionBombWarning)


@dataclass(frozen=True)
class DataSet:
    """What the files of a data set say, one row per image, in the order of images.txt."""

    name: str
    root: Path
    ids: np.ndarray  # (N,) int64, as in images.txt
    paths: list[Path]
    labels: np.ndarray  # (N,) int64, 0 to C - 1
    class_names: list[str]
    boxes: np.ndarray  # (N, 4) float64, x y width height in stored pixels, clipped to the image
    split: np.ndarray  # (N,) "train" | "val" | "test"
    image_sizes: np.ndarray  # (N, 2) int64, width height as stored
    clipped: int = 0  # boxes that reached past their image
    unreadable: dict[int, str] = field(default_factory=dict)  # image id -> why; these images have no row

    def rows(self, split: str) -> np.ndarray:
        """Return the row numbers of one split."""
        return np.flatnonzero(self.split == split)

    def fingerprint(self) -> str:
        """Return a hash of which images these are: ids, file names, sizes, in any order."""
        images = (self.root / "images").resolve()
        names = [path.relative_to(images).as_posix() for path in self.paths]
        rows = sorted(zip(self.ids.tolist(), names, self.image_sizes.tolist(), strict=True))
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def read_dataset(
    name: str,
    root: Path | str | None = None,
    *,
    split: str = "official",
    val_fraction: float = 0.0,
    download: bool = False,
    check: bool = False,
    keep_going: bool = False,
) -> DataSet:
    """Read and check a data set; ToyBirds is drawn when its folder is missing.

    Args:
        name: "toybirds" or "cub" (any folder in CUB's file format).
        root: the folder with images.txt; None: the usual one under data/.
        split: "official", or "70/30": train filled up with the first test images in file order.
        val_fraction: share of each class's training images that becomes the split "val": the last ones in file order.
        download: fetch the CUB archive when the folder is missing.
        check: decode every image.
        keep_going: leave out images that are no images, into ``unreadable``, instead of raising.

    Raises:
        UserError: on any fault of the files, naming file, line or image.
    """
    root = Path(root or DEFAULT_ROOTS[name])
    if name == "toybirds":
        with user_errors(FileExistsError):  # another version of the drawings lies there
            toybirds.write_toybirds(root)
    elif not root.exists():
        _make_cub(root, download)
    data = _read_tables(name, root, keep_going)
    faults = unreadable_images(data) if check else []
    if faults:
        raise UserError(f"{len(faults)} images cannot be read, the first: {faults[0]} (check_dataset.py lists all)")
    return hold_out(fill_train(data) if split == "70/30" else data, val_fraction)


def _make_cub(root: Path, download: bool) -> None:
    if not download:
        raise UserError(
            f"{root}: there is no such folder; give dataset.root, or dataset.download=true to fetch CUB-200-2011 "
            "(1.1 GB, non-commercial research use)"
        )
    download_cub(root)


# --- the text files -----------------------------------------------------------------------------------------------


def _read_tables(name: str, root: Path, keep_going: bool) -> DataSet:
    images = dict(_read_rows(root / "images.txt", _text))
    classes = dict(_read_rows(root / "classes.txt", _text))
    class_of = _read_for(root / "image_class_labels.txt", images, _whole_number)
    raw_boxes = _read_for(root / "bounding_boxes.txt", images, _box)
    is_train = _read_for(root / "train_test_split.txt", images, _flag)
    paths = {image_id: _image_path(root, image_id, relative) for image_id, relative in images.items()}
    sizes, unreadable = _read_sizes(paths, keep_going)
    paths, class_of, raw_boxes, is_train = (
        {image_id: rows[image_id] for image_id in sizes} for rows in (paths, class_of, raw_boxes, is_train)
    )
    sizes = np.array(list(sizes.values()), dtype=np.int64).reshape(-1, 2)
    boxes = _clip_checked(root / "bounding_boxes.txt", list(paths), raw_boxes, sizes)
    return DataSet(
        name=name,
        root=root,
        ids=np.array(list(paths), dtype=np.int64),
        paths=list(paths.values()),
        labels=_labels(root, classes, class_of),
        class_names=list(classes.values()),
        boxes=boxes,
        split=np.where(list(is_train.values()), "train", "test").astype("<U5"),
        image_sizes=sizes,
        clipped=int((np.abs(boxes - _as_array(raw_boxes)) > 1e-6).any(1).sum()),
        unreadable=unreadable,
    )


def _as_array(raw_boxes: dict[int, tuple]) -> np.ndarray:
    return np.array(list(raw_boxes.values()), dtype=np.float64).reshape(-1, 4)


def _read_rows(path: Path, parse: Callable[[list[str]], object]) -> Iterator[tuple[int, object]]:
    """Yield (id, parsed rest) of each line; an id stands once."""
    if not path.exists():
        raise UserError(f"{path}: missing; dataset.root must be a folder in CUB-200-2011's file format")
    seen = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        try:
            key, value = _whole_number(fields[:1]), parse(fields[1:])
        except ValueError as error:
            raise UserError(f"{path}:{number}: {line[:80]!r}: {error}") from None
        if key in seen:
            raise UserError(f"{path}:{number}: id {key} stands in line {seen[key]} already; remove one")
        seen[key] = number
        yield key, value
    if not seen:
        raise UserError(f"{path}: is empty")


def _read_for(path: Path, images: dict[int, str], parse: Callable) -> dict[int, object]:
    """Read a file that has one row for each image, into the order of images.txt."""
    rows = dict(_read_rows(path, parse))
    for one, other, problem in ((images, rows, "has no row here"), (rows, images, "is not in images.txt")):
        lacking = next((key for key in one if key not in other), None)
        if lacking is not None:
            raise UserError(f"{path}: image id {lacking} {problem}; the files must name the same images")
    return {key: rows[key] for key in images}


def _text(fields: list[str]) -> str:
    if not fields:
        raise ValueError("a name is missing after the id")
    return " ".join(fields)


def _whole_number(fields: list[str]) -> int:
    if len(fields) != 1 or not (fields[0].isascii() and fields[0].isdigit()) or len(fields[0]) > 18:
        raise ValueError("a whole number was expected")
    return int(fields[0])


def _flag(fields: list[str]) -> bool:
    if fields not in (["0"], ["1"]):
        raise ValueError("1 (train) or 0 (test) was expected")
    return fields == ["1"]


def _box(fields: list[str]) -> tuple[float, float, float, float]:
    try:
        x, y, width, height = (float(field) for field in fields)
    except ValueError:
        raise ValueError("four numbers x y width height were expected") from None
    if not all(map(math.isfinite, (x, y, width, height))):
        raise ValueError("the box has a number that is not finite")
    if max(map(abs, (x, y, width, height))) > LARGEST_PIXEL:
        raise ValueError("the box has a number that lies outside any image")
    if width <= 0 or height <= 0:
        raise ValueError("the box has no area")
    return x, y, width, height


def _labels(root: Path, classes: dict[int, str], class_of: dict[int, int]) -> np.ndarray:
    number_of = {class_id: number for number, class_id in enumerate(classes)}
    for image_id, class_id in class_of.items():
        if class_id not in number_of:
            raise UserError(
                f"{root / 'image_class_labels.txt'}: image id {image_id} has class {class_id}, "
                "which classes.txt does not name"
            )
    return np.array([number_of[class_id] for class_id in class_of.values()])


def _image_path(root: Path, image_id: int, relative: str) -> Path:
    if "\0" in relative:
        raise UserError(f"{root / 'images.txt'}: image id {image_id}: {relative!r} is no file name")
    folder = (root / "images").resolve()
    path = Path(os.path.normpath(folder / relative))
    if not path.is_relative_to(folder) or path == folder:
        raise UserError(f"{root / 'images.txt'}: image id {image_id}: {relative!r} leaves the images folder")
    return path


def _read_sizes(paths: dict[int, Path], keep_going: bool) -> tuple[dict[int, tuple[int, int]], dict[int, str]]:
    """Return (width, height) by image id, and with ``keep_going`` what is wrong with the images that have none."""

    def size_or_fault(path: Path) -> tuple[int, int] | str:
        try:
            return _image_size(path)
        except UserError as error:
            if not keep_going:
                raise
            return str(error)

    with ThreadPoolExecutor(16) as pool:  # headers only: the time goes to the disk
        found = dict(zip(paths, pool.map(size_or_fault, paths.values()), strict=True))
    faults = {image_id: fault for image_id, fault in found.items() if isinstance(fault, str)}
    return {image_id: size for image_id, size in found.items() if image_id not in faults}, faults


def _clip_checked(path: Path, ids: list[int], raw_boxes: dict[int, tuple], sizes: np.ndarray) -> np.ndarray:
    boxes = clip_boxes(_as_array(raw_boxes), sizes)
    outside = np.flatnonzero((boxes[:, 2:] <= 0).any(1))
    if len(outside):
        image_id, size = ids[outside[0]], tuple(sizes[outside[0]].tolist())
        raise UserError(f"{path}: image id {image_id}: box {raw_boxes[image_id]} lies outside the image, {size}")
    return boxes


# --- splits -------------------------------------------------------------------------------------------------------


def fill_train(data: DataSet) -> DataSet:
    """Return the data set with the first test images, in file order, moved to train until it holds 70%."""
    wanted = math.ceil(TRAIN_SHARE * len(data.ids))
    moved = data.rows("test")[: max(0, wanted - len(data.rows("train")))]
    return _with_split(data, moved, "train")


def hold_out(data: DataSet, val_fraction: float) -> DataSet:
    """Return the data set with the last ``val_fraction`` of each class's training images as split "val"."""
    train, moved = data.rows("train"), []
    for label in range(len(data.class_names)):
        rows = train[data.labels[train] == label]
        moved.extend(rows[len(rows) - round(val_fraction * len(rows)) :])
    return _with_split(data, moved, "val")


def _with_split(data: DataSet, rows: Iterable[int], name: str) -> DataSet:
    split = data.split.copy()
    split[np.asarray(rows, dtype=np.int64)] = name
    return replace(data, split=split)


# --- images -------------------------------------------------------------------------------------------------------


def _open_image(path: Path) -> PIL.Image.Image:
    try:
        image = PIL.Image.open(path)
    except FileNotFoundError:
        raise UserError(f"{path}: the image is missing; restore it or remove its rows from the text files") from None
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        raise _bomb(path) from None
    except Exception as error:  # Pillow's readers raise errors of many unrelated kinds
        raise UserError(f"{path}: not an image that can be read ({_reason(error, path)}); restore it") from None
    if math.prod(image.size) > PIL.Image.MAX_IMAGE_PIXELS:  # up to twice as many, Pillow only warns
        image.close()
        raise _bomb(path)
    return image


def _bomb(path: Path) -> UserError:
    return UserError(f"{path}: declares more pixels than {PIL.Image.MAX_IMAGE_PIXELS:,}; refused")


def _reason(error: Exception, path: Path) -> str:
    reason = str(error).replace(repr(str(path)), "it")
    return reason.splitlines()[0][:100] if reason else type(error).__name__


def _image_size(path: Path) -> tuple[int, int]:
    with _open_image(path) as image:
        return image.size


def read_image(path: Path) -> PIL.Image.Image:
    """Return an image as 8-bit RGB in its stored pixel grid (EXIF orientation is not applied, boxes refer to this).

    Grey, palette and CMYK are converted; 16-bit grey is scaled to 8 bits; transparency is dropped.

    Raises:
        UserError: if it is missing, truncated or no image.
    """
    with _open_image(path) as image:
        try:
            image.load()
        except Exception as error:  # see _open_image
            raise UserError(f"{path}: the image is damaged ({_reason(error, path)}); restore it") from None
        if image.mode.startswith("I"):  # 16 bits a pixel; convert("RGB") would cut off at 255
            return PIL.Image.fromarray((np.asarray(image, dtype=np.uint32) // 257).astype(np.uint8)).convert("RGB")
        if image.mode == "P" and "transparency" in image.info:
            return image.convert("RGBA").convert("RGB")
        return image.convert("RGB")


def unreadable_images(data: DataSet) -> list[str]:
    """Decode every image and return one line for each that fails."""

    def fault(path: Path) -> str | None:
        try:
            read_image(path)
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow's decoders let go of the interpreter's lock
        faults = tqdm(pool.map(fault, data.paths), total=len(data.paths), desc="checking images", unit=" images")
        return [line for line in faults if line]


# --- boxes of a source --------------------------------------------------------------------------------------------


def source_boxes(source: str, data: DataSet) -> tuple[np.ndarray, int]:
    """Return the boxes that ``source`` names, (N, 4) x y width height, and for how many images it has none.

    Args:
        source: "gt" (of the data set), "center", "image", or the path of a box JSON. An image without a box in the
            JSON gets the whole image.
        data: the data set, in whose order the boxes come.

    Raises:
        UserError: if the file is unusable or was made for other images.
    """
    if source == "gt":
        return data.boxes, 0
    if source == "center":
        return center_boxes(data.image_sizes), 0
    if source == "image":
        return whole_image_boxes(data.image_sizes), 0
    return boxes_for_images(source, data.ids, data.image_sizes)


# --- torch data sets and loaders ----------------------------------------------------------------------------------


MOST_EPOCHS_AT_ONCE = 32  # share the reading of a density map
CROPS_AT_ONCE = 2**18  # 8 MB of them stay in a worker's memory


class Crops(Protocol):
    """Draws the training crops of N images."""

    def draw(self, rngs: Sequence[np.random.Generator]) -> np.ndarray:
        """Draw the crops of some epochs, of which each has its ``rng``: (E, N, 4) int64 top left height width."""


class Batch(NamedTuple):
    """Training images of one step, or this process's part of them."""

    images: torch.Tensor  # (B, 3, size, size) uint8, not yet flipped
    labels: torch.Tensor  # (B,) int64
    flips: torch.Tensor  # (B,) bool, which images to flip
    coverage: torch.Tensor  # (B,) float64, the share of the true box that each crop keeps
    real: int  # how many of the B images count; the rest fill up a part that would be too small for BatchNorm
    whole: int  # images of the whole step, over all its parts


class TrainImages(Dataset):
    """Batches of randomly cropped training images.

    What is drawn depends on (seed, epoch) and the training images alone, not on batches and workers: a worker draws
    the crops and flips of several whole epochs at once, when the first batch of one of them is asked for.
    """

    def __init__(
        self,
        data: DataSet,
        rows: np.ndarray,
        crops: Crops,
        transform: Callable,
        *,
        flip: float,
        seed: int,
        decoded: ImageCache | None = None,
    ) -> None:
        """Keep the rows of ``data``.

        Args:
            data: the data set.
            rows: which of its images.
            crops: of these images.
            transform: (image, crop, seed) -> (3, size, size) uint8.
            flip: probability of a horizontal flip.
            seed: of all that is drawn.
            decoded: the images, decoded already; None: their files are read.
        """
        self.paths, self.decoded = [data.paths[row] for row in rows], decoded
        self.ids, self.labels, self.true_boxes = data.ids[rows], data.labels[rows], data.boxes[rows]
        self.crops, self.transform, self.flip, self.seed = crops, transform, flip, seed
        self.epochs_at_once = max(1, min(MOST_EPOCHS_AT_ONCE, CROPS_AT_ONCE // len(rows)))
        self.block: int | None = None  # of so many epochs, whose crops and flips are drawn

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: "BatchKey") -> Batch:
        """Return the batch of a key that ``EpochBatches`` gives."""
        epoch, rows, real, whole = key
        block, place = divmod(epoch, self.epochs_at_once)
        if block != self.block:
            self._draw(block)
        crops = self.drawn[place, rows]
        ids, shown = self.ids[rows].tolist(), crops.tolist()
        if self.decoded is not None:
            shown = [self.decoded.crop_as_stored(*one) for one in zip(ids, shown, strict=True)]
        loaded = [load_image(self.paths[row], image_id, self.decoded) for row, image_id in zip(rows, ids, strict=True)]
        seeds = [partial(draw_seed, self.seed, epoch, image_id) for image_id in ids]
        images = [self.transform(*one) for one in zip(loaded, shown, seeds, strict=True)]
        kept = coverage(crops_to_xywh(crops), self.true_boxes[rows])
        about = (torch.from_numpy(values) for values in (self.labels[rows], self.flips[place, rows], kept))
        return Batch(stack_images(images), *about, real, whole)

    def _draw(self, block: int) -> None:
        epochs = range(block * self.epochs_at_once, (block + 1) * self.epochs_at_once)
        rngs = [np.random.default_rng([self.seed, epoch]).spawn(2) for epoch in epochs]
        self.drawn, self.block = self.crops.draw([crops for crops, _ in rngs]), block
        self.flips = np.stack([flips.random(len(self)) < self.flip for _, flips in rngs])


def load_image(path: Path, image_id: int, decoded: ImageCache | None) -> torch.Tensor:
    """Return an image, (3, H, W) uint8 in channels-last order, from the cache of decoded images or from its file."""
    return pil_to_tensor(read_image(path)) if decoded is None else decoded[image_id]


def stack_images(images: list[torch.Tensor]) -> torch.Tensor:
    """Return images (3, H, W) as one batch (B, 3, H, W), in channels-last order as they are."""
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def draw_seed(seed: int, epoch: int, image_id: int) -> int:
    """Return the seed of the colours of one image in one epoch."""
    return int(np.random.SeedSequence([seed, epoch, image_id]).generate_state(1, np.uint64)[0]) >> 1


BatchKey = tuple[int, list[int], int, int]  # epoch, rows, how many of them count, images of the whole step


class EpochBatches(Sampler):
    """Batches, shuffled anew each epoch by (seed, epoch) alone, and each cut into parts: so many for each process."""

    def __init__(
        self, size: int, batch_size: int, seed: int, *, parts: int = 1, rank: int = 0, world_size: int = 1
    ) -> None:
        """Plan the batches of one process.

        Args:
            size: images.
            batch_size: images of a step, over all processes and parts.
            seed: of the order.
            parts: into how many each process cuts its share of a step.
            rank, world_size: which of how many processes this is.
        """
        self.size, self.batch_size, self.seed, self.epoch = size, batch_size, seed, 0
        self.parts, self.rank, self.world_size = parts, rank, world_size

    def __len__(self) -> int:
        return len(self._starts()) * self.parts

    def __iter__(self) -> Iterator[BatchKey]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        starts = self._starts()
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


class ViewImages(Dataset):
    """Test images, each in several views."""

    def __init__(
        self,
        data: DataSet,
        rows: np.ndarray,
        boxes: np.ndarray,
        views: list[Callable],
        decoded: ImageCache | None = None,
    ) -> None:
        """Keep the rows of ``data``; ``boxes`` (N, 4), of the whole data set, serve the views that look at a box."""
        self.paths, self.ids, self.decoded = [data.paths[row] for row in rows], data.ids[rows].tolist(), decoded
        self.labels, self.boxes, self.views = data.labels[rows], boxes[rows], views

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[tuple[torch.Tensor, ...], int]:
        """Return the views, each (3, size, size) uint8, and the label."""
        image, box = load_image(self.paths[row], self.ids[row], self.decoded), self.boxes[row]
        if self.decoded is not None:
            box = self.decoded.box_as_stored(self.ids[row], box)
        return tuple(view(image, box) for view in self.views), int(self.labels[row])


class Loader(DataLoader):
    """A DataLoader that always says so when a worker died, in the words that ``utils.DEAD_WORKER`` knows."""

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches.

        Raises:
            RuntimeError: if a worker died.
        """
        batches = super().__iter__()
        try:
            yield from batches
        except (OSError, EOFError) as error:  # a broken connection: it died while it handed a batch over
            dead = _ended(getattr(batches, "_workers", []))
            if not dead:
                raise
            raise RuntimeError(f"DataLoader worker (pid(s) {', '.join(dead)}) exited unexpectedly") from error


def _ended(workers: list[Any]) -> list[str]:
    """Return the pids of the processes that have ended; one whose connection broke ends within the second."""
    ended = multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=1.0)
    return [str(worker.pid) for worker in workers if worker.sentinel in ended]


def build_loader(dataset: Dataset, *, num_workers: int, pin_memory: bool, **batches) -> DataLoader:
    """Build a loader with spawn workers that live as long as it and end with it, never of Ctrl-C by themselves.

    Args:
        dataset: what to load.
        num_workers: processes; 0: this one.
        pin_memory: for copies to a GPU.
        **batches: batch_size; or None and a sampler whose items are batches.
    """
    return Loader(
        dataset,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        multiprocessing_context=_WorkerContext() if num_workers else None,
        worker_init_fn=_use_one_thread,
        generator=torch.Generator().manual_seed(0),  # else it draws from the model's random numbers, once or every
        # epoch, as there are workers or not: a resumed run would drop out other features than an unbroken one
        **batches,
    )


class _Worker(multiprocessing.context.SpawnProcess):
    """A spawned process to which Ctrl-C, sent to all processes of a terminal, is nothing: its parent ends it."""

    def start(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the new process inherits it
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Flag:
    """A multiprocessing.Event without its lock, which a worker that is killed may hold for ever.

    torch's loader sets one to end its workers; none waits for it.
    """

    def __init__(self, context: multiprocessing.context.SpawnContext) -> None:
        self._value = context.RawValue("b", 0)

    def set(self) -> None:
        self._value.value = 1

    def is_set(self) -> bool:
        return bool(self._value.value)


class _WorkerContext(multiprocessing.context.SpawnContext):
    Process = _Worker

    def Event(self) -> _Flag:  # noqa: N802 - multiprocessing's name
        return _Flag(self)


def _use_one_thread(_worker: int) -> None:
    torch.set_num_threads(1)  # as many workers as cores already


# --- CUB-200-2011 -------------------------------------------------------------------------------------------------


def download_cub(root: Path) -> None:
    """Fetch, check and unpack CUB-200-2011 to ``root``; an archive that lies beside it is used.

    Raises:
        UserError: if it cannot be fetched or is not the official archive.
    """
    archive = root.parent / CUB_ARCHIVE
    if not archive.exists():
        _fetch(CUB_URL, archive)
    if not check_integrity(str(archive), CUB_MD5):
        raise UserError(f"{archive}: not the official archive (md5 is not {CUB_MD5}); remove it and try again")
    unpack(archive, root)


def _fetch(url: str, path: Path) -> None:
    """Fetch a file, whole or not at all."""
    with whole_file(path) as scratch:
        try:
            scratch.unlink(missing_ok=True)  # torchvision leaves a file that is there as it is
            download_url(url, str(scratch.parent), scratch.name)
        except (urllib.error.URLError, OSError, RuntimeError) as error:
            raise UserError(f"{url}: cannot be fetched ({error}); fetch it by hand to {path}") from None


def unpack(archive: Path, root: Path) -> None:
    """Unpack the folder CUB_200_2011 of the archive as ``root``, whole or not at all.

    Raises:
        UserError: if a member would leave the folder, or the archive is damaged or has no such folder.
    """
    scratch = root.with_name(f"{root.name}.partial-{os.getpid()}")
    try:
        with tarfile.open(archive) as tar:
            members = tqdm(tar, desc="unpacking", unit=" files", mininterval=1.0)
            tar.extractall(scratch, members=members, filter="data")  # refuses members that leave the folder
        os.replace(scratch / "CUB_200_2011", root)
    except (tarfile.TarError, EOFError, FileNotFoundError) as error:
        raise UserError(f"{archive}: cannot be unpacked ({error}); remove it and fetch it again") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
