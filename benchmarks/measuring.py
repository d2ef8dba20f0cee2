"""What the benchmarks share: clocks, ratios, settings of the command line, and data sets of drawn images."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

CPU = torch.device("cpu")
SIZES = ((375, 500), (500, 333), (332, 500), (500, 400))  # height, width: as in CUB


def timed(work: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> float:
    """Return the seconds that ``work()`` takes; by default those of the processor, as machines are shared."""
    start = clock()
    work()
    return clock() - start


def timed_on(
    device: torch.device | str, work: Callable[[], Any], clock_of_cpu: Callable[[], float] = time.process_time
) -> float:
    """Return the seconds until ``work()`` is done on the device: of the clock on a GPU, else of ``clock_of_cpu``."""
    if torch.device(device).type == "cpu":
        return timed(work, clock_of_cpu)

    def whole() -> None:
        work()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return timed(whole, time.perf_counter)


def alternated(ways: Mapping[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each way in each round; a first round warms up and is not counted.

    Args:
        ways: what does the work once, given the number of the round, and returns its seconds.
        rounds: in each, all ways run one after the other, so that a machine that slows down slows all of them.
    """
    times = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            seconds = way(number)
            if number:
                times[name].append(seconds)
    return times


def memory(key: str, pid: int | str = "self") -> float:
    """Return an entry of a process's status in MiB: RssAnon, RssShmem, RssFile, VmHWM.

    Raises:
        ProcessLookupError: if the process has ended.
    """
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 2**10
    raise ProcessLookupError(f"{pid} has ended")


def quartiles(some: Sequence[float], base: Sequence[float]) -> list[float]:
    """Return the first quartile, median and third quartile of the ratio within a round."""
    return np.quantile(np.array(some) / np.array(base), (0.25, 0.5, 0.75)).tolist()


def ratio(some: Sequence[float], base: Sequence[float]) -> str:
    """Return the median and quartiles of the ratio within a round."""
    low, middle, high = quartiles(some, base)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def parse_settings(arguments: list[str], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return ``defaults`` with ``key=value`` arguments laid over them, each of the type of its default."""
    settings = dict(defaults)
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in settings:
            raise SystemExit(f"unknown setting {key!r}; known: {', '.join(settings)}")
        settings[key] = type(settings[key])(value)
    return settings


# --- drawn images -------------------------------------------------------------------------------------------------


def build_images(count: int, sizes: Sequence[tuple[int, int]] = SIZES, grain: float = 0.0) -> list[np.ndarray]:
    """Return ``count`` smooth random images (H, W, 3) uint8, of ``sizes`` (H, W) in turn.

    Args:
        count: images.
        sizes: height and width in pixels.
        grain: deviation of noise on top, grey levels; 12 makes JPEGs as large as photographs are.
    """
    generator = np.random.default_rng(0)
    small = generator.integers(0, 256, (count, 6, 9, 3), dtype=np.uint8)
    sides = [sizes[index % len(sizes)] for index in range(count)]
    pairs = zip(small, sides, strict=True)
    smooth = [np.asarray(PIL.Image.fromarray(pixels).resize(side[::-1], PIL.Image.BICUBIC)) for pixels, side in pairs]
    if not grain:
        return smooth
    return [np.clip(one + generator.normal(0, grain, one.shape), 0, 255).astype(np.uint8) for one in smooth]


def write_cub(root: Path, images: Sequence[np.ndarray], count: int, classes: int = 200) -> Path:
    """Write a data set in CUB's format: each image once, then links to them; two of three are training images.

    Args:
        root: folder to make.
        images: (H, W, 3) uint8.
        count: rows of the data set.
        classes: labels.
    """
    rng, files = np.random.default_rng(0), []
    (root / "images").mkdir(parents=True)
    for number, pixels in enumerate(images):
        files.append(root / "images" / f"image_{number}.jpg")
        PIL.Image.fromarray(pixels).save(files[-1], quality=90)
    names = [f"{number % classes:03}/{number:07}.jpg" for number in range(count)]
    for folder in {Path(name).parent for name in names}:
        (root / "images" / folder).mkdir(exist_ok=True)
    for number, name in enumerate(names):
        os.link(files[number % len(files)], root / "images" / name)
    sizes = np.array([pixels.shape[1::-1] for pixels in images])[np.arange(count) % len(images)]
    boxes = np.round(np.concatenate([rng.uniform(0, 0.4, (count, 2)), rng.uniform(0.2, 0.6, (count, 2))], axis=1)
                     * np.tile(sizes, 2), 1)  # fmt: skip
    write_rows(root / "images.txt", names)
    write_rows(root / "image_class_labels.txt", [number % classes + 1 for number in range(count)])
    write_rows(root / "bounding_boxes.txt", [" ".join(map(str, box)) for box in boxes.tolist()])
    write_rows(root / "train_test_split.txt", [int(number // classes % 3 < 2) for number in range(count)])
    write_rows(root / "classes.txt", [f"class_{number}" for number in range(classes)])
    return root


def write_rows(path: Path, values: Sequence[Any]) -> None:
    """Write a line for each value, numbered from 1."""
    path.write_text("".join(f"{number} {value}\n" for number, value in enumerate(values, 1)))
