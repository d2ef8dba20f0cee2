"""Boxes in other tools' formats: read, checked, matched, chosen from, written."""

import json
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest

import boxes as convert_script
from config import load_config
from datasets import read_dataset, source_boxes
from localized_crops.box_file import load_boxes
from localized_crops.boxes import center_boxes, coverage, crops_to_xywh
from localized_crops.files import UserError
from readers.box_sources import match_names, read_foreign
from training.epoch_crops import BoxCrops
from training.train_data import build_crops, crop_boxes

SIZES = [(40, 30), (25, 50), (61, 33), (20, 20)]
NAMES = ["ash/a.jpg", "ash/b.jpg", "yew/a.jpg", "yew/c d.jpg"]
BOXES = np.array([[1, 2, 30, 20], [5, 6, 7, 8], [10, 11, 50, 20], [0, 0, 20, 15.5]])  # one reaches to the edge


@pytest.fixture
def data(tmp_path):
    for name, size in zip(NAMES, SIZES, strict=True):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", size).save(path)
    return read_dataset("folder", tmp_path / "photos")


def coco(path, boxes=BOXES, names=NAMES, sizes=SIZES, **more):
    images = [
        {"id": 7 + n, "file_name": name, "width": w, "height": h}
        for n, (name, (w, h)) in enumerate(zip(names, sizes, strict=True))
    ]
    annotations = [
        {"id": n, "image_id": 7 + n, "category_id": 3, "bbox": list(map(float, box))} | more
        for n, box in enumerate(boxes)
    ]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": []}))
    return path


def csv_table(path):
    rows = [f"{name},{','.join(map(str, box))}" for name, box in zip(NAMES, BOXES.tolist(), strict=True)]
    path.write_text("\n".join(["path,x,y,width,height", *rows]) + "\n")
    return path


def yolo(folder, boxes=BOXES):
    for name, (w, h), (x, y, bw, bh) in zip(NAMES, SIZES, boxes.tolist(), strict=True):
        path = folder / name.replace(".jpg", ".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"0 {(x + bw / 2) / w} {(y + bh / 2) / h} {bw / w} {bh / h}\n")
    (folder / "classes.txt").write_text("bird\n")  # stands beside YOLO's files and holds no boxes
    return folder


def voc(folder):
    folder.mkdir()
    for number, (name, (w, h), (x, y, bw, bh)) in enumerate(zip(NAMES, SIZES, BOXES.tolist(), strict=True)):
        box = f"<xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + bw}</xmax><ymax>{y + bh}</ymax>"
        size = f"<size><width>{w}</width><height>{h}</height><depth>3</depth></size>"
        text = f"<annotation><filename>{name}</filename>{size}<object><bndbox>{box}</bndbox></object></annotation>"
        (folder / f"{number}.xml").write_text(text)
    return folder


FORMATS = {"boxes.json": coco, "boxes.csv": csv_table, "yolo": yolo, "voc": voc}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_boxes(data, tmp_path, name):
    boxes, missing = source_boxes(str(FORMATS[name](tmp_path / name)), data)
    assert missing == 0 and np.allclose(boxes, BOXES)


def test_names_are_matched_by_path_then_by_their_last_parts():
    own = ["train/ash/a.jpg", "train/yew/a.jpg", "train/yew/b.jpg"]
    rows, unknown = match_names(["train/ash/a.jpg", "x/yew/a.png", "b", "a.jpg", "no\\c.jpg"], own)
    assert rows.tolist() == [0, 1, 2, -1, -1] and unknown == ["a.jpg", "no\\c.jpg"]
    assert match_names(["p/b.jpg", "q/b.jpg"], own)[0].tolist() == [-1, -1]  # two files would be one image


def test_images_without_a_box_are_named_and_allowed_by_a_key(data, tmp_path, capsys):
    path = coco(tmp_path / "half.json", BOXES[:2])
    with pytest.raises(UserError, match=r"2 of 4 images \(yew/a\.jpg.*boxes\.allow_missing=0\.5"):
        source_boxes(str(path), data)
    boxes, missing = source_boxes(str(path), data, allow_missing=0.5)
    assert missing == 2 and boxes[2].tolist() == [0, 0, 61, 33] and "yew/a.jpg" in capsys.readouterr().out


@pytest.mark.parametrize(
    "write",
    [
        lambda p: coco(p / "b.json", BOXES / 100),
        lambda p: coco(p / "b.json", sizes=[(30, 40), *SIZES[1:]]),
        lambda p: coco(p / "b.json", BOXES * [1, 1, 0, 1]),
        lambda p: coco(p / "b.json", bbox=[], segmentation=[[1, 2, 3, 4, 5, 6]]),
        lambda p: yolo(p / "yolo", BOXES * 100),
        lambda p: p / "photos" / "ash",
    ],
    ids=["normalised", "size", "flat", "segmentations", "yolo in pixels", "no boxes"],
)
def test_what_cannot_be_boxes_is_one_line(data, tmp_path, write):
    path = write(tmp_path)
    with pytest.raises(UserError) as error:
        source_boxes(str(path), data)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.txt", "0 0.5 0.5 0.2 0.2\n\n0 0.5 0.5 0.2\n", r"a\.txt:3"),
        ("a.txt", "0 0.5 half 0.2 0.2\n", r"a\.txt:1"),
        ("a.xml", "<annotation><object>", r"a\.xml"),
        ("a.xml", "<annotation><object><bndbox><xmin>1</xmin></bndbox></object></annotation>", r"a\.xml"),
        ("a.xml", "<annotation><size><width>wide</width></size></annotation>", r"a\.xml"),
    ],
)
def test_a_fault_in_a_yolo_or_voc_file_is_named(data, tmp_path, name, text, told):
    (tmp_path / "boxes").mkdir()
    (tmp_path / "boxes" / name).write_text(text)
    with pytest.raises(UserError, match=told) as error:
        source_boxes(str(tmp_path / "boxes"), data)
    assert "\n" not in str(error.value)


def test_names_that_are_no_image_and_boxes_outside_are_told(data, tmp_path, capsys):
    names = ["none.jpg", *NAMES[1:]]
    path = coco(tmp_path / "b.json", BOXES + np.array([[0], [900], [0], [0]]) * [1, 0, 0, 0], names)
    with pytest.raises(UserError, match=r"boxes\.allow_missing=0\.5") as error:
        source_boxes(str(path), data)
    assert "1 names there are no image here (none.jpg" in str(error.value) and "1 boxes lie outside" in str(error.value)
    assert source_boxes(str(path), data, allow_missing=0.5)[1] == 2


def test_images_that_yolo_would_mix_up_are_refused(data, tmp_path):
    PIL.Image.new("RGB", (9, 9)).save(tmp_path / "photos" / "ash" / "a.png")
    with pytest.raises(UserError, match="2 images are called ash/a"):
        run_convert("image", tmp_path / "yolo", data.root)
    assert not (tmp_path / "yolo").exists()


@pytest.mark.parametrize("text", ["{}", "[]", '{"images": 3, "annotations": []}', "no,such,columns\n1,2,3\n", ""])
def test_other_files_are_no_boxes(data, tmp_path, text):
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(UserError, match=r"odd\.json"):
        source_boxes(str(tmp_path / "odd.json"), data)


def test_of_several_boxes_the_largest_their_union_or_one_drawn_for_each_crop(data, tmp_path):
    path = coco(tmp_path / "b.json")
    content = json.loads(path.read_text())
    content["annotations"].append({"id": 9, "image_id": 8, "category_id": 3, "bbox": [10, 20, 10, 25]})
    path.write_text(json.dumps(content))
    assert source_boxes(str(path), data)[0][1].tolist() == [10, 20, 10, 25]
    assert source_boxes(str(path), data, several="union")[0][1].tolist() == [5, 6, 15, 39]
    pool = read_foreign(path, data).of(np.array([1, 3]))
    crops = BoxCrops(pool.one_each("largest"), pool.image_sizes, thr=1.0, redraw=pool.drawn)
    drawn = {tuple(pool.drawn(np.random.default_rng(seed))[0]) for seed in range(20)}
    assert drawn == {(10, 20, 10, 25), (5, 6, 7, 8)} and crops.draw(np.random.default_rng(0)).shape == (2, 4)
    assert (pool.drawn(np.random.default_rng(0))[1] == BOXES[3]).all()


@pytest.mark.parametrize(("words", "has_others"), [((), False), (("boxes.several=random",), True)])
def test_a_training_draws_one_of_several_boxes_anew_for_each_epoch(data, tmp_path, words, has_others):
    path, largest = coco(tmp_path / "b.json"), [10, 20, 10, 25]
    content = json.loads(path.read_text())
    content["annotations"].append({"id": 9, "image_id": 8, "category_id": 3, "bbox": largest})
    path.write_text(json.dumps(content))
    data = replace(data, split=np.full(4, "train"))
    config = load_config(["dataset.name=folder", f"dataset.root={data.root}", f"source={path}", "THR=1", *words])
    crops = build_crops(config, data, crop_boxes(config, data)[0])
    drawn = crops_to_xywh(np.stack([crops.draw(np.random.default_rng(seed))[1] for seed in range(30)]))
    kept = np.array([coverage(drawn, np.tile(box, (30, 1))) == 1 for box in (largest, BOXES[1])])
    assert kept.any(0).all() and (~kept[0]).any() == has_others


def test_boxes_of_which_there_is_one_an_image_are_not_drawn(data):
    config = load_config(["dataset.name=folder", f"dataset.root={data.root}", "source=center", "boxes.several=random"])
    crops = build_crops(config, data, crop_boxes(config, data)[0])
    rows = data.rows("train")
    assert crops.redraw is None and np.array_equal(crops.boxes, center_boxes(data.image_sizes[rows]))


# --- converting ---------------------------------------------------------------------------------------------------


def run_convert(source, out, root):
    words = ["convert", str(source), str(out), "dataset.name=folder", f"dataset.root={root}"]
    convert_script.main(convert_script.load_request(words))


def test_a_round_through_all_formats_keeps_boxes_and_gaps(data, tmp_path):
    names, source = ["ours.json", "b.coco.json", "b.csv", "yolo", "again.json"], coco(tmp_path / "b.json", BOXES[:3])
    for name in names:
        words = ["convert", str(source), str(tmp_path / name), "dataset.name=folder", f"dataset.root={data.root}"]
        convert_script.main(convert_script.load_request([*words, "boxes.allow_missing=0.25"]))
        source = tmp_path / name
    file = load_boxes(tmp_path / "again.json")
    assert file.boxes["yew/c d.jpg"] is None and file.pixel_grid == "upright"
    assert np.allclose([file.boxes[name] for name in NAMES[:3]], BOXES[:3])


def test_coco_is_opened_by_its_own_library(data, tmp_path):
    library = pytest.importorskip("pycocotools.coco")
    run_convert(csv_table(tmp_path / "b.csv"), tmp_path / "b.coco.json", data.root)
    content = library.COCO(str(tmp_path / "b.coco.json"))
    found = {content.imgs[one["image_id"]]["file_name"]: one["bbox"] for one in content.anns.values()}
    assert found == dict(zip(NAMES, BOXES.tolist(), strict=True))


def test_cub_images_are_named_by_their_files(birds, tmp_path):
    out = tmp_path / "b.csv"
    words = ["convert", "gt", str(out), "dataset.name=cub", f"dataset.root={birds}"]
    convert_script.main(convert_script.load_request(words))
    data = read_dataset("cub", birds)
    assert np.allclose(source_boxes(str(out), data)[0], data.boxes)


@pytest.mark.parametrize("words", [[], ["convert", "a"], ["turn", "a", "b"], ["convert", "a", "dataset.root=b"]])
def test_other_words_are_refused(words):
    with pytest.raises(UserError):
        convert_script.load_request(words)


def test_what_lies_at_the_new_place_is_kept(data, tmp_path):
    (tmp_path / "yolo").mkdir()
    (tmp_path / "yolo" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        run_convert(csv_table(tmp_path / "b.csv"), tmp_path / "yolo", data.root)
    with pytest.raises(UserError, match="name"):
        run_convert(tmp_path / "b.csv", tmp_path / "b.txt", data.root)
    assert load_config([])["boxes"] == {"several": "largest", "allow_missing": 0.0}


def test_the_help_says_how_to_convert(capsys):
    assert convert_script.load_request(["--help"]) is None
    assert "python boxes.py convert FROM TO" in capsys.readouterr().out
