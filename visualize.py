"""Draw images with their boxes, and the crops that each method draws from them.

Reads a data set and, where ``source`` names one, a box JSON. Writes a PNG: a row per image; the image with its true box
(green) and the source's box (orange, if it is another), then crops of RandomResizedCrop, the reference and the exact
mode, each with the share of the true box that it keeps.

    python visualize.py visualize.out=docs/crops.png visualize.images=4
"""

import numpy as np
import PIL.Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from boxes import coverage, crops_to_xywh
from config import load_config
from crops import sample_crops
from datasets import DataSet, read_dataset, read_image, source_boxes
from plots import save_figure
from utils import run_script, user_errors

CROPS_EACH = 3  # crops drawn per method and image


def main(config: dict) -> None:
    """Draw the picture that ``config`` asks for."""
    data = read_dataset(**config["dataset"])
    boxes, _ = source_boxes(config["source"], data)
    rng = np.random.default_rng(config["seed"])
    rows = np.sort(rng.choice(len(data.ids), min(config["visualize"]["images"], len(data.ids)), replace=False))
    with user_errors(ValueError):
        figure = draw_crops(data, rows, boxes, config, rng)
    save_figure(figure, config["visualize"]["out"])
    print(f"{len(rows)} images of {data.root} drawn to {config['visualize']['out']}")


def methods(config: dict) -> dict[str, tuple[float, str]]:
    """Return (threshold, mode) of each method, by the name that stands over its crops."""
    thr = max(config["THR"], 0.0)
    return {
        "RandomResizedCrop": (-1.0, "exact"),
        f"reference, THR={thr:g}": (thr, "reference"),
        f"exact, THR={thr:g}": (thr, "exact"),
    }


def draw_crops(data: DataSet, rows: np.ndarray, boxes: np.ndarray, config: dict, rng: np.random.Generator) -> Figure:
    """Return a figure with a row per image: the image, then ``CROPS_EACH`` crops of each method.

    Args:
        data: the data set.
        rows: which images.
        boxes: (N, 4) x y width height of the whole data set: what crops are held to.
        config: THR, crop.scale, crop.ratio, image_size.
        rng: of the crops.
    """
    columns = 1 + CROPS_EACH * len(methods(config))
    figure = Figure(figsize=(1.25 * columns + 0.6, 1.4 * len(rows) + 0.4), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False, width_ratios=[1.5, *[1] * (columns - 1)])
    for axes in grid.flat:
        axes.set_axis_off()
    for number, name in enumerate(methods(config)):
        grid[0, 1 + number * CROPS_EACH + CROPS_EACH // 2].set_title(name, fontsize=9)
    for line, row in zip(grid, rows, strict=True):
        image = read_image(data.paths[row])
        draw_boxes(line[0], image, data.boxes[row], boxes[row])
        for number, (thr, mode) in enumerate(methods(config).values()):
            first = 1 + number * CROPS_EACH
            for axes in line[first : first + CROPS_EACH]:
                crop = sample_crops(
                    boxes[[row]],
                    data.image_sizes[[row]],
                    thr,
                    mode,
                    tuple(config["crop"]["scale"]),
                    tuple(config["crop"]["ratio"]),
                    rng,
                )[0]
                draw_crop(axes, image, crop, data.boxes[row], config["image_size"])
    return figure


def draw_boxes(axes: Axes, image: PIL.Image.Image, true_box: np.ndarray, box: np.ndarray) -> None:
    """Draw an image with its true box (green) and, where it differs, the crop's box (orange)."""
    axes.imshow(image)
    for (x, y, width, height), colour in ((box, "tab:orange"), (true_box, "lime")):
        axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=colour, linewidth=1.5))


def draw_crop(axes: Axes, image: PIL.Image.Image, crop: np.ndarray, true_box: np.ndarray, size: int) -> None:
    """Draw a crop (top left height width) as the network sees it, with the share of the true box that it keeps."""
    top, left, height, width = crop.tolist()
    axes.imshow(image.resize((size, size), box=(left, top, left + width, top + height)))
    share = f"{coverage(crops_to_xywh(crop), true_box):.0%}"
    axes.text(0.03, 0.04, share, transform=axes.transAxes, fontsize=7, color="white", backgroundcolor="#0008")


if __name__ == "__main__":
    run_script(main, load_config)
