"""Work in progress on disk: records appended to a file that survives a kill at any point."""

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from localized_crops.files import DiskError, disk_errors
from utils import is_at


class Record(NamedTuple):
    """One finished unit of work in a record file."""

    header: dict[str, Any]
    payload: bytes


class RecordFile:
    """Records appended to a file; each is a JSON line, its payload, and is valid only whole.

    After a kill, a power cut or on a full disk the file may end in half a record. Readers stop there, and opening
    the file for writing cuts it off.
    """

    def __init__(self, path: Path) -> None:
        """Open for appending, after the last whole record."""
        self.path = path
        whole = sum(_record_size(record) for record in read_records(path)) if path.exists() else 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        os.ftruncate(self._file, whole)

    def append(self, header: dict[str, Any], payload: bytes) -> None:
        """Append one record and hand it to the system.

        Raises:
            DiskError: if the disk is full, or the file was removed; the records before stay whole.
        """
        if not is_at(self._file, self.path):
            raise DiskError(f"{self.path}: was removed while it was in use, and what was finished with it")
        content = memoryview(_record_line(header, payload) + payload)
        with disk_errors(self.path):
            while content:
                content = content[os.write(self._file, content) :]

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def read_records(path: Path) -> Iterator[Record]:
    """Yield the whole records of a file, up to the first that is not."""
    with open(path, "rb") as file:
        while record := _read_record(file):
            yield record


def _record_line(header: dict[str, Any], payload: bytes) -> bytes:
    sealed = {"header": header, "bytes": len(payload)}
    sealed["crc"] = zlib.crc32(json.dumps(sealed).encode() + payload)
    return json.dumps(sealed).encode() + b"\n"


def _record_size(record: Record) -> int:
    return len(_record_line(*record)) + len(record.payload)


def _read_record(file: Any) -> Record | None:
    try:
        sealed = json.loads(file.readline())
        crc = sealed.pop("crc")
        payload = file.read(min(sealed["bytes"], os.fstat(file.fileno()).st_size))
        whole = len(payload) == sealed["bytes"] and zlib.crc32(json.dumps(sealed).encode() + payload) == crc
        return Record(sealed["header"], payload) if whole else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
