import json

import numpy as np
import pytest
import torch
from torchvision.ops import box_convert, box_iou

from localized_crops import box_file, boxes
from localized_crops.box_file import load_boxes, save_boxes
from localized_crops.files import UserError


def pairs(count=300, seed=0):
    rng = np.random.default_rng(seed)
    return [np.concatenate([rng.uniform(0, 60, (count, 2)), rng.uniform(1, 60, (count, 2))], 1) for _ in range(2)]


def test_iou_agrees_with_torchvision():
    a, b = pairs()
    theirs = box_iou(*(box_convert(torch.tensor(x), "xywh", "xyxy") for x in (a, b))).diagonal().numpy()
    np.testing.assert_allclose(boxes.iou(a, b), theirs, atol=1e-12)


def test_coverage_agrees_with_counting_pixels():
    a, b = (x.round() for x in pairs())

    def mask(box):
        image = np.zeros((130, 140), bool)  # H, W
        x, y, w, h = box.astype(int)
        image[y : y + h, x : x + w] = True
        return image

    counted = [(mask(p) & mask(q)).sum() / mask(q).sum() for p, q in zip(a, b, strict=True)]
    np.testing.assert_allclose(boxes.coverage(a, b), counted)


def test_a_box_inside_a_crop_is_kept_exactly():
    inner = np.array([[0.1, 0.7, 33.3, 21.9]])
    assert boxes.coverage(np.array([[0, 0, 34, 23]]), inner)[0] == 1.0


def test_clip_expand_and_the_trivial_boxes():
    size = np.array([[53, 37]])
    assert boxes.clip_boxes([[-5, 30, 20, 20]], size).tolist() == [[0, 30, 15, 7]]
    assert boxes.expand_boxes(np.array([[10, 10, 10, 20.0]]), size, 0.5).tolist() == [[5, 0, 20, 37]]
    assert boxes.whole_image_boxes(size).tolist() == [[0, 0, 53, 37]]
    assert boxes.fill_missing(np.array([[np.nan] * 4]), size).tolist() == [[0, 0, 53, 37]]
    np.testing.assert_allclose(boxes.center_boxes(size, 0.5), [[13.25, 9.25, 26.5, 18.5]])


def test_the_centred_box_on_cub_is_as_known(cub_boxes):
    true, sizes = cub_boxes
    assert boxes.iou(boxes.center_boxes(sizes), true).mean() == pytest.approx(0.524, abs=0.005)
    assert boxes.iou(boxes.whole_image_boxes(sizes), true).mean() == pytest.approx(0.342, abs=0.005)


@pytest.mark.parametrize("mode", ["exact", "reference"])
def test_a_target_maiou_gives_the_threshold_that_reaches_it(mode):
    rng = np.random.default_rng(0)
    sizes = rng.integers(100, 300, (500, 2))
    true = np.concatenate([sizes * 0.3, sizes * rng.uniform(0.2, 0.5, (500, 2))], 1)
    thr = boxes.maiou_to_thr(0.9, true, sizes, mode=mode)
    assert boxes.maiou_curve(true, sizes, [thr], mode=mode, seed=1)[0] == pytest.approx(0.9, abs=0.01)
    with pytest.raises(UserError, match="reach from"):
        boxes.maiou_to_thr(0.2, true, sizes, mode=mode)


# --- the file -----------------------------------------------------------------------------------------------------


def write(path, **change):
    save_boxes(
        path,
        {7: (1.5, 2, 30, 20), 3: None},
        {7: (53, 37), 3: (20, 10)},
        made_by="test",
        settings={"threshold": 0.5},
        scores={7: 0.25, 3: None},
    )
    if change:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return path


def test_a_box_file_comes_back_as_it_was(tmp_path):
    file = load_boxes(write(tmp_path / "boxes.json"))
    assert file.boxes == {7: (1.5, 2.0, 30.0, 20.0), 3: None} and file.scores == {7: 0.25, 3: None}
    assert file.image_sizes == {7: (53, 37), 3: (20, 10)} and file.pixel_grid == "stored"
    assert (file.made_by, file.settings) == ("test", {"threshold": 0.5})
    assert [path.name for path in tmp_path.iterdir()] == ["boxes.json"]  # no scratch file is left


@pytest.mark.parametrize("ids", [[0, 7, 10**18 - 1], ["a/b c.jpg", "ä.png", "007", "9" * 30], [3, "3.jpg"]])
def test_ids_are_numbers_or_text_and_keep_their_type(tmp_path, ids):
    path = tmp_path / "boxes.json"
    values = dict(zip(ids, [(1.0, 2.0, 3.5, 4.0), None, (0.0, 0.0, 53.0, 37.0), (0.0, 0.0, 1.0, 1.0)], strict=False))
    sizes = dict.fromkeys(ids, (53, 37))
    save_boxes(path, values, sizes, made_by="test", settings={}, scores=dict.fromkeys(ids, 0.5), pixel_grid="upright")
    file = load_boxes(path)
    assert (file.boxes, file.image_sizes, file.scores) == (values, sizes, dict.fromkeys(ids, 0.5))
    assert file.pixel_grid == "upright"


@pytest.mark.parametrize("image_id", ["12", -1, "", 10**18, 1.5])
def test_an_id_that_would_come_back_as_another_is_refused(tmp_path, image_id):
    with pytest.raises(ValueError, match="image id"):
        save_boxes(tmp_path / "b.json", {image_id: None}, {image_id: (3, 5)}, made_by="test", settings={})


def test_a_file_of_version_1_is_read(tmp_path):
    path = write(tmp_path / "boxes.json")
    content = json.loads(path.read_text()) | {"version": 1, "unit": "pixels of the original image as stored"}
    del content["pixel_grid"]
    path.write_text(json.dumps(content))
    assert load_boxes(path).boxes == {7: (1.5, 2.0, 30.0, 20.0), 3: None} and load_boxes(path).pixel_grid == "stored"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kind": "masks"}, "kind"),
        ({"version": 4}, "version"),
        ({"box_format": "xyxy"}, "box_format"),
        ({"pixel_grid": "turned"}, "pixel_grid"),
        ({"made_by": None}, "made_by"),
        ({"settings": []}, "settings"),
        ({"boxes": []}, "boxes"),
        ({"boxes": {"7": [1, 2, 3, 4]}}, "different images"),
        ({"boxes": {"7": [1, 2, 3], "3": None}}, "image 7"),
        ({"boxes": {"7": [1, 2, 0, 4], "3": None}}, "image 7"),
        ({"boxes": {"7": [1, 2, "3", 4], "3": None}}, "image 7"),
        ({"boxes": {"7": [1, 2, True, 4], "3": None}}, "image 7"),
        ({"boxes": {"7": [1, 2, float("inf"), 4], "3": None}}, "image 7"),
        ({"boxes": {"7": [50, 2, 30, 4], "3": None}}, "image 7"),
        ({"boxes": {"7": [1, 2, 10**400, 4], "3": [1, 2]}}, "image 7"),
        ({"image_sizes": {"7": None, "3": [20, 10]}}, "image 7"),
        ({"image_sizes": {"7": [53], "3": [20, 10]}}, "image 7"),
        ({"image_sizes": {"7": [10**400, 37], "3": [20, 10]}}, "image 7"),
        ({"image_sizes": {"7": [53.5, 37], "3": [20, 10]}}, "image 7"),
        ({"scores": {"7": "high"}}, "image 7"),
        ({"scores": {"9": 1.0}}, "different images"),
    ],
)
def test_a_wrong_box_file_is_refused_in_one_line(tmp_path, change, named):
    path = write(tmp_path / "boxes.json", **change)
    with pytest.raises(UserError, match=named) as error:
        load_boxes(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"kind": "localized-crops boxes"', "\xff", "NaN", "[" * 9999])
def test_text_that_is_no_box_file(tmp_path, text):
    path = tmp_path / "boxes.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"boxes\.json"):
        load_boxes(path)


def test_nan_in_a_box_is_refused_on_both_ends(tmp_path):
    path = tmp_path / "boxes.json"
    with pytest.raises(ValueError, match="image 1"):
        save_boxes(path, {1: (float("nan"), 0, 1, 1)}, {1: (9, 9)}, made_by="test", settings={})
    assert not path.exists()
    text = write(path).read_text().replace("1.5", "NaN")
    path.write_text(text)
    with pytest.raises(UserError, match="image 7"):
        load_boxes(path)


def test_boxes_of_a_data_set(tmp_path):
    path = write(tmp_path / "boxes.json")
    found = box_file.boxes_for_images(path, [3, 7], np.array([[20, 10], [53, 37]]), "stored")
    assert np.isnan(found[0]).all() and found[1].tolist() == [1.5, 2, 30, 20]
    with pytest.raises(UserError, match="no entry for image 5"):
        box_file.boxes_for_images(path, [5], np.array([[20, 10]]), "stored")
    with pytest.raises(UserError, match=r"image 7 is \(37, 53\) here"):
        box_file.boxes_for_images(path, [7], np.array([[37, 53]]), "stored")
    with pytest.raises(UserError, match="upright"):
        box_file.boxes_for_images(path, [3], np.array([[20, 10]]), "upright")
