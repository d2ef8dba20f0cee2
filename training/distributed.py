"""Training by several processes, started by torchrun: ranks, broadcast, all-reduce, sharding.

Without torchrun there is one process, rank 0 of 1, and nothing is communicated.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from jobs.guard import DeadWorkerError
from jobs.torchrun import process_numbers
from localized_crops.files import UserError

JOIN_SECONDS = 300  # until all processes of a run must have joined
TIMEOUT = timedelta(hours=2)  # the others wait while rank 0 makes attention maps of all training images


def rank() -> int:
    """Return the number of this process in the run, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, for the time of the with block; ranks above 0 print nothing.

    Raises:
        UserError: if the processes do not come together.
        DeadWorkerError: if another process dies.
    """
    rank, count = process_numbers()
    if count == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with lost_process(), contextlib.ExitStack() as stack:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=meet(), rank=rank, world_size=count, timeout=TIMEOUT)
        stack.callback(dist.destroy_process_group)
        if rank:
            devnull = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(devnull))
        yield


def meet() -> dist.Store:
    """Return the key-value store that all processes of the run share, once all have joined, within JOIN_SECONDS."""
    rank, count = process_numbers()
    keys, limit = [f"joined/{number}" for number in range(count)], timedelta(seconds=JOIN_SECONDS)
    try:
        store = next(dist.rendezvous("env://", timeout=limit))[0]
        store.set(keys[rank], "")
        store.wait(keys, limit)
    except (RuntimeError, ValueError, OSError) as error:
        address = ", ".join(f"{name}={os.environ.get(name)}" for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise UserError(
            f"rank {rank} of {count}: cannot meet the others at {address} within {JOIN_SECONDS} s ({_brief(error)}); "
            "start all of them, or give another address or port"
        ) from None
    return store


@contextlib.contextmanager
def lost_process() -> Iterator[None]:
    """Raise DeadWorkerError where the with block fails because another process is gone."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises a plain RuntimeError that begins with a place in gloo's source
        if isinstance(error, dist.DistError) or "/gloo/" in str(error):
            raise DeadWorkerError(
                f"another process of this run is gone (seen by rank {process_numbers()[0]}: {_brief(error)}); "
                "its own message says why"
            ) from error
        raise


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0].rpartition("] ")[2][:100]


def on_rank_0(function: Callable[[], Any]) -> Any:
    """Call ``function`` on rank 0 and return its result on every process; if it raises UserError, all processes end."""
    if world_size() == 1:
        return function()
    outcome = [None]  # the result in a tuple; None: rank 0 failed
    try:
        if rank() == 0:
            outcome = [(function(),)]
    except UserError:
        dist.broadcast_object_list(outcome)
        raise
    dist.broadcast_object_list(outcome)
    if outcome[0] is None:
        raise SystemExit(2)  # rank 0 has the message
    return outcome[0][0]


def my_rows(rows: np.ndarray) -> np.ndarray:
    """Return this process's shard of rows (N,), a contiguous part; UserError if there are too few for all."""
    if len(rows) < world_size():
        raise UserError(f"{len(rows)} images for {world_size()} processes: start fewer")
    return np.array_split(rows, world_size())[rank()]


def all_rows(mine: torch.Tensor) -> torch.Tensor:
    """Return the rows (n, ...) that each process holds, on the CPU, as one tensor (N, ...) in the order of ranks."""
    if world_size() == 1:
        return mine
    shares = [None] * world_size()
    dist.all_gather_object(shares, mine)
    return torch.cat(shares)
