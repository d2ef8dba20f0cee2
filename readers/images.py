"""How one image file is read."""

import contextlib
import math
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
from tqdm import tqdm

from localized_crops.files import DiskError, UserError, refuse_special, whole_file
from localized_crops.image_ids import Rows
from readers.data_set import ImagePaths, UprightPath
from utils import batched, file_stats

# Formats that are tried, whatever a file is called: Pillow would start Ghostscript for an EPS file named .jpg. (The two
# pictures of an MPO are opened as JPEG.)
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm"}
MOST_HEADERS = 20_000  # images; the headers of more, some 60 µs each, are kept in a file
ORIENTATION = 0x0112  # EXIF tag: 1 is upright, of 5 to 8 width and height are swapped

# Such images are refused here, by their size: a filter set for each image would be undone by other threads.
warnings.filterwarnings("ignore", category=PIL.Image.DecompressionBombWarning)


def _open_image(path: Path) -> PIL.Image.Image:
    refuse_special(path)
    try:
        image = PIL.Image.open(path, formats=FORMATS)
        if math.prod(image.size) > PIL.Image.MAX_IMAGE_PIXELS:  # up to twice as many, Pillow only warns
            image.close()
            raise PIL.Image.DecompressionBombError
    except FileNotFoundError:
        raise UserError(f"{path}: the image is missing; restore it or remove its rows from the text files") from None
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        raise UserError(f"{path}: declares more pixels than {PIL.Image.MAX_IMAGE_PIXELS:,}; refused") from None
    except Exception as error:  # Pillow's readers raise errors of many unrelated kinds
        raise UserError(f"{path}: not an image that can be read ({_reason(error, path)}); restore it") from None
    return image


def _reason(error: Exception, path: Path) -> str:
    reason = str(error).replace(repr(str(path)), "it")
    return reason.splitlines()[0][:100] if reason else type(error).__name__


def _orientation(image: PIL.Image.Image) -> int:
    """Return the EXIF orientation of an image whose pixels were not read yet; 1 where its header says none."""
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1  # Pillow turns a TIFF itself; for a PNG it would decode the pixels to look behind them
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF data: Pillow raises errors of many kinds
        return 1


def image_size(path: Path) -> tuple[int, int, bool]:
    """Return width and height, of an `UprightPath` upright, and whether the EXIF orientation is another than upright.

    Raises:
        UserError: if it is missing or no image.
    """
    with _open_image(path) as image:
        orientation = _orientation(image)
        swapped = isinstance(path, UprightPath) and orientation in range(5, 9)
        return *(image.size[::-1] if swapped else image.size), orientation in range(2, 9)


def image_sizes(
    paths: ImagePaths | Sequence[Path], *, keep_going: bool = False
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Read the headers of all images; those of many are kept in a file in their folder, and read again on a change.

    Args:
        paths: of the N images.
        keep_going: note faults instead of raising.

    Returns:
        Width height (N, 2) int64, 0 where unknown; (N,) bool, whether the EXIF orientation is another than upright;
        and row -> what is wrong with the image.

    Raises:
        UserError: if an image cannot be read.
    """
    faults, headers = {}, np.zeros((len(paths), 3), dtype=np.int64)  # width, height, whether it is turned
    kept = None
    if isinstance(paths, ImagePaths) and len(paths) > MOST_HEADERS:
        kept = Path(paths.folder) / f".image_sizes_{'upright' if paths.kind is UprightPath else 'stored'}.npy"
        stats = file_stats(paths.files())
        _read_kept(kept, paths.names, stats, headers)
    todo = np.flatnonzero(headers[:, 0] == 0).tolist()

    def read(rows: tuple[int, ...]) -> None:
        for row in rows:
            try:
                headers[row] = image_size(paths[row])
            except UserError as error:
                if not keep_going:
                    raise
                faults[row] = str(error)

    with (
        ThreadPoolExecutor(16) as pool,  # headers only: the time goes to the disk
        tqdm(total=len(todo), desc="reading image sizes", unit=" images", delay=5, leave=False) as bar,
    ):
        parts = list(batched(todo, 64))
        for part, _ in zip(parts, pool.map(read, parts), strict=True):
            bar.update(len(part))
    if kept is not None and len(todo) > len(faults):
        _keep(kept, paths.names, stats, headers)
    return headers[:, :2], headers[:, 2].astype(bool), dict(sorted(faults.items()))


def _read_kept(file: Path, names: np.ndarray, stats: np.ndarray, headers: np.ndarray) -> None:
    """Fill in the headers (N, 3) of the images that did not change since they were kept."""
    with contextlib.suppress(OSError, ValueError, EOFError, IndexError):  # there is none, or it is damaged
        rows = np.load(file, allow_pickle=False)
        places = Rows(rows["name"]).of(names)
        same = (places >= 0) & (rows["stats"][places] == stats).all(1) & (stats[:, 0] >= 0)
        headers[same] = rows["found"][places[same]]


def _keep(file: Path, names: np.ndarray, stats: np.ndarray, headers: np.ndarray) -> None:
    known = headers[:, 0] > 0
    rows = np.zeros(known.sum(), [("name", names.dtype), ("stats", np.int64, 3), ("found", np.int32, 3)])
    rows["name"], rows["stats"], rows["found"] = names[known], stats[known], headers[known]
    with contextlib.suppress(DiskError), whole_file(file, new_folder=False) as scratch:  # read-only
        np.save(scratch, rows)


def read_image(path: Path) -> PIL.Image.Image:
    """Return an image as 8-bit RGB: an `UprightPath` as its EXIF orientation shows it, another path as it is stored.

    Grey, palette and CMYK are converted; 16-bit grey is scaled to 8 bits; transparency is dropped.

    Raises:
        UserError: if it is missing, truncated or no image, or its pixels are 32-bit numbers, whose range is unknown.
    """
    return read_reduced(path, 1)[0]


def read_reduced(path: Path, reduction: int) -> tuple[PIL.Image.Image, int]:
    """Return an image as `read_image`, a JPEG at a half, quarter or eighth of its sides, and the reduction.

    The JPEG decoder leaves out the high frequencies of each block, which takes a fraction of the time. The sides are
    rounded up: pixel (x, y) stands for the whole pixels from (x, y) times the reduction on.

    Args:
        path: the file.
        reduction: 1, 2, 4 or 8; of other formats 1 is taken.
    """
    with _open_image(path) as image:
        turned = isinstance(path, UprightPath) and _orientation(image) in range(2, 9)
        width, height = image.size
        if turned and (width % reduction or height % reduction):  # the side that is rounded up would come first
            reduction = 1
        if reduction > 1 and not image.draft(None, (width // reduction, height // reduction)):
            reduction = 1
        try:
            image.load()
        except Exception as error:  # see _open_image
            raise UserError(f"{path}: the image is damaged ({_reason(error, path)}); restore it") from None
        return _as_rgb(PIL.ImageOps.exif_transpose(image) if turned else image, image.format, path), reduction


def _as_rgb(image: PIL.Image.Image, file_format: str | None, path: Path) -> PIL.Image.Image:
    if image.mode[0] in "IF":  # more than 8 bits a pixel; convert("RGB") would cut off at 255
        values, is_long = np.asarray(image), image.mode == "F" or (image.mode, file_format) == ("I", "TIFF")
        if is_long or values.min() < 0 or values.max() > 65535:
            raise UserError(f"{path}: its pixels are 32-bit numbers of unknown range; convert it to 8 or 16 bits")
        return PIL.Image.fromarray((values.astype(np.uint32) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def unreadable_images(paths: Sequence[Path]) -> list[str]:
    """Decode every image and return one line for each that fails."""

    def fault(path: Path) -> str | None:
        try:
            read_image(path)
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow's decoders let go of the interpreter's lock
        faults = tqdm(pool.map(fault, paths), total=len(paths), desc="checking images", unit=" images")
        return [line for line in faults if line]
