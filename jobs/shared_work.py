"""Long work that several processes share and that goes on after a kill: finished units lie in a folder until all are
there.

Every process of a stage appends its finished units to its own record file; process 0 puts them together at the end.
Units of other settings, another model or data set are refused.
"""

import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jobs.records import Record, RecordFile, read_records
from localized_crops.files import UserError, load_json, remove_scratch, save_json
from utils import locked, pick_device

STALLED_SECONDS = 1800  # without a finished unit of any process, the others are taken for dead


def process_numbers() -> tuple[int, int]:
    """Return (rank, world size), as torchrun sets them; (0, 1) without it.

    Raises:
        UserError: if these variables hold something else.
    """
    rank, world_size = (os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
        raise UserError(f"RANK={rank}, WORLD_SIZE={world_size}: not as torchrun sets them; unset both")
    return int(rank), int(world_size)


def choose_device(device: str | None) -> torch.device:
    """Return the device; None or "cuda": this process's own GPU where there is one."""
    own_gpu = device in (None, "cuda") and torch.cuda.is_available()
    return pick_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if own_gpu else device)


@dataclass(frozen=True)
class SharedWork:
    """The unfinished work of one stage.

    Args:
        folder: where it lies; gone when the stage is done.
        identity: all that the results depend on, as JSON holds it; its ``settings`` are of one section of the config.
        section: that section's name.
        again: the command that starts anew.
        rank, world_size: which of how many processes this is.
    """

    folder: Path
    identity: dict[str, Any]
    section: str
    again: str
    rank: int = 0
    world_size: int = 1

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

    def is_mine(self, number: int) -> bool:
        """Tell whether this process does the unit of this number."""
        return number % self.world_size == self.rank

    def records(self) -> Iterator[Record]:
        """Yield the finished units of all processes, those of earlier runs too."""
        for path in sorted(self.folder.glob("process_*/units.records")):
            yield from read_records(path)

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

    @contextmanager
    def writing(self) -> Iterator[RecordFile]:
        """Yield the record file of this process, which has claimed it."""
        if not self.begun:
            save_json(self.folder / "identity.json", self.identity)
        records = RecordFile(self._own_folder / "units.records")
        try:
            yield records
        finally:
            records.close()

    def wait_for_others(self, missing: Callable[[], Collection[int]]) -> None:
        """Wait until the other processes have done the ``missing()`` units.

        Raises:
            UserError: if none has come for a long time.
        """
        before, since = None, time.monotonic()
        while self.world_size > 1 and (left := missing()):
            if left != before:
                before, since = left, time.monotonic()
            if time.monotonic() - since > STALLED_SECONDS:
                raise UserError(f"{len(left)} batches of other processes do not come; start the same command again")
            time.sleep(1.0)

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
        (self.folder / "identity.json").unlink(missing_ok=True)
        for path in self.folder.glob("process_*/units.records"):
            path.unlink()
