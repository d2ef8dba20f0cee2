"""Candidate masks on disk: a folder ``masks_{i}`` with one ``{image_name}.pt`` per image and ``masks_info.json``.

``masks_info.json`` holds, by image name, a list with an entry per mask: bbox (x y width height in pixels of the
original image), area (pixels), predicted_iou, stability_score, point_coords, crop_box; and under ``setup`` what made
them. Only the info is needed to choose boxes; the masks themselves may be left out.
"""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from localized_crops.files import UserError, is_finite_number, load_json, save_json
from localized_crops.image_ids import ImageId
from utils import load_tensors, save_tensors

KIND, VERSION = "localized-crops masks", 1
LONGEST_NAME = 220  # bytes: file systems take 255; the temporary name while a file is written is longer
MAX_PIXELS = 2**40  # of all masks of an image; more is a damaged file


def mask_names(ids: Sequence[ImageId], paths: Sequence[Path]) -> list[str]:
    """Return the name of each image's files: its file name without suffix, as in the original artefacts.

    Where two images of different class folders share that name, all of them get their image id behind it; where that
    is no unused file name, and behind the beginning of a long name, a hash of the image id stands in its place.
    """
    stems = [path.stem for path in paths]
    counts = Counter(stems) + Counter(["setup", "setup"])  # reserved: the key of the setup
    names = [stem if counts[stem] == 1 else f"{stem}.{image_id}" for stem, image_id in zip(stems, ids, strict=True)]
    counts = Counter(names)
    for row, name in enumerate(names):
        if counts[name] > 1 or "/" in name or len(os.fsencode(name)) > LONGEST_NAME:
            start = os.fsencode(stems[row])[: LONGEST_NAME - 20].decode(errors="ignore")
            names[row] = f"{start}.{hashlib.sha256(os.fsencode(str(ids[row]))).hexdigest()[:16]}"
    return names


# --- masks --------------------------------------------------------------------------------------------------------


def save_masks(path: Path, masks: torch.Tensor, store: str) -> None:
    """Write the masks of one image, (N, H, W) bool on the CPU (N may be 0), whole or not at all.

    Args:
        store: "bool" (the tensor as it is, a byte per pixel) or "packed" (a bit per pixel).
    """
    if store == "bool":
        save_tensors(path, masks)
    else:
        count, height, width = masks.shape
        bits = np.packbits(masks.numpy().reshape(count, height * width), axis=1)
        save_tensors(path, {"packed": torch.from_numpy(bits), "shape": list(masks.shape)})


def load_masks(path: Path | str) -> torch.Tensor:
    """Return the masks of one image, (N, H, W) bool, however they were stored.

    Raises:
        UserError: if there is no such file or it holds no masks.
    """
    content = load_tensors(path)
    if torch.is_tensor(content):
        if content.dtype != torch.bool or content.ndim != 3 or not _is_whole(content):
            raise UserError(f"{path}: holds a {content.dtype} tensor of shape {tuple(content.shape)}, not masks")
        return content
    shape, bits = (content.get(key) if isinstance(content, dict) else None for key in ("shape", "packed"))
    is_shape = isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and n >= 0 for n in shape)
    expected = (shape[0], -(-shape[1] * shape[2] // 8)) if is_shape and math.prod(shape) <= MAX_PIXELS else None
    if not torch.is_tensor(bits) or bits.dtype != torch.uint8 or tuple(bits.shape) != expected or not _is_whole(bits):
        raise UserError(
            f"{path}: not masks of generate_mask.py (shape is {str(shape)[:60]}, without packed bits of that shape); "
            "make them again"
        )
    count, height, width = shape
    unpacked = np.unpackbits(bits.numpy(), axis=1, count=height * width)
    return torch.from_numpy(unpacked.reshape(count, height, width).astype(bool))


def _is_whole(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor's elements are all there: a damaged file may declare a few of them as a gigantic one."""
    strided = tensor.layout == torch.strided
    return strided and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return (x, y, width, height) of a mask (H, W) bool that is not empty; it holds every True pixel."""
    left, top, right, bottom = PIL.Image.fromarray(mask).getbbox()
    return left, top, right - left, bottom - top


def mask_record(
    mask: np.ndarray, *, predicted_iou: float, stability_score: float, point_coords: list[list[float]]
) -> dict[str, Any]:
    """Return a record as those of SAM's generator of a mask (H, W) bool; but ``bbox`` holds all pixels of the mask."""
    return {
        "segmentation": mask,
        "area": int(mask.sum()),
        "bbox": list(tight_box(mask)),
        "predicted_iou": predicted_iou,
        "point_coords": point_coords,
        "stability_score": stability_score,
        "crop_box": [0, 0, mask.shape[1], mask.shape[0]],
    }


# --- info ---------------------------------------------------------------------------------------------------------


def info_entry(record: dict[str, Any]) -> dict[str, Any]:
    """Return what masks_info.json keeps of a generator's record: plain numbers and lists, without the mask."""
    return {
        "bbox": [float(n) for n in record["bbox"]],
        "area": int(record["area"]),
        "predicted_iou": float(record["predicted_iou"]),
        "stability_score": float(record["stability_score"]),
        "point_coords": [[float(n) for n in point] for point in record["point_coords"]],
        "crop_box": [float(n) for n in record["crop_box"]],
    }


def save_masks_info(folder: Path, setup: dict[str, Any], images: dict[str, list[dict[str, Any]]]) -> None:
    """Write masks_info.json: ``images`` is image name -> entries of `info_entry`."""
    save_json(folder / "masks_info.json", {"setup": {"kind": KIND, "version": VERSION} | setup} | images)


def load_masks_info(
    folder: Path | str, dataset: str | None = None
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Read and check masks_info.json.

    Args:
        dataset: fingerprint of the data set at hand (`DataSet.fingerprint`); None: any.

    Returns:
        The setup; and image name -> entries.

    Raises:
        UserError: if it is missing, unfinished, of another kind or data set, an entry is impossible, or the masks that
            the setup promises are not there.
    """
    folder = Path(folder)
    path = folder / "masks_info.json"
    if not path.exists() and (folder / "unfinished").exists():
        raise UserError(f"{folder}: unfinished; go on with: python generate_mask.py mask.folder={folder}")
    content = load_json(path)
    setup = content.pop("setup", None) if isinstance(content, dict) else None
    if not isinstance(setup, dict) or (setup.get("kind"), setup.get("version")) != (KIND, VERSION):
        raise UserError(f"{path}: not of {KIND!r}, version {VERSION}; make it again: python generate_mask.py")
    if dataset not in (None, setup.get("dataset")):
        raise UserError(f"{folder}: made for another data set; make it again: python generate_mask.py")
    for name, entries in content.items():
        is_file_name = Path(name).name == name and "\0" not in name and len(name.encode(errors="replace")) <= 250
        if not is_file_name or not isinstance(entries, list) or not all(map(_has_box, entries)):
            fault = f"image {name[:60]}: a mask has no bbox x y width height"
            raise UserError(f"{path}: {fault}; make it again: python generate_mask.py")
        if setup.get("store") != "none" and not (folder / f"{name}.pt").exists():
            raise UserError(f"{folder / name}.pt: missing, though masks_info.json names it; make the masks again")
    return setup, content


def _has_box(entry: Any) -> bool:
    box = entry.get("bbox") if isinstance(entry, dict) else None
    return isinstance(box, list) and len(box) == 4 and all(map(is_finite_number, box)) and min(box[2:]) >= 0
