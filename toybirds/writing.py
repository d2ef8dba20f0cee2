"""ToyBirds as a folder in CUB-200-2011's file format."""

import os
import pathlib
from collections import defaultdict

import numpy as np
from tqdm import tqdm

from localized_crops.files import scratch_folder
from toybirds.drawing import CLASS_NAMES, VERSION, draw_toybird


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
    counts = f"{train_per_class} training and {test_per_class} test images a class"
    header = (  # equal text means equal data
        f"ToyBirds version {VERSION}, seed {seed}, {counts}\n"
        "\n"
        "Birds drawn by toybirds.py, in the file format of CUB-200-2011. The classes are all combinations\n"
        "of crown colour, wing bars and beak; nothing else in an image depends on the class. A box (x y\n"
        "width height, pixels) is tight around the visible pixels of the bird. To make the folder again,\n"
        "delete it and run the program that asked for it.\n"
    )
    if _is_written(root, header):
        return
    with scratch_folder(root) as scratch:
        _write_into(scratch, train_per_class, test_per_class, seed)
        (scratch / "README.txt").write_text(header, encoding="utf-8")
        try:
            os.replace(scratch, root)
        except OSError:
            if not _is_written(root, header):  # by another process since
                raise


def _readme(root: pathlib.Path) -> str:
    """Return what README.txt says; nothing where there is none."""
    path = root / "README.txt"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def has_toybirds(root: pathlib.Path) -> bool:
    """Return whether ``root`` says that it was drawn by this program, by whatever version."""
    return _readme(root).startswith("ToyBirds version ")


def _is_written(root: pathlib.Path, header: str) -> bool:
    """Return whether ``root`` holds this very data set; False where it is absent or empty."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    readme = _readme(root)
    if readme != header:
        found = readme.partition("\n")[0] if has_toybirds(root) else "something else"
        raise FileExistsError(f"{root} holds {found!r}, not {header.partition(chr(10))[0]!r}: choose another folder")
    return True


def _write_into(folder: pathlib.Path, train_per_class: int, test_per_class: int, seed: int) -> None:
    """Draw all images, class by class, and write them and CUB's five lists into ``folder``; ids start at 1.

    Training and test images of a class are evenly mixed.
    """
    class_folders = [f"{class_id:03d}.{name}" for class_id, name in enumerate(CLASS_NAMES, start=1)]
    for class_folder in class_folders:
        (folder / "images" / class_folder).mkdir(parents=True)
    lists = defaultdict(list)
    lists["classes.txt"] = [f"{class_id} {name}" for class_id, name in enumerate(class_folders, start=1)]
    total = train_per_class + test_per_class
    for image_id in tqdm(range(1, len(CLASS_NAMES) * total + 1), desc="drawing ToyBirds", disable=None):
        label, index = divmod(image_id - 1, total)
        name = f"{class_folders[label]}/{CLASS_NAMES[label]}_{index + 1:04d}.jpg"
        rng = np.random.default_rng([seed, image_id])  # its own stream: no image depends on those before it
        bird = draw_toybird(rng, label)
        bird.image.save(folder / "images" / name, quality=int(rng.integers(80, 96)))
        is_train = (index + 1) * train_per_class // total > index * train_per_class // total
        lists["images.txt"].append(f"{image_id} {name}")
        lists["image_class_labels.txt"].append(f"{image_id} {label + 1}")
        lists["train_test_split.txt"].append(f"{image_id} {int(is_train)}")
        lists["bounding_boxes.txt"].append(" ".join([str(image_id), *(f"{side:.1f}" for side in bird.box_xywh)]))
    for name, lines in lists.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
