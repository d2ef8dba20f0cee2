"""Time and peak memory of reading the CLS attention, as ratios to the bare forward pass of the same model.

Reads nothing and writes nothing: the weights are random, which changes neither time nor memory.

    python benchmarks/attention_cost.py
    python benchmarks/attention_cost.py model=vit_small_patch16_dinov3 height=448 width=512 batch_size=4 rounds=15

Three passes are compared: ``model(images)``; the same with the hook that records the CLS row (the extra step alone);
and ``cls_attention``, which also ends the pass at the last block. Rounds alternate the passes, so that a machine that
slows down slows all of them; given are medians of the per-round ratios and their quartiles. The default takes a
minute on one CPU core.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch

from measuring import alternated, parse_settings, quartiles, timed_on

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from localized_crops.attention import cls_attention, cls_attention_and_logits
from utils import autocast, cpu_name

SETTINGS = {
    "model": "vit_small_patch14_dinov2",  # a timm name
    "height": 392,  # pixels, whole patches
    "width": 448,
    "batch_size": 4,
    "rounds": 9,
    "device": "cuda" if torch.cuda.is_available() else "cpu",
    "precision": "float32",  # or bf16, fp16: on CUDA
    "threads": 1,  # of torch on the CPU
}


def main(settings: dict) -> None:
    """Measure and print the table."""
    torch.set_num_threads(settings["threads"])
    passes = build_passes(settings)
    times = time_alternated(passes, settings["rounds"], settings["device"])
    peaks = {name: peak_memory(run, settings["device"]) for name, run in passes.items()}
    print(describe_machine(settings))
    print_table(times, peaks)


def build_passes(settings: dict) -> dict[str, Callable[[], object]]:
    """Return the passes to compare, the bare one first."""
    device = settings["device"]
    model = timm.create_model(settings["model"], dynamic_img_size=True).eval().to(device)
    shape = (settings["batch_size"], 3, settings["height"], settings["width"])
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)

    def within(run: Callable[[], object]) -> Callable[[], object]:
        def whole() -> None:
            with autocast(torch.device(device), settings["precision"]):
                run()

        return whole

    return {
        "bare forward": within(lambda: model(images)),
        "forward + CLS row": within(lambda: cls_attention_and_logits(model, images)),
        "cls_attention (stops)": within(lambda: cls_attention(model, images)),
    }


@torch.inference_mode()
def time_alternated(passes: dict, rounds: int, device: str) -> dict[str, list[float]]:
    """Return the seconds of each pass in each round; one round of warm-up is not counted."""
    ways = {name: lambda _, run=run: timed_on(device, run, time.perf_counter) for name, run in passes.items()}
    return alternated(ways, rounds)


@torch.inference_mode()
def peak_memory(run: Callable[[], object], device: str) -> int:
    """Return the bytes that one pass holds at most, beyond what was held before it (weights, images)."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    return max_running_sum(load_allocations(profile))


def load_allocations(profile: torch.profiler.profile) -> list[int]:
    """Return the bytes of each CPU allocation (positive) and release (negative), in the order of time."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]"]
    return [event["args"]["Bytes"] for event in sorted(memory, key=lambda event: event["ts"])]


def max_running_sum(sizes: list[int]) -> int:
    """Return the largest sum over a prefix of ``sizes``."""
    held = peak = 0
    for size in sizes:
        held += size
        peak = max(peak, held)
    return peak


def describe_machine(settings: dict) -> str:
    """Return what the numbers depend on."""
    device = settings["device"]
    hardware = torch.cuda.get_device_name() if device.startswith("cuda") else cpu_name()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}"
    return f"{hardware}, {settings['threads']} thread(s); {versions}\n{json.dumps(settings)}\n"


def print_table(times: dict[str, list[float]], peaks: dict[str, int]) -> None:
    """Print one Markdown row per pass: median time, peak memory, and their ratios to the bare pass."""
    bare = next(iter(times))
    print("| pass | median s | time / bare (quartiles) | peak MB | peak / bare |\n|---|---|---|---|---|")
    for name, seconds in times.items():
        low, middle, high = quartiles(seconds, times[bare])
        print(
            f"| {name} | {statistics.median(seconds):.3f} | {middle:.3f} ({low:.3f}–{high:.3f}) "
            f"| {peaks[name] / 1e6:.1f} | {peaks[name] / peaks[bare]:.3f} |"
        )


if __name__ == "__main__":
    main(parse_settings(sys.argv[1:], SETTINGS))
