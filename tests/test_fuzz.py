"""Readers against damaged files: whatever the bytes are, the only exception is the user's error.

Seeded, and bounded in time: FUZZ_SECONDS (5 by default) are shared by all readers.
"""

import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch

import train
from config import load_config
from datasets import read_dataset
from jobs.shared_work import Result, load_result, save_result
from localized_crops.box_file import load_boxes
from localized_crops.files import UserError, load_json
from localized_crops.map_file import MapCache
from masks.mask_files import load_masks, load_masks_info
from models import build_model, load_trained
from readers.images import read_image
from training.log import load_log
from training.run import LOGGED
from utils import load_tensors

SECONDS = float(os.environ.get("FUZZ_SECONDS", "5"))
ODD = [
    "NaN",
    "-Infinity",
    "1e999",
    "-1",
    "0",
    "null",
    "true",
    "[]",
    "{}",
    '""',
    '"x"',
    "9" * 400,
    "\0",
    "é",
    "1.5",
    "[[",
]
ODD += ["../x", "/x", "\n", ",", " ", "1" * 5000, '"\\ud800"', "[" * 2000, "__import__('os').system('touch ran')"]


# --- mutations ----------------------------------------------------------------------------------------------------


def flip(content: bytes, rng: random.Random) -> bytes:
    """Change up to eight bytes."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def cut(content: bytes, rng: random.Random) -> bytes:
    """Take a piece out."""
    start, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return content[:start] + content[end:] if rng.random() < 0.5 else content[:end]


def insert(content: bytes, rng: random.Random) -> bytes:
    """Put something odd, or a piece of the file itself, in between."""
    place, start = rng.randrange(len(content) + 1), rng.randrange(len(content))
    piece = rng.choice([rng.choice(ODD).encode(), rng.randbytes(5), content[start : start + 40]])
    return content[:place] + piece + content[place:]


def swap_lines(content: bytes, rng: random.Random) -> bytes:
    """Swap two lines, or double one."""
    lines = content.split(b"\n")
    a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[a], lines[b] = lines[b], (lines[a] if rng.random() < 0.5 else lines[b])
    return b"\n".join(lines)


def replace_number(content: bytes, rng: random.Random) -> bytes:
    """Put something odd in the place of a number."""
    numbers = [match.span() for match in re.finditer(rb"[-.0-9]+", content)]
    if not numbers:
        return flip(content, rng)
    start, end = rng.choice(numbers)
    return content[:start] + rng.choice(ODD).encode() + content[end:]


def replace_value(content: bytes, rng: random.Random) -> bytes:
    """Put something odd in the place of a value of a JSON file, at any depth; other files get something inserted."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return insert(content, rng)
    holder = {"top": value}
    place, inside = holder, "top"
    while isinstance(place[inside], (dict, list)) and place[inside] and rng.random() < 0.85:
        place = place[inside]
        inside = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
    place[inside] = rng.choice([None, True, -1, 10**400, 1.5, float("nan"), "x", "", [], {}, [[]], [1, 2], {"x": 1}])
    return json.dumps(holder["top"]).encode()


MUTATIONS = (flip, cut, insert, swap_lines, replace_number, replace_value)


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Return a file's content after one to three mutations."""
    for _ in range(rng.randint(1, 3)):
        content = rng.choice(MUTATIONS)(content or b"\n", rng)
    return content


# --- readers ------------------------------------------------------------------------------------------------------


def read_birds(folder: Path) -> None:
    """Read the data set."""
    read_dataset("cub", folder / "birds")


def read_maps(folder: Path) -> None:
    """Open the cache of maps and read each."""
    maps = MapCache.open(folder / "boxes.json")
    for image_id in maps:
        maps[image_id]


def read_unit(folder: Path) -> None:
    """Read a finished unit."""
    load_result(folder / "unit.safetensors")


def read_weights(folder: Path) -> None:
    """Read a checkpoint into a network."""
    model = build_model("test_resnet", 3, image_size=32, patch_size=16)
    load_trained(model, folder / "small.pt", ema=True)


def read_words(folder: Path) -> None:
    """Read a command line."""
    load_config((folder / "words.txt").read_bytes().decode("latin-1").split("\n"))


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "images.txt": ("birds/images.txt", read_birds),
    "classes.txt": ("birds/classes.txt", read_birds),
    "image_class_labels.txt": ("birds/image_class_labels.txt", read_birds),
    "bounding_boxes.txt": ("birds/bounding_boxes.txt", read_birds),
    "train_test_split.txt": ("birds/train_test_split.txt", read_birds),
    "boxes": ("boxes.json", lambda folder: load_boxes(folder / "boxes.json")),
    "masks_info": ("masks/masks_info.json", lambda folder: load_masks_info(folder / "masks")),
    "maps": ("boxes.maps.safetensors", read_maps),
    "log": ("run/log.jsonl", lambda folder: load_log(folder / "run" / "log.jsonl", LOGGED)),
    "run_config": ("run/config.json", lambda folder: train.resumed_config([], folder / "run")),
    "summary": ("run/summary.json", lambda folder: load_json(folder / "run" / "summary.json")),
    "records": ("unit.safetensors", read_unit),
    "masks": ("mask.pt", lambda folder: load_masks(folder / "mask.pt")),
    "checkpoint": ("small.pt", read_weights),
    "safetensors": ("small.safetensors", lambda folder: load_tensors(folder / "small.safetensors")),
    "jpeg": ("bird.jpg", lambda folder: read_image(folder / "bird.jpg")),
    "png": ("bird.png", lambda folder: read_image(folder / "bird.png")),
    "words": ("words.txt", read_words),
}


@pytest.fixture
def folder(site_copy, monkeypatch) -> Path:
    """Return a copy of the sound folder with small files of the other kinds."""
    monkeypatch.chdir(site_copy)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1_000_000)  # a changed header shall not cost seconds
    image = next((site_copy / "birds" / "images").rglob("*.jpg"))
    (site_copy / "bird.jpg").write_bytes(image.read_bytes())
    PIL.Image.open(image).save(site_copy / "bird.png")
    shutil.copy(next((site_copy / "masks").glob("*.pt")), site_copy / "mask.pt")
    network = build_model("test_resnet", 3, image_size=32, patch_size=16)
    torch.save({"ema": network.state_dict()}, site_copy / "small.pt")
    safetensors.torch.save_file({"weight": torch.ones(3, 5)}, site_copy / "small.safetensors")
    (site_copy / "words.txt").write_text("THR=0.5\ncrop.scale=0.1,1.0\nnum_epochs=3\nmodel.type=toyresnet\nsave=true")
    save_result(site_copy / "unit.safetensors", Result({"errors": {}}, {"maps": np.zeros((2, 3, 5), np.float16)}))
    return site_copy


@pytest.mark.parametrize("name", READERS)
def test_a_reader_raises_nothing_but_the_users_error(name, folder, record_property):
    file, read = READERS[name]
    path = folder / file
    sound, end, executions, refused = path.read_bytes(), time.monotonic() + SECONDS / len(READERS), 0, 0
    while time.monotonic() < end or executions < 5:
        path.write_bytes(mutated(sound, random.Random(f"{name} {executions}")))
        executions += 1
        try:
            read(folder)
        except UserError as error:
            refused += 1
            assert str(error).strip()
        except Exception as error:
            kept = path.read_bytes()
            pytest.fail(f"execution {executions - 1} of {name}: {error!r} on {kept[:300]!r} ({len(kept)} bytes)")
    record_property("executions", executions)
    print(f"fuzz {name}: {executions} executions, {refused} refused")
    assert not (folder / "ran").exists()
    path.write_bytes(sound)
    read(folder)  # sound again: the reader refuses by content alone
