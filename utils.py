"""What every script needs: the user's error and the guard that reports it, whole-file writes, run folders, seeds."""

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import pickle
import platform
import random
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.torch
import torch


class UserError(Exception):
    """A fault that the user can mend. The message is one line: what was found, where, what to do."""

    def __init__(self, message: str) -> None:
        # a loader's worker hands its error over as a whole traceback with the message at its end
        super().__init__(message.rpartition("UserError: ")[2].strip())


# What torch.load, safetensors and the networks that take the result raise on files that are torn or something else.
UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError)
UNREADABLE += (AssertionError, safetensors.SafetensorError)
LONGEST_LINE = 600  # characters of an error: what was found may be a whole file, its two ends tell enough


class DiskError(UserError):
    """What was to be written could not be; what was finished before is whole."""


class DeadWorkerError(UserError):
    """A process that loads images died; what was finished before is whole."""

    def __init__(self, message: str, pids: Iterable[int]) -> None:
        """Keep the message and the pids of the processes that died."""
        super().__init__(message)
        self.pids = list(pids)


LONGEST_END = 60  # seconds of a process's own end after a worker died
# What torch says then: the pid and, where it is known, the signal.
DEAD_WORKER = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: [\w ]+|exited unexpectedly)"
)
SHARED_MEMORY = Path("/dev/shm")


class Terminated(BaseException):
    """SIGTERM arrived. Not an Exception, so that nothing but the guard catches it (as with KeyboardInterrupt)."""


def run_script(main: Callable[[dict], None], load_config: Callable[[list[str]], dict | None]) -> None:
    """Run a script from the command line: load its config, call ``main``, end with the right exit status.

    Status 2 with one line for anything the user can mend, 130 after Ctrl-C, 143 after SIGTERM. Where `going_on_with`
    was told a command, the line ends with it.

    Args:
        main: the script, given the resolved config.
        load_config: turns ``sys.argv[1:]`` into the config (None: help was printed); its ValueError is the user's.
    """
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a job in the background ignores it
        signal.signal(signal.SIGINT, _stop)
    try:
        with user_errors(ValueError):
            config = load_config(sys.argv[1:])
        if config is not None:
            main(config)
    except (UserError, OSError) as error:
        if isinstance(error, DeadWorkerError):
            _end_within(LONGEST_END, 2, error)
        _exit(f"error: {_one_line(error)}", error, 2)
    except KeyboardInterrupt as error:
        _exit("interrupted", error, 130)
    except Terminated as error:
        _exit("terminated", error, 143)


@contextlib.contextmanager
def going_on_with(command: Callable[[], str | None]) -> Iterator[None]:
    """Let what stops the with block from outside tell the command that goes on; None: there is none.

    That is an interruption, a full disk, or the death of a loader's worker.

    Of several blocks the outermost has the say: a sweep knows better than the training that it is at.
    """
    try:
        with _dead_workers():
            yield
    except (KeyboardInterrupt, Terminated, DiskError, DeadWorkerError) as error:
        error.command = command()
        raise


@contextlib.contextmanager
def _dead_workers() -> Iterator[None]:
    """Turn what torch says of a dead worker, from a signal handler and so at any point, into DeadWorkerError."""
    try:
        yield
    except RuntimeError as error:
        dead = DEAD_WORKER.search(str(error))
        if not dead:
            raise
        words = f"{dead[0].strip()}; if memory ran out (see dmesg) lower num_workers"
        raise DeadWorkerError(words, map(int, dead[1].split(","))) from None


def same_command(*words: str) -> str:
    """Return the command line of this process with ``words`` added, without those that start anew."""
    script, *given = sys.argv
    kept = [word for word in given if not word.endswith(".again=true")]
    start = ["torchrun", "...", script] if "WORLD_SIZE" in os.environ else ["python", script]
    return shlex.join([*start, *kept, *(word for word in words if word not in kept)])


@contextlib.contextmanager
def user_errors(kind: type[Exception] | tuple[type[Exception], ...], where: str = "") -> Iterator[None]:
    """Turn exceptions of one kind (or several), raised inside the with block, into UserError.

    ``where`` goes before the message.
    """
    try:
        yield
    except kind as error:
        raise UserError(f"{where}{error}") from error


def _stop(number: int, _frame: Any) -> None:
    """End the script in order; of a second signal it dies at once, which leaves no file half either."""
    signal.signal(number, signal.SIG_DFL)
    # torch takes loader workers that die of the same signal for a fault; Python wants a handler for a pending one
    signal.signal(signal.SIGCHLD, lambda *_: None)
    raise {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}[number]


def _end_within(seconds: int, status: int, error: DeadWorkerError) -> None:
    """Kill the other workers than the dead ones, and this process too if its end takes longer than ``seconds``.

    A worker that was killed may have held what another one, for whose end this process waits, waits for.
    """
    signal.signal(signal.SIGCHLD, lambda *_: None)  # torch would raise once more
    sys.last_value = error  # holds the loader to the end: freed before, its threads would be cut off as they clean up
    others = multiprocessing.active_children()
    for child in others:
        child.kill()
    for child in others:
        child.join(timeout=1)
    for pid in (*error.pids, *(child.pid for child in others)):
        for path in SHARED_MEMORY.glob(f"torch_{pid}_*"):  # a batch has this name while it is made, then none
            path.unlink(missing_ok=True)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(status))
    signal.alarm(seconds)


def _one_line(error: Exception) -> str:
    line = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        line = f"{error.strerror}: {error.filename or 'unknown file'}{_remedy(error)}"
    half = LONGEST_LINE // 2 - 4
    return line if len(line) <= LONGEST_LINE else f"{line[:half]} [...] {line[-half:]}"


def _exit(message: str, error: BaseException, status: int) -> None:
    command = getattr(error, "command", None)
    with contextlib.suppress(OSError):  # of a full disk or a reader that has gone
        sys.stdout.flush()
    print(f"{message}; to go on: {command}" if command else message, file=sys.stderr, flush=True)
    sys.exit(status)


# --- files, written whole or not at all ---------------------------------------------------------------------------

REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "what was finished before is kept; make room")
REMEDIES |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "name a folder that you may write to")
REMEDIES |= dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a file lies where a folder is needed; name another")
SCRATCH = re.compile(r"\..+\.\d+\.tmp(\.\w+)?")  # .NAME.PID.tmp.SUFFIX


def _remedy(error: OSError) -> str:
    return f"; {REMEDIES[error.errno]}" if error.errno in REMEDIES else ""


@contextlib.contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Turn system errors, raised while ``path`` is written, into a DiskError that names it and says what to do."""
    try:
        yield
    except OSError as error:
        gone = "; its folder was removed" if error.errno == errno.ENOENT else ""
        raise DiskError(f"{path}: {error.strerror or error}{gone or _remedy(error)}") from error


@contextlib.contextmanager
def whole_file(path: Path | str, *, new_folder: bool = True) -> Iterator[Path]:
    """Yield a scratch path in the folder of ``path``; on leaving without an error it takes the place of ``path``.

    Args:
        path: the file to write.
        new_folder: make its folder where there is none; false: that is an error, for a folder that was there before.

    Raises:
        DiskError: if it cannot be written; then ``path`` is as it was.
    """
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        with disk_errors(path):
            if new_folder:
                path.parent.mkdir(parents=True, exist_ok=True)
            with open(scratch, "wb") as held:
                with contextlib.suppress(OSError):  # a file system without locks: remove_scratch() is not safe there
                    fcntl.flock(held, fcntl.LOCK_EX)
                yield scratch
            with open(scratch, "rb") as file:
                os.fsync(file.fileno())
            os.replace(scratch, path)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def remove_scratch(folder: Path | str) -> None:
    """Remove what killed writers left in ``folder``; a living one holds its scratch file."""
    for path in Path(folder).glob(".*.tmp*"):
        if SCRATCH.fullmatch(path.name):
            with contextlib.suppress(OSError), open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def save_text(path: Path | str, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with whole_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def save_json(path: Path | str, value: Any) -> None:
    """Write JSON, whole or not at all; NaN and infinity are refused, since JSON has neither."""
    save_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_text(path: Path | str) -> str:
    """Return what a UTF-8 text file holds.

    Raises:
        UserError: if there is no such file or it is no text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, a file was expected") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file ({error.reason} at byte {error.start})") from None


def parse_json(text: str) -> Any:
    """Return what JSON holds; NaN passes, so that its reader can say where it stands.

    Raises:
        ValueError: if it is not JSON, an object has a key twice, or it is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deeply to be one of our files") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for number, key in enumerate(keys) if key in keys[:number])
        raise ValueError(f"the key {twice[:60]!r} stands twice in one object")
    return values


def load_json(path: Path | str) -> Any:
    """Return what a JSON file holds.

    Raises:
        UserError: if there is no such file or it is not JSON.
    """
    with user_errors(ValueError, f"{path}: not a whole JSON file, make it again: "):
        return parse_json(read_text(path))


def save_tensors(path: Path | str, value: Any) -> None:
    """Write a checkpoint (tensors in dicts, lists, plain values), whole or not at all, into a folder that exists.

    Raises:
        DiskError: if it cannot be written.
    """
    with whole_file(path, new_folder=False) as scratch, _system_error_of_torch(), open(scratch, "wb") as file:
        torch.save(value, file)  # to a path, its error on a full disk would tell no reason


@contextlib.contextmanager
def _system_error_of_torch() -> Iterator[None]:
    """Raise the system's error in place of torch's own about its archive, which came of it."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def load_tensors(path: Path | str) -> Any:
    """Return what a ``.pt``, ``.pth`` or ``.safetensors`` file holds, on the CPU; code in a pickle is never run.

    Raises:
        UserError: if there is no such file, it is torn, or it holds more than tensors and plain values.
    """
    try:
        if Path(path).suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings():  # torch warns of what is refused here in one line
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, a checkpoint file was expected") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: refused, it is no plain checkpoint: it is damaged or holds objects other than tensors and "
            "plain values (such a pickle can run code)"
        ) from None
    except PermissionError:
        raise UserError(f"{path}: may not be read; see its permissions") from None
    except UNREADABLE as error:
        raise UserError(
            f"{path}: torn or not a checkpoint ({(str(error) or type(error).__name__).splitlines()[0][:120]})"
        ) from None


# --- run folders --------------------------------------------------------------------------------------------------


def new_folder(parent: Path | str, stem: str) -> Path:
    """Create and return ``parent/stem_{i}``, i the first free number; safe when several processes ask at once."""
    number = 0
    while True:
        folder = Path(parent) / f"{stem}_{number}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


def lock_file(path: Path, how: int) -> IO | None:
    """Open and lock a file, made where there is none; None if ``how`` has LOCK_NB and another holds it.

    Args:
        path: the file; the lock ends when it is closed, at the latest with the process.
        how: of fcntl: LOCK_EX or LOCK_SH, with LOCK_NB so as not to wait.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = open(path, "a")  # noqa: SIM115 - the caller closes it
        except FileNotFoundError:  # its folder was removed since
            continue
        try:
            fcntl.flock(file, how)
        except BlockingIOError:
            file.close()
            return None
        if is_at(file.fileno(), path):
            return file
        file.close()  # its last holder removed it: locking a file without a name keeps nobody out


def is_at(file: int, path: Path) -> bool:
    """Tell whether an open file is still the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


@contextlib.contextmanager
def locked(folder: Path | str) -> Iterator[bool]:
    """Hold ``folder`` for this process; yield False if another process holds it. The lock ends with the process."""
    folder = Path(folder)
    file = lock_file(folder / ".lock", fcntl.LOCK_EX | fcntl.LOCK_NB)
    if file is None:
        yield False
        return
    with file:
        remove_scratch(folder)
        try:
            yield True
        finally:
            own = is_at(file.fileno(), folder / ".lock")  # the folder may have been removed
            if own and [path.name for path in folder.iterdir()] == [".lock"]:  # nothing came of it
                shutil.rmtree(folder)


def load_log(path: Path | str, numbers: Collection[str] = ()) -> list[dict]:
    """Return the objects of a ``log.jsonl``; no file means no epoch yet.

    Args:
        path: the file.
        numbers: keys under which every object holds a number.

    Raises:
        UserError: if a line is not such a JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        with user_errors(ValueError, f"{path}:{number}: not a JSON object, remove the line: "):
            record = parse_json(line)
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: not a JSON object; remove the line")
        lacking = next((key for key in numbers if not _is_finite(record.get(key))), None)
        if lacking is not None:
            raise UserError(f"{path}:{number}: has no number under {lacking!r}; remove the line")
        records.append(record)
    return records


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # an int may be too long for math.isfinite


def save_log(path: Path | str, records: list[dict]) -> None:
    """Write a ``log.jsonl``, whole or not at all (a run has a few hundred lines), into a folder that exists."""
    with whole_file(path, new_folder=False) as scratch:
        lines = (json.dumps(record, allow_nan=False) + "\n" for record in records)
        scratch.write_text("".join(lines), encoding="utf-8")


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
        "torch": torch.__version__,
    }


def pick_device(device: str | None) -> torch.device:
    """Return the device to train on; None: CUDA where there is one.

    Raises:
        UserError: if it is not to be had.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={device}: not to be had here ({str(error).splitlines()[0][:100]})") from None
    return chosen


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the time that the with block takes to ``seconds[name]``."""
    start = time.perf_counter()
    yield
    seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - start, 3)


# --- randomness ---------------------------------------------------------------------------------------------------


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed Python, NumPy and torch; ``deterministic`` makes torch refuse what it cannot repeat."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by torch's own error message
    torch.use_deterministic_algorithms(deterministic)


@contextlib.contextmanager
def torch_seed(seed: int) -> Iterator[None]:
    """Let torch's CPU generator start from ``seed`` inside the with block and go on as before after it."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield
