"""Image ids, integers (CUB) or text (a path below the data set's folder), as the text keys of JSON and safetensors."""

from collections.abc import Sequence

import numpy as np

ImageId = int | str
MOST_DIGITS = 18  # of an integer id: it fits int64


def id_to_key(image_id: ImageId) -> str:
    """Return an id as a file's key.

    Raises:
        ValueError: if it would not come back as it is: an empty or negative id, or digits as text.
    """
    key = str(image_id)
    if not key or key_to_id(key) != image_id:
        raise ValueError(f"image id {image_id!r} must be a whole number under 10^{MOST_DIGITS} or text that is none")
    return key


def key_to_id(key: str) -> ImageId:
    """Return the id of a file's key: an integer for digits without leading zeros, the text itself otherwise."""
    is_number = key.isascii() and key.isdigit() and len(key) <= MOST_DIGITS and (key[0] != "0" or key == "0")
    return int(key) if is_number else key


# --- many ids in an array: a million take a tenth of what a dict takes ---------------------------------------------


def ids_to_keys(ids: Sequence[ImageId] | np.ndarray) -> np.ndarray:
    """Return image ids as files name them, (N,) UTF-8 bytes.

    Raises:
        ValueError: if an id holds the character NUL or a character that UTF-8 does not have.
    """
    if isinstance(ids, np.ndarray) and ids.dtype.kind in "iuS":
        return ids.astype(np.bytes_)
    texts = [str(image_id) for image_id in (ids.tolist() if isinstance(ids, np.ndarray) else ids)]
    if any("\0" in text for text in texts):
        raise ValueError("an image id holds the character NUL")
    return np.array([text.encode() for text in texts], dtype=np.bytes_)


def compact_ids(ids: np.ndarray) -> np.ndarray:
    """Return ids that are numbers as they are, text as UTF-8 bytes, a fourth of its size."""
    return ids if ids.dtype.kind in "iuS" else ids_to_keys(ids)


def listed_ids(ids: np.ndarray) -> list[ImageId]:
    """Return the ids of `compact_ids` as integers or text."""
    return [key.decode() for key in ids.tolist()] if ids.dtype.kind == "S" else ids.tolist()


class Rows:
    """Which row belongs to which image."""

    def __init__(self, keys: np.ndarray) -> None:
        """Number the images by their keys (N,) bytes, of `ids_to_keys`; raise ValueError if one comes twice."""
        self.keys = keys
        self._order = keys.argsort(kind="stable")
        ordered = keys[self._order]
        if (twice := np.flatnonzero(ordered[1:] == ordered[:-1])).size:
            raise ValueError(f"image {ordered[twice[0]].decode()[:100]} comes twice")

    def __len__(self) -> int:
        return len(self.keys)

    def of(self, ids: Sequence[ImageId] | np.ndarray) -> np.ndarray:
        """Return the row of each image (M,), -1 where there is none."""
        keys = ids_to_keys(ids)
        if np.array_equal(keys, self.keys):
            return np.arange(len(keys))
        if not len(self.keys):
            return np.full(len(keys), -1)
        places = np.minimum(self.keys.searchsorted(keys, sorter=self._order), len(self.keys) - 1)
        rows = self._order[places]
        return np.where(self.keys[rows] == keys, rows, -1)

    def row(self, image_id: ImageId) -> int:
        """Return the row of an image; KeyError if there is none."""
        key = str(image_id).encode()
        place = int(self.keys.searchsorted(key, sorter=self._order))
        if place == len(self.keys) or self.keys[self._order[place]] != key or key_to_id(str(image_id)) != image_id:
            raise KeyError(image_id)
        return int(self._order[place])
