"""A process that loads images and is killed: one line, status 2, nothing left behind, in every script that has such."""

import os
import signal
import time
from pathlib import Path

import pytest
import stages
from torch.utils.data import Dataset

from jobs.guard import DeadWorkerError, with_resume_hint
from jobs.loader import build_loader, end_workers


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


def workers(pid):
    return [one for one, line in children(pid).items() if "spawn_main" in line]


def kill_a_worker(script, words, log, begun):
    """Run a script until ``begun()``, kill one of its two workers; return its pid, the status, and what stderr says."""
    command = [str(stages.ROOT / script), "dataset.name=cub", "num_workers=2", "num_threads=1", *words]
    with stages.Process(command, log, forked=False) as process:
        pid = process.process.pid
        assert process.wait_until(lambda: begun() and len(workers(pid)) == 2, 0.05), process.told()
        family, killed = list(children(pid)), workers(pid)[0]
        os.kill(killed, signal.SIGKILL)
        status = process.end()
    assert soon(lambda: not any(map(is_alive, family)))
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
    killed, status, error = kill_a_worker("train.py", words, tmp_path / "log", (folder / "config.json").exists)
    assert status == 2 and "Traceback" not in error, error
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert f"{killed})" in line and line.endswith(f"to go on: python train.py resume=true run_dir={folder}")


def test_masks_whose_worker_is_killed_say_how_to_go_on(birds_copy, tmp_path):
    folder = tmp_path / "masks"
    words = [f"dataset.root={birds_copy}", f"mask.folder={folder}", "mask.image_batch=1", "mask.store=none"]
    killed, status, error = kill_a_worker(
        "generate_mask.py",
        words,
        tmp_path / "log",
        lambda: list(folder.glob("unfinished/process_0/[0-9]*.safetensors")),
    )
    assert status == 2 and "Traceback" not in error, error
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert f"{killed})" in line and line.split("; to go on: ")[1].endswith(
        f"mask.folder={folder} mask.image_batch=1 mask.store=none"
    )
    assert not (folder / "masks_info.json").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP], ids=["SIGKILL", "SIGHUP"])
def test_a_stage_that_ends_leaves_no_worker(birds_copy, tmp_path, number):
    words = ["dataset.name=cub", f"dataset.root={birds_copy}", f"mask.folder={tmp_path / 'masks'}", "num_workers=2"]
    command = [str(stages.ROOT / "generate_mask.py"), *words, "mask.image_batch=1", "mask.store=none"]
    with stages.Process(command, tmp_path / "log", forked=False) as process:
        assert process.wait_until(lambda: list(tmp_path.glob("masks/unfinished/process_0/[0-9]*.safetensors")))
        family = list(children(process.process.pid))
        process.send(number, group=False)
        status = process.end()
    assert len(family) >= 2 and soon(lambda: not any(map(is_alive, family)))
    assert status == (-signal.SIGKILL if number == signal.SIGKILL else 128 + number)
    assert number == signal.SIGKILL or stages.last_line(process.told()).startswith("terminated; to go on: python ")


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


def test_workers_end_when_they_are_told_or_after_their_only_epoch():
    loaders = [build_loader(Numbers(), num_workers=1, pin_memory=False, persistent=p) for p in (True, False)]
    (first, *_), (other, *_) = ([int(pid) for pid in loader] for loader in loaders)
    assert first != other != os.getpid() and is_alive(first) and soon(lambda: not is_alive(other))
    assert int(next(iter(loaders[0]))) == first
    for loader in loaders:
        end_workers(loader)
    assert soon(lambda: not is_alive(first))
    assert int(next(iter(loaders[0]))) != first


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
