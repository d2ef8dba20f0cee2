"""Training by several processes, started by torchrun: ranks, broadcast, all-reduce, sharding.

Without torchrun there is one process, rank 0 of 1, and nothing is communicated.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
from torch import distributed as dist
from torch import nn

from jobs.guard import DeadWorkerError
from jobs.torchrun import process_numbers
from localized_crops.files import UserError

JOIN_SECONDS = 300  # until all processes of a run must have joined
TIMEOUT = timedelta(hours=2)  # the others wait while rank 0 makes attention maps of all training images

Result = TypeVar("Result")


class LostProcessError(DeadWorkerError):
    """Another process of the run is gone."""


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
        LostProcessError: if another process dies.
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
    """Raise LostProcessError where the with block fails because another process is gone."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises a plain RuntimeError that begins with a place in gloo's source
        if isinstance(error, dist.DistError) or "/gloo/" in str(error):
            raise LostProcessError(
                f"another process of this run is gone (seen by rank {process_numbers()[0]}: {_brief(error)}); "
                "its own message says why"
            ) from error
        raise


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0].rpartition("] ")[2][:100]


def on_rank_0(function: Callable[[], Result]) -> Result:
    """Call ``function`` on rank 0 and return its result on every process; if it raises UserError, all processes end."""
    if world_size() == 1:
        return function()
    if rank():
        received = [None]
        dist.broadcast_object_list(received)
        if received[0] is None:
            raise SystemExit(2)  # rank 0 has the message
        return received[0][0]
    try:
        result = function()
    except UserError:
        dist.broadcast_object_list([None])
        raise
    dist.broadcast_object_list([(result,)])
    return result


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of ``values`` over all processes, on each."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def my_rows(rows: np.ndarray) -> np.ndarray:
    """Return this process's shard of rows (N,): every world_size-th one; UserError if there are too few for all."""
    if len(rows) < world_size():
        raise UserError(f"{len(rows)} images for {world_size()} processes: start fewer")
    return rows[rank() :: world_size()]


def shares_of_all(mine: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors of all processes, in the order of their ranks, on every process."""
    shares: list[torch.Tensor] = [mine] * world_size()
    if world_size() > 1:
        dist.all_gather_object(shares, mine)
    return shares


def all_rows(mine: torch.Tensor) -> torch.Tensor:
    """Return the rows (N, ...) whose shards of `my_rows` the processes hold (n, ...), in order, on every process."""
    shares = shares_of_all(mine)
    whole = mine.new_empty(sum(map(len, shares)), *mine.shape[1:])
    for number, share in enumerate(shares):
        whole[number :: world_size()] = share
    return whole


def copy_buffers_of_rank_0(*models: nn.Module) -> None:
    """Broadcast rank 0's buffers: BatchNorm's statistics, which differ between processes without model.sync_bn."""
    if world_size() > 1:
        for buffer in (buffer for model in models for buffer in model.buffers()):
            dist.broadcast(buffer, 0)


def seed_rank(seed: int, epoch: int) -> None:
    """Seed torch's generators of several processes differently, by the epoch so that a resumed run draws the same."""
    if world_size() > 1:
        torch.manual_seed(int(np.random.SeedSequence([seed, epoch, rank()]).generate_state(1)[0]))
