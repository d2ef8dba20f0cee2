"""The cache of attention maps: made once by generate_dino_boxes.py, read by every loader worker.

Two files: ``STEM.maps.bin``, a 64-byte head and then all maps as float16 in C order (CUB's 11,788 at 37 x 37 cells: 33
MB), and ``STEM.maps.json``, which says what they are and where each image's map lies. Maps are read with pread: the
pages belong to the system's cache, which all processes share, so a reader's own memory does not grow with the file.
Several programs could map the file too: ``np.memmap(path, np.float16, "r", offset=64)``.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from localized_crops.files import UserError, load_json, save_json, whole_file

KIND, VERSION, DTYPE = "localized-crops attention maps", 1, "float16"
MAGIC, HEAD_BYTES, TOKEN_BYTES = b"lc-maps1", 64, 16
MAX_SIDE = 4096  # cells; a larger one is a damaged index


def cache_paths(path: Path | str) -> tuple[Path, Path]:
    """Return (index, data) of the cache that ``path`` names: the index itself, or the box JSON beside it."""
    path = Path(path)
    stem = path.name.removesuffix(".maps.json") if path.name.endswith(".maps.json") else path.stem
    return path.with_name(f"{stem}.maps.json"), path.with_name(f"{stem}.maps.bin")


# --- writing ------------------------------------------------------------------------------------------------------


def save_map_cache(path: Path | str, maps: Iterable[tuple[int, np.ndarray]], header: dict[str, Any]) -> None:
    """Write a cache. A reader never sees half of it: data first, then the index that carries the data's hash.

    Args:
        path: the index, or the box JSON beside which it shall lie.
        maps: (image id, map (feat_h, feat_w)), each id once; may be a generator.
        header: what the maps are: at least ``dataset`` (its fingerprint), ``model``, ``weights_sha256``, ``settings``.
    """
    index_path, data_path = cache_paths(path)
    entries, offset, digest = {}, HEAD_BYTES, hashlib.sha256()
    with whole_file(data_path) as scratch, open(scratch, "wb") as file:
        file.write(bytes(HEAD_BYTES))
        for image_id, attention_map in maps:
            content = np.ascontiguousarray(attention_map, dtype=np.float16).tobytes()
            digest.update(content)
            file.write(content)
            entries[str(int(image_id))] = [offset, *attention_map.shape]
            offset += len(content)
        file.seek(0)
        file.write(MAGIC + digest.digest()[:TOKEN_BYTES])
    own = {"kind": KIND, "version": VERSION, "dtype": DTYPE, "bytes": offset, "sha256": digest.hexdigest()}
    save_json(index_path, own | header | {"maps": entries})


# --- reading ------------------------------------------------------------------------------------------------------


class MapCache:
    """Maps by image id. Cheap to pickle: a worker opens the file anew, nothing is copied."""

    def __init__(self, path: Path, header: dict[str, Any], ids: np.ndarray, places: np.ndarray) -> None:
        """Use `open`: ids (N,) sorted, places (N, 3) offset in bytes, feat_h, feat_w."""
        self.path, self.header, self.ids, self.places = path, header, ids, places
        self._file: int | None = None

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        dataset: str | None = None,
        model: str | None = None,
        weights_sha256: str | None = None,
    ) -> "MapCache":
        """Check the cache's index and data and return a reader.

        Args:
            path: the index, or the box JSON beside it.
            dataset: fingerprint of the data set at hand (`DataSet.fingerprint`); None: any.
            model: name of the model that must have made the maps; None: any.
            weights_sha256: hash of its weights; None: any.

        Raises:
            UserError: one line, if it is missing, damaged, or of another data set or model.
        """
        index_path, data_path = cache_paths(path)
        content = load_json(index_path)
        fault = _index_fault(content) or _data_fault(content, data_path)
        fault = fault or _other_origin(content, {"dataset": dataset, "model": model, "weights_sha256": weights_sha256})
        if fault:
            raise UserError(f"{index_path}: {fault}; make the maps again: {remake_command(index_path)}")
        ids = np.array(list(map(int, content["maps"])), dtype=np.int64)
        places = np.array(list(content["maps"].values()), dtype=np.int64).reshape(-1, 3)
        order = ids.argsort()
        header = {key: value for key, value in content.items() if key != "maps"}
        return cls(data_path, header, ids[order], places[order])

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, image_id: int) -> bool:
        return self._row(image_id) is not None

    def __getitem__(self, image_id: int) -> np.ndarray:
        """Return the map (feat_h, feat_w) float16 of an image.

        Raises:
            KeyError: if the cache has none.
            UserError: if the file was cut short since it was opened.
        """
        row = self._row(image_id)
        if row is None:
            raise KeyError(image_id)
        offset, feat_h, feat_w = self.places[row].tolist()
        content = os.pread(self._descriptor(), 2 * feat_h * feat_w, offset)
        if len(content) != 2 * feat_h * feat_w:
            raise UserError(f"{self.path}: cut short while it was read; make it again: {remake_command(self.path)}")
        return np.frombuffer(content, dtype=np.float16).reshape(feat_h, feat_w)

    def get(self, image_id: int) -> np.ndarray | None:
        """Return the map of an image, None if the cache has none."""
        return self[image_id] if image_id in self else None  # noqa: SIM401 - this is what get() is made of

    def _row(self, image_id: int) -> int | None:
        row = int(np.searchsorted(self.ids, image_id))
        return row if row < len(self.ids) and self.ids[row] == image_id else None

    def _descriptor(self) -> int:
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}  # a descriptor means nothing in another process

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)


def remake_command(path: Path) -> str:
    """Return the command that makes the maps at ``path`` again."""
    stem = path.name.removesuffix(".json").removesuffix(".bin").removesuffix(".maps")
    return f"python generate_dino_boxes.py out={path.with_name(stem + '.json')} dino.again=true"


def _index_fault(content: Any) -> str | None:
    """Return what is wrong with an index by itself, None if nothing is."""
    if not isinstance(content, dict) or content.get("kind") != KIND:
        return f"kind is {content.get('kind') if isinstance(content, dict) else None!r}, expected {KIND!r}"
    if content.get("version") != VERSION or content.get("dtype") != DTYPE:
        return f"version {content.get('version')!r} of {content.get('dtype')!r}, expected {VERSION} of {DTYPE!r}"
    if not isinstance(content.get("maps"), dict) or not isinstance(content.get("bytes"), int):
        return "it names no maps or not how many bytes they have"
    if not isinstance(content.get("sha256"), str):
        return "the hash of the data is missing"
    return next((fault for item in content["maps"].items() if (fault := _place_fault(item, content["bytes"]))), None)


def _place_fault(item: tuple[str, Any], size: int) -> str | None:
    image_id, place = item
    if not (image_id.isascii() and image_id.isdigit() and len(image_id) <= 18 and str(int(image_id)) == image_id):
        return f"image id {image_id[:40]!r} is not a number"
    whole = isinstance(place, list) and len(place) == 3 and all(type(n) is int for n in place)
    if not whole or not all(1 <= side <= MAX_SIDE for side in place[1:]):
        return f"image {image_id}: {str(place)[:60]} is not [offset, feat_h, feat_w]"
    if place[0] < HEAD_BYTES or place[0] + 2 * place[1] * place[2] > size:
        return f"image {image_id}: its map at {str(place)[:60]} lies outside the {size} bytes of the data"
    return None


def _data_fault(content: dict, data_path: Path) -> str | None:
    """Return why the data file is not the index's own, None if it is. The hash's head is compared, not all bytes."""
    if not data_path.is_file():
        return f"{data_path.name} is missing"
    found = data_path.stat().st_size
    if found != content["bytes"]:
        return f"{data_path.name} has {found} bytes, {content['bytes']} were written"
    with open(data_path, "rb") as file:
        head = file.read(HEAD_BYTES)
    if head[:8] != MAGIC or head[8 : 8 + TOKEN_BYTES].hex() != content["sha256"][: 2 * TOKEN_BYTES]:
        return f"{data_path.name} is of another run"
    return None


def _other_origin(content: dict, wanted: dict[str, str | None]) -> str | None:
    words = {"dataset": "another data set", "model": "another model", "weights_sha256": "other weights"}
    for key, value in wanted.items():
        if value is not None and content.get(key) != value:
            return f"made for {words[key]} ({str(content.get(key))[:40]!r}, here {value[:40]!r})"
    return None
