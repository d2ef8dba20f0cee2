"""Malformed input at every door: one clear line, status 2, nothing that existed is changed."""

import importlib
import json
import pickle
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import stages
import torch
from damage import (
    Bomb,
    Damage,
    code,
    content,
    cut,
    fingerprint,
    first,
    folder_instead,
    image,
    lines,
    nothing,
    png_that_declares,
    put,
    remove,
    rest_of_line,
    tensors,
    text,
)

import models
from jobs.guard import LONGEST_LINE, run_script
from localized_crops.map_file import MapCache, save_map_cache
from localizer.networks import build_localizer
from masks.mask_files import load_masks

ROOT = Path(__file__).parent.parent
DATA = ("dataset.name=cub", "dataset.root={folder}/birds")
TRAIN = (*DATA, "num_workers=0", "num_epochs=1", "image_size=32", "device=cpu", "run_dir={folder}/new")
LOCALIZE = (*DATA, f"dino.weights={ROOT / 'toybirds/toy_localizer.pt'}")
RESUME = ("resume=true", "run_dir={folder}/run")
CODE = "__import__('os').system('touch ran')"
DEEP = "[" * 100_000
HUGE = "1" + "0" * 400  # an int for Python and JSON, but no float


# --- the doors ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One malformed input."""

    name: str
    damage: Damage
    script: str  # whose main and load function are called
    words: tuple[str, ...]
    told: tuple[str, ...]  # parts of the line
    real: bool = False  # run the script as a process
    read: Callable[[Path], object] | None = None  # the reader itself, for files that no script of its own opens


def row(name: str, damage: Damage, words: tuple[str, ...], *told: str, script: str = "train", real=False) -> Row:
    """Return a row whose door is a script."""
    return Row(name, damage, script, words, told, real)


def reader(name: str, damage: Damage, read: Callable[[Path], object], *told: str) -> Row:
    """Return a row whose door is a reader."""
    return Row(name, damage, "", (), told, read=read)


def override(name: str, word: str, *told: str, **door) -> Row:
    """Return a row whose fault is one word of the command line."""
    return row(f"config-{name}", nothing, (*TRAIN, word), *told, **door)


CONFIG = [
    override("unknown-key", "THRR=1", "THRR", "did you mean THR"),
    override("text-for-int", "num_epochs=many", "num_epochs=many"),
    override("too-long-int", f"num_epochs={'9' * 5000}", "num_epochs=999"),
    override("code-for-int", f"seed={CODE}", "seed=", real=True),
    override("code-for-names", f"eval.views=[{CODE}]", "eval.views", "not understood"),
    override("empty-word", "", "''"),
    override("unknown-device", "device=abacus", "device=abacus"),
    override("device-without-values", "device=meta", "device=meta"),
    override("no-deviation", "model.std=0,1,1", "model.std"),
    override("boxes-name", "out={folder}/new/boxes.maps.safetensors", "boxes.maps", script="generate_dino_boxes"),
    override("unknown-table", "reproduce.table=none", "toybirds_crops", script="reproduce"),
    row("config-no-root", nothing, ("dataset.name=folder", *TRAIN[2:]), "dataset.name=folder", "dataset.root=FOLDER"),
]


def images_loop(folder: Path) -> None:
    """Put a link that leads to itself in the place of the images."""
    shutil.rmtree(folder / "birds" / "images")
    (folder / "birds" / "images").symlink_to(folder / "birds" / "images")


def table(fault: str, name: str, damage: Damage, *told: str) -> Row:
    """Return a row of one of the five text files, which one reader reads."""
    return row(f"cub-{fault}", damage, TRAIN, name, *told)


CUB = [
    table("missing", "classes.txt", remove("birds/classes.txt"), "missing"),
    table("empty", "images.txt", put("birds/images.txt", ""), "empty"),
    table("binary", "train_test_split.txt", put("birds/train_test_split.txt", b"\x80\x02\xff\x00" * 99)),
    table("folder", "image_class_labels.txt", folder_instead("birds/image_class_labels.txt"), "folder"),
    table("doubled", "bounding_boxes.txt", lines("bounding_boxes.txt", lambda old: [*old, old[0]]), "image id "),
    table("no-id", "image_class_labels.txt", lines("image_class_labels.txt", lambda old: [*old, "x y"])),
    table("huge-id", "images.txt", lines("images.txt", lambda old: [*old, "9" * 400])),
    table("huge-box", "bounding_boxes.txt", rest_of_line("bounding_boxes.txt", "1e308 1e308 1e308 1e308"), ":2"),
    row("cub-boxes-row-missing", lines("bounding_boxes.txt", lambda old: old[1:]), TRAIN, "has no row here", real=True),
    row("cub-class-missing", lines("classes.txt", lambda old: old[1:]), TRAIN, "classes.txt does not name"),
    row("cub-class-negative", rest_of_line("image_class_labels.txt", "-1"), TRAIN, "labels.txt:2", "whole number"),
    row("cub-no-train", lines("train_test_split.txt", lambda old: [f"{w.split()[0]} 0" for w in old]), TRAIN, "train"),
    row("cub-name-folder", rest_of_line("images.txt", "."), TRAIN, "leaves the images folder"),
    row("cub-name-nul", rest_of_line("images.txt", "a\0b.jpg"), TRAIN, "images.txt", "image id"),
    row("cub-name-long", rest_of_line("images.txt", "a" * 5000), TRAIN, "aaa", "image"),
    row("cub-images-loop", images_loop, TRAIN, ".jpg"),
    row("cub-root-missing", nothing, (*TRAIN, "dataset.root={folder}/no"), "no such folder", "download"),
    row("cub-root-file", nothing, (*TRAIN, "dataset.root={folder}/boxes.json"), "boxes.json", "folder"),
]

BOXES = (*TRAIN, "source={folder}/boxes.json")


def boxes(name: str, damage: Damage, *told: str, **door) -> Row:
    """Return a row of a box file, read by train.py."""
    return row(f"boxes-{name}", damage, BOXES, "boxes.json", *told, **door)


def at_the_edge(folder: Path) -> None:
    """Put the first box on the right edge of its image, reaching past it by what rounding may add."""
    path = folder / "boxes.json"
    content = json.loads(path.read_text())
    (key, (width, _)), *_ = content["image_sizes"].items()
    content["boxes"][key] = [width, 2, 0.0005, 4]
    path.write_text(json.dumps(content))


BOX_FILES = [
    boxes("missing", remove("boxes.json")),
    row("boxes-below-a-file", nothing, (*TRAIN, "source={folder}/boxes.json/b.json"), "cannot be read", "(Not a"),
    boxes("folder", folder_instead("boxes.json")),
    boxes("cut", cut("boxes.json", 0.5)),
    boxes("nested", put("boxes.json", DEEP)),
    boxes("id-missing", content("boxes.json", lambda file: file["boxes"].popitem() and None)),
    boxes(
        "ids-missing",
        content("boxes.json", lambda file: [file[key].popitem() for key in ("boxes", "image_sizes")] and None),
    ),
    boxes("id-text", text("boxes.json", r'"\d+": \[', '"x": [')),
    boxes("id-doubled", text("boxes.json", r'"boxes": \{', '"boxes": {"99": null, "99": [1, 2, 3, 4],')),
    boxes("overflow", text("boxes.json", r'"boxes": (\{\s*"\d+"): \[\s*[\d.]+', r'"boxes": \1: [1e999')),
    boxes("at-the-edge", at_the_edge, "image "),
    boxes("other-images", content("boxes.json", lambda file: first(file["image_sizes"], [999, 999]))),
    row("boxes-eval", put("boxes.json", "{}"), (*TRAIN, "eval_box={folder}/boxes.json"), "boxes.json"),
    row("boxes-drawn", cut("boxes.json", 0.9), (*DATA, "source={folder}/boxes.json"), "not a whole JSON file",
        script="visualize", real=True),
]  # fmt: skip

CHOOSE = (*DATA, "masks={folder}/masks", "bbox.classifier={folder}/run/best.pt", "out={folder}/new/boxes.json")
INFO = "masks/masks_info.json"


def masks_info(name: str, damage: Damage, *told: str, **door) -> Row:
    """Return a row of masks_info.json, read by generate_bbox.py."""
    return row(f"masks-{name}", damage, CHOOSE, "masks", *told, script="generate_bbox", **door)


def mask_box(value: object) -> Damage:
    """Change the box of the last image's mask."""
    return content(INFO, lambda file: list(file.values())[-1][0].update(bbox=value))


MASKS_INFO = [
    masks_info("missing", remove(INFO), "no such file"),
    masks_info("not-json", put(INFO, "masks"), "not a whole JSON file"),
    masks_info("cut", cut(INFO, 0.7), "not a whole JSON file", real=True),
    masks_info("nested", put(INFO, '{"setup":' * 100_000), "nested too deeply"),
    masks_info("other-data", content(INFO, lambda file: file["setup"].update(dataset="x")), "another data set"),
    masks_info("long-name", content(INFO, lambda file: file.update({"x" * 300: []})), "xxx"),
    masks_info("nan", mask_box([float("nan"), 2, 3, 4]), "no bbox"),
    masks_info("huge", mask_box([int(HUGE), 2, 3, 4]), "no bbox"),
    masks_info("file-missing", content(INFO, lambda file: file.update(y=[])), "y.pt: missing"),
]

MAPS = (*TRAIN, "use_box=false", "use_dino_maps=true", "dino_maps={folder}/boxes.json")
MAP_FILE = "boxes.maps.safetensors"


def maps(name: str, damage: Damage, *told: str, **door) -> Row:
    """Return a row of the map cache, read by train.py."""
    return row(f"maps-{name}", damage, MAPS, "boxes.maps", *told, **door)


def edited_header(change: Callable[[dict], Any]) -> Damage:
    """Change the header in the metadata of the maps."""

    def damage(folder: Path) -> None:
        maps = dict(MapCache.open(folder / MAP_FILE))
        header = MapCache.open(folder / MAP_FILE).header
        change(header)
        save_map_cache(folder / MAP_FILE, maps.items(), header)

    return damage


def written_anew(change: Callable[[np.ndarray], np.ndarray]) -> Damage:
    """Change every map and write the file as the program would, so that its hash is right."""

    def damage(folder: Path) -> None:
        maps = {key: change(np.array(value)) for key, value in MapCache.open(folder / MAP_FILE).items()}
        save_map_cache(folder / MAP_FILE, maps.items(), MapCache.open(folder / MAP_FILE).header)

    return damage


MAP_CACHE = [
    maps("missing", remove(MAP_FILE), "no such file"),
    maps("text", put(MAP_FILE, DEEP)),
    maps("no-header", lambda folder: safetensors.numpy.save_file({"x": np.zeros(3)}, folder / MAP_FILE), "header"),
    maps("version", edited_header(lambda header: header.update(version=7)), "version"),
    maps("nan", written_anew(lambda old: old * np.float16(np.nan)), "no numbers"),
    maps("empty", written_anew(lambda old: old[:0]), "empty"),
    maps("none", lambda folder: save_map_cache(folder / MAP_FILE, [], MapCache.open(folder / MAP_FILE).header),
         "no map of a training image"),
    maps("other-data", edited_header(lambda header: header.update(dataset="y")), "another data set"),
]  # fmt: skip

WEIGHTS = (*TRAIN, "model.resumed_model={folder}/run/best.pt")
BEST, LAST = "run/best.pt", "run/last.pt"


def checkpoint(name: str, damage: Damage, *told: str, words: tuple[str, ...] = WEIGHTS, **door) -> Row:
    """Return a row of a checkpoint, read by train.py unless other words and script are given."""
    return row(f"checkpoint-{name}", damage, words, *told, **door)


def rename_first(values: dict, name: object) -> None:
    """Give the first entry of a dict another name."""
    values[name] = values.pop(next(iter(values)))


CHECKPOINTS = [
    checkpoint("missing", remove(BEST), "no such file"),
    checkpoint("folder", folder_instead(BEST), "best.pt"),
    checkpoint("empty", put(BEST, ""), "torn or not a checkpoint"),
    checkpoint("text", put(BEST, "weights\n" * 99), "best"),
    checkpoint("cut", cut(BEST, 0.6), "torn or not a checkpoint"),
    checkpoint("code", code(BEST), "refused"),
    checkpoint("plain-pickle", lambda folder: (folder / BEST).write_bytes(pickle.dumps(Bomb())), "refused"),
    checkpoint("tensor", tensors(BEST, lambda _: torch.ones(3)), "no state dict"),
    checkpoint("number-names", tensors(BEST, lambda file: rename_first(file["ema"], 5)), "no state dict"),
    checkpoint("not-tensors", tensors(BEST, lambda file: first(file["ema"], "weights")), "no state dict"),
    checkpoint("scalar-head", tensors(BEST, lambda file: file["ema"].update({"fc.weight": torch.ones(())})), "another"),
    checkpoint("other-architecture", nothing, "another architecture", words=(*WEIGHTS, "model.type=resnet50")),
    checkpoint("classes", tensors(BEST, lambda file: file["ema"].update({"fc.weight": torch.ones(5, 128)})),
               "trained on 5 classes"),
    checkpoint("backbone", tensors(BEST, lambda file: file["ema"].update(x=torch.ones(1))), "another architecture",
               words=(*TRAIN, "model.weights={folder}/run/best.pt")),
    checkpoint("vit", tensors(BEST, lambda file: {"pos_embed": torch.ones(3), "cls_token": torch.ones(2)}),
               "another architecture", words=(*WEIGHTS, "model.type=test_vit", "patch_size=16")),
    checkpoint("safetensors-header", put("x.safetensors", b"\xff" * 64), "x.safetensors", "torn",
               words=(*TRAIN, "model.weights={folder}/x.safetensors")),
    checkpoint("resume-cut", cut(LAST, 0.6), "last", "torn", words=RESUME),
    checkpoint("resume-code", code(LAST), "last", "refused", words=RESUME, real=True),
    checkpoint("resume-tensor", tensors(LAST, lambda _: torch.ones(3)), "last", "not of this run", words=RESUME),
    checkpoint("resume-list", tensors(LAST, lambda _: [1, 2]), "last", "not of this run", words=RESUME),
    checkpoint("resume-other", tensors(LAST, lambda file: file["model"].popitem() and None), "not of this run",
               words=RESUME),
    checkpoint("resume-epoch", tensors(LAST, lambda file: file.update(epoch="two")), "not of this run", words=RESUME),
    checkpoint("resume-rng", tensors(LAST, lambda file: file.update(rng=torch.ones(3))), "not of this run",
               words=RESUME),
]  # fmt: skip


def classifier(name: str, damage: Damage, *told: str) -> Row:
    """Return a row of a checkpoint, read by generate_bbox.py."""
    return checkpoint(f"classifier-{name}", damage, *told, words=CHOOSE, script="generate_bbox")


def localizer_of(name: str, damage: Damage, *told: str, **door) -> Row:
    """Return a row of a checkpoint, read by generate_dino_boxes.py."""
    words = (*DATA, "dino.weights={folder}/vit.pt", "out={folder}/new/boxes.json")
    return checkpoint(f"localizer-{name}", damage, *told, words=words, script="generate_dino_boxes", **door)


def trained(model: object, image_size: object) -> Damage:
    """Write a checkpoint that says it is of this model and image size."""
    about = {"model": model, "image_size": image_size, "patch_size": 16}
    return lambda folder: torch.save({"config": about, "ema": {"x": torch.ones(1)}}, folder / "vit.pt")


def toy(**changed: object) -> Damage:
    """Write a checkpoint that says it is of toybirds/make_localizer.py."""
    architecture = {"image_size": 32, "stride": 8, "width": 32, "depth": 1, "heads": 2} | changed
    return lambda folder: torch.save({"about": {"architecture": architecture}, "model": {}}, folder / "vit.pt")


NETWORKS = [
    classifier("tensor", tensors(BEST, lambda _: torch.ones(3)), "no checkpoint of train.py"),
    classifier("type", tensors(BEST, lambda file: file["config"]["model"].update(type=5)), "model.type=5"),
    classifier("negative", tensors(BEST, lambda file: file["config"]["model"].update(n_classes=-5)), "n_classes=-5"),
    classifier("few", tensors(BEST, lambda file: file.update(class_names=file["class_names"][:4])), "knows 4 classes"),
    classifier("huge", tensors(BEST, lambda file: file["config"]["model"].update(n_classes=10**12)), "model.n_classes"),
    classifier("size", tensors(BEST, lambda file: file["config"].update(image_size=10**9)), "image_size"),
    localizer_of("missing", nothing, "no such file"),
    localizer_of("code", code("vit.pt"), "refused", real=True),
    localizer_of("unnamed", trained({}, 32), "names no model.type"),
    localizer_of("number", trained({"type": 5}, 32), "names no model.type"),
    localizer_of("no-vit", trained({"type": "toyresnet"}, 32), "has no attention"),
    localizer_of("size", trained({"type": "test_vit"}, 10**9), "image_size"),
    localizer_of("no-size", trained({"type": "test_vit"}, 0), "image_size"),
    localizer_of("other", trained({"type": "test_vit"}, 32), "of another architecture"),
    localizer_of("toy-heads", toy(heads=7), "make_localizer.py"),
    localizer_of("toy-none", toy(heads=0), "make_localizer.py"),
    localizer_of("toy-empty", toy(), "make_localizer.py"),
    localizer_of("toy-huge", toy(width=2**40), "make_localizer.py"),
    reader("localizer-name", nothing, lambda _: build_localizer("no_such_vit", "random"), "no such model"),
    reader("model-name", nothing, lambda _: models.build_model("", 5, image_size=32, patch_size=16), "no such model"),
]

SAVED = "run/config.json"


def saved(name: str, damage: Damage, *told: str, **door) -> Row:
    """Return a row of a run folder that is gone on with."""
    return row(f"run-{name}", damage, RESUME, "run", *told, **door)


def dotted(config: dict) -> None:
    """Write a section's key at the top, with a dot in it."""
    config["model.type"] = config["model"].pop("type")


RUNS = [
    saved("config-missing", remove(SAVED), "no config.json"),
    saved("config-cut", cut(SAVED, 0.5), "not a whole JSON file"),
    saved("config-nested", put(SAVED, DEEP), "nested too deeply"),
    saved("config-list", put(SAVED, "[]"), "config.json"),
    saved("config-key", content(SAVED, lambda config: config.update(THRR=1.0)), "config.json", "THRR"),
    saved("config-dotted", content(SAVED, dotted), "config.json"),
    saved("config-list-of-text", content(SAVED, lambda config: config["crop"].update(scale=["a", "b"])), "crop.scale"),
    saved("config-list-of-lists", content(SAVED, lambda config: config["eval"].update(views=[[]])), "eval.views"),
    saved("config-type", content(SAVED, lambda config: config.update(batch_size="16")), "batch_size='16'"),
    saved("config-scheduler", content(SAVED, lambda config: config["opt"].update(scheduler="linear")), "opt.scheduler"),
    saved("config-other-scheduler", content(SAVED, lambda config: config["opt"].update(scheduler="step")), "last.pt"),
    saved("config-n-classes", content(SAVED, lambda config: config["model"].update(n_classes=200)), "last.pt"),
    saved("config-huge", content(SAVED, lambda config: config.update(THR=-int(HUGE))), "THR"),
    saved("log-torn", cut("run/log.jsonl", 0.5), "log.jsonl:1", "not a JSON object"),
    saved("log-binary", put("run/log.jsonl", b"\xff\xfe\x00"), "log.jsonl", "not a text file"),
    saved("log-list", put("run/log.jsonl", "[]\n"), "log.jsonl:1"),
    saved("log-nested", put("run/log.jsonl", DEEP), "log.jsonl:1"),
    saved("log-no-epoch", put("run/log.jsonl", "{}\n"), "log.jsonl:1"),
    saved("log-nan", text("run/log.jsonl", r'"loss": [\d.]+', '"loss": NaN'), "log.jsonl:1", "'loss'"),
    saved("log-text", put("run/log.jsonl", '{"epoch": "one"}\n'), "log.jsonl:1"),
]

# a sweep of one point, which lies in the folder sweep/ as a finished run
SWEEP = (
    *TRAIN,
    "dataset.val_fraction=0",
    "eval.views=full",
    "sweeprun=true",
    "sweep.values=1",
    "run_dir={folder}/sweep",
)
POINT = "sweep/THR=1,seed=0"


def point(name: str, damage: Damage, *told: str) -> Row:
    """Return a row of a finished point of a sweep."""

    def moved(folder: Path) -> None:
        (folder / "sweep").mkdir()
        (folder / "run").rename(folder / POINT)
        damage(folder)

    return row(f"sweep-{name}", moved, SWEEP, POINT, *told)


def taken(name: str, script: str, words: tuple[str, ...], damage: Damage, *told: str) -> Row:
    """Return a row of a file that lies already where a stage is to write."""
    return row(f"out-{name}", damage, (*words, "out={folder}/boxes.json"), "boxes", *told, script=script)


FINISHED = [
    point("config-list", put(f"{POINT}/config.json", "[]"), "holds no config"),
    point("config-other", content(f"{POINT}/config.json", lambda config: config.update(num_epochs=7)), "num_epochs=7"),
    point("summary-cut", cut(f"{POINT}/summary.json", 0.5), "not a whole JSON file"),
    point("summary-list", put(f"{POINT}/summary.json", "[]"), "not of a finished run"),
    point("summary-text", content(f"{POINT}/summary.json", lambda found: found.update(maiou="x")), "finished run"),
    taken("bbox-foreign", "generate_bbox", CHOOSE, nothing, "was not made by this script"),
    taken("bbox-text", "generate_bbox", CHOOSE, put("boxes.json", "mine"), "was not made by this script"),
    taken("bbox-list", "generate_bbox", CHOOSE, content("boxes.json", lambda file: file.update(settings=[])),
          "was not made by this script"),
    taken("dino-foreign", "generate_dino_boxes", LOCALIZE, remove(MAP_FILE), "was not made by this script"),
    taken("dino-other", "generate_dino_boxes", LOCALIZE, nothing, "made with model=test", "dino.again=true"),
]  # fmt: skip

IMAGES = [
    row("image-cut", image(lambda whole: whole[: len(whole) // 2]), (*TRAIN, "dataset.check=true"), "cannot be read"),
    row("image-text", image(lambda _: b"a bird"), TRAIN, ".jpg", "not an image"),
    row("image-empty", image(lambda _: b""), TRAIN, ".jpg", "not an image"),
    row("image-bomb", image(lambda _: png_that_declares(60_000, 60_000)), DATA, "1 of 7 images",
        script="check_dataset"),
    row("image-large", image(lambda _: png_that_declares(10_000, 10_000)), DATA, "1 of 7 images",
        script="check_dataset", real=True),
    row("image-zero-pixels", image(lambda _: png_that_declares(0, 5)), TRAIN, ".jpg", "not an image"),
    row("image-cut-checked", image(lambda whole: whole[:900]), DATA, "1 of 7 images", script="check_dataset"),
    row("image-cached", image(lambda whole: whole[:900]), (*TRAIN, "cache=disk", "cache_folder={folder}/birds"),
        ".jpg", "damaged"),
    row("image-drawn", image(lambda whole: whole[:900]), (*DATA, "visualize.images=9", "visualize.split=train"), ".jpg",
        "damaged", script="visualize"),
]  # fmt: skip


def mask(name: str, value: object, *told: str) -> Row:
    """Return a row of a mask file."""
    damage = code("x.pt") if value is None else lambda folder: torch.save(value, folder / "x.pt")
    return reader(f"mask-{name}", damage, lambda folder: load_masks(folder / "x.pt"), "x.pt", *told)


MASKS = [
    mask("code", None, "refused"),
    mask("no-bits", {"shape": [1, 3, 3]}, "packed bits"),
    mask("shape-text", {"shape": "133", "packed": torch.ones(1, dtype=torch.uint8)}, "shape is 133"),
    mask("negative", {"shape": [1, -3, 3], "packed": torch.ones(1, dtype=torch.uint8)}, "shape"),
    mask("huge-bits", {"shape": [2**20, 2**10, 2**9],
                       "packed": torch.ones(1, 1, dtype=torch.uint8).expand(2**20, 2**16)}, "packed bits"),
    mask("huge-tensor", torch.ones(1, 1, 1, dtype=torch.bool).expand(2**20, 2**20, 2**20), "not masks"),
    mask("sparse", {"shape": [1, 1, 8], "packed": torch.ones(1, 1, dtype=torch.uint8).to_sparse()}, "packed bits"),
    reader("mask-missing", nothing, lambda folder: load_masks(folder / "x.pt"), "no such file"),
]  # fmt: skip

TABLE = [
    *CONFIG, *CUB, *BOX_FILES, *MASKS_INFO, *MAP_CACHE, *CHECKPOINTS, *NETWORKS, *RUNS, *FINISHED, *IMAGES, *MASKS,
]  # fmt: skip


# --- the test -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(site_copy, monkeypatch):
    """Yield a copy of the sound folder, and put back what a script leaves changed in this process."""
    shutil.copy(next((site_copy / "masks").glob("*.pt")), site_copy / "masks" / "x.pt")
    monkeypatch.chdir(site_copy)
    threads, before = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    yield site_copy
    signal.signal(signal.SIGTERM, before)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def end_of_process(row: Row, folder: Path, words: list[str]) -> tuple[int, str]:
    """Run the script as a user would; return its status and what it wrote to stderr."""
    with stages.Process([str(ROOT / f"{row.script}.py"), *words], folder.parent / "log") as process:
        return process.end(), process.told()


def end_of_main(row: Row, folder: Path, words: list[str], monkeypatch, capsys) -> tuple[int, str]:
    """Run the script's guard, load function and main in this process; return status and stderr."""
    monkeypatch.setattr(sys, "argv", [row.script, *words])
    if row.read is not None:
        main, load = lambda _: row.read(folder), lambda _: {}
    else:
        module = importlib.import_module(row.script)
        own_load = {"train": "load_run_config", "reproduce": "load_request"}
        main, load = module.main, getattr(module, own_load.get(row.script, "load_config"))
    with pytest.raises(SystemExit) as end:
        run_script(main, load)
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_a_malformed_input_is_one_line_and_changes_nothing(row, folder, monkeypatch, capsys, recwarn):
    row.damage(folder)
    words = [word.format(folder=folder) if "{folder}" in word else word for word in row.words]
    before = fingerprint(folder)
    capsys.readouterr()
    status, printed = (
        end_of_process(row, folder, words) if row.real else end_of_main(row, folder, words, monkeypatch, capsys)
    )
    assert status == 2, printed
    shown = [line for line in printed.splitlines() if line and "%|" not in line]  # without progress bars
    line, *more = [line for line in shown if not line.startswith("warning: ")]
    shown = [str(one.message) for one in recwarn if issubclass(one.category, (UserWarning, RuntimeWarning))]
    assert not shown  # a script would print them beside the line
    assert line.startswith("error: ") and len(line) <= 7 + LONGEST_LINE and not more, printed
    assert all(part in line for part in row.told), line
    assert fingerprint(folder) == before
