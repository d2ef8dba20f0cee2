"""Print what starting loader workers costs: forks of a server (ours) over spawned ones, for 1, 2 and 4 workers.

The data set is 96 px training crops of drawn images, read from files. Each measurement is a process of its own, both
kinds alternated; ratios within a round. A spawned worker imports the data set's module anew; the server does that once,
and is measured when a run's first loader starts it and when it is there already, as for every later loader. Seconds of
the processor are those of the workers and the server; memory is the proportional set size (a page that n processes
share counts a n-th in each), after one epoch.

    python benchmarks/worker_start.py [rounds=3]
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from measuring import build_images, parse_settings, ratio, write_cub

sys.path.insert(0, str(Path(__file__).parent.parent))

from datasets import read_dataset
from growth import train_images
from jobs.loader import build_loader, end_workers
from training.batches import EpochBatches
from utils import environment

WORKERS, IMAGES, BATCH = (1, 2, 4), 256, 32
KINDS = ("spawn", "server")
ROWS = {"spawned": "spawn", "first loader": "server", "later loader": "server"}
FIGURES = {"wall": "s to the first batch", "cpu": "CPU s", "worker": "MiB a worker", "all": "MiB of all"}


def main(rounds: int) -> None:
    """Measure and print the table."""
    found = {(kind, count): [] for count in WORKERS for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        root = write_cub(Path(folder) / "birds", build_images(64), IMAGES, 20)
        for _ in range(rounds):
            for kind, count in found:
                code = f"import worker_start; worker_start.measure({str(root)!r}, {kind!r}, {count})"
                done = subprocess.run(  # without a script, which spawned workers would import
                    [sys.executable, "-W", "ignore", "-c", code],
                    cwd=Path(__file__).parent,
                    stdout=subprocess.PIPE,
                    check=True,
                )
                found[kind, count].append(json.loads(done.stdout))
    print(f"| workers | started | {' | '.join(FIGURES.values())} | CPU s over spawned | MiB of all over spawned |")
    print("|---" * (4 + len(FIGURES)) + "|")
    for count in WORKERS:
        for name, kind in ROWS.items():
            base = [one["spawned"] for one in found["spawn", count]]
            print(row(count, name, [one[name] for one in found[kind, count]], base))
    about = environment()
    print(f"\n{rounds} rounds; {about['processor']}, torch {about['torch']}, Python {about['python']}")


def row(count: int, name: str, some: list[dict], base: list[dict]) -> str:
    """Return a line of the table: medians, and the ratios to spawned workers."""
    medians = [f"{sorted(one[key] for one in some)[len(some) // 2]:.3g}" for key in FIGURES]
    ratios = [ratio([one[key] for one in some], [one[key] for one in base]) for key in ("cpu", "all")]
    return f"| {count} | {name} | {' | '.join(medians + ratios)} |"


def measure(root: str, kind: str, workers: int) -> None:
    """Print the figures of the kind's loaders, in a process that has imported all that it needs."""
    torch.set_num_threads(1)
    data = read_dataset("cub", root)
    images = train_images(data, None)
    names = [name for name, of in ROWS.items() if of == kind]
    print(json.dumps({name: figures(images, kind, workers) for name in names}))


def figures(images, kind: str, workers: int) -> dict[str, float]:
    """Start a loader's workers, let them load an epoch, and end them."""
    sampler = EpochBatches(len(images), BATCH, seed=0)
    server = forkserver._forkserver._forkserver_pid
    before, start = cpu_of([server] if server else []), time.perf_counter()
    if kind == "spawn":
        loader = DataLoader(
            images, None, sampler=sampler, num_workers=workers, multiprocessing_context=kind, persistent_workers=True
        )
    else:
        loader = build_loader(images, num_workers=workers, pin_memory=False, batch_size=None, sampler=sampler)
    batches = iter(loader)
    next(batches)
    wall = time.perf_counter() - start
    own = [worker.pid for worker in batches._workers]
    server = forkserver._forkserver._forkserver_pid
    everything = [*own, server] if server else own
    cpu = cpu_of(everything) - before
    for _ in batches:
        pass
    memory = {pid: memory_of(pid) for pid in everything}
    end_workers(loader)
    return {"wall": wall, "cpu": cpu, "worker": sum(memory[pid] for pid in own) / workers, "all": sum(memory.values())}


def cpu_of(pids: list[int]) -> float:
    """Return the processor's seconds of processes so far."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(one[11]) + int(one[12]) for one in fields) / os.sysconf("SC_CLK_TCK")


def memory_of(pid: int) -> float:
    """Return the proportional set size of a process, MiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 2**10


if __name__ == "__main__":
    main(**parse_settings(sys.argv[1:], {"rounds": 3}))
