"""Print images/s of generate_dino_boxes.py's maps, decoding and cleaning included, over the bare forward pass.

Same network, same batches, one process, one thread, CPU time (the machines are shared), alternated rounds. Writing the
records and finding the boxes are not in it. Takes the config's words, ToyBirds by default.

    python benchmarks/stage_cost.py out=runs/stage_cost.json
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import generate_dino_boxes as stage_script
from config import load_config
from utils import environment

ROUNDS = 5


def main(words: list[str]) -> None:
    """Measure and print one line."""
    stage = stage_script.prepare(load_config([*words, "num_workers=0", "num_threads=1"]))
    images = sum(len(batch.rows) for batch in stage.batches)
    inputs = [
        stage.localizer.normalize(torch.full((len(b.rows), 3, b.height, b.width), 100, dtype=torch.uint8))
        for b in stage.batches
    ]
    bare_pass(stage, inputs)  # warms up
    bare, whole = (
        np.array(times)
        for times in zip(*((bare_pass(stage, inputs), whole_stage(stage)) for _ in range(ROUNDS)), strict=True)
    )
    low, middle, high = np.quantile(bare / whole, (0.25, 0.5, 0.75))
    print(f"{images} images: bare {images / np.median(bare):.0f}/s, stage {images / np.median(whole):.0f}/s, "
          f"ratio {middle:.3f} ({low:.3f} to {high:.3f}), {ROUNDS} rounds; {environment()['processor']}")  # fmt: skip


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


if __name__ == "__main__":
    main(sys.argv[1:])
