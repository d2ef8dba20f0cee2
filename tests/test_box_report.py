"""box_report.py against brute force over pixels, and its files."""

import numpy as np
import PIL.Image
import pytest

from figures import box_report
from figures.box_report import best_median_worst, draw_contact_sheet, evaluate_boxes, report_table
from localized_crops.files import load_json
from readers.data_set import DataSet, ImagePaths

SIZES = np.array([[53, 37], [40, 61], [30, 30], [71, 44], [64, 48]])  # width, height: odd and unequal
SPLIT = np.array(["train", "val", "test", "train", "test"])


def some_boxes(seed):
    rng = np.random.default_rng(seed)
    near = rng.integers(0, SIZES // 2)
    return np.concatenate([near, rng.integers(2, SIZES - near)], axis=1).astype(np.float64)


def pixels(box, size):
    """(H, W) bool, True inside a box of whole pixels."""
    x, y, width, height = box.astype(int)
    mask = np.zeros((size[1], size[0]), dtype=bool)
    mask[y : y + height, x : x + width] = True
    return mask


def brute_force(boxes, true):
    masks = [(pixels(b, s), pixels(t, s)) for b, t, s in zip(boxes, true, SIZES, strict=True)]
    ious = np.array([(a & b).sum() / (a | b).sum() for a, b in masks])
    return ious, np.array([(a & b).sum() / b.sum() for a, b in masks])


@pytest.fixture
def scores():
    boxes = some_boxes(0)
    boxes[1] = np.nan
    return evaluate_boxes(boxes, some_boxes(1), SIZES, SPLIT)


def test_figures_against_pixels(scores):
    boxes = some_boxes(0)
    boxes[1] = 0, 0, *SIZES[1]  # where none was found
    ious, coverages = brute_force(boxes, some_boxes(1))
    for split, rows in (("train", [0, 1, 3]), ("test", [2, 4])):
        score = scores["boxes"][split]
        assert score["mean_iou"] == pytest.approx(ious[rows].mean())
        assert score["coverage"] == pytest.approx(coverages[rows].mean())
        for level in ("0.3", "0.5", "0.7"):
            assert score["iou_at"][level] == (ious[rows] >= float(level)).mean()
        assert score["n"] == len(rows)
    assert (scores["boxes"]["train"]["n_without_box"], scores["boxes"]["test"]["n_without_box"]) == (1, 0)


def test_every_baseline_has_every_figure(scores):
    assert set(scores) == {"boxes", "whole_image", "center", "median_train"}
    for method in scores.values():
        for split in ("train", "test"):
            assert {"mean_iou", "coverage", "iou_at", "n", "n_without_box"} == set(method[split])
    whole = np.concatenate([np.zeros_like(SIZES), SIZES], axis=1)
    ious, _ = brute_force(whole, some_boxes(1))
    assert scores["whole_image"]["test"]["mean_iou"] == pytest.approx(ious[[2, 4]].mean())
    assert scores["whole_image"]["test"]["coverage"] == 1


def test_the_median_box_looks_at_training_images_only():
    true = some_boxes(1)
    is_train = np.isin(SPLIT, ("train", "val"))
    train = np.flatnonzero(is_train)
    before = box_report.median_boxes(true, SIZES, train)
    edges = np.concatenate([true[:, :2], true[:, :2] + true[:, 2:]], axis=1) / np.tile(SIZES, 2)
    expected = np.median(edges[is_train], axis=0) * np.tile(SIZES, 2)
    assert np.allclose(before[:, :2], expected[:, :2])
    assert np.allclose(before[:, :2] + before[:, 2:], expected[:, 2:])
    changed = np.where(is_train[:, None], true, 1.0)
    assert np.array_equal(box_report.median_boxes(changed, SIZES, train), before)


def test_a_split_without_images_is_left_out():
    test_only = np.array(["test"] * 5)
    scores = evaluate_boxes(some_boxes(0), some_boxes(1), SIZES, test_only)
    assert set(scores["boxes"]) == {"test"} and scores["median_train"] == scores["center"]
    assert "train" not in report_table(scores).replace("median training", "")


def test_the_files(scores, tmp_path, monkeypatch):
    monkeypatch.setattr(box_report, "draw_contact_sheet", lambda *_: None)
    boxes, ids, paths = some_boxes(0), np.arange(5), ImagePaths(tmp_path, ["a.jpg"] * 5)
    boxes[1] = np.nan
    data = DataSet("cub", tmp_path, ids, paths, np.zeros(5, int), ["a"], some_boxes(1), SPLIT, SIZES)
    box_report.report_boxes(
        tmp_path / "my.boxes.json", data, boxes, seconds={"maps": 1.5}, errors={7: "torn"}, images_mapped=5
    )
    content = load_json(tmp_path / "my.boxes.eval.json")
    assert content["boxes"]["test"] == scores["boxes"]["test"] and content["seconds"]["maps"] == 1.5
    assert (tmp_path / "errors.txt").read_text() == "1 images failed\n7: torn\n"
    assert "torch" in content["environment"] and content["images_mapped"] == 5
    table = (tmp_path / "my.boxes.eval.md").read_text().splitlines()
    assert len(table) == 2 + 2 * 4 and len({line.count("|") for line in table}) == 1
    assert f"{content['boxes']['train']['mean_iou']:.3f}" in table[2]


def test_best_median_worst():
    ious = np.array([0.1, 0.9, 0.5, 0.3, 0.7])
    assert best_median_worst(ious, 1) == {"best": [1], "median": [2], "worst": [0]}
    assert best_median_worst(ious, 9)["best"] == [1, 4, 2, 3, 0]


@pytest.mark.parametrize(
    ("failed", "without"),
    [([], []), ([0], range(5)), ([], [2, 4]), ([2, 4], []), ([2, 4], range(5))],
    ids=["all is known", "no true box", "no true box of a test image", "all test images failed", "both"],
)
def test_the_contact_sheet_is_a_picture(tmp_path, failed, without):
    names, true = [f"{number}.png" for number in range(5)], some_boxes(1)
    for name, size in zip(names, SIZES.tolist(), strict=True):
        PIL.Image.new("RGB", tuple(size), (200, 30, 30)).save(tmp_path / name)
    true[list(without)] = np.nan
    data = DataSet("cub", tmp_path, np.arange(5), ImagePaths(tmp_path, names), np.zeros(5, int), ["a"], true, SPLIT,
                   SIZES)  # fmt: skip
    maps = dict.fromkeys(range(5), np.full((4, 5), np.nan))
    draw_contact_sheet(tmp_path / "sheet.png", data, some_boxes(0), failed, maps)
    with PIL.Image.open(tmp_path / "sheet.png") as sheet:
        sheet.load()
        assert sheet.width > 150
    assert len(list(tmp_path.iterdir())) == 6


def test_without_an_image_there_is_no_contact_sheet(tmp_path):
    paths = ImagePaths(tmp_path, ["a.jpg"] * 5)
    data = DataSet("cub", tmp_path, np.arange(5), paths, np.zeros(5, int), ["a"], some_boxes(1), SPLIT, SIZES)
    draw_contact_sheet(tmp_path / "sheet.png", data, some_boxes(0), range(5), None)
    assert list(tmp_path.iterdir()) == []
