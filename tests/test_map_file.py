"""localized_crops/map_file.py: what is written is read back, in other processes too, and damage is one line."""

import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import stages

from localized_crops import map_file
from localized_crops.files import UserError
from localized_crops.map_file import MapCache, maps_path, save_map_cache

HEADER = {"dataset": "d" * 64, "model": "vit", "weights_sha256": "w" * 64, "settings": {"image_size": 80}, "errors": {}}


def some_maps(ids=(43, 33, 3, 13, 23), plus=0.0):
    rng = np.random.default_rng(0)
    return {one: (rng.random((3 + i, 5)) + plus).astype(np.float16) for i, one in enumerate(ids)}


@pytest.fixture
def path(tmp_path):
    save_map_cache(tmp_path / "boxes.json", some_maps().items(), HEADER)
    return tmp_path / "boxes.json"


@pytest.mark.parametrize("ids", [(43, 33, 3, 13, 10**17), ("b/ä.jpg", "a/long name.png", "007", "x"), (7, "7.jpg"), ()])
def test_maps_come_back_by_id(tmp_path, ids):
    save_map_cache(tmp_path / "boxes.json", some_maps(ids).items(), HEADER)
    cache = MapCache.open(tmp_path / "boxes.json", dataset="d" * 64)
    assert set(cache) == set(ids) and len(cache) == len(ids) and 14 not in cache and cache.get("a") is None
    for image_id, cells in some_maps(ids).items():
        assert cache[image_id].dtype == np.float16 and np.array_equal(cache[image_id], cells)
    with pytest.raises(KeyError):
        cache[14]
    assert cache.header["settings"] == {"image_size": 80}


def test_other_programs_read_it_as_the_module_says(path):
    tensors = safetensors.numpy.load_file(maps_path(path))
    ids = tensors["ids"].view(f"S{tensors['ids'].shape[1]}").ravel()
    assert ids.tolist() == [b"13", b"23", b"3", b"33", b"43"]
    for row, image_id in enumerate(ids.tolist()):
        height, width = tensors["shapes"][row]
        cells = tensors["cells"][tensors["starts"][row] :][: height * width].reshape(height, width)
        assert np.array_equal(cells, some_maps()[int(image_id)])


def test_an_id_that_comes_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="twice"):
        save_map_cache(tmp_path / "boxes.json", [(3, np.zeros((2, 3)))] * 2, HEADER)
    assert not list(tmp_path.iterdir())


def test_the_size_is_two_bytes_a_cell(tmp_path):
    cells = np.zeros((37, 37), np.float16)
    save_map_cache(tmp_path / "a.json", ((i, cells) for i in range(100)), HEADER)
    size = maps_path(tmp_path / "a.json").stat().st_size
    assert 0 < size - 100 * 37 * 37 * 2 < 5000  # 11,788 such maps: 32.5 MB


def read_in_worker(cache, image_id, queue):
    try:
        queue.put(cache[image_id])
    except UserError as error:
        queue.put(str(error))


def test_another_process_reads_the_same_and_refuses_another_file(path):
    cache = MapCache.open(path)
    assert cache[3].shape == (5, 5)  # opened here: what is open must not travel
    assert len(pickle.dumps(cache)) < 500
    queue = stages.FORKS.Queue()
    save_map_cache(path.with_name("other.json"), some_maps(plus=1).items(), HEADER)  # of the same size
    for replaced in (False, True):
        if replaced:
            os.replace(maps_path(path.with_name("other.json")), maps_path(path))
        worker = stages.fork(read_in_worker, cache, 43, queue)
        found = queue.get(timeout=300)
        worker.join()
        if replaced:
            assert "boxes.maps.safetensors" in found and "replaced" in found
        else:
            assert np.array_equal(found, some_maps()[43])
    assert np.array_equal(cache[43], some_maps()[43])  # here the first file is still open
    with pytest.raises(UserError, match=r"boxes\.maps\.safetensors.*replaced"):
        pickle.loads(pickle.dumps(cache))[43]


def test_reading_keeps_nothing_in_memory_that_is_not_shared(tmp_path):
    cells = np.zeros((256, 256), np.float16)
    save_map_cache(tmp_path / "a.json", ((i, cells) for i in range(400)), HEADER)  # 52 MB
    cache = pickle.loads(pickle.dumps(MapCache.open(tmp_path / "a.json")))
    cache[0]
    before = own_bytes()
    for image_id in range(400):
        cache[image_id]
    assert own_bytes() - before < 5e6


def own_bytes():
    """Return the bytes of this process's memory that belong to no file."""
    return 1024 * int(re.search(r"Anonymous: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text())[1])


def test_maps_of_another_data_set_are_refused(path):
    assert_refused(path, dataset="e" * 64)


def assert_refused(path, **expected):
    with pytest.raises(UserError, match=re.escape(f"python generate_dino_boxes.py out={path}")) as error:
        MapCache.open(path, **expected)
    assert "\n" not in str(error.value) and str(maps_path(path)) in str(error.value)


@pytest.mark.parametrize("place", [0, 5, 200, -1])
def test_one_wrong_byte_is_found(path, place):
    content = bytearray(maps_path(path).read_bytes())
    content[place] ^= 1
    maps_path(path).write_bytes(content)
    assert_refused(path)


@pytest.mark.parametrize("size", [0, 7, 100, -2])
def test_a_torn_file_is_refused(path, size):
    maps_path(path).write_bytes(maps_path(path).read_bytes()[:size])
    assert_refused(path)


def test_a_large_file_is_not_hashed(path, monkeypatch):
    monkeypatch.setattr(map_file, "MOST_BYTES_HASHED", 100)
    content = bytearray(maps_path(path).read_bytes())
    content[-1] ^= 1
    maps_path(path).write_bytes(content)
    assert len(MapCache.open(path)) == 5


def test_a_missing_file_and_maps_of_the_format_before_are_refused(path):
    maps_path(path).unlink()
    assert_refused(path)
    path.with_name("boxes.maps.json").write_text("{}")
    with pytest.raises(UserError, match="earlier version"):
        MapCache.open(path)


def test_a_broken_off_writer_leaves_the_old_file(path):
    def breaking():
        yield 1, np.zeros((2, 2))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_map_cache(path, breaking(), HEADER)
    assert len(MapCache.open(path)) == 5
    assert len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("name", ["a.maps.json", "a.maps.bin", "a.maps.safetensors", "a.json"])
def test_every_name_leads_to_the_file_and_the_command(name):
    assert maps_path(Path("runs") / name) == Path("runs/a.maps.safetensors")
    assert "out=runs/a.json " in map_file.remake_command(Path("runs") / name)
