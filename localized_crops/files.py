"""Files written whole or not at all, and the one-line errors of what is read."""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import stat
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A fault that the user can mend. The message is one line: what is wrong, where, what to do."""

    def __init__(self, message: str) -> None:
        # a loader's worker hands its error over as a whole traceback with the message at its end
        super().__init__(message.rpartition("UserError: ")[2].strip())


class DiskError(UserError):
    """What was to be written could not be; what was finished before is whole."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, at most 160 characters of it, or its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


@contextlib.contextmanager
def user_errors(kind: type[Exception] | tuple[type[Exception], ...], where: str = "") -> Iterator[None]:
    """Turn exceptions of one kind (or several), raised inside the with block, into UserError.

    ``where`` goes before the message.
    """
    try:
        yield
    except kind as error:
        raise UserError(f"{where}{error}") from error


# error number of the system -> what to do about a file that cannot be written
REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "what was finished before is kept; make room")
REMEDIES |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "name a folder that you may write to")
REMEDIES |= dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a file lies where a folder is needed; name another")
SCRATCH = re.compile(r"\..+\.\d+\.tmp(\.\w+)?")  # .NAME.PID.tmp.SUFFIX
HEAD_BYTES = 2**20  # of a file that are read to recognise what wrote it


@contextlib.contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Turn system errors, raised while ``path`` is written, into a DiskError that names it and says what to do."""
    try:
        yield
    except OSError as error:
        more = "its folder was removed" if error.errno == errno.ENOENT else REMEDIES.get(error.errno, "")
        raise DiskError(f"{path}: {error.strerror or error}{'; ' * bool(more)}{more}") from error


@contextlib.contextmanager
def whole_file(path: Path | str, *, new_folder: bool = True) -> Iterator[Path]:
    """Yield a scratch path in the folder of ``path``; on leaving without an error it takes the place of ``path``.

    With ``new_folder`` a missing folder is made, else it is an error. Raises DiskError if the file cannot be written;
    then ``path`` is as it was.
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


@contextlib.contextmanager
def scratch_folder(path: Path | str) -> Iterator[Path]:
    """Yield an empty folder beside ``path``, to be filled and renamed to it; if it is not renamed, it is removed.

    Scratch folders that killed processes left there are removed first.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_scratch(path.parent)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    scratch.mkdir()  # not by tempfile, whose folders (mode 0700) lock colleagues out
    held = os.open(scratch, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(held, fcntl.LOCK_EX)
        yield scratch
    finally:
        os.close(held)
        shutil.rmtree(scratch, ignore_errors=True)


def remove_scratch(folder: Path | str) -> None:
    """Remove scratch files and folders that killed processes left in ``folder``; running ones lock theirs."""
    for path in Path(folder).glob(".*.tmp*"):
        if SCRATCH.fullmatch(path.name):
            with contextlib.suppress(OSError):
                file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                finally:
                    os.close(file)


@contextlib.contextmanager
def no_empty_folder(folder: Path | str, *, is_new: bool = False) -> Iterator[None]:
    """Make a folder; on leaving, remove it and the parents that were made with it, as far as they are empty.

    A folder that was there already stays, unless ``is_new``: it was made just before, for what the with block does.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()] or [folder] * is_new
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def check_output(path: Path | str, ours: bytes | None = None) -> None:
    """Make sure that a file can be written later, and that it will replace nothing but a file of this program.

    Args:
        path: the file.
        ours: regular expression that matches the beginning of a file that may be replaced; None: no file may be.

    Raises:
        UserError: if something else lies there, or it cannot be written.
    """
    path = Path(path)
    refuse_special(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder, a file is to be written there; give another name")
    if path.exists():
        with open(path, "rb") as file:
            if ours is None or not re.search(ours, file.read(HEAD_BYTES)):
                raise UserError(f"{path}: was not made by this script, which would replace it; move it away")
    with disk_errors(path), no_empty_folder(path.parent):
        scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        scratch.touch()
        scratch.unlink()


def refuse_special(path: Path | str) -> None:
    """Raise UserError if a pipe, socket or device lies at ``path``: reading it, or opening it, might never end."""
    with contextlib.suppress(OSError, ValueError):  # what cannot be looked at fails when it is opened
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UserError(f"{path}: is a pipe, socket or device, a file was expected")


def save_text(path: Path | str, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with whole_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def save_json(path: Path | str, value: Any) -> None:
    """Write JSON, whole or not at all; NaN and infinity are refused, since JSON has neither."""
    save_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_text(path: Path | str) -> str:
    """Return what a UTF-8 text file holds; raise UserError if there is no such file or it is no text."""
    refuse_special(path)
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
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:60]!r} stands twice in one object")
    return values


def is_finite_number(value: Any) -> bool:
    """Tell whether a value from JSON is a number: no bool, no infinity, no int too large for a float."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def load_json(path: Path | str) -> Any:
    """Return what a JSON file holds; raise UserError if there is no such file or it is not JSON."""
    with user_errors(ValueError, f"{path}: not a whole JSON file, make it again: "):
        return parse_json(read_text(path))
