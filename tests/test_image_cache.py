"""image_cache.py: the same pixels as the files, and what happens when it is killed, shared, torn or out of date."""

import os
import pickle
import re
import resource
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import stages
import torch
from small_runs import run
from torchvision.transforms.v2.functional import pil_to_tensor

import train
from datasets import read_dataset
from localized_crops.files import UserError, load_json
from readers import image_cache
from readers.data_set import DataSet, ImagePaths, no_boxes
from readers.image_cache import cached_images
from readers.images import read_image
from training.log import load_log
from transforms import TrainTransform, build_views

ROOT = Path(__file__).parent.parent


@pytest.fixture
def photos(tmp_path):
    """Return a data set of smooth JPEGs of odd sizes, as large as photographs or one pixel."""
    rng, sizes = np.random.default_rng(0), [(53, 37), (37, 53), (500, 333), (1, 1), (7, 300)]
    for number, size in enumerate(sizes):
        coarse = PIL.Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8))
        coarse.resize(size, PIL.Image.Resampling.BICUBIC).save(tmp_path / f"{number}.jpg", quality=92)
    return data_set([3, 11, 4, 99, 12], tmp_path, [f"{number}.jpg" for number in range(5)], sizes)


def data_set(ids, folder, names, sizes):
    count, paths = len(ids), ImagePaths(folder, names)
    columns = np.array(ids), paths, np.zeros(count, np.int64), ["bird"], no_boxes(count), np.full(count, "train")
    return DataSet("cub", folder, *columns, image_sizes=np.array(sizes))


def data_file(folder):
    (path,) = folder.glob("decoded_*.bin")
    return path


def test_every_image_comes_back(tmp_path, photos):
    cache = cached_images(tmp_path / "cache", photos)
    for image_id, path in zip(photos.ids.tolist(), photos.paths, strict=True):
        assert np.array_equal(cache[image_id].permute(1, 2, 0).numpy(), np.asarray(read_image(path)))
    assert data_file(tmp_path / "cache").stat().st_size == 64 + 3 * photos.image_sizes.prod(1).sum()


def test_crops_are_those_of_the_files(tmp_path, photos):
    cache = cached_images(tmp_path / "cache", photos)
    transform = TrainTransform(24, "bilinear", augment=False, augment_p=1.0, use_augment_mix=False)
    rng = np.random.default_rng(1)
    for image_id, path, (width, height) in zip(photos.ids.tolist(), photos.paths, photos.image_sizes, strict=True):
        for _ in range(10):
            left, top = rng.integers(0, width), rng.integers(0, height)
            crop = (top, left, rng.integers(1, height - top + 1), rng.integers(1, width - left + 1))
            assert torch.equal(
                transform(pil_to_tensor(read_image(path)), crop, None), transform(cache[image_id], crop, None)
            )


def test_views_are_those_of_the_files(tmp_path, photos):
    cache = cached_images(tmp_path / "cache", photos)
    for view in build_views(["full", "center@30", "whole", "box"], 28, 0.875, 0.1).values():
        from_file = view(pil_to_tensor(read_image(photos.paths[2])), (9, 5, 70, 90))
        assert torch.equal(from_file, view(cache[4], (9, 5, 70, 90)))


def test_it_is_built_once_and_again_when_an_image_changes(tmp_path, photos, capsys):
    folder = tmp_path / "cache"
    cached_images(folder, photos)
    assert "decoding 5 images once: 0.00 GB" in capsys.readouterr().out
    first = data_file(folder).stat().st_mtime_ns
    cached_images(folder, photos)
    assert data_file(folder).stat().st_mtime_ns == first and capsys.readouterr().out == ""
    PIL.Image.new("RGB", (53, 37), (9, 8, 7)).save(photos.paths[0])
    assert cached_images(folder, photos)[3][:, 5, 5].tolist() == pytest.approx([9, 8, 7], abs=2)
    cached_images(folder, replace(photos, ids=photos.ids + 1))
    assert "decoding" in capsys.readouterr().out


def test_an_image_that_was_replaced_by_one_of_equal_size_and_time_is_noticed(tmp_path):
    path, found = tmp_path / "one.bmp", []
    for colour in ("red", "blue"):
        before = path.stat() if path.exists() else None
        PIL.Image.new("RGB", (5, 3), colour).save(path)
        if before:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        found.append(
            cached_images(tmp_path / "cache", data_set([1], tmp_path, ["one.bmp"], [(5, 3)]))[1][:, 0, 0].tolist()
        )
    assert found == [[255, 0, 0], [0, 0, 255]]


@pytest.mark.parametrize("damage", ["short", "head", "missing"])
def test_a_damaged_cache_is_built_again(tmp_path, photos, damage):
    folder = tmp_path / "cache"
    cached_images(folder, photos)
    data = data_file(folder)
    if damage == "short":
        data.write_bytes(data.read_bytes()[:-1])
    elif damage == "head":
        data.write_bytes(b"x" + data.read_bytes()[1:])
    else:
        data.unlink()
    cache = cached_images(folder, photos)
    assert np.array_equal(cache[3].permute(1, 2, 0).numpy(), np.asarray(read_image(photos.paths[0])))


def test_a_worker_maps_it_anew(tmp_path, photos):
    cache = cached_images(tmp_path / "cache", photos)
    expected = cache[4].sum().item()
    assert len(pickle.dumps(cache)) < 3000
    queue = stages.FORKS.Queue()
    worker = stages.fork(_put_sum, cache, 4, queue)
    assert queue.get(timeout=300) == expected
    worker.join()


def _put_sum(cache, image_id, queue):
    queue.put(cache[image_id].sum().item())


def test_a_corrupt_image_is_named_and_nothing_is_left(tmp_path, photos):
    photos.paths[2].write_bytes(photos.paths[2].read_bytes()[:400])
    with pytest.raises(UserError, match=r"2\.jpg"):
        cached_images(tmp_path / "cache", photos)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [image_cache.LOCK]


def test_an_image_of_another_size_than_its_header_said_is_named_and_nothing_is_left(tmp_path, photos):
    photos.image_sizes[1] += 1
    with pytest.raises(UserError, match=r"1\.jpg: is 37 x 53 pixels, 38 x 54 were expected"):
        cached_images(tmp_path / "cache", photos)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [image_cache.LOCK]


def test_an_image_that_is_not_in_it_is_a_key_error(tmp_path, photos):
    cache = cached_images(tmp_path / "cache", photos)
    for unknown in (5, 100, "3", "a.jpg"):  # the id 3 is a number
        with pytest.raises(KeyError):
            cache[unknown]


def test_a_disk_that_is_too_small_is_said_before(tmp_path, photos, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(UserError, match=r"take 0\.00 GB, only 0\.00 are free; make room or set cache=none"):
        cached_images(tmp_path / "cache", photos)
    assert not list((tmp_path / "cache").glob("decoded_*.bin"))


def _build_on_a_full_disk(folder, photos, queue):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # bytes: writing further fails as on a full disk
    try:
        cached_images(folder, photos)
    except UserError as error:
        queue.put(str(error))


def test_a_disk_that_fills_leaves_nothing_half(tmp_path, photos):
    queue = stages.FORKS.Queue()
    process = stages.fork(_build_on_a_full_disk, tmp_path / "cache", photos, queue)
    assert re.search(r"decoded_images_\w+\.bin: File too large; .*make room", queue.get(timeout=300))
    process.join()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [image_cache.LOCK]


# --- in a training ------------------------------------------------------------------------------------------------


def test_a_training_reads_the_cache(birds_copy, tmp_path):
    for workers in (0, 1):
        words = ["num_epochs=1", "cache=disk", "augment=true", f"num_workers={workers}"]
        assert run(birds_copy, tmp_path / str(workers), *words)["epochs"] == 1
    predictions = [load_json(tmp_path / name / "predictions.json") for name in ("0", "1")]
    assert predictions[0] == predictions[1]
    files = run(birds_copy, tmp_path / "files", "num_epochs=1", "augment=true")
    assert files["maiou"] == load_json(tmp_path / "0" / "summary.json")["maiou"]


def test_a_cache_side_under_what_the_crops_need_is_refused_with_the_least_one(birds, tmp_path):
    small = ["cache=disk", f"cache_folder={tmp_path / 'cache'}", "crop.scale=0.25,1"]
    with pytest.raises(UserError, match="need a short side of 74 pixels"):  # 32 / sqrt(.25 * .75)
        run(birds, tmp_path / "run", *small, "cache_side=40")
    run(birds, tmp_path / "run", *small, "cache_side=100", "num_epochs=1")
    run(birds, tmp_path / "whole", *small[2:], "num_epochs=1")
    stored, whole = (load_log(tmp_path / name / "log.jsonl")[0] for name in ("run", "whole"))
    assert stored["maiou"] == whole["maiou"]  # the same crops
    assert stored["train_loss"] == pytest.approx(whole["train_loss"], rel=0.05)


def test_a_build_leaves_the_file_that_another_run_uses(tmp_path, photos):
    """Another stored side, while the first run is on its way: its workers start after the second build."""
    folder = tmp_path / "cache"
    first, expected = cached_images(folder, photos), np.asarray(read_image(photos.paths[2]))
    cached_images(folder, photos, side=8)
    worker = pickle.loads(pickle.dumps(first))
    assert np.array_equal(worker[4].permute(1, 2, 0), expected) and len(list(folder.glob("decoded_*.bin"))) == 2
    del first
    cached_images(folder, photos, side=9)
    assert len(list(folder.glob("decoded_*.bin"))) == 1  # what nobody uses goes


def test_a_worker_refuses_another_file_under_the_name_it_was_given(tmp_path, photos):
    first = cached_images(tmp_path / "cache", photos)
    other = cached_images(tmp_path / "other", replace(photos, ids=photos.ids + 1))
    os.replace(other.path, first.path)
    with pytest.raises(UserError, match="decoded_images"):
        pickle.loads(pickle.dumps(first))[4]


def _build_slowly(root):
    def slow(path):
        time.sleep(0.05)
        return read_image(path)

    image_cache.read_image = slow  # in this process alone
    cached_images(root, read_dataset("cub", root))


def test_a_killed_build_is_made_again(birds_copy):
    process = stages.fork(_build_slowly, birds_copy)
    while process.is_alive() and not list(birds_copy.glob(".decoded_images_*")):
        time.sleep(0.005)
    process.kill()
    process.join()
    data = read_dataset("cub", birds_copy)
    assert not list(birds_copy.glob("decoded_*.bin"))
    cache = cached_images(birds_copy, data)
    expected = np.asarray(read_image(data.paths[0]))
    assert np.array_equal(cache[int(data.ids[0])].permute(1, 2, 0).numpy(), expected)


def test_an_unknown_mode_is_refused():
    with pytest.raises(UserError, match="cache=tape"):
        train.load_run_config(["cache=tape"])


# --- a shorter stored side ----------------------------------------------------------------------------------------


def test_large_images_are_stored_smaller_and_crops_follow(tmp_path, photos):
    ids, sizes = photos.ids.tolist(), photos.image_sizes
    side = int(np.median(sizes.min(1)))
    cache = cached_images(tmp_path / "cache", photos, side)
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
    assert 0 < (cache.scales < 1).any(1).sum() < len(ids)
