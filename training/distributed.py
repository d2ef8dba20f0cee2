"""Training by several processes, started by torchrun: who is who, agreement, sums, and rows shared out.

Without torchrun every function here is that of one process, rank 0 of 1.
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

JOIN_SECONDS = 300  # for all processes of a run to come together
TIMEOUT = timedelta(hours=2)  # rank 0 may make attention maps of all training images while the others wait

Answer = TypeVar("Answer")


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
    if process_numbers()[1] == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with contextlib.ExitStack() as stack:
        store, (number, count) = meet(), process_numbers()
        about = {"store": store, "rank": number, "world_size": count, "timeout": TIMEOUT}
        with lost_process():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **about)
        stack.callback(dist.destroy_process_group)
        if rank():
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(lost_process())
        yield


def meet() -> dist.Store:
    """Return the store through which all processes of the run know each other, once all have come.

    Raises:
        UserError: if that takes longer than JOIN_SECONDS, or they cannot come together.
    """
    rank, count = process_numbers()
    place = ", ".join(f"{name}={os.environ.get(name)}" for name in ("MASTER_ADDR", "MASTER_PORT"))
    who, limit = [f"joined/{number}" for number in range(count)], timedelta(seconds=JOIN_SECONDS)
    try:
        store = next(dist.rendezvous("env://", timeout=limit))[0]
        store.set(who[rank], "")
        store.wait(who, limit)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"rank {rank} of {count}: cannot meet the others at {place}, for which it waits {JOIN_SECONDS} s at most "
            f"({_brief(error)}); start all of them, or give another address or port"
        ) from None
    return store


@contextlib.contextmanager
def lost_process() -> Iterator[None]:
    """Raise LostProcessError where the with block fails because another process is gone."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises a bare RuntimeError with the place in its own source
        if isinstance(error, dist.DistError) or "/gloo/" in str(error):
            raise LostProcessError(
                f"another process of this run is gone (seen by rank {process_numbers()[0]}: {_brief(error)}); "
                "its own message says why"
            ) from error
        raise


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0].rpartition("] ")[2][:100]


def require_single_process(what: str) -> None:
    """Raise UserError under torchrun with several processes: ``what`` shares its trainings in another way."""
    if process_numbers()[1] > 1:
        raise UserError(
            f"{what} under torchrun: start the plain command several times instead, they share the trainings"
        )


def on_rank_0(function: Callable[[], Answer]) -> Answer:
    """Return on every process what ``function`` returns on rank 0; where it fails there, all end."""
    if world_size() == 1:
        return function()
    if rank():
        received = [None]
        dist.broadcast_object_list(received)
        if received[0] is None:
            raise SystemExit(2)  # rank 0 has the message
        return received[0][0]
    try:
        answer = function()
    except UserError:
        dist.broadcast_object_list([None])
        raise
    dist.broadcast_object_list([(answer,)])
    return answer


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of ``values`` over all processes, on each."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def my_rows(rows: np.ndarray) -> np.ndarray:
    """Return this process's share of rows (N,): every world_size-th; none is doubled to fill up.

    Raises:
        UserError: if there are fewer rows than processes.
    """
    if len(rows) < world_size():
        raise UserError(f"{len(rows)} images for {world_size()} processes: start fewer")
    return rows[rank() :: world_size()]


def shares_of_all(mine: torch.Tensor) -> list[torch.Tensor]:
    """Return, on every process, what each process holds, by rank."""
    shares: list[torch.Tensor] = [mine] * world_size()
    if world_size() > 1:
        dist.all_gather_object(shares, mine)
    return shares


def all_rows(mine: torch.Tensor) -> torch.Tensor:
    """Return, on every process, the rows (N, ...) of which each holds its share (n, ...), in their first order."""
    shares = shares_of_all(mine)
    whole = mine.new_empty(sum(map(len, shares)), *mine.shape[1:])
    for number, share in enumerate(shares):
        whole[number :: world_size()] = share
    return whole


def copy_buffers_of_rank_0(*models: nn.Module) -> None:
    """Give every process rank 0's buffers: BatchNorm's statistics, which differ where they are not synchronised."""
    if world_size() > 1:
        for buffer in (buffer for model in models for buffer in model.buffers()):
            dist.broadcast(buffer, 0)


def seed_rank(seed: int, epoch: int) -> None:
    """Let torch's generators of several processes draw differently, the same for a continued run."""
    if world_size() > 1:
        torch.manual_seed(int(np.random.SeedSequence([seed, epoch, rank()]).generate_state(1)[0]))
