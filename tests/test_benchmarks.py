"""The benchmarks start and run, small: what is measured by hand must not break unseen."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import config
import reproduce
from datasets import read_dataset
from measuring import build_images, ratio, write_cub
from models import fit_linear

ROOT = Path(__file__).parent.parent


def bench(script, *words, cwd, **env):
    """Run a benchmark as a user would; return what it printed."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | env
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def lines(cwd):
    return [json.loads(line) for line in (cwd / "runs" / "gpu.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Return a small data set in CUB's format."""
    return write_cub(tmp_path_factory.mktemp("data") / "photos", build_images(6), 24, 3)


def test_kept_memory_is_measured_beside_memory_given_back(monkeypatch, capsys):
    script = importlib.import_module("kept_memory")

    def in_this_process(command, **options):
        settings = script.parse_settings(command[2:], script.SETTINGS)
        return subprocess.CompletedProcess(command, 0, json.dumps(script.measure(settings)))

    monkeypatch.setattr(script.subprocess, "run", in_this_process)
    script.main(script.SETTINGS | {"rounds": 1, "steps": 1, "batch_size": 2, "work": "training toyresnet, 64 px"})
    assert "| training toyresnet, 64 px | " in capsys.readouterr().out


def test_one_command_measures_every_row(tmp_path):
    printed = bench("gpu.py", cwd=tmp_path)
    found = lines(tmp_path)
    parts = {"machine", "precision", "tests", "attention", "stage", "sam", "train", "bbox", "compile", "photos"}
    assert {line["part"] for line in found} == parts
    assert [line for line in found if line["row"] in ("failed", "died", "cut off", "not run")] == []
    table = printed[printed.index("| part | row |") :].strip().splitlines()
    assert len(table) == 2 + len(found)
    assert "no GPU" in found[0]["row"] and all(line["seconds"] >= 0 for line in found)


def test_rows_whose_packages_are_not_there_say_so(tmp_path):
    """Neither wandb nor segment-anything can be imported."""
    for name in ("wandb", "segment_anything"):
        code = f"raise ModuleNotFoundError('no', name={name!r})"
        (tmp_path / f"{name}.py").write_text(code)
    bench("gpu.py", "precision", "sam", "bbox", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    found = {line["part"]: line for line in lines(tmp_path)}  # the last line of each
    assert all("segment_anything" in found[part]["why"] for part in ("precision", "sam"))
    assert found["bbox"]["row"].startswith("generate_bbox.py")
    assert sum(line["part"] == "precision" for line in lines(tmp_path)) == 5  # attention and the step


def test_a_part_that_takes_too_long_is_cut_off_and_what_it_found_is_kept(tmp_path, monkeypatch):
    for name in ("OMP_NUM_THREADS", "PYTORCH_NVML_BASED_CUDA_CHECK"):  # the module sets them
        monkeypatch.setenv(name, "1")
    gpu = importlib.import_module("gpu")

    def slow(_folder):
        yield "first", {"value": 1}
        while True:
            pass

    out = tmp_path / "gpu.jsonl"
    gpu.run_part("slow", slow, 5.0, out)
    gpu.run_part("late", slow, 1.0, out)
    assert [json.loads(line)["row"] for line in out.read_text().splitlines()] == ["first", "cut off", "not run"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("attention_cost.py", ["height=56", "width=70", "batch_size=1", "rounds=2"]),
        ("bbox_cost.py", ["{photos}", "toyresnet", "32"]),
        ("crop_cost.py", ["dataset.name=cub", "dataset.root={photos}", "image_size=32", "batch_size=4",
                          "dino_maps={boxes}"]),
        ("growth.py", ["{photos}"]),
        ("large_photos.py", ["{photos}"]),
        ("loader_cost.py", ["{photos}", "32"]),
        ("long_runs.py", ["8", "200"]),
        ("maiou_curve.py", ["{photos}"]),
        ("mask_speed.py", ["model=tiny", "images=1", "rounds=2", "memory_images=0"]),
        ("millions.py", ["400"]),
        ("prompt_speed.py", ["tiny", "cpu", "8"]),
        ("stage_cost.py", ["out=stage.json"]),
        ("training_cost.py", ["dataset.name=cub", "dataset.root={photos}", "image_size=32", "batch_size=4",
                              "cache_folder=decoded"]),
    ],
)  # fmt: skip
def test_every_benchmark_runs_small(script, words, photos, birds, tmp_path):
    if "{boxes}" in "".join(words):
        subprocess.run(
            [sys.executable, str(ROOT / "generate_dino_boxes.py"), "dataset.name=cub", f"dataset.root={photos}",
             f"out={tmp_path / 'boxes.json'}", "dino.weights=" + str(ROOT / "toybirds" / "toy_localizer.pt")],
            check=True,
        )  # fmt: skip
    printed = bench(script, *[one.format(photos=photos, boxes=tmp_path / "boxes.json") for one in words], cwd=tmp_path)
    assert any(character.isdigit() for character in printed)


def test_a_ratio_has_its_quartiles():
    assert ratio([2.0, 4.0, 6.0, 8.0, 10.0], [2.0] * 5) == "3.000 (2.000 to 4.000)"
    assert np.unique([one.shape for one in build_images(4)], axis=0).shape[0] == 4


def test_a_probe_answers_view_by_view_and_keeps_its_features(birds, tmp_path, monkeypatch):
    """Views of a random network: the whole table from one command, the second time from the features on disk."""
    script = importlib.import_module("photos_probe")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "STEPS", ())
    monkeypatch.setattr(script, "SIDES", (32, 48))
    monkeypatch.setattr(script, "SOURCES", {"centred": "center", "true": "gt"})
    words = [f"dataset.root={birds}", "model.type=toyresnet", "model.weights=none", "num_threads=1"]
    script.main(reproduce.load_request(words))
    folder = tmp_path / "runs" / "photos_probe"
    numbers, text = json.loads((folder / "photos_probe.json").read_text()), (folder / "photos_probe.md").read_text()
    data = read_dataset("cub", birds, val_fraction=0.2)
    assert list(numbers) == ["32 px", "48 px"] and "full and box: true" in numbers["48 px"]
    assert len(list(folder.glob("features_*.npy"))) == 2 * 5  # sizes, views
    settings = config.load_config(["preset=finetune", *words, "image_size=48", "eval.crop_pct=0.875"])
    features = script.view_features(settings, data, "full", None, folder)
    both, test = np.concatenate([data.rows("train"), data.rows("val")]), data.rows("test")
    fitted = {penalty: fit_linear(features[both], data.labels[both], 8, penalty) for penalty in script.PENALTIES}
    top1 = [((features[test] @ w.T + b).argmax(1) == data.labels[test]).mean() for w, b in fitted.values()]
    assert min(abs(numbers["48 px"]["full"]["test"] - one) for one in top1) < 1e-6
    line = next(line for line in text.splitlines() if line.startswith("| share of the image"))
    assert len(line.split("|")) == 2 + 2 + len(numbers["32 px"])
    monkeypatch.setattr(script, "_batches", None)  # no image is looked at again
    script.main(reproduce.load_request(words))
    assert json.loads((folder / "photos_probe.json").read_text()) == numbers


@pytest.mark.parametrize("word, status, said", [("--help", 0, '"model": {'), ("num_epoch=3", 2, "error: num_epoch")])
def test_the_probe_has_the_help_and_the_errors_of_reproduce(word, status, said):
    script = ROOT / "benchmarks" / "photos_probe.py"
    done = subprocess.run([sys.executable, str(script), word], capture_output=True, text=True, timeout=600)
    assert done.returncode == status and said in done.stdout + done.stderr and "Traceback" not in done.stderr
