r"""Images per second of our mask generator over the official one: same weights, same settings, same masks.

Reads and writes nothing: weights and images are random, and set so that masks are regions of an image of which about
half pass each threshold. First both generators run in float32 and their masks are compared; then rounds alternate the
two, so that a machine that slows down slows both; then each runs alone in a process of its own, for its memory.

    python benchmarks/mask_speed.py
    python benchmarks/mask_speed.py model=vit_h device=cuda image_batch=8 precision=bf16 images=16 \
        points_per_batch=512 chunk_megabytes=256

The default takes a quarter of an hour on one CPU core. Given are medians of the per-round ratios and their quartiles;
the times for 11,788 images are extrapolated from images/s, without reading images and writing masks.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from segment_anything import SamAutomaticMaskGenerator, sam_model_registry
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

from measuring import alternated, build_images, memory, parse_settings, timed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from masks.mask_generator import MaskGenerator
from utils import cpu_name

SETTINGS = {
    "model": "small",  # small: an encoder of width 192 and depth 4 at 1024 px; tiny: 64, 2, 256 px; vit_b, vit_l, vit_h
    "device": "cuda" if torch.cuda.is_available() else "cpu",
    "precision": "float32",  # of ours when it is timed: float32, bf16, fp16 (CUDA); the official one runs in float32
    "image_batch": 1,  # this and the next four: of ours, no mask depends on them
    "points_per_batch": 64,
    "chunk_megabytes": 32,
    "compile_encoder": 0,  # 1: torch.compile
    "images": 2,  # a round's
    "rounds": 3,
    "memory_images": 20,  # run by each generator in its own process; 0: not measured
    "threads": 1,  # of torch on the CPU
}
PRESETS = {  # the published settings
    "10 a side, stability .5": {"points_per_side": 10, "stability_score_thresh": 0.5},
    "3 a side, stability .3": {"points_per_side": 3, "stability_score_thresh": 0.3},
}
MARKS = (5, 10)  # images after which memory is read, and after the last
CUB_IMAGES = 11788
LOGIT_STD = 40.0  # of the random networks: about as steep as trained ones are at an edge, for the stability scores


def main(settings: dict) -> None:
    """Compare, measure, print."""
    torch.set_num_threads(settings["threads"])
    sam, images = build_network(settings), build_images(settings["images"])
    print(describe_machine(settings))
    rows = []
    for name, preset in PRESETS.items():
        print(f"{name}: {compare_generators(sam, images, preset)}")
        if settings["precision"] != "float32" and settings["device"].startswith("cuda"):
            print(f"{name}, {settings['precision']}: {compare_precisions(sam, images, preset, settings)}")
        times = time_alternated(build_engines(sam, preset, settings), images, settings)
        rows.append(table_row(name, times, len(images)))
    print_table(rows)
    if settings["memory_images"]:
        print_memory(settings)


# --- random weights and images ------------------------------------------------------------------------------------


def build_network(settings: dict) -> Sam:
    """Return the network, its thresholds set on one image."""
    torch.manual_seed(0)
    own = {"small": build_small_sam, "tiny": partial(build_small_sam, 256, 64, 2)}
    build = own.get(settings["model"]) or partial(sam_model_registry[settings["model"]], checkpoint=None)
    sam = build()
    return set_thresholds(sam.to(settings["device"]), build_images(1)[0])


def build_small_sam(side: int = 1024, width: int = 192, depth: int = 4) -> Sam:
    """Return a Sam of the package's own classes: small encoder, decoder of the published size, ``side`` pixels."""
    grid, channels = side // 16, 256
    encoder = ImageEncoderViT(
        img_size=side,
        embed_dim=width,
        depth=depth,
        num_heads=width // 64,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=14 if grid > 14 else 6,
        global_attn_indexes=(depth - 1,),
        out_chans=channels,
    )
    prompts = PromptEncoder(channels, (grid, grid), (side, side), mask_in_chans=16)
    transformer = TwoWayTransformer(depth=2, embedding_dim=channels, num_heads=8, mlp_dim=2048)
    return Sam(encoder, prompts, MaskDecoder(transformer_dim=channels, transformer=transformer)).eval()


@torch.no_grad()
def set_thresholds(sam: Sam, image: np.ndarray) -> Sam:
    """Give random weights masks that are regions near their point, half of which pass the default thresholds.

    Untrained, every mask is noise over the whole image: the same box each time, and one mask is left. Here image tokens
    attend to the point near them; then the logits on ``image`` get a standard deviation of 40 and a
    threshold that a tenth exceeds, and the predicted IoUs a median of .88.
    """
    decoder, encoder = sam.mask_decoder, sam.prompt_encoder
    encoder.pe_layer.positional_encoding_gaussian_matrix.mul_(0.7)  # wider neighbourhoods
    encoder.point_embeddings[1].weight.mul_(0.3)
    for layer in decoder.transformer.layers:
        attn = layer.cross_attn_image_to_token
        attn.k_proj.weight.copy_(attn.q_proj.weight.mul_(8))  # like attends to like: same position, high score
        attn.v_proj.weight.mul_(6)
        attn.out_proj.weight.mul_(6)
    for convolution in (decoder.output_upscaling[0], decoder.output_upscaling[3]):  # no texture within a token
        convolution.weight.copy_(2 * convolution.weight.mean((2, 3), keepdim=True).expand_as(convolution.weight))
    logits, iou = logits_on_a_grid(sam, image)
    for head in decoder.output_hypernetworks_mlps:
        head.layers[-1].weight.mul_(LOGIT_STD / logits.std())
        head.layers[-1].bias.mul_(LOGIT_STD / logits.std())
    sam.mask_threshold = float(np.quantile(logits.cpu().numpy(), 0.9) * LOGIT_STD / logits.std())
    decoder.iou_prediction_head.layers[-1].bias.add_(0.88 - iou.median())
    return sam


def logits_on_a_grid(sam: Sam, image: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the official low-resolution logits (16, 3, h, w) and predicted IoUs (16, 3) at 4 x 4 points."""
    side = sam.image_encoder.img_size
    line = (torch.arange(4.0) + 0.5) * side / 4
    points = torch.cartesian_prod(line, line)[:, None].to(sam.device)
    sparse, dense = sam.prompt_encoder(
        points=(points, torch.ones(points.shape[:2], device=sam.device)), boxes=None, masks=None
    )
    embeddings = MaskGenerator(sam).embed([image])
    return sam.mask_decoder(embeddings, sam.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=True)


# --- the same masks? ----------------------------------------------------------------------------------------------


def compare_generators(sam: Sam, images: list[np.ndarray], preset: dict) -> str:
    """Return in words how far ours is from the official one in float32.

    Raises:
        SystemExit: if they are not the same: then their times mean nothing.
    """
    official = SamAutomaticMaskGenerator(sam, **preset)
    pairs = zip(map(official.generate, images), MaskGenerator(sam, **preset).generate(images), strict=True)
    ious, differing, score_gap = [], [], 0.0
    for theirs, ours in pairs:
        if [record["bbox"] for record in theirs] != [record["bbox"] for record in ours]:
            raise SystemExit(f"the boxes differ: {len(theirs)} official, {len(ours)} ours")
        for one, other in zip(theirs, ours, strict=True):
            ious.append(mask_iou(one["segmentation"], other["segmentation"]))
            differing.append(int((one["segmentation"] ^ other["segmentation"]).sum()))
            score_gap = max(score_gap, *(abs(one[key] - other[key]) for key in ("predicted_iou", "stability_score")))
    if not ious or (min(ious) < 0.999 and max(differing) > 1):  # one pixel of a mask of under 1000 is more than .001
        raise SystemExit(f"{len(ious)} masks, up to {max(differing, default=0)} pixels of a mask differ")
    return (
        f"{len(ious)} masks on {len(images)} images, same boxes, {sum(differing)} pixels differ, "
        f"lowest IoU {min(ious):.6f}, scores within {score_gap:.1e}"
    )


def compare_precisions(sam: Sam, images: list[np.ndarray], preset: dict, settings: dict) -> str:
    """Return in words what half precision changes, each float32 mask against the likest of half precision."""
    exact = MaskGenerator(sam, **preset).generate(images)
    half = MaskGenerator(sam, **preset, **own_settings(settings)).generate(images)
    best = [
        max((mask_iou(record["segmentation"], other["segmentation"]) for other in others), default=0.0)
        for records, others in zip(exact, half, strict=True)
        for record in records
    ]
    close = np.mean(np.array(best) >= 0.9)
    return f"{sum(map(len, half))} masks for {len(best)}; best IoU: median {np.median(best):.4f}, >= .9 for {close:.1%}"


def mask_iou(one: np.ndarray, other: np.ndarray) -> float:
    """Return the intersection of two masks over their union; 1 for two empty ones."""
    union = (one | other).sum()
    return float((one & other).sum() / union) if union else 1.0


# --- time ---------------------------------------------------------------------------------------------------------


def own_settings(settings: dict) -> dict:
    """Return the settings that only our generator has."""
    names = ("precision", "image_batch", "points_per_batch", "chunk_megabytes")
    return {name: settings[name] for name in names} | {"compile_encoder": bool(settings["compile_encoder"])}


def build_engines(sam: Sam, preset: dict, settings: dict) -> dict[str, Callable[[list[np.ndarray]], object]]:
    """Return both generators as functions of a list of images."""
    official = SamAutomaticMaskGenerator(sam, **preset)
    ours = MaskGenerator(sam, **preset, **own_settings(settings))
    return {"official": lambda images: [official.generate(image) for image in images], "ours": ours.generate}


def time_alternated(engines: dict, images: list[np.ndarray], settings: dict) -> dict[str, list[float]]:
    """Return the seconds of each generator in each round (of the CPU, where it is the CPU that computes)."""
    clock = time.perf_counter if settings["device"].startswith("cuda") else time.process_time  # shared machines
    # the work ends with masks in the CPU's memory: nothing is left in flight
    ways = {name: lambda _, run=run: timed(lambda: run(images), clock) for name, run in engines.items()}
    return alternated(ways, settings["rounds"])


def table_row(name: str, times: dict[str, list[float]], images: int) -> str:
    """Return a row of the table."""
    speed = {engine: images / statistics.median(seconds) for engine, seconds in times.items()}
    ratios = [theirs / ours for theirs, ours in zip(times["official"], times["ours"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    hours = {engine: CUB_IMAGES / rate / 3600 for engine, rate in speed.items()}
    return (
        f"| {name} | {speed['official']:.3f} | {speed['ours']:.3f} | {middle:.2f} ({low:.2f}–{high:.2f}) "
        f"| {hours['official']:.2f} h | {hours['ours']:.2f} h |"
    )


def print_table(rows: list[str]) -> None:
    """Print the Markdown table."""
    print("\n| preset | official images/s | ours images/s | ours / official (quartiles) "
          f"| official, {CUB_IMAGES:,} images (extrapolated) | ours (extrapolated) |")  # fmt: skip
    print("|---|---|---|---|---|---|", *rows, sep="\n")


# --- memory -------------------------------------------------------------------------------------------------------


def print_memory(settings: dict) -> None:
    """Print what each generator holds as the images go by, each in a fresh process."""
    marks = [mark for mark in MARKS if mark < settings["memory_images"]] + [settings["memory_images"]]
    kind = "peak GPU memory" if settings["device"].startswith("cuda") else "resident memory"
    print(f"\n| {kind}, MB, after images | " + " | ".join(map(str, marks)) + " | peak |")
    print("|---" * (len(marks) + 2) + "|")
    for engine in ("official", "ours"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            held = pool.apply(memory_over_a_run, (settings, engine, marks))
        print(f"| {engine} | " + " | ".join(f"{megabytes:.0f}" for megabytes in held) + " |")


def memory_over_a_run(settings: dict, engine: str, marks: list[int]) -> list[float]:
    """Return the MB held after each of ``marks`` images, and at most; over the first preset."""
    torch.set_num_threads(settings["threads"])
    preset = next(iter(PRESETS.values()))
    run = build_engines(build_network(settings), preset, settings)[engine]
    images, held, done = build_images(marks[-1]), [], 0
    for mark in marks:
        while done < mark:
            run(images[done : min(mark, done + settings["image_batch"])])
            done += settings["image_batch"]
        held.append(memory_now(settings["device"]))
    return [*held, held[-1] if settings["device"].startswith("cuda") else memory("VmHWM") * 2**20 / 1e6]


def memory_now(device: str) -> float:
    """Return the MB that this process holds: on CUDA, at most until now; on the CPU, resident now."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e6
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def describe_machine(settings: dict) -> str:
    """Return what the numbers depend on."""
    cuda = settings["device"].startswith("cuda")
    hardware = torch.cuda.get_device_name() if cuda else f"{cpu_name()}, {settings['threads']} thread(s), CPU time"
    return f"{hardware}; Python {platform.python_version()}, torch {torch.__version__}\n{json.dumps(settings)}\n"


if __name__ == "__main__":
    main(parse_settings(sys.argv[1:], SETTINGS))
