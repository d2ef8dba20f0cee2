"""Evaluation and export of a trained classifier."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

import evaluate
import models
from config import load_config
from inference import evaluation, export
from inference.classifier import load_classifier
from localized_crops.files import UserError, load_json
from transforms import normalize
from utils import load_tensors


def run(checkpoint, *words):
    words = [f"checkpoint={checkpoint}", "num_workers=0", "device=cpu", *words]
    evaluate.main(evaluate.load_evaluation_configs(words))


def test_the_figures_are_those_of_the_trainings_own_test(site_copy):
    run(site_copy / "run" / "best.pt", f"dataset.root={site_copy}/birds", "eval.views=full,whole")
    folder = site_copy / "run" / "evaluation_test_0"
    (found,) = load_json(folder / "evaluation.json")["checkpoints"].values()
    predictions = load_json(site_copy / "run" / "predictions.json")
    expected = [one["views"]["full"][found["weights"]] == one["label"] for one in predictions.values()]
    assert found["views"]["full"]["top1"] == pytest.approx(np.mean(expected))
    assert set(found["views"]) == {"full", "whole", "average"} and found["answer"] == "average"
    assert sum(one["n"] for one in found["per_class"]) == len(predictions) == found["views"]["whole"]["n"]
    assert sum(third["n"] for third in found["views"]["full"]["by_size"].values()) == len(predictions)
    assert found["views"]["full"]["by_box_iou"] is None
    with open(folder / "predictions.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["view"] == "full"]
    names = load_tensors(site_copy / "run" / "best.pt")["class_names"]
    assert [row["predicted"] for row in rows] == [
        names[one["views"]["full"][found["weights"]]] for one in predictions.values()
    ]
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in ("confusion.png", "calibration.png"))
    run(site_copy / "run" / "best.pt", f"dataset.root={site_copy}/birds")
    assert (site_copy / "run" / "evaluation_test_1" / "evaluation.md").exists()


@pytest.mark.parametrize("name", ["evaluation.md", "predictions.csv", "confusion_1.png"])
def test_files_of_the_user_are_not_replaced(site, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=name):
        run(site / "run" / "best.pt", f"dataset.root={site}/birds", f"evaluate.out={tmp_path}")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_checkpoints_are_compared_image_by_image(site_copy, tmp_path):
    for answer, name in enumerate("ab"):
        content = load_tensors(site_copy / "run" / "best.pt")
        for weights in ("model", "ema"):
            content[weights]["fc.bias"][answer] += 100  # always answers this class; all images are of class 0
        torch.save(content, tmp_path / f"{name}.pt")
    both = f"{tmp_path}/a.pt,{tmp_path}/b.pt"
    run(both, f"dataset.root={site_copy}/birds", f"evaluate.out={tmp_path}/out", "evaluate.split=train")
    (pair,) = load_json(tmp_path / "out" / "evaluation.json")["comparisons"]
    with open(tmp_path / "out" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    a, b = (
        np.array([row["label"] == row["predicted"] for row in rows if row["checkpoint"] == path])
        for path in (pair["a"], pair["b"])
    )
    assert (pair["only_a"], pair["only_b"]) == ((a & ~b).sum(), (b & ~a).sum()) and pair["only_a"] == 4
    assert pair["difference"] == 1 and pair["p_images"] == pytest.approx(2 * 0.5**4)
    assert {"confusion_0.png", "confusion_1.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match=r"evaluate\.out"):
        run(both, f"dataset.root={site_copy}/birds", f"evaluate.out={tmp_path}/out")


def test_trainings_that_differ_in_their_seed_are_one_row_and_views_are_averaged_as_asked(
    site_copy, tmp_path, monkeypatch
):
    random = np.random.default_rng(0)
    for thr in (0.0, 1.0):
        for seed in (0, 1):
            content = load_tensors(site_copy / "run" / "best.pt")
            content["config"] |= {"THR": thr, "seed": seed}
            for weights in ("model", "ema"):
                content[weights]["fc.bias"] += 3 * torch.from_numpy(random.normal(size=8)).float()
            (tmp_path / f"thr_{thr:g}_seed_{seed}").mkdir()
            torch.save(content, tmp_path / f"thr_{thr:g}_seed_{seed}" / "best.pt")
    checkpoints = ",".join(str(tmp_path / f"thr_{thr}_seed_{seed}" / "best.pt") for thr in (0, 1) for seed in (0, 1))
    words = [f"dataset.root={site_copy}/birds", "evaluate.split=train", "eval_box=center", "eval.views=full,whole"]
    run(checkpoints, *words, f"evaluate.out={tmp_path}/out", "evaluate.averages=full+box,box")
    text = (tmp_path / "out" / "evaluation.md").read_text()
    with open(tmp_path / "out" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))

    def top1(thr, view):
        chosen = [row for row in rows if f"thr_{thr}" in row["checkpoint"] and row["view"] == view]
        return [np.mean([row["label"] == row["predicted"] for row in chosen if f"seed_{n}" in row["checkpoint"]])
                for n in (0, 1)]  # fmt: skip

    figures = load_json(tmp_path / "out" / "evaluation.json")["checkpoints"].values()
    assert all(0 < one["views"]["box"]["by_box_iou"]["large"]["largest_share"] <= 1 for one in figures)
    best = max(("full", "whole"), key=lambda view: np.mean(top1(0, view)))
    same, in_best = text.split("Top-1 in %, mean")[1:]
    assert "| trainings | full | whole | box | average | full+box |" in same
    for thr, line in enumerate(row for row in same.splitlines() if row.startswith("| thr_")):
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        for view, cell in zip(("full", "whole", "box", "average", "full+box"), cells, strict=True):
            assert cell.startswith(f"{100 * np.mean(top1(thr, view)):.1f} ± ")
            difference = 100 * (np.mean(top1(thr, view)) - np.mean(top1(0, view)))
            assert (f" {difference:+.1f} (p " in cell) == (thr == 1)
    assert f"difference to thr_0, n = 2 in view {best}, its best one" in in_best
    difference = 100 * (np.mean(top1(1, "full+box")) - np.mean(top1(0, best)))
    assert f" {difference:+.1f} (p " in in_best.splitlines()[5].split("|")[6]
    monkeypatch.setattr(evaluation, "build_loader", None)  # before anything is classified
    with pytest.raises(UserError, match=r"evaluate\.averages=full\+bo: bo"):
        run(checkpoints, *words, f"evaluate.out={tmp_path}/none", "evaluate.averages=full+bo")


def test_rows_of_trainings_with_other_views_and_boxes_share_the_views_that_all_have(site_copy, tmp_path):
    paths = []
    for number, (box, seed) in enumerate([("center", 0), ("center", 1), ("gt", 0), (None, 0)]):
        content = load_tensors(site_copy / "run" / "best.pt")
        content["config"] |= {"eval_box": box, "seed": seed}
        paths.append(tmp_path / str(number) / "best.pt")
        paths[-1].parent.mkdir()
        torch.save(content, paths[-1])
    words = [f"dataset.root={site_copy}/birds", "evaluate.split=train", "eval.views=full"]
    run(",".join(map(str, paths)), *words, f"evaluate.out={tmp_path}/all")
    assert "| trainings | full |\n" in (tmp_path / "all" / "evaluation.md").read_text()
    words.append("evaluate.averages=full+box")
    run(",".join(map(str, paths[:3])), *words, f"evaluate.out={tmp_path}/boxes")
    text = (tmp_path / "boxes" / "evaluation.md").read_text()
    oracles = [f"{view} (oracle: true boxes)" for view in ("box", "average", "full+box")]
    assert f"| trainings | full | {' | '.join(oracles)} |" in text
    assert text.split("Top-1 in %, mean")[0].count("| full+box (oracle: true boxes) |") == 1  # of the one training


def test_trainings_without_a_common_view_have_no_table_over_seeds():
    def evaluated(thr, seed, views):
        trained = load_config([f"THR={thr}", f"seed={seed}"])
        classifier = SimpleNamespace(path=f"{thr}_{seed}/best.pt", trained=trained, config=trained)
        answers = dict.fromkeys(views, np.eye(2)), dict.fromkeys(views, np.ones(2, bool))
        return evaluation.Evaluated(classifier, np.arange(2), *answers, np.full(2, np.nan))

    first = [evaluated(0, seed, ["full", "whole"]) for seed in (0, 1)]
    assert "| trainings | full |\n" in evaluation.seeds_tables([*first, evaluated(1, 0, ["full"])])
    assert evaluation.seeds_tables([*first, evaluated(1, 0, ["center"])]) == ""


def test_thirds_that_differ_have_tables_of_their_own():
    def figures(bound):
        thirds = {name: {"largest_share": bound, "top1": 0.5, "n": 4} for name in ("small", "large")}
        return {"views": {"box": {"by_box_iou": thirds}}}

    table = evaluation.thirds_table({"a": figures(0.4), "b": figures(0.6), "c": figures(0.4)}, "by_box_iou", "IoU")
    first, second = table.split("| checkpoint")[1:]
    assert "to 0.40" in first and "| a |" in first and "| c |" in first and "| b |" not in first
    assert "to 0.60" in second and "| b |" in second


def test_a_data_set_of_other_classes_or_without_the_split_is_refused(site_copy, tmp_path):
    checkpoint = site_copy / "run" / "best.pt"
    with pytest.raises(UserError, match=r"evaluate\.split"):
        run(checkpoint, f"dataset.root={site_copy}/birds", "evaluate.split=val")
    names = (site_copy / "birds" / "classes.txt").read_text()
    (site_copy / "birds" / "classes.txt").write_text(names.replace("\n", "x\n", 1))
    with pytest.raises(UserError, match="other classes"):
        run(checkpoint, f"dataset.root={site_copy}/birds")
    assert not list((site_copy / "run").glob("evaluation*"))


@pytest.mark.parametrize("words", [[], ["checkpoint=a.pt,a.pt"], ["checkpoint=a.pt,b.pt", "export=x"]])
def test_what_the_command_needs_is_said(words):
    with pytest.raises(UserError, match=r"checkpoint|export"):
        evaluate.load_evaluation_configs(words)


# --- export -------------------------------------------------------------------------------------------------------


def checkpoint_of(model_type, site, tmp_path, outputs=8):
    """Return a network that was not trained and a checkpoint of it, as train.py writes them."""
    content = load_tensors(site / "run" / "best.pt")
    config = content["config"]
    config["model"] |= {"type": model_type, "n_classes": outputs}
    config["patch_size"] = 16
    torch.manual_seed(0)
    model = models.build_model(model_type, outputs, image_size=32, patch_size=16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05) if parameter.ndim < 2 else None
    weights = model.state_dict()
    torch.save(content | {"model": weights, "ema": weights, "state_dict": weights}, tmp_path / "best.pt")
    return tmp_path / "best.pt", model


@pytest.mark.parametrize("model_type", ["toyresnet", "resnet50", "vit_tiny_patch16_224"])
def test_timm_loads_what_was_exported(site, tmp_path, monkeypatch, capsys, model_type):
    monkeypatch.setattr(export, "NEEDED", ("no_such_package",))
    checkpoint, _ = checkpoint_of(model_type, site, tmp_path)
    with pytest.raises(UserError, match=r"pip install no_such_package"):
        run(checkpoint, f"export={tmp_path}/out")
    assert not (tmp_path / "out" / "model.onnx").exists()
    call = capsys.readouterr().out.partition("to load: ")[2].splitlines()[0]
    model = eval(call, {"timm": timm}).eval()
    classifier = load_classifier(checkpoint, localize=False)
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), classifier.model.cpu()(images), rtol=1e-4, atol=1e-5)
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert about["label_names"] == classifier.class_names and about["pretrained_cfg"]["mean"] == list(classifier.mean)
    assert set(safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")) == set(model.state_dict())
    with pytest.raises(UserError, match=r"export="):
        run(checkpoint, f"export={tmp_path}/out")


def test_onnx_gives_the_logits_of_torch_for_any_batch(site, tmp_path):
    for name in export.NEEDED:
        pytest.importorskip(name)
    onnxruntime = pytest.importorskip("onnxruntime")
    run(site / "run" / "best.pt", f"export={tmp_path}/out")
    classifier = load_classifier(site / "run" / "best.pt", localize=False, device="cpu")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    for count in (1, 4):
        images = torch.randn(count, 3, 32, 32)
        (found,) = session.run(None, {"images": images.numpy()})
        with torch.inference_mode():
            torch.testing.assert_close(torch.from_numpy(found), classifier.model(images), rtol=1e-3, atol=1e-4)
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("difference", [0.5, float("nan")])
def test_an_onnx_file_that_answers_otherwise_is_not_written(site, tmp_path, monkeypatch, difference):
    monkeypatch.setattr(torch.onnx, "export", lambda _model, _images, path, **_: Path(path).touch())
    monkeypatch.setattr(export, "onnx_difference", lambda *_: difference)
    classifier = load_classifier(site / "run" / "best.pt", localize=False, device="cpu")
    with pytest.raises(UserError, match=r"model\.onnx: differs from torch by .*; not written"):
        export.export_onnx(classifier, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model_type", ["toyresnet", "vit_tiny_patch16_224", "repvit_m0_9"])  # its head: two layers
@pytest.mark.parametrize("outputs", [8, 11])
def test_outputs_beyond_the_classes_are_cut_off(site, tmp_path, model_type, outputs):
    """model.n_classes may be larger than the data set's number of classes, 8."""
    checkpoint, model = checkpoint_of(model_type, site, tmp_path, outputs)
    classifier = load_classifier(checkpoint, device="cpu", localize=False)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        expected = model.eval()(normalize(images, classifier.mean, classifier.std))[:, :8].log_softmax(1)
    found = classifier.log_probs([images] * len(classifier.views))
    for view in classifier.views:
        torch.testing.assert_close(found[view], expected, rtol=1e-4, atol=1e-5)
