"""The cache of decoded images: every image decoded once, read by all loader workers from one memory-mapped file.

``decoded_images.bin`` is a 64-byte head and then all images, (H, W, 3) uint8 in C order; ``decoded_images.json`` says
where each lies and what they were made from. Workers crop from the map without a copy, and its pages are the system's,
shared by all processes. It lies on disk (CUB: 6.3 GB), or, while runs use it, in memory under /dev/shm.
"""

import atexit
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
import PIL.Image
import torch
from tqdm import tqdm

from localized_crops.files import UserError, load_json, remove_scratch, save_json, whole_file
from utils import lock_file

KIND, VERSION = "localized-crops decoded images", 1
MAGIC, HEAD_BYTES, TOKEN_BYTES = b"lc-imgs1", 64, 16
ROUNDING = 1e-6  # pixels: what float arithmetic adds to a whole number does not cost a pixel
RAM = Path("/dev/shm")
INDEX, DATA = "decoded_images.json", "decoded_images.bin"
LOCK, USED = ".decoded_images.lock", ".decoded_images.used"  # held by the one that builds; by all that use it


class ImageCache:
    """Decoded images by id. Cheap to pickle: a worker maps the file anew, nothing is copied."""

    def __init__(self, path: Path, places: dict[int, list[int]], scales: dict[int, tuple[float, float]]) -> None:
        """Use `cached_images`.

        Args:
            path: the data file.
            places: image id -> offset in bytes, height, width as stored.
            scales: of the images that are stored smaller than they are: image id -> stored width / width, and heights.
        """
        self.path, self.places, self.scales = path, places, scales
        self._pixels: np.memmap | None = None

    def __getitem__(self, image_id: int) -> torch.Tensor:
        """Return an image, (3, H, W) uint8 in channels-last order: a view of the file."""
        if self._pixels is None:
            self._pixels = np.memmap(self.path, np.uint8, "c")  # copy-on-write: no writer can reach the file
        offset, height, width = self.places[image_id]
        content = self._pixels[offset : offset + 3 * height * width]
        return torch.from_numpy(content.reshape(height, width, 3)).permute(2, 0, 1)

    def crop_as_stored(self, image_id: int, crop: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """Return a crop, top left height width in pixels of the image, in pixels as stored, rounded outward."""
        if image_id not in self.scales:
            return crop
        scale, (_, height, width) = np.array(self.scales[image_id][::-1]), self.places[image_id]
        near = np.floor(np.array(crop[:2]) * scale + ROUNDING)
        far = np.minimum(np.ceil((np.array(crop[:2]) + crop[2:]) * scale - ROUNDING), (height, width))
        return tuple(map(int, (*near, *(far - near))))

    def box_as_stored(self, image_id: int, box_xywh: np.ndarray) -> np.ndarray:
        """Return a box (4,), x y width height in pixels of the image, in pixels as stored."""
        return box_xywh * np.tile(self.scales.get(image_id, (1.0, 1.0)), 2)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pixels": None}


def cached_images(
    mode: str,
    folder: Path,
    fingerprint: str,
    ids: Sequence[int],
    paths: Sequence[Path],
    image_sizes: np.ndarray,
    read: Callable[[Path], PIL.Image.Image],
    side: int | None = None,
) -> ImageCache:
    """Return the cache of a data set's images; it is built on first use, and again when an image file changed.

    Several processes may ask at once: one builds, the others wait. A build that is killed leaves nothing under the
    final names.

    Args:
        mode: "disk", or "ram": the same file under /dev/shm, gone when the last process that uses it ends.
        folder: where the cache lies on disk.
        fingerprint: of the data set.
        ids: (N,) image ids.
        paths: of the image files.
        image_sizes: (N, 2) width height in pixels.
        read: decodes an image file as RGB.
        side: images with a longer short side are stored with this one, pixels; None: as they are.

    Raises:
        UserError: if there is no room, or an image cannot be read.
    """
    key = content_key(fingerprint, paths, side)
    stored_sizes = shortened(image_sizes, side)
    if mode == "ram":
        folder = ram_folder(key)
    places = plan(ids, stored_sizes)
    with building(folder):
        if fault(folder, key) is not None:
            build(folder, key, places, paths, image_sizes, read)
    scales = np.asarray(stored_sizes) / np.asarray(image_sizes)
    smaller = {int(ids[row]): tuple(scales[row].tolist()) for row in np.flatnonzero((scales < 1).any(1))}
    return ImageCache(folder / DATA, places, smaller)


def shortened(image_sizes: np.ndarray, side: int | None) -> np.ndarray:
    """Return the sizes (N, 2), width height, with the short sides brought down to ``side`` pixels, ratios kept."""
    sizes = np.asarray(image_sizes)
    if side is None:
        return sizes
    return np.round(sizes * np.minimum(1.0, side / sizes.min(1, keepdims=True))).astype(np.int64)


def content_key(fingerprint: str, paths: Sequence[Path], side: int | None) -> str:
    """Return a hash of the data set, of each file's size and time of change, and of the longest short side."""
    stats = [path.stat() for path in paths]
    content = [fingerprint, [(one.st_size, one.st_mtime_ns) for one in stats], side]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def plan(ids: Sequence[int], image_sizes: np.ndarray) -> dict[int, list[int]]:
    """Return where each image lies: image id -> offset in bytes, height, width."""
    places, offset = {}, HEAD_BYTES
    for image_id, (width, height) in zip(np.asarray(ids).tolist(), np.asarray(image_sizes).tolist(), strict=True):
        places[image_id] = [offset, height, width]
        offset += 3 * height * width
    return places


def total_bytes(places: dict[int, list[int]]) -> int:
    """Return the size of the data file."""
    return HEAD_BYTES + sum(3 * height * width for _, height, width in places.values())


def fault(folder: Path, key: str) -> str | None:
    """Return why the cache in ``folder`` cannot be used for the images of ``key``; None: it can."""
    if not (folder / INDEX).exists():
        return "there is none"
    try:
        content = load_json(folder / INDEX)
    except UserError as error:
        return str(error)
    if not isinstance(content, dict) or (content.get("kind"), content.get("version")) != (KIND, VERSION):
        return "its index is of another kind or version"
    if content.get("key") != key:
        return "it is of other images, or one of them changed"
    data = folder / DATA
    if not data.is_file() or data.stat().st_size != content.get("bytes"):
        return "its data is missing or cut short"
    with open(data, "rb") as file:
        whole = file.read(HEAD_BYTES)[: 8 + TOKEN_BYTES] == _head(key)[: 8 + TOKEN_BYTES]
    return None if whole else "its data is of another build"


def build(
    folder: Path,
    key: str,
    places: dict[int, list[int]],
    paths: Sequence[Path],
    image_sizes: np.ndarray,
    read: Callable[[Path], PIL.Image.Image],
) -> None:
    """Decode all images with all cores and write the cache, data first, whole or not at all."""
    size = total_bytes(places)
    (folder / INDEX).unlink(missing_ok=True)
    (folder / DATA).unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free
    print(f"decoding {len(places)} images once: {size / 1e9:.2f} GB to {folder / DATA}")
    if size > free:
        raise UserError(
            f"{folder}: the decoded images take {size / 1e9:.2f} GB, only {free / 1e9:.2f} are free; make room or set "
            "cache=none"
        )
    with whole_file(folder / DATA) as scratch, open(scratch, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)  # a full disk shows here, in one line
        os.pwrite(file.fileno(), _head(key), 0)
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow's decoders let go of the interpreter's lock
            work = zip(paths, places.values(), np.asarray(image_sizes).tolist(), strict=True)
            jobs = pool.map(lambda job: _decode(file.fileno(), *job, read), work)
            for _ in tqdm(jobs, total=len(places), desc="decoding", unit=" images", mininterval=1.0):
                pass
    save_json(folder / INDEX, {"kind": KIND, "version": VERSION, "key": key, "bytes": size, "images": len(places)})


def _decode(file: int, path: Path, place: list[int], size: list[int], read: Callable[[Path], PIL.Image.Image]) -> None:
    offset, height, width = place
    image = read(path)
    if image.size != tuple(size):
        raise UserError(f"{path}: is {' x '.join(map(str, image.size))} pixels, {size[0]} x {size[1]} were expected")
    if image.size != (width, height):
        image = image.resize((width, height), PIL.Image.Resampling.LANCZOS)
    content = memoryview(np.ascontiguousarray(image)).cast("B")
    while content:
        written = os.pwrite(file, content, offset)
        content, offset = content[written:], offset + written


def _head(key: str) -> bytes:
    return (MAGIC + bytes.fromhex(key)[:TOKEN_BYTES]).ljust(HEAD_BYTES, b"\0")


# --- processes ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def building(folder: Path) -> Iterator[None]:
    """Be the only process that looks whether the cache is there and builds it; say so when another one does.

    Readers are not waited for: the names of the files go, their content lives on for who has it open.
    """
    lock = lock_file(folder / LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if lock is None:
        print(f"another process decodes the images to {folder}: waiting for it", flush=True)
        lock = lock_file(folder / LOCK, fcntl.LOCK_EX)
    with lock:
        remove_scratch(folder)
        yield


def ram_folder(key: str) -> Path:
    """Return the folder in memory of the images of ``key``; it goes when the last process that asked for it ends."""
    remove_stale()
    folder = RAM / f"localized-crops-{os.getuid()}-{key[:16]}"
    atexit.register(remove_if_unused, folder, lock_file(folder / USED, fcntl.LOCK_SH))
    return folder


def remove_if_unused(folder: Path, used: IO) -> None:
    """Remove a cache in memory unless another process uses it."""
    try:
        fcntl.flock(used, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    shutil.rmtree(folder, ignore_errors=True)


def remove_stale() -> None:
    """Remove the caches in memory of processes that were killed."""
    for path in RAM.glob(f"localized-crops-{os.getuid()}-*/{USED}"):
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as used:  # another process may have removed it
            remove_if_unused(path.parent, used)
