"""Ways to damage the sound folder of sound_files.py, or a copy of it."""

import hashlib
import json
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import torch

from readers import image_cache


def fingerprint(folder: Path) -> str:
    """Return a hash of every path below ``folder`` and of every file's content; an empty lock may come and stay."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.name != image_cache.LOCK):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b"folder")
    return digest.hexdigest()


Damage = Callable[[Path], None]


def nothing(folder: Path) -> None:
    """Damage nothing: the fault is in the words."""


def put(name: str, content: bytes | str) -> Damage:
    """Write a file."""
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def remove(name: str) -> Damage:
    """Remove a file."""
    return lambda folder: (folder / name).unlink()


def folder_instead(name: str) -> Damage:
    """Put a folder in the place of a file."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def cut(name: str, share: float) -> Damage:
    """Keep the first ``share`` of a file."""

    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return damage


def lines(name: str, change: Callable[[list[str]], list[str]]) -> Damage:
    """Change the lines of a text file of the data set."""

    def damage(folder: Path) -> None:
        path = folder / "birds" / name
        path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")

    return damage


def rest_of_line(name: str, rest: str) -> Damage:
    """Put another text behind the id in the second line of a text file."""
    return lines(name, lambda old: [old[0], f"{old[1].split()[0]} {rest}", *old[2:]])


def content(name: str, change: Callable[[dict], object]) -> Damage:
    """Change a JSON file: ``change`` alters the dict, or returns what takes its place."""

    def damage(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        changed = change(value)
        (folder / name).write_text(json.dumps(value if changed is None else changed))

    return damage


def first(values: dict, value: object) -> None:
    """Replace the first value of a dict."""
    values[next(iter(values))] = value


def text(name: str, pattern: str, replacement: str) -> Damage:
    """Replace the first match of a pattern in a text file."""

    def damage(folder: Path) -> None:
        changed, count = re.subn(pattern, replacement, (folder / name).read_text(), count=1)
        assert count == 1
        (folder / name).write_text(changed)

    return damage


def tensors(name: str, change: Callable[[dict], object]) -> Damage:
    """Change a checkpoint: ``change`` alters the dict, or returns what takes its place."""

    def damage(folder: Path) -> None:
        value = torch.load(folder / name, weights_only=True) if (folder / name).exists() else {}
        changed = change(value)
        torch.save(value if changed is None else changed, folder / name)

    return damage


class Bomb:
    """What runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def code(name: str) -> Damage:
    """Put a checkpoint whose pickle runs a command in the place of a file."""
    return lambda folder: torch.save({"model": Bomb(), "config": {}}, folder / name)


def image(change: Callable[[bytes], bytes]) -> Damage:
    """Change the bytes of the second image."""

    def damage(folder: Path) -> None:
        relative = (folder / "birds" / "images.txt").read_text().splitlines()[1].split()[1]
        path = folder / "birds" / "images" / relative
        path.write_bytes(change(path.read_bytes()))

    return damage


def png_that_declares(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes whose header declares a large picture."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"0"))]
    packed = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)
