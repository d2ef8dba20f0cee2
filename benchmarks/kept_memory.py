"""Time and memory of training steps and forward passes when freed memory is kept, over giving it back to the system.

Reads nothing and writes nothing: the weights are random. Each way is a process of its own, as nobody can take the
choice back; the two alternate, with a first round that is not counted.

    python benchmarks/kept_memory.py                # four minutes on one core
    python benchmarks/kept_memory.py rounds=9 steps=5 batch_size=32
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import nn

from measuring import alternated, memory, parse_settings, ratio

sys.path.insert(0, str(Path(__file__).parent.parent))

import models
from jobs.machine import set_up_cpu
from utils import environment

SETTINGS = {"rounds": 5, "steps": 4, "batch_size": 32, "threads": 1, "work": "all", "kept": "both"}


def main(settings: dict) -> None:
    """Measure and print the table; or, with ``kept``, be one of the processes."""
    if settings["kept"] != "both":
        print(json.dumps(measure(settings)))
        return
    print("| | s of the clock, given back | kept / given back: clock | time in the kernel | most memory |")
    print("|---|---|---|---|---|")
    for work in WORKS if settings["work"] == "all" else [settings["work"]]:
        found = {"kept": [], "given back": []}

        def run(kept: str, work: str = work, found: dict = found) -> float:
            words = [f"{key}={value}" for key, value in (settings | {"work": work, "kept": kept}).items()]
            done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, check=True, text=True)
            found[kept].append(json.loads(done.stdout))
            return found[kept][-1][0]

        times = alternated({kept: lambda _, kept=kept: run(kept) for kept in found}, settings["rounds"])
        base = sorted(times["given back"])[settings["rounds"] // 2]
        rounds = {kept: numbers[1:] for kept, numbers in found.items()}  # the first one warmed up
        ratios = [ratio(*([numbers[n] for numbers in rounds[kept]] for kept in found)) for n in range(3)]
        print(f"| {work} | {base:.2f} | {' | '.join(ratios)} |", flush=True)
    about = environment()
    print(f"\n{settings}; {about['processor']}, torch {about['torch']}, Python {about['python']}")


def measure(settings: dict) -> tuple[float, float, float]:
    """Return the seconds of the clock and those in the kernel for some steps, and the process's most memory in MiB."""
    torch.set_num_threads(settings["threads"])
    if settings["kept"] == "kept":
        set_up_cpu(settings["threads"])
    step = WORKS[settings["work"]](settings["batch_size"])
    step()
    start, before = time.perf_counter(), kernel_seconds()
    for _ in range(settings["steps"]):
        step()
    return time.perf_counter() - start, kernel_seconds() - before, memory("VmHWM")


def kernel_seconds() -> float:
    """Return the seconds that the kernel worked for this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_stime


def training(model: nn.Module, size: int, batch_size: int) -> Callable[[], object]:
    """Return a training step on random images of ``size`` pixels."""
    model = model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    images = torch.randn(batch_size, 3, size, size).to(memory_format=torch.channels_last)
    labels = torch.arange(batch_size) % 8

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def forward(model: nn.Module, size: int, batch_size: int) -> Callable[[], object]:
    """Return a forward pass."""
    images = torch.randn(batch_size, 3, size, size)
    return torch.inference_mode()(lambda: model.eval()(images))


WORKS = {
    "training toyresnet, 64 px": lambda batch: training(
        models.build_model("toyresnet", 8, image_size=64, patch_size=16), 64, 2 * batch
    ),
    "training EfficientNet-Lite0, 224 px": lambda batch: training(
        timm.create_model("tf_efficientnet_lite0", num_classes=8), 224, batch
    ),
    "training ResNet-50, 224 px": lambda batch: training(timm.create_model("resnet50", num_classes=8), 224, batch),
    "ViT-S/14, forward, 518 px": lambda batch: forward(
        timm.create_model("vit_small_patch14_dinov2", num_classes=0), 518, batch // 8
    ),
}

if __name__ == "__main__":
    main(parse_settings(sys.argv[1:], SETTINGS))
