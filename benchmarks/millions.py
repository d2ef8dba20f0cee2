"""Print what data sets of ten thousand to a million images cost: seconds, memory, sizes of files.

The images are links to a few drawn ones (the loader reads one batch of them, no more); each measurement is a process of
its own, so that its memory is its own. A million rows take some minutes and 4 GB of memory and 8 GB on the disk.

    python benchmarks/millions.py                  # 10,000, 100,000 and 1,000,000 images
    python benchmarks/millions.py 10000 30000 FOLDER      # keeps the images there, for another time
    python benchmarks/millions.py 10000 data_set exact_crops
"""

import ctypes
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from measuring import build_images, memory, write_cub

sys.path.insert(0, str(Path(__file__).parent.parent))

from datasets import read_dataset, source_boxes
from jobs.loader import build_loader
from jobs.shared_work import Result, SharedWork
from localized_crops.box_file import load_boxes, save_boxes
from localized_crops.map_file import MapCache, save_map_cache
from readers.data_set import DataSet
from readers.image_cache import ImageCache, content_key
from training.batches import EpochBatches, TrainImages
from training.epoch_crops import BoxCrops, MapCrops
from transforms import TrainTransform
from utils import environment

COUNTS = (10_000, 100_000, 1_000_000)
IMAGE, DISTINCT = (24, 32), 64  # height and width in pixels; files have at most 65,000 links
MAP = (3, 4)  # cells
EPOCHS = 3

Found = Iterator[tuple[str, float, str]]  # row, number, unit


class Large(NamedTuple):
    """One size."""

    count: int
    folder: Path  # for files
    data: DataSet | None  # in its folder "data"; None: not read yet


def main(words: list[str]) -> None:
    """Measure every row at every size and print the table."""
    counts = [int(word) for word in words if word.isdecimal()] or list(COUNTS)
    chosen = [measure for measure in MEASUREMENTS if measure.__name__ in words] or MEASUREMENTS
    names = {measure.__name__ for measure in MEASUREMENTS}
    kept = next((Path(word) for word in words if not word.isdecimal() and word not in names), None)
    rows: dict[str, dict[int, str]] = {}
    for count in counts:
        with tempfile.TemporaryDirectory() as scratch:
            folder = kept / str(count) if kept else Path(scratch)
            if not (folder / "data").exists():
                write_cub(folder / "data", build_images(DISTINCT, (IMAGE,)), count)
            large = Large(count, folder, None)
            for measure in chosen:
                if large.data is None and measure is not data_set:
                    large = large._replace(data=read_dataset("cub", folder / "data"))
                for name, value, unit in own_process(measure, large):
                    rows.setdefault(f"{name}, {unit}", {})[count] = f"{value:.3g}"
                    print(f"{count:>9,} {name}: {value:.3g} {unit}", file=sys.stderr, flush=True)
    print("| | " + " | ".join(f"{count:,}" for count in counts) + " |\n|---" + "|---" * len(counts) + "|")
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(values.get(count, "–") for count in counts) + " |")
    about = environment()
    print(f"\n{about['processor']}, torch {about['torch']}, Python {about['python']}")


def own_process(measure: Callable[[Large], Found], large: Large) -> list[tuple[str, float, str]]:
    """Return what a measurement finds in a process of its own, and the most memory that it added."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    work = (measure, large, sender)
    process = multiprocessing.get_context("fork").Process(target=_measured, args=work)  # may have loader processes
    process.start()
    sender.close()
    found = receiver.recv()
    process.join()
    return found


def _measured(measure: Callable[[Large], Found], large: Large, answer: Connection) -> None:
    torch.set_num_threads(1)
    ctypes.CDLL(None).malloc_trim(0)  # what the parent freed would serve this process unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = memory("RssAnon")
    found = list(measure(large))
    name = measure.__name__.replace("_", " ")
    answer.send([*found, (f"{name}: most memory", memory("VmHWM") - memory("RssFile") - before, "MiB")])


class Clock:
    """The seconds since the last look, of the clock and of the processor."""

    def __init__(self) -> None:
        self.start, self.cpu = time.perf_counter(), time.process_time()

    def look(self) -> float:
        """Return the processor's seconds since the last look: the machines are shared."""
        now = time.process_time()
        seconds, self.cpu = now - self.cpu, now
        return seconds


# --- what is measured ---------------------------------------------------------------------------------------------


def data_set(large: Large) -> Found:
    """Read the data set for the first time, and again."""
    clock = Clock()
    if not list((large.folder / "data" / "images").glob(".image_sizes*")):
        read_dataset("cub", large.folder / "data")
        yield "data set, first time", clock.look(), "CPU s"
    data = read_dataset("cub", large.folder / "data")
    yield "data set, later", clock.look(), "CPU s"
    data.fingerprint()
    yield "its fingerprint", clock.look(), "CPU s"


def box_file(large: Large) -> Found:
    """Write a box file and open it."""
    data, path = large.data, large.folder / "boxes.json"
    boxes = dict(zip(data.ids.tolist(), map(tuple, data.boxes.tolist()), strict=True))
    sizes = dict(zip(data.ids.tolist(), map(tuple, data.image_sizes.tolist()), strict=True))
    clock = Clock()
    save_boxes(path, boxes, sizes, made_by="millions.py", settings={}, scores=dict.fromkeys(boxes, 0.5))
    yield "box file, writing", clock.look(), "CPU s"
    yield "box file", path.stat().st_size / 1e6, "MB"


def open_boxes(large: Large) -> Found:
    """Open the box file."""
    clock = Clock()
    load_boxes(large.folder / "boxes.json")
    yield "box file, opening", clock.look(), "CPU s"


def boxes_of_images(large: Large) -> Found:
    """Open the box file for the data set."""
    clock = Clock()
    source_boxes(str(large.folder / "boxes.json"), large.data)
    yield "box file for a data set", clock.look(), "CPU s"


def maps(large: Large) -> Found:
    """Write maps of few cells and open their index."""
    cells = np.random.default_rng(0).random((DISTINCT, *MAP)).astype(np.float16)
    about = {"dataset": "", "model": "", "weights_sha256": "", "settings": {}}
    save_map_cache(large.folder / "boxes.json", ((n + 1, cells[n % DISTINCT]) for n in range(large.count)), about)
    clock = Clock()
    cache = MapCache.open(large.folder / "boxes.json")
    len(cache)
    yield "maps, opening", clock.look(), "CPU s"


def exact_crops(large: Large) -> Found:
    """Draw epochs of exact crops."""
    crops = BoxCrops(large.data.boxes, large.data.image_sizes, thr=0.8)
    yield "exact crops of an epoch", _drawing(crops), "CPU µs per image"


def density_crops(large: Large) -> Found:
    """Draw epochs of density-map crops, the first, which reads the maps, and later ones."""
    maps = MapCache.open(large.folder / "boxes.json")
    crops = MapCrops(maps, large.data.ids, large.data.image_sizes, temperature=0.1)
    yield "density-map crops of the first epoch", _drawing(crops), "CPU µs per image"
    yield "density-map crops of a later epoch", np.mean([_drawing(crops) for _ in range(EPOCHS)]), "CPU µs per image"


def caches(large: Large) -> Found:
    """Open the cache of decoded images: its index, and a look at each file."""
    clock, data = Clock(), large.data
    key, sizes = content_key(data, None), data.image_sizes
    cache = ImageCache(large.folder / "none.bin", key, data.ids.tolist(), sizes, sizes)
    yield "cache of decoded images, opening", clock.look(), "CPU s"
    yield "its size", cache.offsets[-1] / 1e6, "MB"


def resuming(large: Large) -> Found:
    """Look at a stage's finished units of 32 images, and put them together."""
    clock, count = Clock(), large.count
    batches = [range(start, min(start + 32, count)) for start in range(0, count, 32)]
    work = SharedWork(large.folder / "partial", {"settings": {}}, "dino", "", batches, large.data.paths)
    yield "resuming a stage: is an image another one?", clock.look(), "CPU s"
    cells = np.zeros((32, *MAP), np.float16)
    with work.claimed():
        work.run_units(lambda numbers: (Result({"ids": []}, {"maps": cells}) for _ in numbers), "units")
        yield "writing the files of its units", clock.look(), "CPU s"
        work.run_units(lambda numbers: iter(()), "units")
        yield "finding them finished", clock.look(), "CPU s"
        for _ in work.results():
            pass
        yield "putting them together", clock.look(), "CPU s"
        work.remove()


def loader_process(large: Large) -> Found:
    """Start a loader process, with exact crops, and look at it after its first batch."""
    small, grown = max(32, large.count // 1000), []
    for rows in (np.arange(small), np.arange(large.count)):
        images = _train_images(large.data, rows)
        sampler = EpochBatches(len(images), 32, seed=0)
        loader = build_loader(images, num_workers=1, pin_memory=False, batch_size=None, sampler=sampler)
        batches = iter(loader)
        next(batches)
        pid = batches._workers[0].pid
        of = "all" if len(rows) > small else "a thousandth of the"
        yield f"first batch of a loader process, {of} images", _cpu_of(pid), "CPU s"
        grown.append(memory("RssAnon", pid))
        del batches, loader
    yield "a loader process grows by", grown[1] - grown[0], "MiB"


def _cpu_of(pid: int) -> float:
    """Return the processor's seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def _train_images(data: DataSet, rows: np.ndarray) -> TrainImages:
    crops = BoxCrops(data.boxes[rows], data.image_sizes[rows], thr=0.8)
    transform = TrainTransform(16, "bilinear", augment=False, augment_p=1.0, use_augment_mix=False)
    return TrainImages(data, rows, crops, transform, flip=0.5, seed=0, reference=crops.boxes)


def _drawing(crops: BoxCrops | MapCrops) -> float:
    """Return the processor's microseconds per image of drawing an epoch."""
    clock = Clock()
    drawn = crops.draw(np.random.default_rng(0))
    return 1e6 * clock.look() / len(drawn)


MEASUREMENTS = (
    data_set, box_file, open_boxes, boxes_of_images, maps, exact_crops, density_crops, caches, resuming, loader_process,
)  # fmt: skip

if __name__ == "__main__":
    main(sys.argv[1:])
