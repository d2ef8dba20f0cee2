"""Print what data sets of ten thousand to a million images cost: seconds, memory, sizes of files.

The images are links to a few drawn ones (the loader reads one batch of them, no more); each measurement is a process of
its own, so that its memory is its own. A million rows take some minutes and 4 GB of memory and 8 GB on the disk.

    python benchmarks/millions.py                  # 10,000, 100,000 and 1,000,000 images
    python benchmarks/millions.py 10000 30000
"""

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from measuring import build_images, write_cub

sys.path.insert(0, str(Path(__file__).parent.parent))

from datasets import read_dataset, source_boxes
from dino_transform import MapCrops
from jobs.loader import build_loader
from jobs.shared_work import Result, SharedWork, content_keys
from localized_crops.box_file import load_boxes, save_boxes
from localized_crops.map_file import MapCache, save_map_cache
from readers.data_set import DataSet
from readers.image_cache import ImageCache, Rows, content_key, ids_to_keys
from training.batches import EpochBatches, TrainImages
from transforms import BoxCrops, build_train_transform
from utils import environment

COUNTS = (10_000, 100_000, 1_000_000)
IMAGE, DISTINCT = (24, 32), 64  # height and width in pixels; files have at most 65,000 links
MAP = (3, 4)  # cells
EPOCHS = 3

Found = Iterator[tuple[str, float, str]]  # row, number, unit


def main(counts: list[int]) -> None:
    """Measure every row at every size and print the table."""
    rows: dict[str, list[str]] = {}
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            write_cub(folder / "data", build_images(DISTINCT, (IMAGE,)), count)
            for measure in MEASUREMENTS:
                for name, value, unit in own_process(measure, folder, count):
                    rows.setdefault(f"{name}, {unit}", []).append(f"{value:.3g}")
                    print(f"{count:>9,} {name}: {value:.3g} {unit}", file=sys.stderr, flush=True)
    print("| | " + " | ".join(f"{count:,}" for count in counts) + " |\n|---" + "|---" * len(counts) + "|")
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(values) + " |")
    about = environment()
    print(f"\n{about['processor']}, torch {about['torch']}, Python {about['python']}")


def own_process(measure: Callable[[Path, int], Found], folder: Path, count: int) -> list[tuple[str, float, str]]:
    """Return what a measurement finds in a process of its own, and the most memory that it added."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    work = (measure, folder, count, sender)
    process = multiprocessing.get_context("fork").Process(target=_measured, args=work)  # may have loader processes
    process.start()
    sender.close()
    found = receiver.recv()
    process.join()
    return found


def _measured(measure: Callable[[Path, int], Found], folder: Path, count: int, answer: Connection) -> None:
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = memory("RssAnon")
    found = list(measure(folder, count))
    name = measure.__name__.replace("_", " ")
    answer.send([*found, (f"{name}: most memory", memory("VmHWM") - memory("RssFile") - before, "MiB")])


def memory(key: str) -> float:
    """Return an entry of this process's status in MiB: RssAnon, RssFile, VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(f"{key}:"))


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


def data_set(folder: Path, count: int) -> Found:
    """Read the data set for the first time, and again."""
    clock = Clock()
    read_dataset("cub", folder / "data")
    yield "data set, first time", clock.look(), "CPU s"
    data = read_dataset("cub", folder / "data")
    yield "data set, later", clock.look(), "CPU s"
    data.fingerprint()
    yield "its fingerprint", clock.look(), "CPU s"


def box_file(folder: Path, count: int) -> Found:
    """Write a box file and open it."""
    data, path = read_dataset("cub", folder / "data"), folder / "boxes.json"
    boxes = dict(zip(data.ids.tolist(), map(tuple, data.boxes.tolist()), strict=True))
    sizes = dict(zip(data.ids.tolist(), map(tuple, data.image_sizes.tolist()), strict=True))
    clock = Clock()
    save_boxes(path, boxes, sizes, made_by="millions.py", settings={}, scores=dict.fromkeys(boxes, 0.5))
    yield "box file, writing", clock.look(), "CPU s"
    yield "box file", path.stat().st_size / 1e6, "MB"


def open_boxes(folder: Path, count: int) -> Found:
    """Open the box file."""
    clock = Clock()
    load_boxes(folder / "boxes.json")
    yield "box file, opening", clock.look(), "CPU s"


def boxes_of_images(folder: Path, count: int) -> Found:
    """Open the box file for the data set."""
    data = read_dataset("cub", folder / "data")
    clock = Clock()
    source_boxes(str(folder / "boxes.json"), data)
    yield "box file for a data set", clock.look(), "CPU s"


def maps(folder: Path, count: int) -> Found:
    """Write maps of few cells and open their index."""
    cells = np.random.default_rng(0).random((DISTINCT, *MAP)).astype(np.float16)
    about = {"dataset": "", "model": "", "weights_sha256": "", "settings": {}}
    save_map_cache(folder / "boxes.json", ((n + 1, cells[n % DISTINCT]) for n in range(count)), about)
    clock = Clock()
    cache = MapCache.open(folder / "boxes.json")
    len(cache)
    yield "maps, opening", clock.look(), "CPU s"


def exact_crops(folder: Path, count: int) -> Found:
    """Draw epochs of exact crops."""
    crops = BoxCrops(*_boxes(folder), thr=0.8)
    yield "exact crops of an epoch", _drawing(crops), "CPU µs per image"


def density_crops(folder: Path, count: int) -> Found:
    """Draw epochs of density-map crops, the first, which reads the maps, and later ones."""
    _, sizes = _boxes(folder)
    crops = MapCrops(MapCache.open(folder / "boxes.json"), np.arange(1, count + 1), sizes, temperature=0.1)
    yield "density-map crops of the first epoch", _drawing(crops), "CPU µs per image"
    yield "density-map crops of a later epoch", np.mean([_drawing(crops) for _ in range(EPOCHS)]), "CPU µs per image"


def caches(folder: Path, count: int) -> Found:
    """Open the cache of decoded images: its index, and a look at each file."""
    data = read_dataset("cub", folder / "data")
    clock = Clock()
    key = content_key(data.fingerprint(), data.paths, None)
    cache = ImageCache(folder / "none.bin", key, Rows(ids_to_keys(data.ids)), data.image_sizes, data.image_sizes)
    yield "cache of decoded images, opening", clock.look(), "CPU s"
    yield "its size", cache.offsets[-1] / 1e6, "MB"


def resuming(folder: Path, count: int) -> Found:
    """Look at a stage's finished units of 32 images, and put them together."""
    data = read_dataset("cub", folder / "data")
    clock = Clock()
    batches = [data.paths[np.arange(start, min(start + 32, count))] for start in range(0, count, 32)]
    work = SharedWork(folder / "partial", {"settings": {}}, "dino", "", keys=content_keys(batches))
    yield "resuming a stage: is an image another one?", clock.look(), "CPU s"
    cells, sizes = np.zeros((32, *MAP), np.float16), [len(batch) for batch in batches]
    with work.claimed():
        work.run_units(sizes, lambda numbers: (Result({"ids": []}, {"maps": cells}) for _ in numbers), what="units")
        yield "writing the files of its units", clock.look(), "CPU s"
        work.run_units(sizes, lambda numbers: iter(()), what="units")
        yield "finding them finished", clock.look(), "CPU s"
        for _ in work.results(set(range(len(batches)))):
            pass
        yield "putting them together", clock.look(), "CPU s"


def loader_process(folder: Path, count: int) -> Found:
    """Start a loader process, with exact crops, and look at its memory after its first batch."""
    data = read_dataset("cub", folder / "data")
    small = len(data.ids) // 1000
    grown = []
    for rows in (np.arange(small), np.arange(count)):
        images = _train_images(data, rows)
        start = time.perf_counter()
        sampler = EpochBatches(len(images), 32, seed=0)
        loader = build_loader(images, num_workers=1, pin_memory=False, batch_size=None, sampler=sampler)
        batches = iter(loader)
        next(batches)
        yield (
            f"first batch of a loader process, {'all' if len(rows) > small else 'a thousandth of the'} images",
            (time.perf_counter() - start),
            "s",
        )
        grown.append(_memory_of(batches._workers[0].pid))
        del batches, loader
    yield "a loader process grows by", grown[1] - grown[0], "MiB"


def _memory_of(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith("RssAnon"))


def _train_images(data: DataSet, rows: np.ndarray) -> TrainImages:
    crops = BoxCrops(data.boxes[rows], data.image_sizes[rows], thr=0.8)
    transform = build_train_transform(16, "bilinear", augment=False, augment_p=1.0, use_augment_mix=False)
    return TrainImages(data, rows, crops, transform, flip=0.5, seed=0, reference=crops.boxes)


def _boxes(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes and sizes of the images."""
    data = read_dataset("cub", folder / "data")
    return data.boxes, data.image_sizes


def _drawing(crops: BoxCrops | MapCrops) -> float:
    """Return the processor's microseconds per image of drawing an epoch."""
    clock = Clock()
    drawn = crops.draw(np.random.default_rng(0))
    return 1e6 * clock.look() / len(drawn)


MEASUREMENTS = (
    data_set, box_file, open_boxes, boxes_of_images, maps, exact_crops, density_crops, caches, resuming, loader_process,
)  # fmt: skip

if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or list(COUNTS))
