"""The parts of gpu.py: each yields rows, (name, what was found). At toy size where there is no GPU."""

import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision

from measuring import build_images, quartiles, timed, write_cub

sys.path.insert(0, str(Path(__file__).parent.parent))

import generate_dino_boxes
import models
import train
from config import load_config
from experiments import tables
from localized_crops.attention import cls_attention
from localizer.attention_maps import clean, map_to_box
from localizer.networks import build_localizer
from toybirds import drawing
from training.batches import Batch
from training.loop import backward
from training.run import Run
from utils import autocast, environment

ROOT = Path(__file__).parent.parent
CUB_IMAGES = 11_788
TRAIN_NAMES = ("files", "cache=disk", "cache=disk, exact crops", "cache=disk, density-map crops")
GRAIN = 12.0  # of the drawn photographs: JPEGs of 90 kB, as CUB's are

Row = tuple[str, dict[str, Any]]
Part = Callable[[Path], Iterator[Row]]  # given a folder for its files


def on_cuda() -> bool:
    """Tell whether there is a GPU; without one everything is small."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Return what is measured."""
    if not on_cuda():
        torch.set_num_threads(1)
    return torch.device("cuda" if on_cuda() else "cpu")


def sized(whole: Any, toy: Any) -> Any:
    """Return what a GPU gets, or what a CPU gets."""
    return whole if on_cuda() else toy


def spread(values: list[float], digits: int = 3) -> str:
    """Return a median with its quartiles."""
    low, middle, high = values
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def machine(_folder: Path) -> Iterator[Row]:
    """Name the machine."""
    about = environment()
    yield (
        about["gpu"] or "no GPU: toy sizes on the CPU, the figures mean nothing",
        {
            "processor": about["processor"],
            "python": about["python"],
            "torch": about["torch"],
            "cuda": torch.version.cuda or "none",
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
        },
    )


# --- a. does half precision give the same? ------------------------------------------------------------------------


def precision(folder: Path) -> Iterator[Row]:
    """Compare CUDA with the CPU, and half precision with float32."""
    yield from _precision_of_attention(folder)
    yield "one training step, bf16 against float32", _precision_of_step(folder)
    yield from _precision_of_sam()


def _precision_of_attention(folder: Path) -> Iterator[Row]:
    """Compare the maps and boxes of the built-in localizer on drawn birds."""
    rng, here = np.random.default_rng(0), device()
    birds = [drawing.draw_toybird(rng, n % 8).image for n in range(sized(64, 4))]
    size = (160, 160)
    pixels = torch.from_numpy(np.stack([np.asarray(bird.resize(size)) for bird in birds])).permute(0, 3, 1, 2)
    localizer = build_localizer(None, None)
    wanted = load_config([])["dino"]
    maps = {}
    for name in ("CPU", "float32", "bf16", "fp16"):
        where, kind = (torch.device("cpu"), "float32") if name == "CPU" else (here, name)
        localizer.model.to(where)
        with torch.inference_mode(), autocast(where, kind):
            found = cls_attention(localizer.model, localizer.normalize(pixels.to(where)))
        maps[name] = found.float().cpu().numpy()
    boxes = {name: np.array([map_to_box(clean(heads, wanted), size, wanted).xywh for heads in found])
             for name, found in maps.items()}  # fmt: skip
    for name, base in (("float32", "CPU"), ("bf16", "float32"), ("fp16", "float32")):
        worst = np.abs(maps[name] - maps[base]).max() / maps[base].max()
        ious = _ious(boxes[name], boxes[base])
        yield (
            f"attention and boxes of {len(birds)} drawn birds, {name} against {base}",
            {
                "largest difference, share of the maximum": f"{worst:.1e}",
                "IoU of the boxes, mean": f"{ious.mean():.4f}",
                "least": f"{ious.min():.4f}",
            },
        )


def _ious(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    pair = (torchvision.ops.box_convert(torch.from_numpy(boxes), "xywh", "xyxy") for boxes in (some, others))
    return torchvision.ops.box_iou(*pair).diagonal().numpy()


def _precision_of_step(folder: Path) -> dict[str, Any]:
    """Return how far loss and gradient of one step are apart."""
    count, here, found = sized(32, 2), device(), {}
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 224, 224), dtype=torch.uint8, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    batch = Batch(images, torch.arange(count), torch.zeros(count, dtype=torch.bool), torch.ones(count), count, count)
    for kind in ("none", "bf16"):
        torch.manual_seed(0)
        config = load_config(
            [f"model.type={sized('resnet50', 'toyresnet')}", "image_size=224", f"amp={kind}", "other.label_smoothing=0"]
        )
        about = models.input_config(config["model"]["type"])
        config["model"] |= {"n_classes": 200, "mean": about["mean"], "std": about["std"]}
        run = Run(folder, config, [str(n) for n in range(200)], {}, here)
        run.model.train()
        loss, _ = backward(run, batch, True).tolist()
        found[kind] = loss / count, torch.cat([p.grad.flatten() for p in run.model.parameters()])
    (loss, exact), (half_loss, half) = found["none"], found["bf16"]
    cosine = torch.nn.functional.cosine_similarity(exact, half, dim=0).item()
    return {"loss": f"{half_loss:.4f} against {loss:.4f}", "cosine of the gradients": f"{cosine:.5f}"}


def _precision_of_sam() -> Iterator[Row]:
    """Compare our masks with Meta's in float32, and ours in half precision with these."""
    mask_speed = importlib.import_module("mask_speed")
    settings = _sam_settings(mask_speed, sized("small", "tiny"), "bf16")
    network, images = mask_speed.build_network(settings), build_images(sized(4, 1))
    presets = sized(mask_speed.PRESETS, {"8 a side": {"points_per_side": 8, "stability_score_thresh": 0.3}})
    for name, preset in presets.items():
        try:
            found = mask_speed.compare_generators(network, images, preset)
        except SystemExit as error:  # they are not the same
            found = str(error)
        yield f"SAM's masks, random weights, {name}, float32 against Meta's", {"found": found}
        found = mask_speed.compare_precisions(network, images, preset, settings)
        yield f"SAM's masks, random weights, {name}, bf16 against float32", {"found": found}


def gpu_tests(_folder: Path) -> Iterator[Row]:
    """Run the tests that are marked gpu."""
    pytest = importlib.import_module("pytest")
    with_masks = importlib.util.find_spec("segment_anything") is not None
    files = ["tests/test_parallel.py", *["tests/test_mask_generator.py"] * with_masks]
    os.chdir(ROOT)
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        status = pytest.main(["-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist", *files])
    print(told.getvalue())
    lines = told.getvalue().strip().splitlines()
    found = {"pytest": lines[-1].strip("= "), "exit status": int(status)}
    if not with_masks:
        found["left out"] = "those of masks, which need segment_anything"
    if failed := [line for line in lines if line.startswith("FAILED")]:
        found["failed"] = "; ".join(failed)[:600]
    yield "tests marked gpu", found


# --- b. attention and the DINO stage ------------------------------------------------------------------------------


def attention(_folder: Path) -> Iterator[Row]:
    """Measure the CLS row over the bare pass."""
    attention_cost = importlib.import_module("attention_cost")
    for side in sized((448, 518), (56,)):
        settings = attention_cost.SETTINGS | {"height": side, "width": side, "device": device().type}
        settings |= {"batch_size": sized(64, 2), "rounds": sized(15, 2), "precision": "bf16"}
        passes = attention_cost.build_passes(settings)
        times = attention_cost.time_alternated(passes, settings["rounds"], settings["device"])
        bare = times["bare forward"]
        for name, seconds in times.items():
            peak = attention_cost.peak_memory(passes[name], settings["device"])
            yield (
                f"{settings['model']}, {side} px, bf16, {name}",
                {
                    "over the bare forward pass": spread(quartiles(seconds, bare)),
                    "images/s": round(settings["batch_size"] / np.median(seconds)),
                    "MB": round(peak / 1e6),
                },
            )


def dino_stage(folder: Path) -> Iterator[Row]:
    """Measure generate_dino_boxes.py over the bare pass, on as many images as CUB has."""
    stage_cost = importlib.import_module("stage_cost")
    count = sized(CUB_IMAGES, 12)
    root = write_cub(folder / "photos", build_images(sized(64, 4), grain=GRAIN), count)
    for side in sized((448, 518), (56,)):
        words = ["preset=cub_dino", f"dataset.root={root}", "dino.weights=random", f"dino.image_size={side}"]
        words += [f"out={folder / str(side) / 'boxes.json'}", *sized([], ["num_workers=0", "dino.batch_size=4"])]
        start = time.perf_counter()
        stage = generate_dino_boxes.prepare(load_config(words))
        prepared = time.perf_counter() - start
        inputs = stage_cost.bare_inputs(stage)
        bare = [stage_cost.bare_pass(stage, inputs) for _ in range(2)][1]  # the first one warms up
        whole = timed(partial(stage_cost.whole_stage, stage), time.perf_counter)
        yield (
            f"generate_dino_boxes.py, {side} px, {count} images of CUB's sizes, ViT-S/14",
            {
                "bare pass, images/s": round(count / bare),
                "maps, images/s": round(count / whole),
                "over the bare pass": round(bare / whole, 3),
                "seconds for maps": round(whole, 1),
                "seconds to read the data set and build the network": round(prepared, 1),
                "loader processes": stage.config["num_workers"],
                "published": "under 15 minutes",
            },
        )


# --- c. SAM -----------------------------------------------------------------------------------------------------------


def sam(_folder: Path) -> Iterator[Row]:
    """Measure our generator over Meta's, and one prompt an image over both."""
    mask_speed, prompt_speed = importlib.import_module("mask_speed"), importlib.import_module("prompt_speed")
    model = sized("vit_h", "tiny")
    settings = _sam_settings(mask_speed, model, "bf16")
    network = mask_speed.build_network(settings)
    own = mask_speed.own_settings(settings)
    for points, threshold, count in sized(((10, 0.5, 4), (32, 0.95, 2)), ((8, 0.3, 1),)):
        preset = {"points_per_side": points, "stability_score_thresh": threshold}
        engines, images = mask_speed.build_engines(network, preset, settings), build_images(count)
        times = mask_speed.time_alternated(engines, images, settings)
        ratio = quartiles(times["official"], times["ours"])
        hours = {name: CUB_IMAGES * np.median(seconds) / count / 3600 for name, seconds in times.items()}
        yield (
            f"SAM {model}, {points} x {points} points, ours in bf16 over Meta's loop in float32",
            {
                "ratio": spread(ratio, 2),
                "Meta's, images/s": round(count / np.median(times["official"]), 3),
                "ours, images/s": round(count / np.median(times["ours"]), 3),
                "11,788 images extrapolated": f"{hours['official']:.2f} h and {hours['ours']:.2f} h",
                "published": "7 h 20 min",
                "verdict": "ours stays" if ratio[1] >= 2 else "under twice: Meta's loop becomes the default, ours goes",
            },
        )
    times = prompt_speed.measure(network, settings["device"], sized(10, 8), sized(4, 1), sized(3, 1), **own)
    yield (
        f"SAM {model}, one prompt an image over {sized('10 x 10', '8 x 8')} automatic points, both ours",
        {
            "ratio": round(float(np.median(times[:, 0] / times[:, 1])), 2),
            "prompted, images/s": round(sized(4, 1) / float(np.median(times[:, 1])), 2),
        },
    )


def _sam_settings(mask_speed: Any, model: str, kind: str) -> dict[str, Any]:
    many = {"image_batch": 4, "points_per_batch": 512, "chunk_megabytes": 256, "rounds": 2}
    return (
        mask_speed.SETTINGS
        | {"model": model, "device": device().type, "precision": sized(kind, "float32")}
        | sized(many, {"rounds": 1})
    )


# --- d. training ------------------------------------------------------------------------------------------------------


def training(folder: Path) -> Iterator[Row]:
    """Measure epochs over those of batches that lie on the device already."""
    root = write_cub(folder / "photos", build_images(sized(64, 4), grain=GRAIN), sized(3072, 24), sized(200, 3))
    for batch_size in sized((32, 256), (4,)):
        yield from _epochs(folder, root, batch_size, TRAIN_NAMES, sized(5, 1))


def compiled(folder: Path) -> Iterator[Row]:
    """Measure torch.compile's epochs."""
    root = write_cub(folder / "photos", build_images(sized(64, 4), grain=GRAIN), sized(3072, 24), sized(200, 3))
    names = sized(("cache=disk, compile",), ("cache=disk",))  # compiling takes a minute on a CPU
    yield from _epochs(folder, root, sized(256, 4), names, sized(5, 1))


def _epochs(folder: Path, root: Path, batch_size: int, names: tuple[str, ...], rounds: int) -> Iterator[Row]:
    training_cost = importlib.import_module("training_cost")
    words = ["dataset.name=cub", f"dataset.root={root}", f"batch_size={batch_size}", "deterministic=false"]
    words += [f"cache_folder={folder / 'cache'}", "dataset.val_fraction=0", "opt.type=sgd", "opt.lr=0.001"]
    words += sized(["model.type=resnet50", "image_size=224"], ["model.type=toyresnet", "image_size=32"])
    if on_cuda():
        torch.cuda.reset_peak_memory_stats()
        torch.backends.cudnn.benchmark = True  # as in a training with deterministic=false
    times, loader, workers = training_cost.measure(words, list(names), device(), rounds)
    for name, seconds in times.items():
        found = {"over synthetic batches": spread(quartiles(seconds, times["synthetic"]))}
        waits = 1 - np.median(np.array(times["synthetic"]) / seconds)
        yield (
            f"{sized('ResNet-50, 224 px, bf16', 'toyresnet, 32 px')}, batch {batch_size}, {name}",
            found
            | {
                "images/s": round(loader.images / np.median(seconds)),
                "share of waiting": f"{max(0.0, waits):.0%}",
                "loader processes": workers,
            },
        )
    yield f"batch {batch_size}: memory", {"found": training_cost.peak_memory(device())}


# --- e. candidates ----------------------------------------------------------------------------------------------------


def candidates(folder: Path) -> Iterator[Row]:
    """Measure generate_bbox.py over the bare classifier."""
    bbox_cost = importlib.import_module("bbox_cost")
    count = sized(20_480, 40)
    root = write_cub(folder / "photos", build_images(sized(64, 4), grain=GRAIN), count // bbox_cost.EACH)
    model, size = sized(("resnet50", 224), ("toyresnet", 32))
    words = sized(["bbox.batch_size=256"], ["num_workers=0", "bbox.batch_size=8"])
    stage = bbox_cost.build_stage(folder, root, model, size, count, *words)
    bare, whole = bbox_cost.measure(stage, sized(3, 1))
    yield (
        f"generate_bbox.py, {model}, {size} px, {count} candidates, ten an image",
        {
            "bare, candidates/s": round(count / np.median(bare)),
            "stage, candidates/s": round(count / np.median(whole)),
            "over the bare classifier": spread(quartiles(bare, whole)),
            "loader processes": stage.config["num_workers"],
        },
    )


# --- f. photographs ---------------------------------------------------------------------------------------------------


def photos(folder: Path) -> Iterator[Row]:
    """Train the table of pretrained networks on the photographs that PHOTOS names, a seed after the other."""
    root, weights = os.environ.get("PHOTOS"), os.environ.get("WEIGHTS")
    if on_cuda() and not (root and weights):
        yield "not run", {"why": "set PHOTOS (a folder in CUB's format) and WEIGHTS (of the two weights files)"}
        return
    words = [f"model.weights={weights}/tf_efficientnet_lite0.safetensors",
             f"dino.weights={weights}/dinov2_vits14_salient.safetensors",
             f"dino.object_weights={weights}/tf_efficientnet_lite0.safetensors"]  # fmt: skip
    if not on_cuda():
        root = write_cub(folder / "photos", build_images(4, ((40, 60), (60, 40))), 18, 3)
        words = ["model.type=toyresnet", "model.weights=none", "image_size=32", "num_epochs=1", "num_workers=0"]
        words += ["eval.views=full", "model.freeze_bn_from=none", "opt.warmup_epochs=0", "batch_size=4"]
        words += ["eval_box=center", "cache=none"]
    if on_cuda():
        _boxes_of_photos(root, words)
    table = tables.TABLES["photos_pretrained"]
    for seed in range(sized(10, 1)):
        for row, overrides in list(table.rows.items())[: sized(None, 1)]:
            more = [f"{key}={_word(value)}" for key, value in (table.common | overrides).items()]
            more += [f"preset={table.preset}", f"dataset.root={root}", f"seed={seed}", f"run_dir={folder / row}_{seed}"]
            summary = train.train_run(train.load_run_config([*more, *words]))
            yield f"{row}, seed {seed}", {"test top-1 by view": summary["top1"]}


def _boxes_of_photos(root: str, words: list[str]) -> None:
    """Make the boxes that the table needs."""
    step = tables.OBJECT_STEP
    if not Path(step.makes).exists():
        script = [sys.executable, str(ROOT / step.script), *step.words, f"dataset.root={root}"]
        subprocess.run([*script, *(word for word in words if word.startswith("dino."))], check=True)


def _word(value: Any) -> str:
    """Return a value as the command line gives it."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)
