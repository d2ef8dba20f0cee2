"""A DataLoader of spawn workers that survive Ctrl-C and never outlive their parent."""

import multiprocessing.connection
import multiprocessing.context
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


class Loader(DataLoader):
    """A DataLoader that always says so when a worker died, in the words that ``utils.DEAD_WORKER`` knows."""

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches.

        Raises:
            RuntimeError: if a worker died.
        """
        batches = super().__iter__()
        try:
            yield from batches
        except (OSError, EOFError) as error:  # a broken connection: it died while it handed a batch over
            dead = _ended(getattr(batches, "_workers", []))
            if not dead:
                raise
            raise RuntimeError(f"DataLoader worker (pid(s) {', '.join(dead)}) exited unexpectedly") from error


def _ended(workers: list[Any]) -> list[str]:
    """Return the pids of the processes that have ended; one whose connection broke ends within the second."""
    ended = multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=1.0)
    return [str(worker.pid) for worker in workers if worker.sentinel in ended]


def build_loader(dataset: Dataset, *, num_workers: int, pin_memory: bool, **batches) -> DataLoader:
    """Build a loader with spawn workers that live as long as it and end with it, never of Ctrl-C by themselves.

    Args:
        dataset: what to load.
        num_workers: processes; 0: this one.
        pin_memory: for copies to a GPU.
        **batches: batch_size; or None and a sampler whose items are batches.
    """
    return Loader(
        dataset,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        multiprocessing_context=_WorkerContext() if num_workers else None,
        worker_init_fn=_use_one_thread,
        generator=torch.Generator().manual_seed(0),  # else it draws from the model's random numbers, once or every
        # epoch, as there are workers or not: a resumed run would drop out other features than an unbroken one
        **batches,
    )


class _Worker(multiprocessing.context.SpawnProcess):
    """A spawned process to which Ctrl-C, sent to all processes of a terminal, is nothing: its parent ends it."""

    def start(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the new process inherits it
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


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


def _use_one_thread(_worker: int) -> None:
    torch.set_num_threads(1)  # as many workers as cores already
