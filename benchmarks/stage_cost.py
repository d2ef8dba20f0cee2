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
from pathlib import Path

import numpy as np
import torch
from timm.utils import AttentionExtract

sys.path.insert(0, str(Path(__file__).parent.parent))

import generate_dino_boxes as stage_script
from config import load_config
from localizer.attention_maps import BatchImages, clean
from utils import environment

ROUNDS, IMAGES = 5, 96


def main(words: list[str]) -> None:
    """Measure and print the ratios."""
    stage = stage_script.prepare(load_config([*words, "num_workers=0", "num_threads=1"]))
    whole_batches = [batch for batch in stage.batches if len(batch.rows) == stage.config["dino"]["batch_size"]]
    stage.batches = (whole_batches or stage.batches)[: max(1, IMAGES // stage.config["dino"]["batch_size"])]
    images = sum(len(batch.rows) for batch in stage.batches)
    inputs = [
        stage.localizer.normalize(torch.full((len(b.rows), 3, b.height, b.width), 100, dtype=torch.uint8))
        for b in stage.batches
    ]
    bare_pass(stage, inputs)  # warms up
    extract = attention_extract(stage)
    times = np.array(
        [(bare_pass(stage, inputs), whole_stage(stage), one_by_one(stage, extract)) for _ in range(ROUNDS)]
    )
    bare, whole, original = times.T
    print(f"{stage.localizer.name}, {images} images: bare {images / np.median(bare):.1f}/s, stage "
          f"{images / np.median(whole):.1f}/s, one by one {images / np.median(original):.1f}/s")  # fmt: skip
    for name, ratio in (("stage / bare forward pass", bare / whole), ("stage / one by one", original / whole)):
        low, middle, high = np.quantile(ratio, (0.25, 0.5, 0.75))
        print(f"{name}: {middle:.3f} ({low:.3f} to {high:.3f})")
    print(f"{ROUNDS} rounds, one thread; {environment()['processor']}")


def bare_pass(stage: stage_script.Stage, inputs: list[torch.Tensor]) -> float:
    """Return the CPU seconds of the network alone."""
    start = time.process_time()
    with torch.inference_mode():
        for images in inputs:
            stage.localizer.model(images)
    return time.process_time() - start


def whole_stage(stage: stage_script.Stage) -> float:
    """Return the CPU seconds of decoding, resizing, attention and cleaning."""
    start = time.process_time()
    for _ in stage_script.mapped_batches(stage, stage.batches):
        pass
    return time.process_time() - start


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
