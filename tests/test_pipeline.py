"""The whole chain, small, on the CPU: fine-tune a ViT's CLS token, make boxes and maps with it, train on both."""

import numpy as np
import pytest

import generate_bbox
import generate_dino_boxes
import generate_mask
import train
from config import load_config
from figures import box_report
from localized_crops.box_file import load_boxes
from localized_crops.files import load_json

SMALL = ["dataset.name=cub", "num_workers=0", "num_epochs=1", "batch_size=8", "opt.warmup_epochs=0"]
VIT = ["model.type=vit_tiny_patch16_224", "patch_size=16", "image_size=48"]


def train_in(folder, *words):
    return train.train_run(train.load_run_config([*SMALL, f"run_dir={folder}", *words]))


def test_from_a_fine_tuned_cls_token_to_a_trained_resnet(birds, tmp_path, monkeypatch):
    monkeypatch.setattr(box_report, "draw_contact_sheet", lambda *_: None)  # slow, and tested elsewhere
    root = f"dataset.root={birds}"
    train_in(tmp_path / "cls", root, *VIT, "use_box=false", "model.train_cls=true")

    out = tmp_path / "boxes.json"
    words = ["dataset.name=cub", root, f"dino.weights={tmp_path / 'cls' / 'best.pt'}", f"out={out}", "num_workers=0"]
    generate_dino_boxes.main(load_config(words))
    made = load_boxes(out)
    assert len(made.boxes) == 72 and made.made_by == "generate_dino_boxes.py"
    evaluation = load_json(tmp_path / "boxes.eval.json")
    assert "mean_iou" in str(evaluation) and "coverage" in str(evaluation)

    held = train_in(tmp_path / "held", root, f"source={out}", f"eval_box={out}", "image_size=32", "THR=1")
    assert set(held["top1"]) == {"full", "center", "box", "average"} and held["maiou"] < 1  # these are no true boxes
    dense = ["use_box=false", "use_dino_maps=true", f"dino_maps={out}", "image_size=32"]
    assert 0 < train_in(tmp_path / "dense", root, *dense)["maiou"] < 1


def test_from_candidate_masks_to_a_trained_resnet(birds_copy, tmp_path):
    root, run = f"dataset.root={birds_copy}", tmp_path / "first"
    generate_mask.main(load_config(["dataset.name=cub", root, "num_workers=0", "mask.store=none"]))
    train_in(run, root, "use_box=false", "image_size=32")
    out = tmp_path / "boxes.json"
    masks = [f"masks={birds_copy / 'masks_0'}", f"bbox.classifier={run / 'best.pt'}", f"out={out}", "bbox.score=ncm"]
    generate_bbox.main(load_config(["dataset.name=cub", root, "num_workers=0", *masks]))
    assert len(load_boxes(out).boxes) == 72 and out.with_suffix(".png").exists()
    held = train_in(tmp_path / "held", root, f"source={out}", "image_size=32")
    assert 0 < held["maiou"] < 1 and held["images_without_box"] == 0


def test_a_resnet_gives_no_maps(birds, tmp_path):
    train_in(tmp_path / "run", f"dataset.root={birds}", "image_size=32")
    words = [f"dino.weights={tmp_path / 'run' / 'best.pt'}", f"out={tmp_path / 'boxes.json'}", "num_workers=0"]
    with pytest.raises(Exception, match="toyresnet") as error:
        generate_dino_boxes.main(load_config(["dataset.name=cub", f"dataset.root={birds}", *words]))
    assert "\n" not in str(error.value) and not (tmp_path / "boxes.json").exists()
    assert np.isfinite(load_json(tmp_path / "run" / "summary.json")["maiou"])
