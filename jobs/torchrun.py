"""What torchrun tells each of its processes, in environment variables."""

import os

from localized_crops.files import UserError


def process_numbers() -> tuple[int, int]:
    """Return (rank, world size); (0, 1) without torchrun; UserError if the two do not go together."""
    rank, world_size = torchrun_number("RANK", 0), torchrun_number("WORLD_SIZE", 1)
    if rank >= world_size:
        raise UserError(f"RANK={rank}, WORLD_SIZE={world_size}: not as torchrun sets them; unset both")
    return rank, world_size


def torchrun_number(name: str, least: int) -> int:
    """Return the whole number in a variable that torchrun sets, ``least`` without torchrun; UserError if it is none."""
    text = os.environ.get(name, str(least))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise UserError(f"{name}={text[:80]}: not as torchrun sets it; unset it")
    return int(text)


def require_single_process(setting: str) -> None:
    """Raise UserError if ``setting``, whose trainings separate processes share, is used under torchrun."""
    if process_numbers()[1] > 1:
        raise UserError(f"{setting} under torchrun: start the plain command several times, they share the trainings")
