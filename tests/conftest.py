"""Small data that the tests share."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from toybirds.writing import write_toybirds


def pytest_configure():
    """Compute in one thread: as many processes as cores run the tests, and more threads would wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def birds(tmp_path_factory) -> Path:
    """Return a small ToyBirds folder, in CUB's file format: read only."""
    root = tmp_path_factory.mktemp("data") / "birds"
    write_toybirds(root, train_per_class=6, test_per_class=3)
    return root


@pytest.fixture
def birds_copy(birds, tmp_path) -> Path:
    """Return a copy of the small ToyBirds folder, to be damaged."""
    return Path(shutil.copytree(birds, tmp_path / "birds"))


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Leave out the curves of trainings, which take longer than their epochs; fixtures of wider scope draw them."""
    if "training.loop" in sys.modules:
        monkeypatch.setattr("training.loop.draw_curves", lambda *_: None)


def real_folder(variable: str) -> Path:
    """Return the folder that an environment variable names; skip the test where it is absent."""
    folder = Path(os.environ.get(variable, ""))
    if not os.environ.get(variable) or not folder.is_dir():
        pytest.skip(f"{variable} names no folder: real data is not at hand")
    return folder


@pytest.fixture
def cub24() -> Path:
    """Return the real images in CUB's format that CUB24 names."""
    return real_folder("CUB24")


@pytest.fixture
def weights_folder() -> Path:
    """Return the folder of real weights that WEIGHTS names."""
    return real_folder("WEIGHTS")


@pytest.fixture(scope="session")
def cub_boxes() -> tuple[np.ndarray, np.ndarray]:
    """Return all of CUB's boxes (11788, 4), clipped, and image sizes (11788, 2), from CUB_METADATA."""
    folder = real_folder("CUB_METADATA")
    boxes = np.loadtxt(folder / "bounding_boxes.txt")[:, 1:]
    sizes = np.loadtxt(folder / "image_sizes.txt")[:, 1:]
    far = np.minimum(boxes[:, :2] + boxes[:, 2:], sizes)
    near = np.maximum(boxes[:, :2], 0)
    return np.concatenate([near, far - near], axis=1), sizes


@pytest.fixture(scope="session")
def few_birds(birds, tmp_path_factory) -> Path:
    """Return a folder of seven of the small birds, training and test images, in CUB's file format: read only."""
    root = tmp_path_factory.mktemp("data") / "few"
    shutil.copytree(birds, root)
    split = dict(line.split() for line in (root / "train_test_split.txt").read_text().splitlines())
    kept = [key for key in split if split[key] == "1"][:4] + [key for key in split if split[key] == "0"][:3]
    for name in ("images.txt", "image_class_labels.txt", "bounding_boxes.txt", "train_test_split.txt"):
        lines = [line for line in (root / name).read_text().splitlines() if line.split()[0] in kept]
        (root / name).write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="session")
def site(few_birds, tmp_path_factory) -> Path:
    """Return a folder with one of everything that the scripts read, all of it sound: read only."""
    from sound_files import make_sound_folder  # here: it imports all that trains, which few tests need

    folder = tmp_path_factory.mktemp("site")
    make_sound_folder(few_birds, folder)
    return folder


@pytest.fixture
def site_copy(site, tmp_path) -> Path:
    """Return a copy of the sound folder, to be damaged."""
    copy = Path(shutil.copytree(site, tmp_path / "site"))
    for path in (copy / "run" / "config.json", copy / "run" / "log.jsonl"):
        path.write_text(path.read_text().replace(str(site), str(copy)))
    return copy
