"""The stages as processes that tests kill, stop, starve of disk space and start twice; and what they leave on disk."""

import contextlib
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from datasets import read_dataset
from jobs.shared_work import load_result
from localized_crops import map_file
from localized_crops.files import SCRATCH, load_json
from localized_crops.map_file import MapCache
from training.log import load_log
from utils import load_tensors

ROOT = Path(__file__).parent.parent
LIMIT = 300  # seconds: a process that takes longer hangs
# What differs between two runs that did the same: clocks, places, and how a run was begun.
FREE = {"seconds", "environment", "images_mapped", "maps_per_second", "images_per_second", "run_dir", "out", "folder"}
FREE |= {"resume", "training_seconds_of_logged_epochs", "cache_folder", "num_workers"}


@dataclass(frozen=True)
class Stage:
    """One stage on small data."""

    script: str
    words: list[str]
    place: str  # the key that says where it writes
    name: str = ""  # of the file or folder there, in the folder of the test; nothing: that folder
    more: Callable[[Path], list[str]] = lambda folder: []  # further words that name the folder

    def command(self, folder: Path, *more: str) -> list[str]:
        """Return the command line that writes to ``folder``, or goes on there."""
        where = f"{self.place}={folder / self.name}"
        resume = ["resume=true"] if self.script == "train.py" and (folder / "config.json").exists() else []
        return [str(ROOT / self.script), *self.words, where, *self.more(folder), *resume, *more]


def train_stage(root: Path, *more: str) -> Stage:
    """Return a short training."""
    small = ["num_epochs=4", "log_interval=1", "image_size=32", "batch_size=8", "opt.warmup_epochs=1"]
    kept = ["augment=true", "model.ema_step=3", "opt.scheduler=step", "opt.step_size=2"]  # what going on could lose
    return Stage("train.py", [*_common(root), *small, *kept, "num_workers=0", *more], "run_dir")


def cache_stage(root: Path) -> Stage:
    """Return a training of one epoch that first builds the cache of decoded images."""
    stage = train_stage(root, "num_epochs=1", "cache=disk")
    return Stage(stage.script, stage.words, "run_dir", more=lambda folder: [f"cache_folder={folder / 'cache'}"])


def sweep_stage(root: Path) -> Stage:
    """Return a local sweep over three short trainings."""
    stage = train_stage(root, "num_epochs=2", "sweeprun=true", "sweep.values=-1,0.5,1")
    return Stage(stage.script, stage.words, "run_dir")


def mask_stage(root: Path) -> Stage:
    """Return classical segments, an image a batch."""
    return Stage("generate_mask.py", [*_common(root), "num_workers=0", "mask.image_batch=1"], "mask.folder", "masks_0")


def bbox_stage(root: Path, masks: Path, classifier: Path) -> Stage:
    """Return the choice among candidates, an image or two a unit."""
    words = [*_common(root), "num_workers=0", f"masks={masks}", f"bbox.classifier={classifier}", "bbox.batch_size=1"]
    return Stage("generate_bbox.py", words, "out", "boxes.json")


def dino_stage(root: Path) -> Stage:
    """Return maps and boxes by the built-in localizer, an image a batch."""
    words = [*_common(root), "num_workers=0", "dino.batch_size=1", f"dino.weights={ROOT / 'toybirds/toy_localizer.pt'}"]
    return Stage("generate_dino_boxes.py", words, "out", "boxes.json")


def _common(root: Path) -> list[str]:
    return ["dataset.name=cub", f"dataset.root={root}", "num_threads=1"]


# --- processes ----------------------------------------------------------------------------------------------------


# A server that has imported the scripts once forks a process per stage: starting Python takes longer than their work.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "generate_mask", "generate_bbox", "generate_dino_boxes", "visualize"])


def fork(target: Callable, *arguments: Any) -> multiprocessing.Process:
    """Call a function of a module in a process of its own."""
    process = FORKS.Process(target=target, args=arguments)
    with pytest.MonkeyPatch.context() as patch:  # of the server, which the first process starts
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        patch.setenv("OMP_NUM_THREADS", "1")
        process.start()
    return process


class Python(subprocess.Popen):
    """A process of Python with the names that multiprocessing gives to the same."""

    @property
    def exitcode(self) -> int | None:
        """The status, negative for a signal; None: it runs."""
        return self.poll()

    def join(self, timeout: float) -> None:
        """Wait for its end, no longer than told."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout)


def lead_group() -> None:
    """Begin a process group, with the signals that shells let background jobs and nohup ignore."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGHUP})  # a loader's server blocks them
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Process:
    """A script that runs in a process group of its own, so that a signal to the group reaches its workers too."""

    def __init__(
        self, words: list[str], log: Path, file_limit: int | None = None, *, forked: bool = True, **env: str
    ) -> None:
        """Start it; what it prints goes to ``log``.out and ``log``.err, so that a kill loses nothing.

        Args:
            words: the script and what follows it on the command line.
            log: a path without a suffix.
            file_limit: let every write beyond so many bytes of a file fail, as on a full disk.
            forked: false: start Python anew, where it is the point how loader processes and what they share end.
            **env: further environment variables.
        """
        self.paths = log.with_suffix(".out"), log.with_suffix(".err")
        for path in self.paths:
            path.write_text("")
        env = os.environ | env
        if forked:
            self.process = fork(run_as_script, words, self.paths, file_limit, env, os.getcwd())
        else:
            with open(self.paths[0], "a") as out, open(self.paths[1], "a") as err:
                self.process = Python([sys.executable, *words], stdout=out, stderr=err, env=env, preexec_fn=lead_group)
        while self.running and os.getpgid(self.process.pid) != self.process.pid:
            time.sleep(0.001)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.exitcode is None

    def printed(self) -> str:
        """Return its standard output so far."""
        return self.paths[0].read_text()

    def told(self) -> str:
        """Return its standard error so far."""
        return self.paths[1].read_text()

    def send(self, number: int, *, group: bool) -> None:
        """Send a signal to the process or to its whole group."""
        if self.running:
            (os.killpg if group else os.kill)(self.process.pid, number)

    def end(self) -> int:
        """Wait for its end; return the status, negative for a signal."""
        self.process.join(LIMIT)
        assert not self.running, f"it hangs: {self.printed()}{self.told()}"
        return self.process.exitcode

    def kill(self) -> None:
        """Kill the whole group, if it still runs."""
        self.send(signal.SIGKILL, group=True)
        self.end()

    def wait_until(self, reached: Callable[[], Any], pause: float = 0.002) -> bool:
        """Wait for something, looked for every ``pause`` seconds; return False if the process ended before."""
        stop = time.monotonic() + LIMIT
        while self.running:
            if reached():
                return True
            assert time.monotonic() < stop, f"not reached: {self.printed()}{self.told()}"
            time.sleep(pause)
        return False


def run_as_script(words: list[str], paths: tuple[Path, Path], file_limit: int | None, env: dict, cwd: str) -> None:
    """Run a script in this process, which was forked for it, as Python would run it from a command line."""
    for number, path in enumerate(paths, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ |= env
    os.chdir(cwd)
    sys.argv = list(words)
    if file_limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    lead_group()
    runpy.run_path(words[0], run_name="__main__")


def started(stage: Stage, folder: Path, log: Path, *more: str, **options: Any) -> Process:
    """Start a stage; as a context it leaves nothing of it running."""
    return Process(stage.command(folder, *more), log, **options)


def finish(stage: Stage, folder: Path, log: Path, *more: str, **options: Any) -> str:
    """Run a stage to its end, which must be good; return what it printed."""
    with started(stage, folder, log, *more, **options) as process:
        assert process.end() == 0, process.told()
        return process.printed()


# --- what lies on disk --------------------------------------------------------------------------------------------


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of change of all files, scratch files too, but no locks: another state is progress."""
    found = {}
    for path in folder.rglob("*"):
        try:
            if path.is_file() and not path.name.endswith((".lock", ".used")):
                found[str(path)] = (path.stat().st_size, path.stat().st_mtime_ns)
        except FileNotFoundError:  # it went meanwhile
            continue
    return found


def scratch_files(folder: Path) -> list[str]:
    """Return the scratch files that are left."""
    return [path.name for path in folder.rglob(".*") if SCRATCH.fullmatch(path.name)]


def visible_files(folder: Path) -> list[Path]:
    """Return all files under their final names."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def check_whole(folder: Path) -> None:
    """Check that every file under its final name can be read to its end."""
    for path in visible_files(folder):
        if path.suffix == ".json":
            load_json(path)
        elif path.suffix == ".jsonl":
            load_log(path)
        elif path.suffix == ".pt":
            load_tensors(path)
        elif path.suffix == ".png":
            PIL.Image.open(path).load()
        elif path.suffix == ".safetensors":
            (MapCache.open if path.name.endswith(map_file.SUFFIX) else load_result)(path)


def contents(folder: Path) -> dict[str, Any]:
    """Return what all files of finished work hold, by name, without clocks and places."""
    return {str(path.relative_to(folder)): _content(path, folder) for path in visible_files(folder)}


def _content(path: Path, folder: Path) -> Any:
    if path.suffix == ".json":
        value = load_json(path)
    elif path.suffix == ".jsonl":
        value = load_log(path)
    elif path.suffix == ".pt":
        value = load_tensors(path)
    else:
        return path.read_bytes()
    return _plain(value, str(folder))


def _plain(value: Any, folder: str) -> Any:
    """Return a value that == compares: tensors as bytes, without what is free to differ."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), list(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: _plain(one, folder) for key, one in value.items() if key not in FREE}
    if isinstance(value, list | tuple):
        return [_plain(one, folder) for one in value]
    return value.replace(folder, "") if isinstance(value, str) else value


def assert_same(one: Path, other: Path) -> None:
    """Check that two finished stages left the same, bit for bit; curves show the names of their folders."""
    a, b = contents(one), contents(other)
    assert list(a) == list(b)
    assert [name for name in a if a[name] != b[name]] == []


def units_done(folder: Path) -> int:
    """Return how many images of a generator that was broken off need not be done again."""
    counts = {"images": len, "scores": len, "ids": len}
    found = [load_result(path).about for path in folder.glob("**/process_*/[0-9]*.safetensors")]
    failed = sum(len(about["errors"]) for about in found if "ids" not in about)
    return failed + sum(counts[key](about[key]) for about in found for key in counts if key in about)


def image_count(root: Path) -> int:
    """Return how many images a data set has."""
    return len(read_dataset("cub", root).ids)


def last_line(text: str) -> str:
    """Return the last line of a text, the one that tells what happened."""
    return (text.strip().splitlines() or [""])[-1]
