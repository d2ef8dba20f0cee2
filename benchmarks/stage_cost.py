"""Print images/s of generate_dino_boxes.py's maps over the bare forward pass, and over a loop as the original's.

Decoding and cleaning are included; writing the records and finding the boxes are not. The original's way: one image at
a time, read and resized in line, the attention matrix of every head of every block kept (fused attention off). Same
network, same input shapes, one process, one thread, CPU time (the machines are shared), alternated rounds, on the first
IMAGES images of the stage's batches. Takes the config's words, ToyBirds by default.

    python benchmarks/stage_cost.py out=runs/stage_cost.json
    python benchmarks/stage_cost.py out=runs/stage_cost.json preset=cub_dino dataset.root=FOLDER \\
        dataset.split=official dino.weights=random dino.image_size=224
"""

import copy
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch
from timm.utils import AttentionExtract

from measuring import ratio, timed_on

sys.path.insert(0, str(Path(__file__).parent.parent))

import generate_dino_boxes as stage_script
from config import load_config
from localizer.attention_maps import BatchImages, clean
from utils import autocast, environment

ROUNDS, IMAGES = 5, 96


def main(words: list[str]) -> None:
    """Measure and print the ratios."""
    stage = stage_script.prepare(load_config([*words, "num_workers=0", "num_threads=1"]))
    few_batches(stage, IMAGES)
    images = sum(len(batch.rows) for batch in stage.batches)
    inputs = bare_inputs(stage)
    bare_pass(stage, inputs)  # warms up
    extract = attention_extract(stage)
    times = np.array(
        [(bare_pass(stage, inputs), whole_stage(stage), one_by_one(stage, extract)) for _ in range(ROUNDS)]
    )
    bare, whole, original = times.T
    print(f"{stage.localizer.name}, {images} images: bare {images / np.median(bare):.1f}/s, stage "
          f"{images / np.median(whole):.1f}/s, one by one {images / np.median(original):.1f}/s")  # fmt: skip
    print(f"stage / bare forward pass: {ratio(bare, whole)}\nstage / one by one: {ratio(original, whole)}")
    print(f"{ROUNDS} rounds, one thread; {environment()['processor']}")


def few_batches(stage: stage_script.Stage, images: int) -> None:
    """Leave the stage about so many images, in whole batches where there are any."""
    size = stage.config["dino"]["batch_size"]
    whole_batches = [batch for batch in stage.batches if len(batch.rows) == size]
    stage.batches = (whole_batches or stage.batches)[: max(1, images // size)]


def bare_inputs(stage: stage_script.Stage) -> list[torch.Tensor]:
    """Return what the network is given for each batch, on its device."""
    shapes = [(len(batch.rows), 3, batch.height, batch.width) for batch in stage.batches]
    grey = {shape: torch.full(shape, 100, dtype=torch.uint8, device=stage.localizer.device) for shape in set(shapes)}
    normalized = {shape: stage.localizer.normalize(images) for shape, images in grey.items()}
    return [normalized[shape] for shape in shapes]


def bare_pass(stage: stage_script.Stage, inputs: list[torch.Tensor]) -> float:
    """Return the seconds of the network alone."""

    def work() -> None:
        with torch.inference_mode(), autocast(stage.localizer.device, stage.work.identity["precision"]):
            for images in inputs:
                stage.localizer.model(images)

    return timed_on(stage.localizer.device, work)


def whole_stage(stage: stage_script.Stage) -> float:
    """Return the seconds of decoding, resizing, attention and cleaning."""
    numbers = list(range(len(stage.batches)))
    return timed_on(stage.localizer.device, lambda: deque(stage_script.mapped_batches(stage, numbers), maxlen=0))


def attention_extract(stage: stage_script.Stage) -> AttentionExtract:
    """Return a copy of the network that keeps every attention matrix."""
    model = copy.deepcopy(stage.localizer.model)
    for block in model.blocks:
        block.attn.fused_attn = False
    return AttentionExtract(model, method="hook", mode="eval")


def one_by_one(stage: stage_script.Stage, extract: AttentionExtract) -> float:
    """Return the CPU seconds of the original's way with the same result."""
    start = time.process_time()
    with torch.inference_mode():
        for batch in stage.batches:
            reader = BatchImages([batch], [[]], stage.localizer.patch, stage.config["dino"]["autocontrast"])
            for row in batch.rows:
                pixels = torch.from_numpy(reader.read(stage.data.paths[row], batch).copy())[None].permute(0, 3, 1, 2)
                attn = list(extract(stage.localizer.normalize(pixels)).values())[-1]  # (1, heads, N, N)
                patches = attn[0, :, 0, stage.localizer.model.num_prefix_tokens :]
                grid = batch.height // stage.localizer.patch[0], batch.width // stage.localizer.patch[1]
                clean(patches.unflatten(1, grid).numpy(), stage.config["dino"])
    return time.process_time() - start


if __name__ == "__main__":
    main(sys.argv[1:])
