"""A DataLoader of spawn workers that survive Ctrl-C and never outlive their parent."""

import ctypes
import multiprocessing.context
import os
import signal
import sys
import types
from functools import partial

import torch
from torch.utils.data import DataLoader, Dataset

from jobs import guard

PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def build_loader(
    dataset: Dataset, *, num_workers: int, pin_memory: bool, persistent: bool = True, **batches
) -> DataLoader:
    """Build a loader with spawn workers that live as long as it and end with it, never of Ctrl-C by themselves.

    Args:
        dataset: what to load.
        num_workers: processes; 0: this one.
        pin_memory: for copies to a GPU.
        persistent: the workers stay for the next epoch, until the loader goes or `end_workers`; false: they end with
            the first.
        **batches: batch_size; or None and a sampler whose items are batches.
    """
    light = type(dataset).__module__ != "__main__"  # else the workers must import the script
    return DataLoader(
        dataset,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=persistent and num_workers > 0,
        multiprocessing_context=(_LightContext() if light else _WorkerContext()) if num_workers else None,
        worker_init_fn=partial(_init_worker, os.getpid()),
        generator=torch.Generator().manual_seed(0),  # else it draws from the model's random numbers, once or every
        # epoch, as there are workers or not: a resumed run would drop out other features than an unbroken one
        **batches,
    )


def end_workers(loader: DataLoader) -> None:
    """End a loader's workers now, not when Python happens to find that nothing refers to it any more."""
    if loader._iterator is not None:  # set by torch while workers stay for the next epoch
        loader._iterator._shutdown_workers()
        loader._iterator = None


class _Worker(multiprocessing.context.SpawnProcess):
    """A spawned process that ignores what a terminal sends to all its processes: its parent ends it."""

    def start(self) -> None:
        guard.WORKERS.add(self)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})  # the process inherits it
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _LightWorker(_Worker):
    """A worker that does not import the script: it needs its data set's module alone, and starts in half the time."""

    def start(self) -> None:
        script = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            super().start()
        finally:
            sys.modules["__main__"] = script


class _Flag:
    """A multiprocessing.Event without its lock, which a worker that is killed may hold for ever.

    torch's loader sets one to end its workers; none waits for it.
    """

    def __init__(self, context: multiprocessing.context.SpawnContext) -> None:
        self._value = context.RawValue("b", 0)

    def set(self) -> None:
        self._value.value = 1

    def is_set(self) -> bool:
        return bool(self._value.value)


class _WorkerContext(multiprocessing.context.SpawnContext):
    Process = _Worker

    def Event(self) -> _Flag:  # noqa: N802 - multiprocessing's name
        return _Flag(self)


class _LightContext(_WorkerContext):
    Process = _LightWorker


def _init_worker(parent: int, _worker: int) -> None:
    """Compute in one thread, as there are as many workers as cores; end with the parent, even if that is killed."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)
