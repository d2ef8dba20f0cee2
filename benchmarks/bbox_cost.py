"""Print candidates/s of generate_bbox.py's scoring, decoding and cutting out included, over the bare forward pass.

Same network with random weights, same batches, one process, one thread, CPU time (the machines are shared), alternated
rounds. Candidates are random boxes, ten an image.

    python benchmarks/bbox_cost.py FOLDER_IN_CUB_FORMAT resnet50 224
    python benchmarks/bbox_cost.py data/toybirds toyresnet 64
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import generate_bbox
from config import load_config
from datasets import read_dataset
from jobs.shared_work import SharedWork
from models import build_model
from transforms import normalize
from utils import environment

ROUNDS, EACH = 5, 10
CANDIDATES = {"resnet50": 160, "toyresnet": 4000}  # a round's


def main(root: str, model_type: str, image_size: int) -> None:
    """Measure and print one line."""
    torch.set_num_threads(1)
    stage = build_stage(root, model_type, image_size)
    crops = torch.zeros(64, 3, image_size, image_size, dtype=torch.uint8)
    count = sum(map(len, stage.candidates.values()))
    bare_pass(stage, crops, 64)  # warms up
    bare, whole = (
        np.array(times)
        for times in zip(*((bare_pass(stage, crops, count), scoring(stage)) for _ in range(ROUNDS)), strict=True)
    )
    low, middle, high = np.quantile(bare / whole, (0.25, 0.5, 0.75))
    print(f"{model_type}, {image_size} px, {count} candidates: bare {count / np.median(bare):.0f}/s, stage "
          f"{count / np.median(whole):.0f}/s, ratio {middle:.3f} ({low:.3f} to {high:.3f}), {ROUNDS} rounds; "
          f"{environment()['processor']}, one thread")  # fmt: skip


def build_stage(root: str, model_type: str, image_size: int) -> generate_bbox.Stage:
    """Return the stage with random candidates and weights."""
    data, rng = read_dataset("cub", root), np.random.default_rng(0)
    candidates = {row: np.zeros((0, 4)) for row in range(len(data.ids))}
    for row in rng.permutation(len(data.ids))[: CANDIDATES.get(model_type, 160) // EACH].tolist():
        near = rng.random((EACH, 2)) * 0.6 * data.image_sizes[row]
        candidates[row] = np.concatenate([near, rng.uniform(0.1, 0.4, (EACH, 2)) * data.image_sizes[row]], axis=1)
    return generate_bbox.Stage(
        config=load_config(["num_workers=0"]),
        out=Path("unused"),
        data=data,
        candidates=candidates,
        model=build_model(model_type, len(data.class_names), image_size=image_size, patch_size=14).eval(),
        image_size=image_size,
        device=torch.device("cpu"),
        work=SharedWork(Path("unused"), {}, "bbox", ""),
        units=generate_bbox.plan_units(candidates, len(data.ids), 64),
    )


def bare_pass(stage: generate_bbox.Stage, crops: torch.Tensor, count: int) -> float:
    """Return the CPU seconds of the network alone, on as many images."""
    start = time.process_time()
    with torch.inference_mode():
        for first in range(0, count, len(crops)):
            stage.model(normalize(crops[: min(len(crops), count - first)]))
    return time.process_time() - start


def scoring(stage: generate_bbox.Stage) -> float:
    """Return the CPU seconds of decoding, cutting out and scoring."""
    start = time.process_time()
    for rows, (crops, errors) in zip(
        stage.units, generate_bbox.cut_out(stage, stage.units, stage.candidates), strict=True
    ):
        generate_bbox.score_crops(stage, rows, crops, errors, None)
    return time.process_time() - start


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
