"""A process that loads images and is killed: one line, status 2, nothing left behind, in every script that has such."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.guard import DeadWorkerError, going_on_with
from jobs.loader import Loader

ROOT = Path(__file__).parent.parent
SHARED_MEMORY = Path("/dev/shm")


def children(pid):
    """Return the living processes that a process has started: pid -> command line."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found[int(path.name)] = (path / "cmdline").read_text()
        except (OSError, ValueError):  # it has ended meanwhile
            continue
    return found


def workers(process):
    return [pid for pid, line in children(process.pid).items() if "spawn_main" in line]


def wait_until(process, condition):
    """Wait for a process's state; fail with its words if it ends before."""
    until = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < until, process.communicate(timeout=5)
        time.sleep(0.02)


def kill_a_worker(script, words, begun):
    """Run a script until ``begun()``, kill one of its two workers; return its pid, the status, and what stderr says."""
    before = set(SHARED_MEMORY.iterdir())
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), "dataset.name=cub", "num_workers=2", "num_threads=1", *words],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        wait_until(process, lambda: begun() and len(workers(process)) == 2)
        family = list(children(process.pid))
        killed = workers(process)[0]
        os.kill(killed, signal.SIGKILL)
        _, error = process.communicate(timeout=300)
    finally:
        process.kill()
    assert soon(lambda: not any(map(is_alive, family))) and soon(lambda: set(SHARED_MEMORY.iterdir()) <= before)
    return killed, process.returncode, error


def soon(reached):
    """Wait for something that happens within a minute; return whether it did."""
    until = time.monotonic() + 60
    while not reached() and time.monotonic() < until:
        time.sleep(0.05)
    return reached()


def is_alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_training_whose_worker_is_killed_ends_with_the_command_that_goes_on(birds, tmp_path):
    folder = tmp_path / "run"
    small = ["num_epochs=9999", "image_size=32", "batch_size=8", "log_interval=9999", "save=false"]
    words = [f"dataset.root={birds}", f"run_dir={folder}", *small, "cache=disk"]
    killed, status, error = kill_a_worker("train.py", words, (folder / "config.json").exists)
    assert status == 2 and "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert f"{killed})" in line and line.endswith(f"to go on: python train.py resume=true run_dir={folder}")


def test_masks_whose_worker_is_killed_say_how_to_go_on(birds_copy, tmp_path):
    folder = tmp_path / "masks"
    records = folder / "unfinished" / "process_0" / "units.records"
    words = [f"dataset.root={birds_copy}", f"mask.folder={folder}", "mask.image_batch=1", "mask.store=none"]
    killed, status, error = kill_a_worker("generate_mask.py", words, records.exists)
    assert status == 2 and "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert f"{killed})" in line and line.split("; to go on: ")[1].endswith(
        f"mask.folder={folder} mask.image_batch=1 mask.store=none"
    )
    assert records.exists() and not (folder / "masks_info.json").exists()


BAD_WORKERS = """
import os, pathlib, re, signal, sys, time
import torch
from torch.utils.data import Dataset
from jobs.loader import build_loader
from jobs.guard import going_on_with, run_script

def leave_half_a_batch():  # as a worker does that is killed before it takes the name from the memory of a batch
    batch = torch.zeros(3).share_memory_()
    maps = pathlib.Path("/proc/self/maps").read_text()
    name = re.search(f"/dev/shm/torch_{os.getpid()}_.*(?= [(]deleted[)])", maps)[0]
    pathlib.Path(name).write_bytes(bytes(12))

class BadWorkers(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, number):
        if number == 2:  # the other worker, at its first image
            leave_half_a_batch()
            WHAT_THE_OTHER_DOES
        if number == 3:
            leave_half_a_batch()
            frame = sys._getframe()
            while "done_event" not in frame.f_locals:
                frame = frame.f_back
            if hasattr(frame.f_locals["done_event"], "_cond"):  # torch's shutdown of the workers needs this lock
                frame.f_locals["done_event"]._cond.acquire()
            os.kill(os.getpid(), signal.SIGKILL)
        return number

def main(_config):
    with going_on_with(lambda: "start again"):
        list(build_loader(BadWorkers(), num_workers=2, pin_memory=False, batch_size=1))

if __name__ == "__main__":
    run_script(main, lambda _words: {})
"""


@pytest.mark.parametrize("other", ["pass", "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)"])
def test_the_end_waits_neither_for_a_lock_of_the_dead_worker_nor_for_one_that_does_not_end(other, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(BAD_WORKERS.replace("WHAT_THE_OTHER_DOES", other))
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    before = set(SHARED_MEMORY.iterdir())
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: DataLoader worker (pid") and line.endswith("; to go on: start again")
    assert soon(lambda: set(SHARED_MEMORY.iterdir()) <= before)


class BrokenConnection:
    """A data set that fails as a loader does when its connection to a worker breaks."""

    def __len__(self):
        return 2

    def __getitem__(self, _):
        raise ConnectionResetError(104, "Connection reset by peer")


def test_a_broken_connection_without_a_dead_worker_stays_what_it_is():
    with pytest.raises(ConnectionResetError):
        list(Loader(BrokenConnection()))


@pytest.mark.parametrize(
    "words",
    [
        "DataLoader worker (pid 17) is killed by signal: Killed. ",
        "DataLoader worker (pid(s) 17, 18) exited unexpectedly",
        "DataLoader worker (pid 17) exited unexpectedly with exit code 1. Details are lost due to multiprocessing.",
        "DataLoader worker (pid 17) is killed by signal: Bus error. It is possible that workers are out of memory",
    ],
)
def test_what_torch_says_of_a_dead_worker_becomes_one_line_with_the_remedy(words):
    with pytest.raises(DeadWorkerError) as error, going_on_with(lambda: "start again"):
        raise RuntimeError(words)
    assert re.fullmatch(r"DataLoader worker \(.*17.*\) [\w :]+; .*num_workers", str(error.value))
    assert error.value.command == "start again"


def test_of_two_blocks_the_outer_one_names_the_command_after_a_dead_worker():
    with pytest.raises(DeadWorkerError) as error, going_on_with(lambda: "outer"), going_on_with(lambda: "inner"):
        raise RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed. ")
    assert error.value.command == "outer"


def test_another_error_is_not_taken_for_a_dead_worker():
    with pytest.raises(RuntimeError, match="shapes differ"), going_on_with(lambda: "start again"):
        raise RuntimeError("shapes differ")
