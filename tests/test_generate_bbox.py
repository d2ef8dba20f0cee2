"""generate_bbox.py: the box that a classifier believes in, whole, killed, shared out, and with bad input."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import stages
import torch
from sound_files import COUNTS, write_candidates
from torchvision.transforms.v2 import functional as F

import generate_bbox as stage
import models
import train
from config import load_config
from datasets import read_dataset, source_boxes
from figures import box_report
from localized_crops.box_file import load_boxes
from localized_crops.boxes import expand_boxes
from localized_crops.files import UserError, load_json
from masks.mask_files import load_masks_info, mask_names, save_masks_info
from readers.images import read_image
from transforms import normalize
from utils import load_tensors


@pytest.fixture(autouse=True)
def no_contact_sheet(monkeypatch):
    monkeypatch.setattr(box_report, "draw_contact_sheet", lambda *_: None)


@pytest.fixture(scope="module")
def classifier(birds, tmp_path_factory):
    """Return the checkpoint of a short training."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = ["dataset.name=cub", f"dataset.root={birds}", f"run_dir={folder}", "num_epochs=2", "image_size=32"]
    train.train_run(load_config([*words, "num_workers=0", "opt.warmup_epochs=0"]))
    return folder / "best.pt"


@pytest.fixture(scope="module")
def masks(birds, tmp_path_factory):
    """Return a folder of random candidates, some images having none."""
    folder, data = tmp_path_factory.mktemp("masks") / "masks_0", read_dataset("cub", birds)
    folder.mkdir()
    write_candidates(folder, data)
    return folder


def words(root, masks, classifier, out, *more):
    settings = ["dataset.name=cub", f"dataset.root={root}", f"masks={masks}", f"bbox.classifier={classifier}"]
    return [*settings, f"out={out}", "num_workers=0", "num_threads=1", "bbox.batch_size=8", *more]


def run(*arguments):
    stage.main(load_config(words(*arguments)))
    return arguments[3]


def command(log, *arguments, **env):
    return stages.Process([str(stages.ROOT / "generate_bbox.py"), *words(*arguments)], log, **env)


def load_model(classifier):
    model = models.build_model("toyresnet", 8, image_size=32, patch_size=14)
    model.load_state_dict(load_tensors(classifier)["ema"])
    return model.eval()


def reference(data, masks, classifier, score):
    """Return image id -> box -> score, one candidate at a time, in plain lines."""
    model, info = load_model(classifier), load_masks_info(masks)[1]

    def look(image, box, size):
        x, y, w, h = expand_boxes(np.array([box]), np.array([size]), 0.1)[0]
        left, top, right, bottom = int(x), int(y), round(x + w), round(y + h)
        crop = image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
        with torch.no_grad():
            return models.features_of(model, normalize(F.resize(F.pil_to_tensor(crop), [32, 32], antialias=True)[None]))

    means = torch.zeros(8, 128)
    for row in [*data.rows("train"), *data.rows("val")]:
        whole = [0, 0, *data.image_sizes[row].tolist()]
        features = look(read_image(data.paths[row]), whole, data.image_sizes[row])[0]
        means[data.labels[row]] += torch.nn.functional.normalize(features)[0]
    found = {}
    for row, name in enumerate(mask_names(data.ids.tolist(), data.paths)):
        values = {}
        for entry in info[name]:
            features, logits = look(read_image(data.paths[row]), entry["bbox"], data.image_sizes[row])
            label = data.labels[row]
            values[tuple(entry["bbox"])] = {
                "logit": logits[0, label],
                "ncm": torch.nn.functional.cosine_similarity(features[0], means[label], dim=0),
                "label_free": logits.softmax(1).max(),
            }[score].item()
        found[int(data.ids[row])] = values
    return found


@pytest.mark.parametrize("score", ["logit", "ncm", "label_free"])
def test_the_box_with_the_best_score_wins(birds, masks, classifier, tmp_path, score):
    out = run(birds, masks, classifier, tmp_path / "boxes.json", f"bbox.score={score}")
    file, data = load_boxes(out), read_dataset("cub", birds)
    same = []
    for image_id, values in reference(data, masks, classifier, score).items():
        assert (file.boxes[image_id] is None) == (not values) == (file.scores[image_id] is None)
        if values:
            own, best = values[file.boxes[image_id]], max(values.values())
            assert file.scores[image_id] == pytest.approx(own, abs=0.02) and own > best - 0.02  # Pillow's rounding
            same.append(own == best)
    assert np.mean(same) > 0.9
    without = sum(COUNTS[row % 5] == 0 for row in range(len(data.ids)))
    assert sum(box is None for box in file.boxes.values()) == without == source_boxes(str(out), data)[1]
    scores = load_json(out.with_suffix(".eval.json"))
    assert sum(scores["boxes"][split]["n_without_box"] for split in ("train", "test")) == without
    assert scores["seconds"]["scores"] > 0 and {"whole_image", "center", "median_train"} <= scores.keys()


def test_a_killed_run_goes_on_and_does_nothing_twice(birds, masks, classifier, tmp_path, monkeypatch, capsys):
    whole = run(birds, masks, classifier, tmp_path / "whole" / "boxes.json")
    out = tmp_path / "killed" / "boxes.json"
    with command(tmp_path / "log", birds, masks, classifier, out) as process:
        assert process.wait_until(lambda: stages.units_done(out.parent))
    assert not out.exists(), "killed too late to show anything"
    with pytest.raises(UserError, match=r"begun with bbox\.padding=0\.1, now 0\.3; .* bbox\.again=true"):
        run(birds, masks, classifier, out, "bbox.padding=0.3")
    prepared = stage.prepare(load_config(words(birds, masks, classifier, out)))
    done, scored, original = prepared.work.finished().keys(), [], stage.score_crops

    def spy(one, rows, *rest):
        scored.append(one.work.units.index(rows))
        return original(one, rows, *rest)

    monkeypatch.setattr(stage, "score_crops", spy)
    run(birds, masks, classifier, out)
    assert done and sorted(scored) == sorted(set(range(len(prepared.work.units))) - done)
    assert load_boxes(out).boxes == load_boxes(whole).boxes and load_boxes(out).scores == load_boxes(whole).scores
    scored.clear()
    capsys.readouterr()
    run(birds, masks, classifier, out)
    assert scored == [] and load_boxes(out).boxes == load_boxes(whole).boxes
    assert "72 of 72 images are done already" in capsys.readouterr().out
    run(birds, masks, classifier, out, "bbox.again=true")
    assert len(scored) == len(prepared.work.units)


def test_two_processes_make_the_same_boxes(birds, masks, classifier, tmp_path):
    whole = run(birds, masks, classifier, tmp_path / "whole" / "boxes.json")
    out = tmp_path / "shared" / "boxes.json"
    given = birds, masks, classifier, out
    shared = [command(tmp_path / str(rank), *given, RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)]
    with shared[0], shared[1]:
        assert [process.end() for process in shared] == [0, 0], [process.told() for process in shared]
    assert load_boxes(out).boxes == load_boxes(whole).boxes


def test_an_image_that_fails_is_listed_and_done_when_mended(birds_copy, classifier, tmp_path):
    data = read_dataset("cub", birds_copy)
    masks = tmp_path / "masks_0"
    masks.mkdir()
    write_candidates(masks, data)
    kept = data.paths[5].read_bytes()
    data.paths[5].write_bytes(kept[: len(kept) // 2])
    out = tmp_path / "out" / "boxes.json"
    with pytest.raises(UserError, match="1 images failed"):
        run(birds_copy, masks, classifier, out)
    assert load_boxes(out).boxes[int(data.ids[5])] is None
    assert f"{data.ids[5]}: " in out.with_name("errors.txt").read_text()
    data.paths[5].write_bytes(kept)
    run(birds_copy, masks, classifier, out)
    whole = run(birds_copy, masks, classifier, tmp_path / "whole" / "boxes.json")
    assert load_boxes(out).boxes == load_boxes(whole).boxes


def test_an_image_that_is_replaced_by_a_torn_one_loses_its_box(birds_copy, masks, classifier, tmp_path):
    out = run(birds_copy, masks, classifier, tmp_path / "boxes.json")
    data = read_dataset("cub", birds_copy)
    row = next(row for row, box in enumerate(load_boxes(out).boxes.values()) if box is not None)
    data.paths[row].write_bytes(data.paths[row].read_bytes()[:-300])
    with pytest.raises(UserError, match=r"errors\.txt"):
        run(birds_copy, masks, classifier, out)
    assert load_boxes(out).boxes[data.ids[row].item()] is None
    assert data.paths[row].name in out.with_name("errors.txt").read_text()


def test_candidates_at_the_borders_are_kept_inside(birds, classifier, tmp_path):
    """SAM's boxes end at the last pixel: a mask of one column has width 0, and it may be the last column."""
    data, masks = read_dataset("cub", birds), tmp_path / "masks_0"
    masks.mkdir()
    images = {
        name: [{"bbox": [width - 1.0, height - 1.0, 0.0, 0.0]}]
        for name, (width, height) in zip(mask_names(data.ids, data.paths), data.image_sizes.tolist(), strict=True)
    }
    save_masks_info(masks, {"dataset": data.fingerprint(), "store": "none"}, images)
    out = run(birds, masks, classifier, tmp_path / "boxes.json")
    assert all(box[2:] == (1, 1) for box in load_boxes(out).boxes.values())


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["masks=none"], "masks: none given"),
        (["bbox.classifier=none"], r"bbox\.classifier: none given"),
        (["masks=nowhere"], "there is no such file"),
        (["bbox.classifier=nowhere.pt"], "there is no such file"),
    ],
)
def test_what_is_missing_is_one_line(birds, masks, classifier, tmp_path, more, told):
    with pytest.raises(UserError, match=told) as error:
        run(birds, masks, classifier, tmp_path / "out" / "boxes.json", *more)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_what_does_not_fit_is_one_line(birds, masks, classifier, tmp_path):
    other = Path(shutil.copytree(masks, tmp_path / "masks_1"))
    content = json.loads((other / "masks_info.json").read_text())
    content["setup"]["dataset"] = "another"
    (other / "masks_info.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="made for another data set"):
        run(birds, other, classifier, tmp_path / "boxes.json")
    state = load_tensors(classifier)
    torch.save(state | {"class_names": state["class_names"][:5]}, tmp_path / "5.pt")
    with pytest.raises(UserError, match="knows 5 classes, the data set has 8"):
        run(birds, masks, tmp_path / "5.pt", tmp_path / "boxes.json")
    torch.save(state["ema"], tmp_path / "plain.pt")
    with pytest.raises(UserError, match=r"no checkpoint of train\.py"):
        run(birds, masks, tmp_path / "plain.pt", tmp_path / "boxes.json")
    (tmp_path / "boxes.json").write_text("{}")
    with pytest.raises(UserError, match="was not made by this script"):
        run(birds, masks, classifier, tmp_path / "boxes.json")


def test_class_means_need_a_training_image(birds_copy, classifier, tmp_path):
    split = (birds_copy / "train_test_split.txt").read_text()
    (birds_copy / "train_test_split.txt").write_text(split.replace(" 1\n", " 0\n"))
    masks = tmp_path / "masks_0"
    masks.mkdir()
    write_candidates(masks, read_dataset("cub", birds_copy))
    with pytest.raises(UserError, match=r"no training image to make class means of; use bbox\.score=logit"):
        run(birds_copy, masks, classifier, tmp_path / "boxes.json", "bbox.score=ncm")


def test_a_second_folder_serves_images_without_a_candidate_in_the_first(birds, masks, classifier, tmp_path):
    data, (setup, info) = read_dataset("cub", birds), load_masks_info(masks)
    second = tmp_path / "masks_1"
    second.mkdir()
    names, sizes = mask_names(data.ids.tolist(), data.paths), data.image_sizes.tolist()
    whole = {n: [{"bbox": [0.0, 0.0, *map(float, size)]}] for n, size in zip(names, sizes, strict=True)}
    save_masks_info(second, setup, whole)
    file = load_boxes(run(birds, f"{masks},{second}", classifier, tmp_path / "first.json"))
    alone = load_boxes(run(birds, masks, classifier, tmp_path / "alone.json")).boxes
    for (image_id, box), name, size in zip(file.boxes.items(), names, sizes, strict=True):
        assert box == (alone[image_id] if info[name] else (0, 0, *size))
    every = load_boxes(run(birds, f"{masks},{second}", classifier, tmp_path / "all.json", "bbox.folders=all"))
    assert all(every.scores[i] >= score - 1e-4 for i, score in file.scores.items()) and every.scores != file.scores


def test_candidates_that_were_edited_after_the_choice_are_noticed(birds, masks, classifier, tmp_path):
    own = Path(shutil.copytree(masks, tmp_path / "masks_0"))
    run(birds, own, classifier, tmp_path / "boxes.json")
    (own / "masks_info.json").write_text((own / "masks_info.json").read_text().replace(".0", ".5", 1))
    with pytest.raises(UserError, match=r"bbox\.again=true"):
        run(birds, own, classifier, tmp_path / "boxes.json")


def test_weights_that_are_no_numbers_and_boxes_outside_the_image_are_found_at_the_start(
    birds, masks, classifier, tmp_path
):
    state = load_tensors(classifier)
    for part in ("ema", "model", "state_dict"):
        next(iter(state.get(part, {0: torch.zeros(1)}).values()))[:] = np.nan
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(UserError, match=r"nan\.pt"):
        run(birds, masks, tmp_path / "nan.pt", tmp_path / "boxes.json")
    own = Path(shutil.copytree(masks, tmp_path / "masks_0"))
    setup, info = load_masks_info(own)
    info[next(iter(info))][0]["bbox"] = [-90.0, 2.0, 3.0, 4.0]
    save_masks_info(own, setup, info)
    with pytest.raises(UserError, match="masks_0"):
        run(birds, own, classifier, tmp_path / "boxes.json")
