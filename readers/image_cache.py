"""The cache of decoded images: every image decoded once, read by all loader workers from one memory-mapped file.

``decoded_images_HASH.bin`` is a 64-byte head and then all images, (H, W, 3) uint8 in C order. The hash is of what the
images were made from, so other images lie in another file, and no process can find other images under the name that
it was given. Workers crop from the map without a copy, and its pages are the system's, shared by all processes. CUB
takes 6.3 GB. A folder in /dev/shm keeps the file in memory.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import PIL.Image
import torch
from tqdm import tqdm

from localized_crops.files import UserError, remove_scratch, whole_file
from localized_crops.image_ids import Rows, ids_to_keys
from readers.data_set import DataSet
from readers.images import read_image
from utils import file_stats, lock_file

MAGIC, HEAD_BYTES = b"lc-imgs2", 64
ROUNDING = 1e-6  # pixels: what float arithmetic adds to a whole number does not cost a pixel
LOCK = ".decoded_images.lock"  # held by the process that builds


class ImageCache:
    """Decoded images by id. Cheap to pickle: a worker maps the file anew, nothing is copied."""

    used: IO | None = None  # the file, locked while this process uses it, so that no other process removes it

    def __init__(
        self, path: Path, key: str, ids: Sequence[int | str], sizes: np.ndarray, image_sizes: np.ndarray
    ) -> None:
        """Open a file of `cached_images`, whose images are made from what ``key`` is a hash of.

        ``ids`` (N,) are in the order of the file; ``sizes`` (N, 2) are width height as stored, ``image_sizes`` those of
        the images themselves.
        """
        self.path, self.key, self.rows, self.sizes = path, key, Rows(ids_to_keys(ids)), sizes
        self.scales = sizes / image_sizes if (sizes != image_sizes).any() else None
        ends = HEAD_BYTES + np.cumsum(3 * sizes.prod(1, dtype=np.int64))
        self.offsets = np.concatenate([[HEAD_BYTES], ends])  # (N + 1,) bytes; the last one is the size of the file
        self._pixels: np.memmap | None = None

    def __getitem__(self, image_id: int | str) -> torch.Tensor:
        """Return an image, (3, H, W) uint8 in channels-last order: a view of the file."""
        if self._pixels is None:
            if not self.is_whole():
                raise UserError(f"{self.path}: was removed or replaced while it was in use; start the run again")
            self._pixels = np.memmap(self.path, np.uint8, "c")  # copy-on-write: no writer can reach the file
        row = self.rows.row(image_id)
        width, height = self.sizes[row].tolist()
        content = self._pixels[self.offsets[row] : self.offsets[row + 1]]
        return torch.from_numpy(content.reshape(height, width, 3)).permute(2, 0, 1)

    def is_whole(self) -> bool:
        """Tell whether the finished file of these images is there."""
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                return file.read(HEAD_BYTES) == _head(self.key) and size == self.offsets[-1]
        except FileNotFoundError:
            return False

    def crop_as_stored(self, image_id: int | str, crop: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """Return a crop, top left height width in pixels of the image, in pixels as stored, rounded outward."""
        if self.scales is None:
            return crop
        row = self.rows.row(image_id)
        scale = self.scales[row, ::-1]
        near = np.floor(np.array(crop[:2]) * scale + ROUNDING)
        far = np.minimum(np.ceil((np.array(crop[:2]) + crop[2:]) * scale - ROUNDING), self.sizes[row, ::-1])
        return tuple(map(int, (*near, *(far - near))))

    def box_as_stored(self, image_id: int | str, box_xywh: np.ndarray) -> np.ndarray:
        """Return a box (4,), x y width height in pixels of the image, in pixels as stored."""
        return box_xywh if self.scales is None else box_xywh * np.tile(self.scales[self.rows.row(image_id)], 2)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pixels": None, "used": None}


def cached_images(folder: Path, data: DataSet, side: int | None = None) -> ImageCache:
    """Return the cache of a data set's images; it is built on first use, and again when an image file changed.

    Several processes may ask at once: one builds, the others wait. A build that is killed leaves nothing under the
    final names.

    Args:
        folder: of the cache; cache files of other images in it are removed unless a process uses them.
        data: whose images are decoded.
        side: largest short side in pixels: larger images are stored reduced to it; None: no limit.

    Raises:
        UserError: if there is no room, or an image cannot be read.
    """
    key, sizes = content_key(data, side), data.image_sizes
    if side is not None:
        sizes = np.round(sizes * np.minimum(1.0, side / sizes.min(1, keepdims=True))).astype(np.int64)
    path = folder / f"decoded_images_{key[:16]}.bin"
    cache = ImageCache(path, key, data.ids.tolist(), sizes, data.image_sizes)
    lock = lock_file(folder / LOCK, wait=False)
    if lock is None:
        print(f"another process decodes the images to {folder}: waiting for it", flush=True)
        lock = lock_file(folder / LOCK)
    with lock:
        remove_scratch(folder)
        if not cache.is_whole():
            _remove_unused(folder)
            _build(cache, data)
        cache.used = open(path, "rb")  # noqa: SIM115 - for as long as the cache lives
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(cache.used, fcntl.LOCK_SH)
    return cache


def content_key(data: DataSet, side: int | None) -> str:
    """Return a hash of the data set, of each file's size and times of change, and of the longest short side."""
    stats = hashlib.sha256(file_stats(data.paths.files()).tobytes()).hexdigest()
    return hashlib.sha256(json.dumps([data.fingerprint(), stats, side]).encode()).hexdigest()


def _remove_unused(folder: Path) -> None:
    """Remove the files of decoded images that no process uses."""
    for path in folder.glob("decoded_images*.bin"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _build(cache: ImageCache, data: DataSet) -> None:
    """Decode all images with all cores and write the file of ``cache``, whole or not at all."""
    size, count, folder = int(cache.offsets[-1]), len(data.paths), cache.path.parent
    free = shutil.disk_usage(folder).free
    print(f"decoding {count} images once: {size / 1e9:.2f} GB to {cache.path}")
    if size > free:
        raise UserError(
            f"{folder}: the decoded images take {size / 1e9:.2f} GB, only {free / 1e9:.2f} are free; make room or set "
            "cache=none"
        )
    with whole_file(cache.path) as scratch, open(scratch, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)  # a full disk shows here, in one line
        os.pwrite(file.fileno(), _head(cache.key), 0)
        columns = cache.offsets[:-1].tolist(), cache.sizes.tolist(), data.image_sizes.tolist()
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow's decoders let go of the interpreter's lock
            jobs = pool.map(partial(_decode, file.fileno()), data.paths, *columns)
            for _ in tqdm(jobs, total=count, desc="decoding", unit=" images", mininterval=1.0):
                pass


def _decode(file: int, path: Path, offset: int, stored: list[int], size: list[int]) -> None:
    """Write an image of ``size``, width height, to its place in the file, resized to ``stored``."""
    image = read_image(path)
    if image.size != tuple(size):
        raise UserError(f"{path}: is {' x '.join(map(str, image.size))} pixels, {size[0]} x {size[1]} were expected")
    if stored != size:
        image = image.resize(tuple(stored), PIL.Image.Resampling.LANCZOS)
    content = memoryview(np.ascontiguousarray(image)).cast("B")
    while content:
        written = os.pwrite(file, content, offset)
        content, offset = content[written:], offset + written


def _head(key: str) -> bytes:
    return (MAGIC + bytes.fromhex(key)).ljust(HEAD_BYTES, b"\0")
