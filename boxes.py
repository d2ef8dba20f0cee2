"""Convert box files: read ours, COCO JSON, CSV, a folder of YOLO or Pascal VOC; write ours, COCO, CSV or YOLO.

    python boxes.py convert A B dataset.name=folder dataset.root=photos
    python boxes.py convert runs/dino_boxes_photos/boxes.json boxes.coco.json dataset.name=folder dataset.root=photos

The data set gives the images' names and sizes. B chooses the format: NAME.coco.json is COCO, another .json is ours,
NAME.csv a table (path, x, y, width, height in pixels), a name without a suffix a new folder of YOLO files. Names are
the images' paths, of CUB's format those below images/. boxes.several and boxes.allow_missing hold for A.
"""

import jobs.early  # noqa: F401 - Ctrl-C during the other imports

from pathlib import Path

import numpy as np

from config import load_config
from datasets import convert_source, known_boxes, read_dataset
from jobs.guard import run_script
from localized_crops.files import UserError, check_output

USAGE = "python boxes.py convert FROM TO dataset.name=NAME dataset.root=FOLDER"


def load_request(arguments: list[str]) -> dict | None:
    """Return ``config``, with the file to read as its source, and the file to write as ``out``; None after help.

    Raises:
        UserError: if the words are not ``convert A B`` and then keys, or as load_config does.
    """
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return load_config(arguments)
    if len(arguments) < 3 or arguments[0] != "convert" or any("=" in word for word in arguments[:3]):
        raise UserError(f"usage: {USAGE}")
    return {"config": load_config([f"source={arguments[1]}", *arguments[3:]]), "out": arguments[2]}


def main(request: dict) -> None:
    """Read the boxes and write them in the other format."""
    config, out = request["config"], Path(request["out"])
    if out.suffix:
        check_output(out)
    data = read_dataset(**config["dataset"])
    boxes = known_boxes(config["source"], data, **config["boxes"])
    settings = {key: config[key] for key in ("dataset", "boxes", "source")}
    convert_source(out, data, boxes, made_by=f"boxes.py convert {config['source']}", settings=settings)
    missing = np.isnan(boxes[:, 0]).sum()
    print(f"{out}: {len(boxes) - missing} boxes, none for {missing} images")


if __name__ == "__main__":
    run_script(main, load_request)
