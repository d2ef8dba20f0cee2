"""Write boxes and maps of a saliency network's maps where generate_dino_boxes.py would write those of DINO.

Reads a folder in CUB's file format and a file of maps (``ids`` (N,), ``maps`` (N, h, w), stretched over the image). The
box is the component method's at its defaults (threshold .15, which docs/boxes.md chose on training boxes).

    python benchmarks/saliency_boxes.py cub24_saliency.npz FOLDER_IN_CUB_FORMAT runs/saliency_boxes/boxes.json
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from box_methods import load_maps
from datasets import read_dataset, save_source
from figures.box_report import report_boxes
from localized_crops.map_boxes import component_box
from localized_crops.map_file import MapCache, save_map_cache


def main(saliency: str, root: str, out: str) -> None:
    """Write the box file, the maps beside it, and the evaluation; print it."""
    data, path = read_dataset("cub", root), Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    ids, maps = data.ids.tolist(), load_maps(saliency, data.ids)
    sizes = [tuple(size) for size in data.image_sizes.tolist()]
    boxes = [component_box(cells, size) for cells, size in zip(maps, sizes, strict=True)]
    about = {"made_by": Path(__file__).name, "settings": {"method": "component"}}
    xywh = np.array([box.xywh if box.found else [np.nan] * 4 for box in boxes])
    save_source(path, data, xywh, **about)
    header = about | {"dataset": data.fingerprint(), "model": "saliency", "weights_sha256": None}
    save_map_cache(path, zip(ids, maps, strict=True), header)
    report_boxes(path, data, xywh, seconds={}, errors={}, maps=MapCache.open(path))


if __name__ == "__main__":
    main(*sys.argv[1:])
