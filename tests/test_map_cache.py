"""map_cache.py: what is written is read back, in other processes too, and damage is one line."""

import multiprocessing
import os
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest

from localized_crops import map_file
from localized_crops.files import UserError, load_json, save_json
from localized_crops.map_file import MapCache, cache_paths, save_map_cache

HEADER = {"dataset": "d" * 64, "model": "vit", "weights_sha256": "w" * 64, "settings": {"image_size": 80}, "errors": {}}


def some_maps(count=5):
    rng = np.random.default_rng(0)
    return {10 * i + 3: rng.random((3 + i, 5)).astype(np.float16) for i in reversed(range(count))}


@pytest.fixture
def cache_path(tmp_path):
    save_map_cache(tmp_path / "boxes.json", some_maps().items(), HEADER)
    return tmp_path / "boxes.json"


def test_maps_come_back_by_id(cache_path):
    cache = MapCache.open(cache_path, dataset="d" * 64, model="vit", weights_sha256="w" * 64)
    assert len(cache) == 5 and 13 in cache and 14 not in cache and 99 not in cache
    for image_id, cells in some_maps().items():
        assert cache[image_id].dtype == np.float16 and np.array_equal(cache[image_id], cells)
    with pytest.raises(KeyError):
        cache[14]
    assert cache.header["settings"] == {"image_size": 80}


def test_the_data_can_be_memory_mapped(cache_path):
    index, data = cache_paths(cache_path)
    flat = np.memmap(data, np.float16, "r", offset=64)
    expected = np.concatenate([cells.ravel() for cells in some_maps().values()])
    assert np.array_equal(flat, expected) and index.name == "boxes.maps.json"
    assert cache_paths(index) == cache_paths(cache_path)


def test_the_size_is_two_bytes_a_cell(tmp_path):
    cells = np.zeros((37, 37), np.float16)
    save_map_cache(tmp_path / "a.json", ((i, cells) for i in range(100)), HEADER)
    size = cache_paths(tmp_path / "a.json")[1].stat().st_size
    assert size == 64 + 100 * 37 * 37 * 2  # 11,788 such maps: 32.3 MB


def read_in_worker(cache, image_id, queue):
    queue.put(cache[image_id])


def test_a_spawned_worker_reads_the_same(cache_path):
    cache = MapCache.open(cache_path)
    assert cache[3].shape == (3, 5)  # opened here: the descriptor must not travel
    assert len(pickle.dumps(cache)) < 3000
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=read_in_worker, args=(cache, 43, queue))
    worker.start()
    assert np.array_equal(queue.get(timeout=300), some_maps()[43])
    worker.join()


def test_reading_keeps_nothing_in_memory(tmp_path):
    cells = np.zeros((256, 256), np.float16)
    save_map_cache(tmp_path / "a.json", ((i, cells) for i in range(400)), HEADER)  # 52 MB
    cache = MapCache.open(tmp_path / "a.json")
    cache[0]
    before = resident_bytes()
    for image_id in range(400):
        cache[image_id]
    assert resident_bytes() - before < 5e6


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.parametrize(
    ("expected", "told"),
    [
        ({"dataset": "e" * 64}, "made for another data set"),
        ({"model": "resnet"}, "made for another model"),
        ({"weights_sha256": "0"}, "made for other weights"),
    ],
)
def test_a_cache_of_something_else_is_refused(cache_path, expected, told):
    assert_refused(cache_path, told, **expected)


def assert_refused(path, told, **expected):
    with pytest.raises(UserError, match=told) as error:
        MapCache.open(path, **expected)
    assert "\n" not in str(error.value) and f"python generate_dino_boxes.py out={path}" in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("kind", "boxes", "kind is 'boxes'"),
        ("version", 99, "version 99"),
        ("dtype", "float32", "float32"),
        ("bytes", "many", "how many bytes"),
        ("bytes", 10**15, "1000000000000000 were written"),
        ("sha256", None, "hash"),
        ("sha256", "0" * 64, "of another run"),
        ("maps", [], "names no maps"),
        ("maps", {"3": [64, 10**9, 10**9]}, "is not"),
        ("maps", {"3": [64, 4000, 4000]}, "outside"),
        ("maps", {"3": [-8, 2, 2]}, "outside"),
        ("maps", {"3": [64, 2.5, 2]}, "is not"),
        ("maps", {"3": [64, True, 2]}, "is not"),
        ("maps", {"-3": [64, 2, 2]}, "is not a number"),
        ("maps", {"²": [64, 2, 2]}, "is not a number"),
    ],
)
def test_a_damaged_index_is_one_line(cache_path, key, value, told):
    index, _ = cache_paths(cache_path)
    save_json(index, load_json(index) | {key: value})
    assert_refused(cache_path, told)


def test_a_damaged_data_file_is_one_line(cache_path):
    _, data = cache_paths(cache_path)
    cache = MapCache.open(cache_path)
    os.truncate(data, data.stat().st_size - 2)
    with pytest.raises(UserError, match="cut short"):
        [cache[i] for i in cache.ids.tolist()]
    assert_refused(cache_path, "were written")
    data.unlink()
    assert_refused(cache_path, "is missing")


def test_a_torn_index_is_one_line(cache_path):
    index, _ = cache_paths(cache_path)
    index.write_text(index.read_text()[:100])
    with pytest.raises(UserError, match="not a whole JSON file"):
        MapCache.open(cache_path)
    index.write_text("[1]")
    assert_refused(cache_path, "kind is None")


def test_data_of_another_run_is_told_apart(cache_path, tmp_path):
    """A kill between the two files leaves the new data beside the old index."""
    other = tmp_path / "other.json"
    save_map_cache(other, ((i, cells + np.float16(1)) for i, cells in some_maps().items()), HEADER)
    os.replace(cache_paths(other)[1], cache_paths(cache_path)[1])
    assert_refused(cache_path, "of another run")


def test_a_broken_off_writer_leaves_the_old_cache(cache_path):
    def breaking():
        yield 1, np.zeros((2, 2))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_map_cache(cache_path, breaking(), HEADER)
    assert len(MapCache.open(cache_path)) == 5
    assert len(list(cache_path.parent.iterdir())) == 2


def test_remake_command_names_the_box_file():
    for name in ("a.maps.json", "a.maps.bin", "a.json"):
        assert "out=runs/a.json " in map_file.remake_command(map_file.Path("runs") / name)
