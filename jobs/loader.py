"""A DataLoader whose worker processes are forked from one server, survive Ctrl-C and never outlive their parent."""

import atexit
import contextlib
import fcntl
import multiprocessing
import multiprocessing.context
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator
from multiprocessing import forkserver
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from jobs import guard

WORTH_A_WORKER = 1000  # images: reading fewer takes less time than starting a worker, some seconds


def build_loader(dataset: Dataset, *, num_workers: int, pin_memory: bool, **batches) -> DataLoader:
    """Build a loader whose workers live as long as it, or until `end_workers`, and never end of Ctrl-C by themselves.

    Args:
        dataset: what to load; its class stands in a module, not in the script, which workers do not import.
        num_workers: processes; 0: this one.
        **batches: batch_size; or None and a sampler whose items are batches.
    """
    start_server(type(dataset), num_workers)
    return DataLoader(
        dataset,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        multiprocessing_context=_WorkerContext() if num_workers else None,
        worker_init_fn=_end_with_parent,
        generator=torch.Generator().manual_seed(0),  # else it draws from the model's random numbers, once or every
        # epoch, as there are workers or not: a resumed run would drop out other features than an unbroken one
        **batches,
    )


def workers_for(images: int, config: dict) -> int:
    """Return the number of worker processes for one pass over so many images: 0 for few."""
    return config["num_workers"] if images >= WORTH_A_WORKER else 0


def end_workers(loader: DataLoader) -> None:
    """End a loader's workers now, not when Python happens to find that nothing refers to it any more."""
    if loader._iterator is not None:  # set by torch while workers stay for the next epoch
        loader._iterator._shutdown_workers()
        loader._iterator = None


# --- the server ---------------------------------------------------------------------------------------------------


def start_server(dataset: type[Dataset], num_workers: int) -> None:
    """Start the server that all workers of this process are forked from, if there will be workers and none runs yet.

    It imports torch and whatever else ``dataset`` needs, some seconds, while this process goes on. It ends when this
    process and all workers have ended.
    """
    if num_workers:
        forkserver.set_forkserver_preload([dataset.__module__])
        with _inherited_by_workers():
            forkserver.ensure_running()


@contextlib.contextmanager
def _inherited_by_workers() -> Iterator[None]:
    """Let a server that starts in the with block find the modules of this process, in a single thread.

    It and its workers ignore what a terminal sends to all processes.
    """
    variables = {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONSAFEPATH": "1",  # nothing from the working directory
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",  # whose threads would start with the import of NumPy
    }
    before = {name: value for name, value in os.environ.items() if name in variables}
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]
        os.environ.update(before)
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)


@atexit.register
def _end_server() -> None:
    """End the server at once, even while it imports; that workers end now is no fault."""
    signal.signal(signal.SIGIO, signal.SIG_IGN)  # Python takes its handlers back while it ends, and SIGIO would kill it
    guard.WORKERS.clear()
    if pid := forkserver._forkserver._forkserver_pid:
        os.kill(pid, signal.SIGKILL)


# --- workers ------------------------------------------------------------------------------------------------------


class _Worker(multiprocessing.context.ForkServerProcess):
    """A fork of the server, with nothing of this script."""

    def start(self) -> None:
        script = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")  # else the worker would import it
        try:
            with _inherited_by_workers():  # if the server has died, another one starts here
                super().start()
        finally:
            sys.modules["__main__"] = script
        guard.WORKERS.add(self)
        if sys.platform == "linux" and threading.current_thread() is threading.main_thread():
            # The kernel interrupts this process when the worker ends: torch's loader sees the end of its own children
            # alone, looks at others every 5 seconds, and not at all while it reads half a batch.
            signal.signal(signal.SIGIO, guard.raise_for_dead_workers)
            fcntl.fcntl(self.sentinel, fcntl.F_SETOWN, os.getpid())
            fcntl.fcntl(self.sentinel, fcntl.F_SETFL, os.O_ASYNC)


class _Flag:
    """A multiprocessing.Event without its lock, which a worker that is killed may hold for ever.

    torch's loader sets one to end its workers; none waits for it.
    """

    def __init__(self, context: multiprocessing.context.ForkServerContext) -> None:
        self._value, self.workers = context.RawValue("b", 0), []

    def __getstate__(self) -> dict:
        return {"_value": self._value}

    def set(self) -> None:
        guard.WORKERS.difference_update(self.workers)
        self._value.value = 1

    def is_set(self) -> bool:
        return bool(self._value.value)


class _WorkerContext(multiprocessing.context.ForkServerContext):
    """Makes what one loader needs: first its flag, then its workers."""

    def Event(self) -> _Flag:  # noqa: N802 - multiprocessing's name
        self.flag = _Flag(self)
        return self.flag

    def Process(self, **call: Any) -> _Worker:  # noqa: N802
        self.flag.workers.append(_Worker(**call))
        return self.flag.workers[-1]


def _end_with_parent(_worker: int) -> None:
    """End this worker when the process that it loads for ends, even if that is killed."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
