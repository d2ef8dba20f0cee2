"""What every script needs: checkpoints, run folders and their locks, logs, devices, seeds."""

import contextlib
import fcntl
import hashlib
import itertools
import os
import pickle
import platform
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.torch
import torch

from localized_crops.files import UserError, first_line, no_empty_folder, refuse_special, remove_scratch, whole_file

# What torch.load, safetensors and the networks that take the result raise on files that are torn or something else.
UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError)
UNREADABLE += (AssertionError, safetensors.SafetensorError)
NO_MEMORY = "can't allocate memory|ALLOC_FAILED"  # of torch's errors on a CPU and of CUDA's libraries
MOST_TRIES = 1000  # to lock a file whose folder others remove meanwhile


# --- files, written whole or not at all ---------------------------------------------------------------------------


def save_tensors(path: Path | str, value: Any) -> None:
    """Write a checkpoint (tensors in dicts, lists, plain values), whole or not at all, into a folder that exists."""
    with whole_file(path, new_folder=False) as scratch, open(scratch, "wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:
            # a full disk or a signal says, as torch's error about its archive does not, why
            if isinstance(error.__context__, (OSError, UserError)) or not isinstance(
                error.__context__, Exception | None
            ):
                raise error.__context__ from None
            raise


def load_tensors(path: Path | str) -> Any:
    """Return what a ``.pt``, ``.pth`` or ``.safetensors`` file holds, on the CPU; code in a pickle is never run.

    Raises UserError if there is no such file, it is torn, or it holds more than tensors and plain values.
    """
    refuse_special(path)
    try:
        if Path(path).suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings():  # torch warns of what is refused here in one line
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: refused, it is no plain checkpoint: it is damaged or holds objects other than tensors and "
            "plain values (such a pickle can run code)"
        ) from None
    except UNREADABLE as error:
        raise UserError(f"{path}: torn or not a checkpoint ({first_line(error)})") from None


def file_sha256(path: Path | str) -> str:
    """Return the sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_stats(paths: Iterable[Path | str | bytes]) -> np.ndarray:
    """Return size and times of change of files, (N, 3) int64: bytes, and nanoseconds of content and of anything.

    Unlike the time of the last writing, the time of the last change cannot be set back by a program. -1: no such file.
    """

    def stats(part: tuple[Path | str | bytes, ...]) -> list[tuple[int, int, int]]:
        rows = []
        for path in part:
            try:
                stat = os.stat(path)
                rows.append((stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
            except OSError:  # it is reported when it is read
                rows.append((-1, -1, -1))
        return rows

    with ThreadPoolExecutor(16) as pool:  # on a network's file system the time goes to waiting
        parts = pool.map(stats, batched(paths, 4096))
        return np.array([row for part in parts for row in part], dtype=np.int64).reshape(-1, 3)


def batched(values: Iterable[Any], size: int) -> Iterator[tuple[Any, ...]]:
    """Yield the values in tuples of ``size``, the last one shorter (itertools.batched of Python 3.12)."""
    left = iter(values)
    while part := tuple(itertools.islice(left, size)):
        yield part


# --- run folders --------------------------------------------------------------------------------------------------


class FolderInUseError(UserError):
    """Another process works in this folder."""


def new_folder(parent: Path | str, stem: str) -> Path:
    """Create and return ``parent/stem_{i}``, i the first free number; safe when several processes ask at once."""
    for number in itertools.count():
        folder = Path(parent) / f"{stem}_{number}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


def lock_file(path: Path, *, wait: bool = True) -> IO | None:
    """Open and lock a file, made where there is none; None if another process holds it and it is not to ``wait``.

    The lock ends when the file is closed, at the latest with the process.
    """
    refuse_special(path)
    for _ in range(MOST_TRIES):
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # its folder was removed since, or, as /proc, takes no files
            file = open(path, "a")  # noqa: SIM115 - the caller closes it
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                return None
            if is_at(file.fileno(), path):
                return file
            file.close()  # its last holder removed it: locking a file without a name keeps nobody out
    raise UserError(f"{path}: cannot be made, or other processes remove it again and again; give another folder")


def is_at(file: int, path: Path) -> bool:
    """Tell whether an open file is still the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


@contextlib.contextmanager
def locked(folder: Path | str, key: str, *, is_new: bool = False) -> Iterator[None]:
    """Hold ``folder``, the setting ``key``, for this process; FolderInUseError if another process holds it.

    The folder is made where there is none, and removed again if nothing came of it; ``is_new``: it was just made. The
    lock ends with the process.
    """
    folder = Path(folder)
    with no_empty_folder(folder, is_new=is_new):
        file = lock_file(folder / ".lock", wait=False)
        if file is None:
            raise FolderInUseError(f"{folder}: another process works there; wait for it, or give another {key}")
        with file:
            remove_scratch(folder)
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # it shall not hide the error that ended the block
                    is_ours = is_at(file.fileno(), folder / ".lock")  # the folder may have been removed
                    if is_ours and [path.name for path in folder.iterdir()] == [".lock"]:
                        (folder / ".lock").unlink()


def markdown_table(heads: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    above, *below = (f"| {' | '.join(map(str, cells))} |" for cells in (heads, *rows))
    return "\n".join([above, "|---" * len(heads) + "|", *below])


def cpu_name() -> str:
    """Return the CPU's name where the system gives one."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def environment() -> dict[str, Any]:
    """Return what a result was made with: host, processor, versions."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "host": platform.node(),
        "processor": f"{cpu_name()}, {os.cpu_count()} cores",
        "gpu": cuda,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a subclass of str, which a plain checkpoint may not hold
    }


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context for forward passes in ``precision``, bf16 or fp16; off for others and on a CPU."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None and device.type == "cuda")


@contextlib.contextmanager
def memory_errors(what: str, remedy: str) -> Iterator[None]:
    """Turn an error of memory that ran out into a UserError.

    Args:
        what: the with block works on, with the size of the batch and of its images.
        remedy: what takes less.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or re.search(NO_MEMORY, str(error)):
            raise UserError(f"{what}: memory ran out; {remedy}") from None
        raise


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the time that the with block takes to ``seconds[name]``."""
    start = time.perf_counter()
    yield
    seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - start, 3)


@contextlib.contextmanager
def torch_seed(seed: int) -> Iterator[None]:
    """Let torch's CPU generator start from ``seed`` inside the with block and go on as before after it."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield
