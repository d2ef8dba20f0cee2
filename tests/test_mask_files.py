"""mask_files.py: masks and their info, written and read back, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from localized_crops.files import UserError
from masks.mask_files import (
    info_entry,
    load_masks,
    load_masks_info,
    mask_names,
    save_masks,
    save_masks_info,
    tight_box,
)
from utils import save_tensors

ENTRY = {
    "bbox": [1, 2, 3, 4],
    "area": 9,
    "predicted_iou": 0.5,
    "stability_score": 0.25,
    "point_coords": [[2, 3]],
    "crop_box": [0, 0, 53, 37],
}


@pytest.mark.parametrize("store", ["bool", "packed"])
@pytest.mark.parametrize("shape", [(3, 37, 53), (0, 37, 53), (1, 1, 1), (2, 8, 8)])
def test_masks_come_back(tmp_path, store, shape):
    masks = torch.from_numpy(np.random.default_rng(0).random(shape) > 0.6)
    save_masks(tmp_path / "a.pt", masks, store)
    found = load_masks(tmp_path / "a.pt")
    assert found.dtype == torch.bool and found.shape == shape and torch.equal(found, masks)


def test_packed_masks_are_an_eighth(tmp_path):
    masks = torch.zeros(20, 200, 300, dtype=torch.bool)
    for store in ("bool", "packed"):
        save_masks(tmp_path / store, masks, store)
    assert (tmp_path / "packed").stat().st_size < 0.13 * (tmp_path / "bool").stat().st_size
    assert torch.equal(torch.load(tmp_path / "bool", weights_only=True), masks)  # the published artefact


def test_the_original_artefact_is_read(tmp_path):
    torch.save(torch.ones(2, 5, 7, dtype=torch.bool), tmp_path / "a.pt")
    assert load_masks(tmp_path / "a.pt").shape == (2, 5, 7)


@pytest.mark.parametrize(
    "content",
    [
        torch.zeros(3, 4, 5),
        torch.zeros(4, 5, dtype=torch.bool),
        {"packed": torch.zeros(2, 3, dtype=torch.uint8), "shape": [2, 9, 9]},
        {"packed": torch.zeros(2, 3, dtype=torch.uint8), "shape": [10**9, 10**6, 10**6]},
        {"packed": torch.zeros(2, 3), "shape": [2, 4, 6]},
        {"shape": "x"},
        [1],
    ],
)
def test_what_is_no_masks_is_refused(tmp_path, content):
    save_tensors(tmp_path / "a.pt", content)
    with pytest.raises(UserError, match="not masks"):
        load_masks(tmp_path / "a.pt")


def test_a_torn_file_is_refused(tmp_path):
    save_masks(tmp_path / "a.pt", torch.ones(2, 50, 70, dtype=torch.bool), "packed")
    (tmp_path / "a.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:300])
    with pytest.raises(UserError, match=r"a\.pt"):
        load_masks(tmp_path / "a.pt")


def test_names_of_two_class_folders_do_not_meet(tmp_path):
    paths = [
        tmp_path / "a" / "bird_1.jpg",
        tmp_path / "b" / "bird_1.png",
        tmp_path / "b" / "x.y.jpg",
        tmp_path / "setup.jpg",
    ]
    assert mask_names([4, 9, 11, 12], paths) == ["bird_1.4", "bird_1.9", "x.y", "setup.12"]


def test_info_comes_back(tmp_path):
    record = ENTRY | {"segmentation": np.ones((37, 53), bool), "bbox": np.array([1, 2, 3, 4]), "area": np.int64(9)}
    save_masks(tmp_path / "bird.pt", torch.zeros(1, 37, 53, dtype=torch.bool), "bool")
    save_masks(tmp_path / "none.pt", torch.zeros(0, 37, 53, dtype=torch.bool), "bool")
    save_masks_info(tmp_path, {"engine": "sam", "store": "bool"}, {"bird": [info_entry(record)], "none": []})
    setup, info = load_masks_info(tmp_path)
    assert info == {"bird": [ENTRY], "none": []} and setup["engine"] == "sam"
    (tmp_path / "none.pt").unlink()
    with pytest.raises(UserError, match=r"none\.pt: missing"):
        load_masks_info(tmp_path)


def change(content, how):
    content = json.loads(json.dumps(content))
    how(content)
    return content


GOOD = {"setup": {"kind": "localized-crops masks", "version": 1, "store": "none"}, "bird": [ENTRY]}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([1], r"masks_info\.json"),
        ({"bird": [ENTRY]}, r"masks_info\.json"),
        (change(GOOD, lambda c: c["setup"].update(version=9)), "version 1"),
        (change(GOOD, lambda c: c.update(bird={})), "image bird"),
        (change(GOOD, lambda c: c.update({"../x": []})), r"image \.\./x"),
        (change(GOOD, lambda c: c["bird"].append({})), "image bird"),
        (change(GOOD, lambda c: c["bird"][0].update(bbox=[1, 2, 3])), "image bird"),
        (change(GOOD, lambda c: c["bird"][0].update(bbox=[1, 2, -3, 4])), "image bird"),
        (change(GOOD, lambda c: c["bird"][0].update(bbox=[1, 2, "3", 4])), "image bird"),
    ],
)
def test_wrong_info_is_refused_in_one_line(tmp_path, content, told):
    (tmp_path / "masks_info.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=told) as error:
        load_masks_info(tmp_path)
    assert "generate_mask.py" in str(error.value) and "\n" not in str(error.value)


def test_an_unfinished_folder_says_how_to_go_on(tmp_path):
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(UserError, match=r"unfinished; go on with: python generate_mask\.py mask\.folder="):
        load_masks_info(tmp_path)


def test_tight_box():
    mask = np.zeros((37, 53), dtype=bool)
    mask[4:9, 10] = mask[6, 10:30] = True
    assert tight_box(mask) == (10, 4, 20, 5)


def test_every_image_has_a_mask_file_of_its_own_with_a_name_that_can_be_written(tmp_path):
    names = ["x/a.jpg", "y/a.jpg", "z/a.425.jpg", "b\u00ad\u200d\x7f.jpg", f"{'n' * 240}.jpg", f"{'n' * 241}.jpg"]
    for ids in ([424, 425, 426, 427, 428, 429], names):
        found = mask_names(ids, [Path(name) for name in names])
        assert len(set(found)) == len(names)
        for name in found:
            save_masks(tmp_path / f"{name}.pt", torch.zeros(1, 2, 3, dtype=torch.bool), "bool")
        save_masks_info(tmp_path, {"store": "bool"}, {name: [] for name in found})
        assert list(load_masks_info(tmp_path)[1]) == found
