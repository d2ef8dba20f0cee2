"""Print candidates/s of generate_bbox.py's scoring, decoding and cutting out included, over the bare forward pass.

Same network with random weights, same batches, alternated rounds; on a CPU one process, one thread, CPU time (the
machines are shared). Candidates are random boxes, ten an image, in a folder as generate_mask.py writes it.

    python benchmarks/bbox_cost.py FOLDER_IN_CUB_FORMAT resnet50 224
    python benchmarks/bbox_cost.py data/toybirds toyresnet 64
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from measuring import ratio, timed_on

sys.path.insert(0, str(Path(__file__).parent.parent))

import generate_bbox
from config import load_config
from datasets import read_dataset
from masks.mask_files import mask_names, save_masks_info
from models import build_model, input_config
from readers.data_set import DataSet
from transforms import normalize
from utils import autocast, environment, save_tensors

ROUNDS, EACH = 5, 10
CANDIDATES = {"resnet50": 160, "toyresnet": 4000}  # a round's


def main(root: str, model_type: str, image_size: str) -> None:
    """Measure and print one line."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        count = CANDIDATES.get(model_type, 160)
        stage = build_stage(Path(folder), root, model_type, int(image_size), count, "num_workers=0")
        bare, whole = measure(stage, ROUNDS)
    print(f"{model_type}, {image_size} px, {count} candidates: bare {count / np.median(bare):.0f}/s, stage "
          f"{count / np.median(whole):.0f}/s, ratio {ratio(bare, whole)}, {ROUNDS} rounds; "
          f"{environment()['gpu'] or environment()['processor'] + ', one thread'}")  # fmt: skip


def build_stage(
    folder: Path, root: Path | str, model_type: str, image_size: int, count: int, *words: str
) -> generate_bbox.Stage:
    """Return the stage with ``count`` random candidates and random weights, which go to ``folder``."""
    data = read_dataset("cub", root)
    write_candidates(folder / "masks", data, count)
    model = build_model(model_type, len(data.class_names), image_size=image_size, patch_size=14)
    classifier = load_config([f"model.type={model_type}", f"image_size={image_size}"])
    statistics = {key: input_config(model_type)[key] for key in ("mean", "std")}
    classifier["model"] |= {"n_classes": len(data.class_names)} | statistics
    content = {"config": classifier, "model": model.state_dict(), "class_names": data.class_names}
    save_tensors(folder / "classifier.pt", content)
    return generate_bbox.prepare(
        load_config(
            ["dataset.name=cub", f"dataset.root={root}", f"masks={folder / 'masks'}", f"out={folder / 'boxes.json'}",
             f"bbox.classifier={folder / 'classifier.pt'}", *words]
        )
    )  # fmt: skip


def write_candidates(folder: Path, data: DataSet, count: int) -> None:
    """Write a masks_info.json with EACH boxes for so many images that there are ``count``."""
    rng, names = np.random.default_rng(0), mask_names(data.ids.tolist(), data.paths)
    info = {name: [] for name in names}
    for row in rng.permutation(len(names))[: count // EACH].tolist():
        near = rng.random((EACH, 2)) * 0.6 * data.image_sizes[row]
        boxes = np.concatenate([near, rng.uniform(0.1, 0.4, (EACH, 2)) * data.image_sizes[row]], axis=1)
        info[names[row]] = [{"bbox": box} for box in boxes.tolist()]
    save_masks_info(folder, {"dataset": data.fingerprint(), "store": "none"}, info)


def measure(stage: generate_bbox.Stage, rounds: int) -> tuple[list[float], list[float]]:
    """Return the seconds of the network alone and of the whole stage, in each round."""
    size = stage.config["bbox"]["batch_size"]
    crops = torch.zeros(size, 3, stage.image_size, stage.image_size, dtype=torch.uint8, device=stage.classifier.device)
    count = sum(map(len, stage.candidates))

    def bare() -> None:
        with torch.inference_mode(), autocast(stage.classifier.device, stage.config["amp"]):
            for first in range(0, count, size):
                stage.classifier.model(normalize(crops[: min(size, count - first)]))

    def whole() -> None:
        cut = generate_bbox.cut_out(stage, stage.work.units, stage.candidates)
        for rows, (parts, errors) in zip(stage.work.units, cut, strict=True):
            generate_bbox.score_crops(stage, rows, parts, errors, None)

    bare()  # warms up
    rows = [(timed_on(stage.classifier.device, bare), timed_on(stage.classifier.device, whole)) for _ in range(rounds)]
    return tuple(map(list, zip(*rows, strict=True)))


if __name__ == "__main__":
    main(*sys.argv[1:])
