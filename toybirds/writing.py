"""ToyBirds as a folder in CUB-200-2011's file format."""

import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from localized_crops.files import scratch_folder
from toybirds.drawing import CLASS_NAMES, VERSION, draw_toybird


class _Row(NamedTuple):
    """One image to write; ``image_id`` and ``class_id`` start at 1 as CUB's do."""

    image_id: int
    class_id: int
    name: str
    is_train: bool


def write_toybirds(root: pathlib.Path, *, train_per_class: int = 75, test_per_class: int = 60, seed: int = 0) -> None:
    """Write the data set as JPEGs in CUB-200-2011's layout, whole or not at all.

    It is drawn into a scratch folder beside ``root``, which takes the final name when it is complete. Where
    another process wrote the same set first, its copy stays. The same arguments give the same bytes (with the
    same Pillow).

    Args:
        train_per_class: images a class with a 1 in train_test_split.txt.
        test_per_class: images a class with a 0 there.
        seed: of the drawings, 0 or more.

    Raises:
        FileExistsError: if ``root`` holds something else already.
    """
    header = _header(train_per_class, test_per_class, seed)
    if _is_written(root, header):
        return
    with scratch_folder(root) as scratch:
        _write_into(scratch, list(_rows(train_per_class, test_per_class)), seed)
        (scratch / "README.txt").write_text(header, encoding="utf-8")
        try:
            os.replace(scratch, root)
        except OSError:
            if not _is_written(root, header):  # by another process since
                raise


def _header(train_per_class: int, test_per_class: int, seed: int) -> str:
    """Return README.txt: what the folder is and what it was made with. Equal text means equal data."""
    counts = f"{train_per_class} training and {test_per_class} test images a class"
    return (
        f"ToyBirds version {VERSION}, seed {seed}, {counts}\n"
        "\n"
        "Birds drawn by toybirds.py, in the file format of CUB-200-2011. The classes are all combinations\n"
        "of crown colour, wing bars and beak; nothing else in an image depends on the class. A box (x y\n"
        "width height, pixels) is tight around the visible pixels of the bird. To make the folder again,\n"
        "delete it and run the program that asked for it.\n"
    )


def has_toybirds(root: pathlib.Path) -> bool:
    """Return whether ``root`` says that it was drawn by this program, by whatever version."""
    readme = root / "README.txt"
    return readme.is_file() and readme.read_text(encoding="utf-8", errors="replace").startswith("ToyBirds version ")


def _is_written(root: pathlib.Path, header: str) -> bool:
    """Return whether ``root`` holds this very data set; False where it is absent or empty."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    readme = root / "README.txt"
    if not readme.is_file() or (found := readme.read_text(encoding="utf-8", errors="replace")) != header:
        found = found.partition("\n")[0] if has_toybirds(root) else "something else"
        raise FileExistsError(f"{root} holds {found!r}, not {header.partition(chr(10))[0]!r}: choose another folder")
    return True


def _rows(train_per_class: int, test_per_class: int) -> Iterator[_Row]:
    """Yield the images in file order: by class, training and test images evenly mixed within each."""
    total = train_per_class + test_per_class
    for class_id, class_name in enumerate(CLASS_NAMES, start=1):
        for index in range(total):
            is_train = (index + 1) * train_per_class // total > index * train_per_class // total
            name = f"{class_id:03d}.{class_name}/{class_name}_{index + 1:04d}.jpg"
            yield _Row((class_id - 1) * total + index + 1, class_id, name, is_train)


def _write_into(folder: pathlib.Path, rows: list[_Row], seed: int) -> None:
    """Draw all images and write them and CUB's five lists into ``folder``."""
    for class_id, class_name in enumerate(CLASS_NAMES, start=1):
        (folder / "images" / f"{class_id:03d}.{class_name}").mkdir(parents=True)
    boxes = [_write_image(folder, row, seed) for row in tqdm(rows, desc="drawing ToyBirds", disable=None)]
    lists = {
        "images.txt": [f"{row.image_id} {row.name}" for row in rows],
        "image_class_labels.txt": [f"{row.image_id} {row.class_id}" for row in rows],
        "train_test_split.txt": [f"{row.image_id} {int(row.is_train)}" for row in rows],
        "bounding_boxes.txt": [
            " ".join([str(row.image_id), *(f"{side:.1f}" for side in box)])
            for row, box in zip(rows, boxes, strict=True)
        ],
        "classes.txt": [f"{class_id} {class_id:03d}.{name}" for class_id, name in enumerate(CLASS_NAMES, start=1)],
    }
    for name, lines in lists.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _write_image(folder: pathlib.Path, row: _Row, seed: int) -> tuple[float, float, float, float]:
    """Draw one image, save it as JPEG, return its box x, y, width, height in pixels."""
    rng = np.random.default_rng([seed, row.image_id])  # its own stream: no image depends on those before it
    drawing = draw_toybird(rng, row.class_id - 1)
    drawing.image.save(folder / "images" / row.name, quality=int(rng.integers(80, 96)))
    return drawing.box_xywh
