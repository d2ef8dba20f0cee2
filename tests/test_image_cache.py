"""image_cache.py: the same pixels as the files, and what happens when it is killed, shared, torn or out of date."""

import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from test_train import run, words

import train
from datasets import read_dataset
from localized_crops.files import UserError, load_json
from readers import image_cache
from readers.image_cache import DATA, INDEX, cached_images
from readers.images import read_image
from training.batches import load_image
from transforms import build_train_transform, build_views

ROOT = Path(__file__).parent.parent


@pytest.fixture
def photos(tmp_path):
    """Return ids, paths and sizes of smooth JPEGs of odd sizes, as large as photographs or one pixel."""
    rng, sizes = np.random.default_rng(0), [(53, 37), (37, 53), (500, 333), (1, 1), (7, 300)]
    paths = []
    for number, size in enumerate(sizes):
        coarse = PIL.Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8))
        paths.append(tmp_path / f"{number}.jpg")
        coarse.resize(size, PIL.Image.Resampling.BICUBIC).save(paths[-1], quality=92)
    return [3, 11, 4, 99, 12], paths, np.array(sizes)


def build(folder, photos, mode="disk", fingerprint="f"):
    return cached_images(mode, folder, fingerprint, *photos, read_image)


def test_every_image_comes_back(tmp_path, photos):
    cache = build(tmp_path / "cache", photos)
    for image_id, path in zip(photos[0], photos[1], strict=True):
        assert np.array_equal(cache[image_id].permute(1, 2, 0).numpy(), np.asarray(read_image(path)))
    assert (tmp_path / "cache" / DATA).stat().st_size == 64 + 3 * photos[2].prod(1).sum()


def test_crops_are_those_of_the_files(tmp_path, photos):
    cache = build(tmp_path / "cache", photos)
    transform = build_train_transform(24, "bilinear", augment=False, augment_p=1.0, use_augment_mix=False)
    rng = np.random.default_rng(1)
    for image_id, path, (width, height) in zip(*photos, strict=True):
        for _ in range(10):
            left, top = rng.integers(0, width), rng.integers(0, height)
            crop = (top, left, rng.integers(1, height - top + 1), rng.integers(1, width - left + 1))
            assert torch.equal(
                transform(load_image(path, image_id, None), crop, None), transform(cache[image_id], crop, None)
            )


def test_views_are_those_of_the_files(tmp_path, photos):
    cache = build(tmp_path / "cache", photos)
    for view in build_views(["full", "center@30", "whole", "box"], 28, 0.875, 0.1).values():
        from_file = view(load_image(photos[1][2], 4, None), (9, 5, 70, 90))
        assert torch.equal(from_file, view(cache[4], (9, 5, 70, 90)))


def test_it_is_built_once_and_again_when_an_image_changes(tmp_path, photos, capsys):
    folder = tmp_path / "cache"
    build(folder, photos)
    assert "decoding 5 images once: 0.00 GB" in capsys.readouterr().out
    first = (folder / DATA).stat().st_mtime_ns
    build(folder, photos)
    assert (folder / DATA).stat().st_mtime_ns == first and capsys.readouterr().out == ""
    PIL.Image.new("RGB", (53, 37), (9, 8, 7)).save(photos[1][0])
    assert build(folder, photos)[3][:, 5, 5].tolist() == pytest.approx([9, 8, 7], abs=2)
    build(folder, photos, fingerprint="another")
    assert "decoding" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["short", "head", "index", "kind", "missing"])
def test_a_damaged_cache_is_built_again(tmp_path, photos, damage):
    folder = tmp_path / "cache"
    build(folder, photos)
    data, index = folder / DATA, folder / INDEX
    if damage == "short":
        data.write_bytes(data.read_bytes()[:-1])
    elif damage == "head":
        data.write_bytes(b"x" + data.read_bytes()[1:])
    elif damage == "index":
        index.write_text("{")
    elif damage == "kind":
        index.write_text('{"kind": "something else", "bytes": 1e300}')
    else:
        data.unlink()
    cache = build(folder, photos)
    assert np.array_equal(cache[3].permute(1, 2, 0).numpy(), np.asarray(read_image(photos[1][0])))


def test_a_worker_maps_it_anew(tmp_path, photos):
    cache = build(tmp_path / "cache", photos)
    expected = cache[4].sum().item()
    assert len(pickle.dumps(cache)) < 1000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_sum, (cache, 4)) == expected


def _sum(cache, image_id):
    return cache[image_id].sum().item()


def test_a_corrupt_image_is_named_and_nothing_is_left(tmp_path, photos):
    photos[1][2].write_bytes(photos[1][2].read_bytes()[:400])
    with pytest.raises(UserError, match=r"2\.jpg"):
        build(tmp_path / "cache", photos)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [image_cache.LOCK]


def test_a_disk_that_is_too_small_is_said_before(tmp_path, photos, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(UserError, match=r"take 0\.00 GB, only 0\.00 are free; make room or set cache=none"):
        build(tmp_path / "cache", photos)
    assert not (tmp_path / "cache" / DATA).exists()


def _build_on_a_full_disk(folder, photos, queue):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # bytes: writing further fails as on a full disk
    try:
        build(folder, photos)
    except UserError as error:
        queue.put(str(error))


def test_a_disk_that_fills_leaves_nothing_half(tmp_path, photos):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_build_on_a_full_disk, args=(tmp_path / "cache", photos, queue))
    process.start()
    assert re.search(r"decoded_images\.bin: File too large; .*make room", queue.get(timeout=300))
    process.join()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [image_cache.LOCK]


# --- in a training ------------------------------------------------------------------------------------------------


def test_a_training_reads_the_cache(birds_copy, tmp_path):
    for mode in ("disk", "ram"):
        summary = run(birds_copy, tmp_path / mode, "num_epochs=1", f"cache={mode}", "augment=true")
        assert summary["epochs"] == 1
    again = run(birds_copy, tmp_path / "again", "num_epochs=1", "cache=disk", "augment=true", "num_workers=1")
    assert load_json(tmp_path / "again" / "predictions.json") == load_json(tmp_path / "disk" / "predictions.json")
    assert again["maiou"] == run(birds_copy, tmp_path / "files", "num_epochs=1", "augment=true")["maiou"]
    assert load_json(birds_copy / INDEX)["images"] == 72


def command(root, folder, *more):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words(root, folder, "num_epochs=1", *more)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_the_memory_is_free_when_the_last_run_ends(birds_copy, tmp_path):
    os.utime(read_dataset("cub", birds_copy).paths[0])  # other images than those of the test before
    before = set(image_cache.RAM.glob("localized-crops-*"))
    both = [command(birds_copy, tmp_path / str(n), "cache=ram") for n in range(2)]
    answers = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert set(image_cache.RAM.glob("localized-crops-*")) <= before
    assert sum("decoding 72 images" in out for out, _ in answers) >= 1


def test_a_killed_build_is_made_again(tmp_path, birds_copy):
    data = read_dataset("cub", birds_copy)
    code = f"""
import sys, time; sys.path.insert(0, {str(ROOT)!r})
import datasets
from readers import image_cache, images
data = datasets.read_dataset("cub", {str(birds_copy)!r})
def slow(path):
    time.sleep(0.05)
    return images.read_image(path)
about = data.fingerprint(), data.ids, data.paths, data.image_sizes, slow
image_cache.cached_images("disk", data.root, *about)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(birds_copy.glob(f".{DATA}.*")):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (birds_copy / DATA).exists() and not (birds_copy / INDEX).exists()
    about = data.ids.tolist(), data.paths, data.image_sizes
    cache = cached_images("disk", birds_copy, data.fingerprint(), *about, read_image)
    expected = np.asarray(read_image(data.paths[0]))
    assert np.array_equal(cache[int(data.ids[0])].permute(1, 2, 0).numpy(), expected)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="cache=tape: must be one of none, disk, ram"):
        train.load_run_config(["cache=tape"])


# --- a shorter stored side ----------------------------------------------------------------------------------------


def test_large_images_are_stored_smaller_and_crops_follow(tmp_path, photos):
    ids, paths, sizes = photos[:3]
    side = int(np.median(sizes.min(1)))
    cache = cached_images("disk", tmp_path / "cache", "f", ids, paths, sizes, read_image, side=side)
    for row, image_id in enumerate(ids):
        width, height = sizes[row]
        stored = cache[image_id]
        assert min(stored.shape[1:]) == min(side, width, height)
        assert stored.shape[2] / stored.shape[1] == pytest.approx(width / height, rel=0.05)
        whole = cache.crop_as_stored(image_id, (0, 0, int(height), int(width)))
        assert whole == (0, 0, *stored.shape[1:])
        crop = (height // 4, width // 3, height // 2, width // 3)
        top, left, tall, wide = cache.crop_as_stored(image_id, tuple(map(int, crop)))
        scale = np.array(stored.shape[1:]) / (height, width)
        assert np.all(np.array([top, left]) <= np.array(crop[:2]) * scale + 1e-6)
        assert np.all(np.array([top + tall, left + wide]) >= (np.array(crop[:2]) + crop[2:]) * scale - 1e-6)
        assert np.all(np.array([tall, wide]) <= np.array(crop[2:]) * scale + 2)
        box = cache.box_as_stored(image_id, np.array([0.0, 0.0, width, height]))
        assert box == pytest.approx([0, 0, stored.shape[2], stored.shape[1]])
    assert 0 < len(cache.scales) < len(ids)


def test_another_side_is_another_cache(tmp_path, photos):
    ids, paths, sizes = photos[:3]
    cached_images("disk", tmp_path / "cache", "f", ids, paths, sizes, read_image)
    whole = (tmp_path / "cache" / "decoded_images.bin").stat().st_size
    cached_images("disk", tmp_path / "cache", "f", ids, paths, sizes, read_image, side=8)
    assert (tmp_path / "cache" / "decoded_images.bin").stat().st_size < whole
