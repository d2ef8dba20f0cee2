"""What torchrun tells each of its processes, in environment variables."""

import os

from localized_crops.files import UserError


def process_numbers() -> tuple[int, int]:
    """Return (rank, world size); (0, 1) without torchrun.

    Raises:
        UserError: if these variables hold something else.
    """
    rank, world_size = _number("RANK", 0, 0), _number("WORLD_SIZE", 1, 1)
    if rank >= world_size:
        raise UserError(f"RANK={rank}, WORLD_SIZE={world_size}: not as torchrun sets them; unset both")
    return rank, world_size


def local_rank() -> int:
    """Return the number of this process on its machine."""
    return _number("LOCAL_RANK", 0, 0)


def local_world_size() -> int:
    """Return how many processes torchrun started on this machine."""
    return _number("LOCAL_WORLD_SIZE", 1, 1)


def _number(name: str, default: int, least: int) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise UserError(f"{name}={text[:80]}: not as torchrun sets it; unset it")
    return int(text)
