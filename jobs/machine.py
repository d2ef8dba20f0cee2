"""What a script computes on: device, precision, threads, memory, random numbers."""

import ctypes
import os
import random

import numpy as np
import torch

from jobs.torchrun import torchrun_number
from localized_crops.files import UserError, first_line

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # options of glibc's mallopt, in bytes


def choose_device(device: str | None) -> torch.device:
    """Return the device to compute on; UserError if this machine does not have it.

    None or "cuda" is this process's own GPU where there is one; None else is the CPU.
    """
    own_gpu = device in (None, "cuda") and torch.cuda.is_available()
    name = f"cuda:{torchrun_number('LOCAL_RANK', 0)}" if own_gpu else device or "cpu"
    try:
        chosen = torch.device(name)
        torch.zeros(1, device=chosen).item()  # "meta" makes tensors without values
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name}: not available here ({first_line(error)})") from None
    return chosen


def precision_on(device: torch.device, amp: str) -> str:
    """Return in which precision networks compute: ``amp`` (none, bf16 or fp16) on CUDA, else float32."""
    return amp if device.type == "cuda" and amp != "none" else "float32"


def set_up_cpu(threads: int | None) -> None:
    """Let torch compute in so many threads, and keep freed memory for the next step.

    More threads than cores stand still: there is at most one a core; None: torch's choice. glibc gives large blocks
    back to the system when they are freed, which then clears every page of the next ones: up to half the time of a
    training step (benchmarks/kept_memory.py). The process grows to its peak and stays there.
    """
    if threads:
        torch.set_num_threads(min(threads, os.cpu_count() or 1))
    if set_option := getattr(ctypes.CDLL(None), "mallopt", None):  # glibc's alone
        if not set_option(M_MMAP_THRESHOLD, 2**30):  # older versions take 32 MiB at most
            set_option(M_MMAP_THRESHOLD, 2**25)
        set_option(M_TRIM_THRESHOLD, 2**31 - 1)


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed Python, NumPy and torch; ``deterministic`` makes torch refuse what it cannot repeat."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by torch's own error message
    torch.use_deterministic_algorithms(deterministic)
