"""Long work in units that several processes share and that goes on after a kill.

One finished unit is one file, written whole, in the stage's partial folder. Process 0 puts the units together at the
end and removes the folder. Units of other settings, another model or data set are refused.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import InitVar, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
from tqdm import tqdm

from jobs.settings import leaves
from jobs.torchrun import process_numbers
from localized_crops.files import UserError, check_output, load_json, remove_scratch, save_json, whole_file
from utils import file_sha256, file_stats, locked

MOST_READ = 50_000  # files whose content is hashed
STALLED_SECONDS = 1800  # without a finished unit of any process, the others are taken for dead


def content_keys(batches: Sequence[Sequence[Path]]) -> list[str]:
    """Return for each batch a hash of what its files hold: an image that was replaced makes another key.

    Of many files it is a hash of their sizes and times of change: to read them all would take hours.
    """

    def digest(path: Path) -> bytes:
        try:
            return bytes.fromhex(file_sha256(path))
        except OSError:  # it is reported when it is to be decoded
            return b"unreadable"

    paths = [path for batch in batches for path in batch]
    if len(paths) > MOST_READ:
        digests = map(np.ndarray.tobytes, file_stats(paths))
    else:
        with ThreadPoolExecutor(8) as pool:  # hashing lets go of the interpreter's lock
            digests = pool.map(digest, paths)
    return [hashlib.sha256(b"".join(islice(digests, len(batch)))).hexdigest()[:16] for batch in batches]


def refuse_foreign(out: Path) -> None:
    """Raise UserError if a file that goes with the new box file ``out`` is there: this program did not write it."""
    for path in [out, *(out.with_suffix(suffix) for suffix in (".eval.json", ".eval.md", ".png"))]:
        check_output(path)
    check_output(out.with_name("errors.txt"), rb"\A\d+ images failed\n")


def box_path(out: str | None, default: Path | str) -> Path:
    """Return the box file that a generator writes; UserError unless it is .json: others of its name go with it."""
    path = Path(out or default)
    if path.suffix != ".json":
        raise UserError(f"out={path}: boxes are written as .json; give such a name")
    return path


class Result(NamedTuple):
    """What the work on one unit gave."""

    about: dict[str, Any]  # as JSON holds it
    arrays: dict[str, np.ndarray] = {}  # noqa: RUF012 - never changed


@dataclass
class SharedWork:
    """The work of one stage on the images of a data set, in units of some images each."""

    folder: Path  # where the finished units lie until all are there
    identity: dict[str, Any]  # all that the results depend on, as JSON holds it
    section: str  # of the config, whose keys ``identity["settings"]`` holds
    again: str  # the command that starts anew
    units: Sequence[Sequence[int]]  # rows of the data set that are worked on together
    paths: InitVar[Sequence[Path]]  # of the images, by row

    def __post_init__(self, paths: Sequence[Path]) -> None:
        self.rank, self.world_size = process_numbers()
        self.keys = content_keys([[paths[row] for row in unit] for unit in self.units])
        self._names = [f"{number:07}-{key}.safetensors" for number, key in enumerate(self.keys)]  # of the units' files
        self._own_folder = self.folder / f"process_{self.rank}"
        self.earlier: set[int] = set()  # numbers of the units that an earlier run's final file holds

    @contextmanager
    def claimed(self, *, again: bool = False) -> Iterator[None]:
        """Hold this process's part of the work, from before it is looked at to after it is put together.

        ``again`` removes the finished units first. Raises UserError if another process holds it, or what was begun in
        the folder is of another identity.
        """
        try:
            with locked(self._own_folder, "out"):
                if self.rank == 0:
                    remove_scratch(self.folder)
                    remove_scratch(self.folder.parent)
                if again:
                    self._start_anew()
                elif self.begun:
                    self._check_identity(load_json(self.folder / "identity.json"), f"{self.folder}: begun")
                yield
        finally:
            with suppress(OSError):
                self.folder.rmdir()  # where nothing was finished

    def take_over(self, path: Path, identity: Any, keys: Any, failed: Collection[int]) -> None:
        """Leave out the units that an earlier run's final file holds, except those that may come out otherwise now.

        Args:
            path: the final file.
            identity: this work's, as that run saved it; UserError if it is another one now.
            keys: likewise; a unit whose images were replaced since has another key.
            failed: rows of images that failed then.
        """
        self._check_identity(identity, f"{path}: made")
        pairs, failed = zip(self.keys, keys if isinstance(keys, list) else [], strict=False), set(failed)
        same = (number for number, (now, before) in enumerate(pairs) if now == before)
        self.earlier = {number for number in same if failed.isdisjoint(self.units[number])}

    @property
    def begun(self) -> bool:
        """Whether there are finished units, or will be."""
        return (self.folder / "identity.json").exists()

    @property
    def has_new_units(self) -> bool:
        """Whether there are units that no earlier run's final file holds."""
        return len(self.earlier) < len(self.units)

    def _check_identity(self, identity: Any, what: str) -> None:
        before = self._by_key(identity if isinstance(identity, dict) else {})
        for key, value in self._by_key(self.identity).items():
            if before.get(key) != value:
                raise UserError(
                    f"{what} with {key}={str(before.get(key))[:40]}, now {str(value)[:40]}; give another out, or "
                    f"start anew: {self.again}"
                )

    def _by_key(self, identity: dict[str, Any]) -> dict[str, Any]:
        return leaves({self.section if key == "settings" else key: value for key, value in identity.items()})

    def _start_anew(self) -> None:
        if self.world_size > 1:  # one process would remove what another has begun
            raise UserError(f"again=true is for one process: start anew with {self.again}")
        for path in self.folder.glob("process_*/*.safetensors"):
            path.unlink()
        (self.folder / "identity.json").unlink(missing_ok=True)

    # --- units ----------------------------------------------------------------------------------------------------

    def finished(self) -> dict[int, Path]:
        """Return the files of the finished units of all processes, of earlier runs too, by the unit's number."""
        files = {path.name: path for path in self.folder.glob("process_*/*.safetensors")} if self.begun else {}
        return {number: files[name] for number, name in enumerate(self._names) if name in files}

    def run_units(self, make: Callable[[list[int]], Iterable[Result]], what: str) -> int:
        """Make this process's share of the units that are not finished, each into its file; return how many images.

        ``make``, given the numbers of units, yields their results in this order. ``what`` names them to people.
        """
        sizes, done = [len(rows) for rows in self.units], self.earlier | self.finished().keys()
        mine = [n for n in range(len(sizes)) if n not in done and n % self.world_size == self.rank]
        if done and self.rank == 0:
            print(f"{sum(sizes[n] for n in done)} of {sum(sizes)} images are done already")
        if not mine:
            return 0
        if not self.begun:
            save_json(self.folder / "identity.json", self.identity)
        total = sum(sizes[n] for n in mine)
        with tqdm(total=total, desc=what, unit=" images", disable=self.rank > 0, mininterval=1.0) as bar:
            for number, result in zip(mine, make(mine), strict=True):
                save_result(self._own_folder / self._names[number], result)
                bar.update(sizes[number])
        return total

    def results(self) -> Iterator[Result]:
        """Wait until all units are finished, by whichever process, and yield their results by number.

        Units that an earlier run's final file holds have none. Raises UserError if none has come for a long time.
        """
        left, since = len(self.units) + 1, time.monotonic()
        while missing := len(self.units) - len(self.earlier | self.finished().keys()):
            if missing < left:
                left, since = missing, time.monotonic()
            if self.world_size == 1 or time.monotonic() - since > STALLED_SECONDS:
                raise UserError(
                    f"{missing} batches of other processes have not come for {STALLED_SECONDS} s; start the same "
                    "command again"
                )
            time.sleep(1.0)
        yield from (load_result(path) for _, path in sorted(self.finished().items()))

    def remove(self) -> None:
        """Remove the folder and all in it."""
        shutil.rmtree(self.folder, ignore_errors=True)


def save_result(path: Path, result: Result) -> None:
    """Write a unit's result, whole or not at all, into a folder that exists."""
    with whole_file(path, new_folder=False) as scratch:
        scratch.write_bytes(safetensors.numpy.save(result.arrays, {"about": json.dumps(result.about)}))


def load_result(path: Path) -> Result:
    """Return a unit's result; raise UserError if the file is damaged."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return Result(json.loads(file.metadata()["about"]), {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({str(error)[:100]}); remove it and run the same command again") from None
