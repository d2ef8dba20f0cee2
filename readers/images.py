"""How one image file is read."""

import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
from tqdm import tqdm

from localized_crops.files import UserError
from readers.data_set import DataSet

# Such images are refused here, by their size: a filter set for each image would be undone by other threads.
warnings.filterwarnings("ignore", category=PIL.Image.DecompressionBombWarning)


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


def image_size(path: Path) -> tuple[int, int]:
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
