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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
import torch
from tqdm import tqdm

from jobs.torchrun import local_rank
from localized_crops.files import UserError, check_output, load_json, remove_scratch, save_json, whole_file
from utils import file_stats, locked, pick_device

MOST_READ = 50_000  # files whose content is hashed
STALLED_SECONDS = 1800  # without a finished unit of any process, the others are taken for dead


def choose_device(device: str | None) -> torch.device:
    """Return the device; None or "cuda": this process's own GPU where there is one."""
    own_gpu = device in (None, "cuda") and torch.cuda.is_available()
    return pick_device(f"cuda:{local_rank()}" if own_gpu else device)


def content_keys(batches: Sequence[Sequence[Path]]) -> list[str]:
    """Return for each batch a hash of what its files hold: an image that was replaced makes another key.

    Of many files it is a hash of their sizes and times of change: to read them all would take hours.
    """
    paths, ends = [path for batch in batches for path in batch], np.cumsum([len(batch) for batch in batches])
    if len(paths) > MOST_READ:
        parts = np.split(file_stats(paths), ends[:-1]) if batches else []
        return [hashlib.sha256(part.tobytes()).hexdigest()[:16] for part in parts]

    def digest(path: Path) -> bytes:
        try:
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").digest()
        except OSError:  # it is reported when it is to be decoded
            return b"unreadable"

    with ThreadPoolExecutor(8) as pool:  # hashing lets go of the interpreter's lock
        digests = pool.map(digest, paths)
        return [hashlib.sha256(b"".join(next(digests) for _ in batch)).hexdigest()[:16] for batch in batches]


def refuse_foreign(out: Path) -> None:
    """Raise UserError if a file that goes with the new box file ``out`` is there: this program did not write it."""
    for path in [out, *(out.with_suffix(suffix) for suffix in (".eval.json", ".eval.md", ".png"))]:
        check_output(path)
    check_output(out.with_name("errors.txt"), rb"\A\d+ images failed\n")


def box_path(out: str | None, default: Path | str) -> Path:
    """Return the box file that a generator writes.

    Raises:
        UserError: if its name may be that of another file which goes with it.
    """
    path = Path(out or default)
    if path.suffix != ".json":
        raise UserError(f"out={path}: boxes are written as .json; give such a name")
    return path


class Result(NamedTuple):
    """What the work on one unit gave."""

    about: dict[str, Any]  # as JSON holds it
    arrays: dict[str, np.ndarray] = {}  # noqa: RUF012 - never changed


@dataclass(frozen=True)
class SharedWork:
    """The unfinished work of one stage.

    Args:
        folder: where the finished units lie; gone when the stage is done.
        identity: all that the results depend on, as JSON holds it; its ``settings`` are of one section of the config.
        section: that section's name.
        again: the command that starts anew.
        rank, world_size: which of how many processes this is.
        keys: of `content_keys`, one a unit; a unit of other images is made again.
    """

    folder: Path
    identity: dict[str, Any]
    section: str
    again: str
    rank: int = 0
    world_size: int = 1
    keys: Sequence[str] = ()

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold this process's part of the work, from before it is looked at to after it is put together.

        Raises:
            UserError: if another process holds it.
        """
        try:
            with locked(self._own_folder) as free:
                if not free:
                    raise UserError(
                        f"{self._own_folder}: another process works there; wait for it, or give another out"
                    )
                if self.rank == 0:
                    remove_scratch(self.folder)
                    remove_scratch(self.folder.parent)
                yield
        finally:
            with suppress(OSError):
                self.folder.rmdir()  # nothing came of it

    @property
    def _own_folder(self) -> Path:
        return self.folder / f"process_{self.rank}"

    @property
    def begun(self) -> bool:
        """Whether there are finished units, or will be."""
        return (self.folder / "identity.json").exists()

    def check(self) -> None:
        """Raise UserError if what was begun in the folder is of another identity."""
        if self.begun:
            self.check_identity(load_json(self.folder / "identity.json"), f"{self.folder}: begun")

    def check_identity(self, found: Any, what: str) -> None:
        """Raise UserError if ``found``, the identity of ``what``, is not this work's."""
        before = self._flat(found if isinstance(found, dict) else {})
        for key, value in self._flat(self.identity).items():
            if before.get(key) != value:
                raise UserError(
                    f"{what} with {key}={str(before.get(key))[:40]}, now {str(value)[:40]}; give another out, or "
                    f"start anew: {self.again}"
                )

    def _flat(self, identity: dict[str, Any]) -> dict[str, Any]:
        settings = identity.get("settings")
        own = {f"{self.section}.{key}": v for key, v in settings.items()} if isinstance(settings, dict) else {}
        return {key: value for key, value in identity.items() if key != "settings"} | own

    # --- units ----------------------------------------------------------------------------------------------------

    def finished(self) -> dict[int, Path]:
        """Return the files of the finished units of all processes, of earlier runs too, by the unit's number."""
        found = {path.name: path for path in self.folder.glob("process_*/*.safetensors")} if self.begun else {}
        names = [self._name(number) for number in range(len(self.keys))]
        return {number: found[name] for number, name in enumerate(names) if name in found}

    def _name(self, number: int) -> str:
        return f"{number:07}-{self.keys[number]}.safetensors"

    def unchanged(self, keys: Any) -> set[int]:
        """Return the units whose images hold what they held when ``keys`` were taken."""
        return {n for n, pair in enumerate(zip(self.keys, keys if isinstance(keys, list) else (), strict=False))
                if pair[0] == pair[1]}  # fmt: skip

    def run_units(
        self,
        sizes: Sequence[int],
        make: Callable[[list[int]], Iterable[Result]],
        *,
        done: Collection[int] = (),
        what: str,
    ) -> int:
        """Make this process's share of the units that are not finished, each into its file.

        Args:
            sizes: images of each unit.
            make: given the numbers of units, yields their results in this order.
            done: units that need not be made: an earlier run's final files hold them.
            what: is made, for the progress bar.

        Returns:
            The number of images that this process worked on.
        """
        done = set(done) | self.finished().keys()
        mine = [n for n in range(len(sizes)) if n not in done and n % self.world_size == self.rank]
        if done and self.rank == 0:
            print(f"{sum(sizes[n] for n in done)} of {sum(sizes)} images are done already")
        if mine and not self.begun:
            save_json(self.folder / "identity.json", self.identity)
        total = sum(sizes[n] for n in mine)
        quiet = self.rank > 0 or not mine
        with tqdm(total=total, desc=what, unit=" images", disable=quiet, mininterval=1.0) as bar:
            for number, result in zip(mine, make(mine) if mine else (), strict=True):
                save_result(self._own_folder / self._name(number), result)
                bar.update(sizes[number])
        return total

    def results(self, numbers: Collection[int]) -> Iterator[Result]:
        """Wait until these units are finished, by whichever process, and yield the results of all, by number.

        Raises:
            UserError: if none has come for a long time.
        """
        left, since = len(numbers) + 1, time.monotonic()
        while missing := len(set(numbers) - self.finished().keys()):
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

    def start_anew(self) -> None:
        """Remove the finished units, which this process has claimed.

        Raises:
            UserError: if several processes would: one would remove what another has begun.
        """
        if self.world_size > 1:
            raise UserError(f"again=true is for one process: start anew with {self.again}")
        for path in self.folder.glob("process_*/*.safetensors"):
            path.unlink()
        (self.folder / "identity.json").unlink(missing_ok=True)


def save_result(path: Path, result: Result) -> None:
    """Write a unit's result, whole or not at all, into a folder that exists.

    Raises:
        DiskError: if it cannot be written.
    """
    with whole_file(path, new_folder=False) as scratch:
        scratch.write_bytes(safetensors.numpy.save(result.arrays, {"about": json.dumps(result.about)}))


def load_result(path: Path) -> Result:
    """Return a unit's result.

    Raises:
        UserError: if the file is damaged.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return Result(json.loads(file.metadata()["about"]), {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({str(error)[:100]}); remove it and run the same command again") from None
