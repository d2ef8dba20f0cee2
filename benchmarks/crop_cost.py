"""Print what localized and density-map crops cost: loading and an epoch, as ratios to RandomResizedCrop's.

Uses the maps that generate_dino_boxes.py wrote. One process, one thread, CPU time, no workers; all kinds of crop
alternately in one run; median and quartiles over rounds of the ratio within a round. Takes the config's words, ToyBirds
by default.

    python generate_dino_boxes.py
    python benchmarks/crop_cost.py dino_maps=runs/dino_boxes_toybirds/boxes.json
"""

import sys
from pathlib import Path

import numpy as np
import torch

from measuring import CPU, ratio, timed

sys.path.insert(0, str(Path(__file__).parent.parent))

from config import load_config
from training import train_data, train_run
from training.loop import train_one_epoch
from training.run import Run
from utils import environment

ROUNDS = 9
KINDS = {
    "RandomResizedCrop": {"use_box": False},
    "exact, thr 1": {"use_box": True},
    "reference, thr 1": {"use_box": True, "crop": {"mode": "reference"}},
    "density map": {"use_box": False, "use_dino_maps": True},
}


def main(words: list[str]) -> None:
    """Measure and print the table."""
    torch.set_num_threads(1)
    runs = {kind: prepare(load_config([*words, "num_workers=0"]), changes) for kind, changes in KINDS.items()}
    times = {kind: {"loading": [], "epoch": []} for kind in KINDS}
    for number in range(ROUNDS + 1):
        for kind, (run, loader) in runs.items():
            loader.sampler.epoch = number
            loading = timed(lambda loader=loader: [None for _ in loader])
            epoch = timed(lambda run=run, loader=loader: train_one_epoch(run, loader))
            if number:  # the first round warms up
                times[kind]["loading"].append(loading)
                times[kind]["epoch"].append(epoch)
    print(table(times, len(next(iter(runs.values()))[1].dataset)))
    about = environment()
    print(f"\n{about['processor']}, one thread; torch {about['torch']}; {ROUNDS} alternated rounds, median (quartiles)")


def prepare(config: dict, changes: dict) -> tuple:
    """Build the training of one kind of crop; return its run and loader."""
    crop = config["crop"] | changes.get("crop", {})
    config = config | changes | {"crop": crop}
    data = train_data.load_data(config)
    boxes, _ = train_data.crop_boxes(config, data)
    train_run.resolve(config, Path("runs/crop_cost"), data, boxes)
    crops, decoded = train_data.build_crops(config, data, boxes), train_data.decoded_images(config, data)
    loader = train_data.build_train_loader(config, data, crops, CPU, decoded)
    run = Run(Path("runs/crop_cost"), config, data.class_names, {}, CPU)
    run.is_begun = True  # config.json is not written
    return run, loader


def table(times: dict, images: int) -> str:
    """Return the Markdown table."""
    base = times["RandomResizedCrop"]
    lines = ["| crop | loading | epoch | loading, images/s |", "|---|---|---|---|"]
    for kind, measured in times.items():
        cells = [ratio(measured[what], base[what]) for what in ("loading", "epoch")]
        lines.append(f"| {kind} | {' | '.join(cells)} | {images / np.median(measured['loading']):.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
