"""Prediction of files without labels, and the classifier behind it."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

import models
import predict
from inference.classifier import load_classifier
from inference.photos import find_images
from localized_crops.files import UserError
from localizer.networks import TOY_WEIGHTS, build_localizer
from transforms import normalize
from utils import load_tensors

TOY = f"dino.weights={TOY_WEIGHTS}"


@pytest.fixture
def photos(site, tmp_path) -> Path:
    """Return a folder of five images, one of them in a folder of its own, and a file that is none."""
    folder = tmp_path / "photos"
    (folder / "trip").mkdir(parents=True)
    for number, path in enumerate(sorted((site / "birds" / "images").rglob("*.jpg"))[:5]):
        shutil.copy(path, folder / ("trip" if number == 4 else "") / f"bird {number}, {'é' * number}.jpg")
    (folder / "notes.txt").write_text("no image")
    return folder


def run(site, *words):
    words = [f"checkpoint={site}/run/best.pt", "num_workers=0", "device=cpu", *words]
    predict.main(predict.load_prediction_config(words))


def rows_of(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_images_are_found_by_file_folder_pattern_and_list(photos, monkeypatch):
    everything = find_images(str(photos))
    assert len(everything) == 5 and everything == sorted(everything)
    assert find_images(str(everything[0])) == everything[:1]
    assert find_images(f"{photos}/*.jpg") == [path for path in everything if path.parent == photos]
    assert find_images(f"{photos}/**/*.jpg") == everything
    monkeypatch.setattr("sys.stdin", [f"{path}\n" for path in everything[::-1]] + ["\n"])
    assert find_images("-") == everything[::-1]
    monkeypatch.setattr("sys.stdin", ["\n"])
    for nothing in (f"{photos}/*.png", f"{photos}/none", "-"):
        with pytest.raises(UserError, match="images="):
            find_images(nothing)


def test_every_image_gets_a_row_with_the_networks_own_probabilities(site, photos, tmp_path):
    run(site, f"images={photos}", f"out={tmp_path}/found.csv", "predict.top_k=3", "eval.batch_size=2")
    head, *rows = rows_of(tmp_path / "found.csv")
    assert head[:3] == ["path", "class_1", "probability_1"] and len(head) == 7
    assert [row[0] for row in rows] == [str(path) for path in find_images(str(photos))]
    content = load_tensors(site / "run" / "best.pt")
    config = content["config"]
    model = models.build_model("toyresnet", 8, image_size=32, patch_size=14).eval()
    model.load_state_dict(content[content["chosen"]])
    classifier = load_classifier(site / "run" / "best.pt", device="cpu")
    for row in rows:
        image = torch.from_numpy(np.array(PIL.Image.open(row[0]))).permute(2, 0, 1)
        pixels = normalize(classifier.views["full"](image, None)[None], config["model"]["mean"], config["model"]["std"])
        with torch.inference_mode():
            values, classes = model(pixels).softmax(1)[0].topk(3)
        assert row[1::2] == [content["class_names"][k] for k in classes]
        assert [float(cell) for cell in row[2::2]] == pytest.approx(values.tolist(), abs=2e-5)


def test_the_library_call_gives_what_the_command_writes(site, photos, tmp_path):
    run(site, f"images={photos}", f"out={tmp_path}/found.jsonl", "predict.top_k=99")
    lines = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    classifier = load_classifier(site / "run" / "best.pt")
    predictions = classifier.predict([line["path"] for line in lines], top_k=8)
    first = next(classifier.stream([line["path"] for line in lines], top_k=8, batch_size=1))
    assert first.path == predictions[0].path and first.classes == predictions[0].classes
    for line, one in zip(lines, predictions, strict=True):
        assert [entry["class"] for entry in line["top"]] == one.classes and len(one.classes) == 8
        assert [entry["probability"] for entry in line["top"]] == pytest.approx(one.probabilities, abs=1e-5)
        assert sum(one.probabilities) == pytest.approx(1, abs=1e-4) and line["box"] is None


def test_with_the_box_view_the_localizers_box_is_looked_at_and_averaged(site, photos, tmp_path):
    sheet = tmp_path / "sheet.png"
    words = [f"images={photos}", f"out={tmp_path}/found.jsonl", "predict.top_k=8", f"predict.sheet={sheet}"]
    run(site, *words, "eval_box=center", TOY, "eval.views=full")
    lines = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    paths = find_images(str(photos))
    words = [f"checkpoint={site}/run/best.pt", f"images={photos}", "eval_box=center", TOY, "eval.views=full"]
    config = predict.load_prediction_config(words)
    classifier = load_classifier(site / "run" / "best.pt", config=config)
    boxes, failed = replace(classifier, localizer=build_localizer(None, None)).find_boxes(paths)
    assert list(classifier.views) == ["full", "box"] and failed == {}
    for line, path, box in zip(lines, paths, boxes, strict=True):
        assert line["box"] == pytest.approx(box.tolist())
        image = torch.from_numpy(np.array(PIL.Image.open(path))).permute(2, 0, 1)
        shown = classifier.log_probs([view(image, box)[None] for view in classifier.views.values()])
        mean = (shown["full"].exp() + shown["box"].exp())[0] / 2
        assert line["top"][0]["probability"] == pytest.approx(float(mean.max()), abs=1e-4)
    assert sheet.read_bytes().startswith(b"\x89PNG")


def test_files_that_cannot_be_read_are_listed_and_cost_no_other_its_row(site, photos, tmp_path):
    whole = (photos / "trip").glob("*.jpg").__next__()
    (photos / "damaged.jpg").write_bytes(whole.read_bytes()[:500])
    (photos / "text.jpg").write_text("no image")
    (photos / "empty.png").touch()
    for words in ([], ["eval_box=center", TOY]):
        with pytest.raises(UserError, match=r"3 of 8 .*errors\.txt"):
            run(site, f"images={photos}", f"out={tmp_path}/found.csv", *words)
        assert len(rows_of(tmp_path / "found.csv")) == 1 + 5
        listed = (tmp_path / "found.errors.txt").read_text()
        assert listed.startswith("3 ") and all(name in listed for name in ("damaged.jpg", "text.jpg", "empty.png"))
        assert len(listed.splitlines()) == 4
    run(site, f"images={whole}", f"out={tmp_path}/found.csv")
    assert not (tmp_path / "found.errors.txt").exists() and len(rows_of(tmp_path / "found.csv")) == 2


def test_an_image_that_cannot_be_decoded_has_a_reason_in_the_place_of_a_box(site, photos):
    words = [f"checkpoint={site}/run/best.pt", "images=x", "eval_box=center", TOY]
    classifier = load_classifier(site / "run" / "best.pt", config=predict.load_prediction_config(words))
    paths = find_images(str(photos))
    paths[1].write_bytes(paths[1].read_bytes()[:-300])  # its header is whole
    boxes, failed = classifier.find_boxes(paths)
    assert list(failed) == [1] and "damaged" in failed[1] and str(paths[1]) in failed[1]
    assert (boxes[[0, 2, 3, 4], 2:] > 0).all()


def test_a_path_on_stdin_that_is_no_file_is_listed_too(site, photos, tmp_path):
    paths = [*find_images(str(photos))[:2], photos / "gone.jpg"]
    found = load_classifier(site / "run" / "best.pt").predict(paths)
    assert [one.error is None for one in found] == [True, True, False]
    assert "gone.jpg" in found[2].error and found[2].classes == []


def test_the_exif_orientation_is_applied(site, photos, tmp_path):
    with PIL.Image.open(next((photos / "trip").glob("*.jpg"))) as image:
        exif = PIL.Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees clockwise
        image.transpose(PIL.Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
        image.save(tmp_path / "upright.png")
    paths = [tmp_path / "turned.png", tmp_path / "upright.png"]
    config = predict.load_prediction_config([f"checkpoint={site}/run/best.pt", "images=x", "eval_box=center", TOY])
    turned, upright = load_classifier(site / "run" / "best.pt", config=config).predict(paths)
    assert turned.box_xywh == pytest.approx(upright.box_xywh) and turned.classes == upright.classes
    assert turned.probabilities == pytest.approx(upright.probabilities)


def test_what_is_no_prediction_is_never_overwritten(site, photos, tmp_path):
    for name in ("labels.csv", "mine.errors.txt", "sheet.png"):
        (tmp_path / name).write_text("image,label\n")
    for name in ("labels.csv", "found.txt", "mine.csv"):
        with pytest.raises(UserError, match=Path(name).stem):
            run(site, f"images={photos}", f"out={tmp_path / name}")
    for name in ("sheet.png", "sheet", "sheet.doc"):
        with pytest.raises(UserError, match="sheet"):
            run(site, f"images={photos}", f"out={tmp_path / 'new.csv'}", f"predict.sheet={tmp_path / name}")
    kept = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    assert kept == dict.fromkeys(("labels.csv", "mine.errors.txt", "sheet.png"), "image,label\n")


def without(key):
    def change(content):
        del content[key]

    return change


def renamed(content):
    content["config"]["model"].pop("mean")


def test_answers_that_are_no_numbers_are_refused(site, photos, tmp_path):
    content = load_tensors(site / "run" / "best.pt")
    for weights in ("model", "ema"):
        content[weights]["fc.weight"].fill_(3e38)  # finite, but the logits are not
    torch.save(content, tmp_path / "large.pt")
    with pytest.raises(UserError, match=r"large\.pt: its answers in view full are no numbers; try amp=none"):
        load_classifier(tmp_path / "large.pt").predict(find_images(str(photos)))


def test_a_checkpoint_without_a_classifier_of_cells_names_what_to_give(site, photos):
    words = ["eval_box=center", "dino.method=object_head", "dino.object_weights=random"]
    with pytest.raises(UserError, match=r"best\.pt: holds no classifier for .*; give dino\.method=component, or "):
        run(site, f"images={photos}", *words)


@pytest.mark.parametrize("change", [without("class_names"), without("config"), renamed])
def test_a_checkpoint_that_lacks_something_is_named(site, tmp_path, change):
    content = load_tensors(site / "run" / "best.pt")
    change(content)
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt"):
        load_classifier(tmp_path / "other.pt")


@pytest.mark.parametrize("words", [["images=x"], ["checkpoint=a.pt"], ["checkpoint=a.pt,b.pt", "images=x"]])
def test_what_the_command_needs_is_said(words):
    with pytest.raises(UserError, match="checkpoint=FILE"):
        predict.load_prediction_config(words)
