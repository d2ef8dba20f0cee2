"""Print how memory and open files stand while stages work long: train.py over epochs, every generator over images.

Looked at from outside, from a process's start to its end: anonymous and shared memory (not the pages of mapped files,
which the system can take back) of the stage and of its loader's worker, and the open files of both. Growth is the slope
of a line through all that was seen after a fifth of the work. The images are drawn here, tiny and all different, so
that many pass in minutes; the candidates are those of generate_mask.py, the classifier that of the training.

    python benchmarks/long_runs.py                       # 200 epochs, 20,000 images
    python benchmarks/long_runs.py EPOCHS IMAGES
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image

from measuring import memory, write_rows

sys.path.insert(0, str(Path(__file__).parent.parent))

from utils import environment

ROOT = Path(__file__).parent.parent
SHARED_MEMORY = Path("/dev/shm")
TRAINING_IMAGES, CLASSES, WIDTH, HEIGHT = 60, 3, 24, 20  # an odd shape of image, pixels
POINTS = (0.2, 0.5, 1.0)  # shares of the work
INTERVAL = 0.25  # seconds between two looks
COLUMNS = ("stage", "MiB of the process at 20%, 50%, 100%", "growth", "MiB of the worker", "growth",
           "open files of both", "MiB at most, to the end", "left behind", "seconds")  # fmt: skip


def main(epochs: str = "200", images: str = "20000") -> None:
    """Run every stage and print a row for each as it ends."""
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    with tempfile.TemporaryDirectory() as folder:
        for run in planned_runs(Path(folder), int(epochs), int(images)):
            print(row(run, watch(run)), flush=True)
    about = environment()
    print(f"\n{about['processor']}, torch {about['torch']}, Python {about['python']}")


# --- what runs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One long run of a stage."""

    name: str
    words: list[str]  # the command
    log: Path  # what it tells
    progress: Callable[[], float]  # share of the work that is done
    units: int  # epochs or images of the whole work
    per: int  # growth is told for so many units
    unit: str


def planned_runs(folder: Path, epochs: int, images: int) -> list[Run]:
    """Write the data and return the runs, each of which may use what those before it wrote."""
    few, many = folder / "few", folder / "many"
    write_images(few, TRAINING_IMAGES)
    write_images(many, images)
    trainings = [training(folder, few, epochs, workers) for workers in (0, 1)]
    classifier = ["bbox.classifier=" + str(folder / "training_0" / "best.pt"), f"masks={folder / 'masks'}"]
    return [
        *trainings,
        generator(many, images, "generate_mask.py", "mask.store=none", f"mask.folder={folder / 'masks'}"),
        generator(
            many, images, "generate_dino_boxes.py", "dino.image_size=32", f"out={folder / 'dino' / 'boxes.json'}"
        ),
        generator(many, images, "generate_bbox.py", *classifier, f"out={folder / 'bbox' / 'boxes.json'}"),
    ]


def training(folder: Path, root: Path, epochs: int, workers: int) -> Run:
    """Return a training that validates, logs and saves after every epoch."""
    run_dir = folder / f"training_{workers}"
    small = ["image_size=16", "batch_size=8", "log_interval=1", f"num_epochs={epochs}", f"num_workers={workers}"]
    words = [*command("train.py", root), *small, f"run_dir={run_dir}"]
    log = run_dir / "log.jsonl"

    def progress() -> float:
        return log.read_bytes().count(b"\n") / epochs if log.exists() else 0.0

    return Run(f"train.py, num_workers={workers}", words, run_dir.with_suffix(".err"), progress, epochs, 100, "epochs")


def generator(root: Path, images: int, script: str, *words: str) -> Run:
    """Return a generator with one worker; its progress bar tells how far it is."""
    log = root.parent / f"{script}.err"

    def progress() -> float:
        shown = re.findall(rb"(\d+)/(\d+) \[", log.read_bytes())
        return int(shown[-1][0]) / int(shown[-1][1]) if shown else 0.0

    return Run(script, [*command(script, root), "num_workers=1", *words], log, progress, images, 1000, "images")


def command(script: str, root: Path) -> list[str]:
    """Return the start of a command line."""
    return [sys.executable, str(ROOT / script), "dataset.name=cub", f"dataset.root={root}", "num_threads=1"]


def write_images(root: Path, count: int) -> None:
    """Write a data set in CUB's format: a light ellipse on a dark ground, another one in every image."""
    rng, lines = np.random.default_rng(0), {name: [] for name in ("labels", "boxes", "split", "images")}
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    for number in range(1, count + 1):
        label, name = number % CLASSES, f"{number % 100:03}/{number:06}.jpg"
        y, x, half_height, half_width = rng.uniform((7, 9, 3, 4), (13, 15, 6, 8))
        inside = ((rows - y) / half_height) ** 2 + ((columns - x) / half_width) ** 2 < 1
        pixels = np.where(inside[..., None], rng.uniform(120, 255, 3), rng.uniform(0, 100, 3)).astype(np.uint8)
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels).save(root / "images" / name)
        lines["images"].append(name)
        lines["labels"].append(label + 1)
        lines["boxes"].append(f"{x - half_width:.1f} {y - half_height:.1f} {2 * half_width:.1f} {2 * half_height:.1f}")
        lines["split"].append(int(number % 4 > 0))
    files = {"images": "images", "labels": "image_class_labels", "boxes": "bounding_boxes", "split": "train_test_split"}
    for name, file in files.items():
        write_rows(root / f"{file}.txt", lines[name])
    write_rows(root / "classes.txt", [f"class_{label}" for label in range(CLASSES)])


# --- looking at processes -----------------------------------------------------------------------------------------


class Look(NamedTuple):
    """What was seen at one moment."""

    done: float  # share of the work
    process: float  # MiB
    children: float  # MiB, all together
    files: int  # open, of all


@dataclass
class Watched:
    """What was seen of one run."""

    looks: list[Look]
    seconds: float
    left: int  # processes that outlived it, and entries of shared memory that it used and did not remove


def watch(run: Run) -> Watched:
    """Run a stage to its end, which must be good, and look at it all the while."""
    looks, shared, start = [], set(), time.perf_counter()
    with open(run.log, "wb") as told:
        process = subprocess.Popen(run.words, stdout=subprocess.DEVNULL, stderr=told, start_new_session=True)
    while process.poll() is None:
        time.sleep(INTERVAL)
        try:
            children = descendants(process.pid)
            files = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in (process.pid, *children))
            held = [memory("RssAnon", pid) + memory("RssShmem", pid) for pid in (process.pid, *children)]
            shared |= {name for pid in (process.pid, *children) for name in shared_entries(pid)}
        except (FileNotFoundError, ProcessLookupError, StopIteration):  # one of them ends at this moment
            continue
        looks.append(Look(run.progress(), held[0], sum(held[1:]), files))
    if process.returncode:
        raise SystemExit(f"{' '.join(run.words)}\n{run.log.read_text()[-3000:]}")
    seconds = time.perf_counter() - start
    time.sleep(1.0)  # the tracker of resources ends after the process
    left = group_size(process.pid) + len(shared & set(os.listdir(SHARED_MEMORY)))
    return Watched(looks, seconds, left)


def descendants(pid: int) -> list[int]:
    """Return the children of a process and theirs."""
    direct = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return direct + [one for child in direct for one in descendants(child)]


def shared_entries(pid: int) -> list[str]:
    """Return the names of the entries of shared memory that a process maps."""
    return re.findall(rf"{SHARED_MEMORY}/(\S+)", Path(f"/proc/{pid}/maps").read_text())


def group_size(group: int) -> int:
    """Return how many processes of a group live."""
    count = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of, *_ = path.read_text().rpartition(")")[2].split()
            count += int(of) == group and state != "Z"  # a zombie has ended, and waits for its parent's look
        except OSError:  # it has ended
            continue
    return count


# --- the table ----------------------------------------------------------------------------------------------------


def row(run: Run, watched: Watched) -> str:
    """Return a row of the table."""
    working = [look for look in watched.looks if 0 < look.done < 1]
    at = [next(look for look in reversed(working) if look.done <= share) for share in POINTS]
    held, children = (", ".join(f"{look[place]:.0f}" for look in at) for place in (1, 2))
    growth, growth_of_children = (
        f"{slope(run, working, place):+.2f} MiB per {run.per:,} {run.unit}" for place in (1, 2)
    )
    files = ", ".join(str(look.files) for look in at)
    most = max(look.process for look in watched.looks)
    cells = (f"{run.name}, {run.units:,} {run.unit}", held, growth, children, growth_of_children, files)
    return "| " + " | ".join((*cells, f"{most:.0f}", str(watched.left), f"{watched.seconds:.0f}")) + " |"


def slope(run: Run, working: list[Look], place: int) -> float:
    """Return the growth in MiB per ``run.per`` units after the first point."""
    later = [look for look in working if look.done >= POINTS[0]]
    done, held = np.array([(look.done * run.units, look[place]) for look in later]).T
    return float(np.polyfit(done, held, 1)[0]) * run.per


if __name__ == "__main__":
    main(*sys.argv[1:])
