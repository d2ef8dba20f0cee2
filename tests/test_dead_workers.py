"""A process that loads images and is killed: one line, status 2, nothing left behind, in every script that has such."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import small_runs
import stages
from torch.utils.data import Dataset

from jobs.guard import DeadWorkerError, with_resume_hint
from jobs.loader import build_loader, end_workers
from masks.image_batches import as_it_is


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


def family(pid):
    """Return the server and the workers of a process, and what else it has started."""
    found = children(pid)
    return found | {grandchild: line for child in found for grandchild, line in children(child).items()}


def server(pid):
    return next((one for one, line in children(pid).items() if "forkserver" in line), None)


def workers(pid):
    return list(children(server(pid)))


def kill_one(script, words, log, begun, victim=lambda pid: workers(pid)[0]):
    """Run a script until ``begun()``, kill a worker (or ``victim``); return its pid, the status, what stderr says."""
    command = [str(stages.ROOT / script), "dataset.name=cub", "num_workers=2", "num_threads=1", *words]
    with stages.Process(command, log, forked=False) as process:
        pid = process.process.pid
        assert process.wait_until(lambda: begun() and len(workers(pid)) == 2, 0.05), process.told()
        relatives, killed = family(pid), victim(pid)
        os.kill(killed, signal.SIGKILL)
        status = process.end()
    assert soon(lambda: not any(map(is_alive, relatives)))
    return killed, status, process.told()


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
    killed, status, error = kill_one("train.py", words, tmp_path / "log", (folder / "config.json").exists)
    assert status == 2 and "Traceback" not in error, error
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert f"{killed})" in line and line.endswith(f"to go on: python train.py resume=true run_dir={folder}")


@pytest.mark.parametrize("victim", [lambda pid: workers(pid)[0], server], ids=["worker", "server"])
def test_masks_whose_worker_is_killed_say_how_to_go_on(birds_copy, tmp_path, victim):
    folder = tmp_path / "masks"
    words = [f"dataset.root={birds_copy}", f"mask.folder={folder}", "mask.image_batch=1", "mask.store=none"]
    begun = partial(finished_masks, folder)
    killed, status, error = kill_one("generate_mask.py", words, tmp_path / "log", begun, victim)
    assert status == 2 and "Traceback" not in error, error
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert victim is server or f"{killed})" in line
    assert line.split("; to go on: ")[1].endswith(f"mask.folder={folder} mask.image_batch=1 mask.store=none")
    assert not (folder / "masks_info.json").exists()


def finished_masks(folder):
    """Return the finished batches of masks, none at the start."""
    return list(folder.glob("unfinished/process_0/[0-9]*.safetensors"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP], ids=["SIGKILL", "SIGHUP"])
@pytest.mark.parametrize("at_work", [True, False], ids=["at work", "while the server imports"])
def test_a_stage_that_ends_leaves_no_worker_and_no_server(birds_copy, tmp_path, number, at_work):
    folder = tmp_path / "masks"
    words = ["dataset.name=cub", f"dataset.root={birds_copy}", f"mask.folder={folder}", "num_workers=2"]
    command = [str(stages.ROOT / "generate_mask.py"), *words, "mask.image_batch=1", "mask.store=none"]
    with stages.Process(command, tmp_path / "log", forked=False) as process:
        pid = process.process.pid
        assert process.wait_until(lambda: server(pid) and (not at_work or finished_masks(folder)))
        relatives = family(pid)
        assert len(workers(pid)) == (2 if at_work else 0)
        process.send(number, group=False)
        status = process.end()
    assert soon(lambda: not any(map(is_alive, relatives)))
    assert status == (-signal.SIGKILL if number == signal.SIGKILL else 128 + number)
    assert number == signal.SIGKILL or stages.last_line(process.told()).startswith("terminated")
    assert number == signal.SIGKILL or not at_work or "; to go on: python " in stages.last_line(process.told())


class NotAnError(Dataset):
    """Fails as any code may."""

    def __len__(self):
        return 1

    def __getitem__(self, number):
        raise RuntimeError("shapes differ")


def test_another_error_is_not_taken_for_a_dead_worker():
    loader = build_loader(NotAnError(), num_workers=1, pin_memory=False, batch_size=1)
    with pytest.raises(RuntimeError, match="shapes differ"), with_resume_hint(lambda: "start again"):
        list(loader)


class Numbers(Dataset):
    """Gives the pid of the process that loads."""

    def __len__(self):
        return 2

    def __getitem__(self, number):
        return os.getpid()


def test_workers_stay_until_they_are_told_to_end_or_their_loader_goes():
    loaders = [build_loader(Numbers(), num_workers=1, pin_memory=False) for _ in range(2)]
    (first, *_), (other, *_) = ([int(pid) for pid in loader] for loader in loaders)
    assert first != other != os.getpid() and is_alive(first) and is_alive(other)
    assert int(next(iter(loaders[0]))) == first
    end_workers(loaders[0])
    del loaders[1]
    assert soon(lambda: not is_alive(first) and not is_alive(other))
    assert int(next(iter(loaders[0]))) != first


def test_a_training_ends_its_workers_though_a_figure_keeps_the_frames_that_drew_it(birds, tmp_path, monkeypatch):
    kept, before = [], set(multiprocessing.active_children())
    monkeypatch.setattr("training.loop.draw_curves", lambda *_: kept.append(sys._getframe()))
    small_runs.run(birds, tmp_path / "run", "num_epochs=1", "num_workers=1")
    assert kept and before.issuperset(multiprocessing.active_children())


class Dies(Dataset):
    """Kills the process that loads."""

    def __len__(self):
        return 2

    def __getitem__(self, number):
        os.kill(os.getpid(), signal.SIGKILL)


def test_of_two_blocks_the_outer_one_names_the_command_after_a_dead_worker():
    loader = build_loader(Dies(), num_workers=1, pin_memory=False, batch_size=1)
    with pytest.raises(DeadWorkerError) as error, with_resume_hint(lambda: "outer"), with_resume_hint(lambda: "inner"):
        list(loader)
    assert error.value.command == "outer"


COUNTED = """
import os
from torch.utils.data import Dataset

IMPORTED_BY = os.getpid()

class Counted(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, number):
        return IMPORTED_BY, os.getppid(), os.getpid()
"""
SCRIPT = """
import sys
from counted import Counted
from jobs.loader import build_loader

if __name__ == "__main__":
    print(*next(iter(build_loader(Counted(), num_workers=1, pin_memory=False, batch_size=None))))
"""


def test_workers_are_forks_of_a_server_that_has_imported_their_data_set_wherever_the_script_runs(tmp_path):
    for name, code in (("scripts/counted.py", COUNTED), ("scripts/start.py", SCRIPT), ("work/random.py", "1 / 0")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code)
    command, env = [sys.executable, str(tmp_path / "scripts" / "start.py")], os.environ | {"PYTHONPATH": stages.ROOT}
    done = subprocess.run(command, cwd=tmp_path / "work", env=env, capture_output=True, text=True, timeout=300)
    assert done.stderr == ""
    imported_by, parent, worker = done.stdout.split()
    assert imported_by == parent != worker


class Large(Dataset):
    """Gives more than a pipe holds, without shared memory, and tells when it does."""

    def __init__(self, told):
        self.told = told

    def __len__(self):
        return 2

    def __getitem__(self, number):
        self.told.write_text(str(os.getpid()))
        return np.zeros(10_000_000, dtype=np.uint8)


def test_a_worker_that_is_killed_while_half_its_batch_is_read_leaves_no_hang(tmp_path):
    loader = build_loader(
        Large(tmp_path / "pid"), num_workers=1, pin_memory=False, batch_size=None, collate_fn=as_it_is
    )
    batches = iter(loader)
    assert soon((tmp_path / "pid").exists)
    time.sleep(1.0)  # it has filled the pipe
    pid = int((tmp_path / "pid").read_text())
    os.kill(pid, signal.SIGSTOP)
    subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {pid}"])
    start = time.monotonic()
    with pytest.raises(DeadWorkerError, match=f"{pid}\\)"), with_resume_hint(lambda: "start again"):
        list(batches)
    assert time.monotonic() - start < 30
