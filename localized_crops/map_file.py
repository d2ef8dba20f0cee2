"""The file of attention maps: made once by generate_dino_boxes.py, read by every loader worker.

``STEM.maps.safetensors`` holds all maps one after the other in four tensors, sorted by id, and a JSON header in its
metadata that says what the maps are. Other programs read it so:

    tensors = safetensors.numpy.load_file("boxes.maps.safetensors")
    ids = tensors["ids"].view(f"S{tensors['ids'].shape[1]}").ravel()  # (N,) UTF-8 text
    height, width = tensors["shapes"][row]
    attention_map = tensors["cells"][tensors["starts"][row] :][: height * width].reshape(height, width)

One tensor per map, named by its id, would be simpler to read, but a reader process of a million maps then takes 6
seconds and 740 MB to open the file; so it takes 0.03 seconds and 43 MB, whatever the size of the maps.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from localized_crops.files import UserError, whole_file
from localized_crops.image_ids import ImageId, id_to_key, key_to_id

KIND, VERSION, SUFFIX = "localized-crops attention maps", 2, ".maps.safetensors"
OLD_SUFFIXES = (".maps.json", ".maps.bin")  # of the format before
MOST_BYTES_HASHED = 2**28  # larger files are not hashed when they are opened: that would take over a second
DTYPES = {"ids": np.uint8, "shapes": np.int32, "starts": np.int64, "cells": np.float16}


def maps_path(path: Path | str) -> Path:
    """Return the map file that ``path`` names: the file itself, or the box JSON beside it."""
    path = Path(path)
    ending = next((suffix for suffix in (SUFFIX, *OLD_SUFFIXES) if path.name.endswith(suffix)), path.suffix)
    return path.with_name(path.name.removesuffix(ending) + SUFFIX)


def save_map_cache(path: Path | str, maps: Iterable[tuple[ImageId, np.ndarray]], header: dict[str, Any]) -> None:
    """Write a map file, whole or not at all.

    Args:
        path: the map file, or the box JSON beside which it shall lie.
        maps: (image id, map (feat_h, feat_w)), each id once; may be a generator.
        header: what the maps are: at least ``dataset`` (its fingerprint), ``model``, ``weights_sha256``, ``settings``.

    Raises:
        ValueError: if an id comes twice or cannot be a key.
    """
    id_keys, all_shapes, cells = [], [], bytearray()
    for image_id, attention_map in maps:
        id_keys.append(id_to_key(image_id).encode())
        all_shapes.append(attention_map.shape)
        cells += np.ascontiguousarray(attention_map, dtype=np.float16).tobytes()
    keys, shapes = np.array(id_keys, dtype=np.bytes_), np.array(all_shapes, dtype=np.int32).reshape(-1, 2)
    if len(np.unique(keys)) < len(keys):
        raise ValueError("an image id comes twice among the maps")
    sizes, order = shapes.prod(1, dtype=np.int64), keys.argsort()
    tensors = {
        "ids": np.frombuffer(keys[order].tobytes(), np.uint8).reshape(len(keys), -1 if len(keys) else 1),
        "shapes": shapes[order],
        "starts": (np.cumsum(sizes) - sizes)[order],
        "cells": np.frombuffer(cells, np.float16),
    }
    header = {"kind": KIND, "version": VERSION} | header
    header["sha256"] = _content_hash(header, tensors)
    content = save(tensors, {"header": json.dumps(header)})  # one entry: the order of several is random
    with whole_file(maps_path(path)) as scratch:
        scratch.write_bytes(content)


def _content_hash(header: dict[str, Any], tensors: dict[str, np.ndarray]) -> str:
    """Return a hash of all that a file holds but for this hash itself."""
    header = {key: value for key, value in header.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(header, allow_nan=False).encode())
    for name in DTYPES:
        digest.update(np.ascontiguousarray(tensors[name]))
    return digest.hexdigest()


class _Opened(NamedTuple):
    """An open map file."""

    header: dict[str, Any]
    keys: np.ndarray  # (N,) bytes, sorted
    shapes: np.ndarray  # (N, 2) feat_h, feat_w
    starts: np.ndarray  # (N,) index of a map's first cell
    cells: Any  # all cells, of which slices are read


class MapCache(Mapping):
    """The maps of a file by image id, each read when it is asked for.

    It pickles to a path and a hash: each process opens the file when it reads its first map, and checks that it is the
    same file. The file is mapped into memory, so a process that has opened it can read on after it was replaced.
    """

    def __init__(self, path: Path, sha256: str | None = None) -> None:
        """Use `open`; ``sha256``: of the content that the file must have."""
        self.path, self._sha256 = path, sha256

    @classmethod
    def open(cls, path: Path | str, *, dataset: str | None = None) -> "MapCache":
        """Check a map file, its content's hash too, and return a reader.

        Args:
            path: the map file, or the box JSON beside it.
            dataset: fingerprint of the data set at hand (`DataSet.fingerprint`); None: any.

        Raises:
            UserError: one line, if it is missing, damaged, or of another data set.
        """
        cache = cls(maps_path(path))
        made_for = cache.header.get("dataset")
        if dataset not in (None, made_for):
            raise UserError(
                f"{cache.path}: made for another data set ({str(made_for)[:40]!r}, here {dataset[:40]!r}); make the "
                f"maps again: {remake_command(cache.path)}"
            )
        cache._sha256 = cache.header["sha256"]
        return cache

    @cached_property
    def _opened(self) -> _Opened:
        try:
            return _open(self.path, known=self._sha256)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
            raise UserError(f"{self.path}: {reason}; make the maps again: {remake_command(self.path)}") from error

    @property
    def header(self) -> dict[str, Any]:
        """Return what the maps are: kind, version, sha256 of the content, and what `save_map_cache` was given."""
        return self._opened.header

    def __len__(self) -> int:
        return len(self._opened.keys)

    def __iter__(self) -> Iterator[ImageId]:
        return (key_to_id(key.decode()) for key in self._opened.keys.tolist())

    def __getitem__(self, image_id: ImageId) -> np.ndarray:
        """Return the map (feat_h, feat_w) float16 of an image; KeyError if there is none."""
        opened, key = self._opened, str(image_id).encode()
        row = int(opened.keys.searchsorted(key))
        if row == len(opened.keys) or opened.keys[row] != key:
            raise KeyError(image_id)
        (height, width), start = opened.shapes[row].tolist(), int(opened.starts[row])
        return opened.cells[start : start + height * width].reshape(height, width)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_sha256": self._sha256}  # what is open means nothing in another process


def _open(path: Path, known: str | None) -> _Opened:
    """Open a map file and check it, by errors of many kinds; ``known``: its hash, if its content was checked before."""
    if not path.is_file():
        old = [path.with_name(path.name.removesuffix(SUFFIX) + suffix) for suffix in OLD_SUFFIXES]
        raise ValueError("the maps beside it are of an earlier version" if old[0].exists() else "there is no such file")
    file = safe_open(path, framework="numpy")
    header = json.loads((file.metadata() or {})["header"])
    if (header["kind"], header["version"]) != (KIND, VERSION):
        raise ValueError(f"kind and version are {header['kind']!r:.60}, {header['version']!r:.20}")
    if known not in (None, header["sha256"]):
        raise ValueError("the file was replaced by another one while it was in use")
    ids, shapes, starts = (file.get_tensor(name) for name in ("ids", "shapes", "starts"))
    cells = file.get_slice("cells")
    if known is None and path.stat().st_size <= MOST_BYTES_HASHED:
        tensors = {"ids": ids, "shapes": shapes, "starts": starts, "cells": file.get_tensor("cells")}
        if _content_hash(header, tensors) != header["sha256"] or {k: t.dtype for k, t in tensors.items()} != DTYPES:
            raise ValueError("its content is not what was written, it is damaged")
        if (shapes < 1).any() or not np.isfinite(tensors["cells"]).all():
            raise ValueError("a map in it is empty or holds values that are no numbers")
    return _Opened(header, ids.view(f"S{ids.shape[1]}").ravel(), shapes, starts, cells)


def remake_command(path: Path) -> str:
    """Return the command that makes the maps at ``path`` again."""
    stem = maps_path(path).name.removesuffix(SUFFIX)
    return f"python generate_dino_boxes.py out={path.with_name(stem + '.json')} dino.again=true"
