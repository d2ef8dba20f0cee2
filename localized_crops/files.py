"""Files written whole or not at all, and the one-line errors of what is read."""

import contextlib
import errno
import fcntl
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A fault that the user can mend. The message is one line: what was found, where, what to do."""

    def __init__(self, message: str) -> None:
        # a loader's worker hands its error over as a whole traceback with the message at its end
        super().__init__(message.rpartition("UserError: ")[2].strip())


class DiskError(UserError):
    """What was to be written could not be; what was finished before is whole."""


@contextlib.contextmanager
def user_errors(kind: type[Exception] | tuple[type[Exception], ...], where: str = "") -> Iterator[None]:
    """Turn exceptions of one kind (or several), raised inside the with block, into UserError.

    ``where`` goes before the message.
    """
    try:
        yield
    except kind as error:
        raise UserError(f"{where}{error}") from error


REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "what was finished before is kept; make room")
REMEDIES |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "name a folder that you may write to")
REMEDIES |= dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a file lies where a folder is needed; name another")
SCRATCH = re.compile(r"\..+\.\d+\.tmp(\.\w+)?")  # .NAME.PID.tmp.SUFFIX


def remedy(error: OSError) -> str:
    return f"; {REMEDIES[error.errno]}" if error.errno in REMEDIES else ""


@contextlib.contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Turn system errors, raised while ``path`` is written, into a DiskError that names it and says what to do."""
    try:
        yield
    except OSError as error:
        gone = "; its folder was removed" if error.errno == errno.ENOENT else ""
        raise DiskError(f"{path}: {error.strerror or error}{gone or remedy(error)}") from error


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
        if stat.S_ISFIFO(os.stat(path).st_mode) or stat.S_ISCHR(os.stat(path).st_mode):  # reading might wait for ever
            raise UserError(f"{path}: is a pipe or device, a file was expected")
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
