"""What large data sets are kept in gives what small ones are given, and is checked alike."""

import json

import numpy as np
import PIL.Image
import pytest

from datasets import known_boxes, read_dataset, source_boxes
from jobs import shared_work
from localized_crops import box_file, crops
from localized_crops.box_file import load_boxes, save_boxes
from localized_crops.files import UserError
from localized_crops.image_ids import Rows, compact_ids, ids_to_keys, listed_ids
from readers import images
from readers.data_set import ImagePaths
from readers.images import image_sizes
from utils import file_stats

BOXES = {"a/1.jpg": (1.5, 2.0, 30.0, 20.0), "b.jpg": None, "ä.png": (0.0, 0.0, 0.1 + 0.2, 10.0)}
SIZES = {"a/1.jpg": (53, 37), "b.jpg": None, "ä.png": (20, 10)}
SCORES = {"a/1.jpg": 1e-300, "b.jpg": None, "ä.png": -0.25}


# --- columns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [[7, 3, 10**17], ["b", "a/ü.jpg", "007"], [3, "3.jpg"], []])
def test_every_image_has_its_row(ids):
    assert Rows(ids_to_keys(ids)).of([*ids[::-1], "x", 99]).tolist() == [*reversed(range(len(ids))), -1, -1]


def test_an_id_has_one_row_and_no_nul():
    with pytest.raises(ValueError, match="3 comes twice"):
        Rows(ids_to_keys([3, 4, 3]))
    with pytest.raises(ValueError, match="NUL"):
        ids_to_keys(["a", "b\0"])


def test_compact_ids_come_back():
    for ids in (np.array([5, 3]), np.array(["a/b", "ä"])):
        assert listed_ids(compact_ids(ids)) == ids.tolist()


# --- box files ----------------------------------------------------------------------------------------------------


def saved(path, monkeypatch, most, **more):
    monkeypatch.setattr(box_file, "MOST_ENTRIES", most)
    save_boxes(path, BOXES, SIZES, made_by="test", settings={"a": [1]}, pixel_grid="upright", **more)
    return path


@pytest.mark.parametrize("more", [{"scores": SCORES}, {"scores": {"b.jpg": 0.5}}, {}])
def test_a_file_with_columns_holds_what_one_with_entries_holds(tmp_path, monkeypatch, more):
    few, many = (saved(tmp_path / f"{most}.json", monkeypatch, most, **more) for most in (9, 2))
    assert "columns" not in json.loads(few.read_text()) and "boxes" not in json.loads(many.read_text())
    one, other = load_boxes(few), load_boxes(many)
    assert (one.boxes, one.image_sizes) == (BOXES, SIZES)
    assert (one.made_by, one.settings, one.pixel_grid) == ("test", {"a": [1]}, "upright")
    assert (other.made_by, other.pixel_grid) == (one.made_by, one.pixel_grid)
    assert (other.boxes, other.image_sizes, other.settings) == (one.boxes, one.image_sizes, one.settings)
    assert {i: score for i, score in other.scores.items() if score is not None} == {
        i: score for i, score in one.scores.items() if score is not None
    }
    ids, sizes = ["ä.png", "b.jpg"], np.array([[20, 10], [9, 9]])
    found = [box_file.boxes_for_images(path, ids, sizes, "upright") for path in (few, many)]
    assert np.array_equal(*found, equal_nan=True) and np.isnan(found[0][:, 0]).sum() == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ids": None}, "ids"),
        ({"ids": ["a/1.jpg", "b.jpg", ""]}, "ids"),
        ({"ids": ["a/1.jpg", "b.jpg", "b.jpg"]}, "b.jpg"),
        ({"ids": ["a/1.jpg", "b.jpg"]}, "reshape"),
        ({"boxes": None}, "boxes"),
        ({"boxes": "&&&&"}, "base64"),
        ({"boxes": "AAAA"}, "buffer"),
        ({"image_sizes": "boxes"}, "reshape"),
        ({"scores": "image_sizes"}, "reshape"),
    ],
)
def test_wrong_columns_are_refused_in_one_line(tmp_path, monkeypatch, change, named):
    path = saved(tmp_path / "boxes.json", monkeypatch, 2, scores=SCORES)
    content = json.loads(path.read_text())
    columns = content["columns"]
    columns |= {key: columns.get(value, value) if isinstance(value, str) else value for key, value in change.items()}
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"boxes\.json: not a box file") as error:
        load_boxes(path)
    assert "\n" not in str(error.value)


def test_impossible_numbers_in_columns_name_their_image(tmp_path, monkeypatch):
    path = saved(tmp_path / "boxes.json", monkeypatch, 2)
    content = json.loads(path.read_text())
    boxes = np.array([[1.0, 2, 90, 20], [np.nan] * 4, [0, 0, 1, 1]])
    content["columns"]["boxes"] = box_file.base64.b64encode(boxes.tobytes()).decode()
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"a/1\.jpg"):
        load_boxes(path)
    boxes[0], boxes[2, 1] = (1, 2, 3, 4), np.inf
    content["columns"]["boxes"] = box_file.base64.b64encode(boxes.tobytes()).decode()
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"ä\.png"):
        load_boxes(path)


def test_a_source_with_columns_serves_a_data_set(birds, tmp_path, monkeypatch):
    data = read_dataset("cub", birds)
    boxes = dict(zip(data.ids.tolist(), map(tuple, data.boxes.tolist()), strict=True)) | {int(data.ids[3]): None}
    sizes = dict(zip(data.ids.tolist(), map(tuple, data.image_sizes.tolist()), strict=True))
    monkeypatch.setattr(box_file, "MOST_ENTRIES", 2)
    save_boxes(tmp_path / "boxes.json", boxes, sizes, made_by="test", settings={})
    found, missing = source_boxes(str(tmp_path / "boxes.json"), data)
    assert missing == 1 and np.array_equal(np.delete(found, 3, 0), np.delete(data.boxes, 3, 0))
    assert np.flatnonzero(np.isnan(known_boxes(str(tmp_path / "boxes.json"), data)[:, 0])).tolist() == [3]


# --- data sets ----------------------------------------------------------------------------------------------------


@pytest.fixture
def paths(tmp_path):
    """Return four small images."""
    for number in range(4):
        PIL.Image.new("RGB", (5 + number, 7)).save(tmp_path / f"{number}.png")
    return ImagePaths(tmp_path, [f"{number}.png" for number in range(4)])


def opened(monkeypatch):
    """Return the list of the images whose headers are read from now on."""
    seen, read = [], images.image_size
    monkeypatch.setattr(images, "image_size", lambda path: seen.append(path.name) or read(path))
    return seen


def test_headers_of_many_images_are_read_once_and_after_a_change(paths, monkeypatch):
    monkeypatch.setattr(images, "MOST_HEADERS", 3)
    first, seen = image_sizes(paths), opened(monkeypatch)
    again = image_sizes(paths)
    assert seen == [] and all(np.array_equal(a, b) for a, b in zip(first[:2], again[:2], strict=True))
    PIL.Image.new("RGB", (11, 13)).save(paths[2])
    assert image_sizes(paths)[0].tolist() == [[5, 7], [6, 7], [11, 13], [8, 7]] and seen == ["2.png"]
    paths[1].write_bytes(b"no image")
    with pytest.raises(UserError, match=r"1\.png"):
        image_sizes(paths)
    for _ in range(2):  # what cannot be read is not kept
        found, _, faults = image_sizes(paths, keep_going=True)
        assert list(faults) == [1] and found[1].tolist() == [0, 0]
    paths[3].unlink()
    assert list(image_sizes(paths, keep_going=True)[2]) == [1, 3]


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"x" * 500])
def test_a_damaged_file_of_headers_is_made_again(paths, monkeypatch, damage):
    monkeypatch.setattr(images, "MOST_HEADERS", 3)
    expected, (kept,) = image_sizes(paths)[0], list(paths[0].parent.glob(".image_sizes*"))
    kept.write_bytes(damage)
    assert np.array_equal(image_sizes(paths)[0], expected)
    seen = opened(monkeypatch)
    assert np.array_equal(image_sizes(paths)[0], expected) and seen == []


def test_few_images_leave_no_file_of_headers(paths):
    image_sizes(paths)
    assert not list(paths[0].parent.glob(".*"))


def test_stats_of_files_that_are_not_there(tmp_path):
    (tmp_path / "a").write_text("abc")
    found = file_stats([tmp_path / "a", tmp_path / "b"])
    assert found[0, 0] == 3 and found[1].tolist() == [-1, -1, -1]


def test_of_many_files_the_stats_tell_an_image_that_was_replaced(paths, monkeypatch):
    monkeypatch.setattr(shared_work, "MOST_READ", 1)
    batches = [[paths[0], paths[1]], [paths[2]], [paths[3]]]
    before = shared_work.content_keys(batches)
    assert before == shared_work.content_keys(batches) and len(set(before)) == 3
    paths[2].write_bytes(paths[2].read_bytes())  # the same bytes, written anew
    after = shared_work.content_keys(batches)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_an_image_that_cannot_be_read_has_a_key_until_it_can(paths):
    gone = paths[0].with_name("gone.jpg")
    batches = [[paths[0], gone], [paths[1]]]
    before = shared_work.content_keys(batches)
    gone.write_bytes(b"mended")
    after = shared_work.content_keys(batches)
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True]


# --- crops --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"thr": 0.7}, {"thr": 0.7, "mode": "reference"}, {"thr": -1.0}])
def test_parts_are_drawn_one_after_the_other(how, monkeypatch):
    rng = np.random.default_rng(0)
    sizes = rng.integers(30, 90, (50, 2))
    boxes = np.concatenate([sizes * 0.2, sizes * rng.uniform(0.1, 0.6, (50, 2))], axis=1)
    monkeypatch.setattr(crops, "ROWS_AT_ONCE", 20)
    whole = crops.sample_crops(boxes, sizes, rng=np.random.default_rng(3), **how)
    one = np.random.default_rng(3)
    parts = [crops.sample_crops(boxes[n : n + 20], sizes[n : n + 20], rng=one, **how) for n in (0, 20, 40)]
    assert np.array_equal(whole, np.concatenate(parts)) and whole.dtype == np.int64
    shapes, found = crops.random_shapes(sizes, (0.08, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0))
    assert shapes.shape == (50, 2) and found.dtype == bool
