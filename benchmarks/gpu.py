"""Measure every row that needs a GPU, the most important first, in eight minutes and with one command.

    python benchmarks/gpu.py                       # results: runs/gpu.jsonl, a line each, and a table at the end
    PHOTOS=FOLDER WEIGHTS=FOLDER python benchmarks/gpu.py     # FOLDER in CUB's format, and of the two weights files

It needs no network and draws its images itself. Each part is a process with a time limit; what it finds is written at
once, so that a run that is cut off keeps what it has. Rows that need packages or folders that are not there say so. The
parts can be named to run these alone: `python benchmarks/gpu.py sam train`. Without a GPU the same code runs at toy
size on the CPU: those figures mean nothing.
"""

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

# Each part is a fork of this process: asking for CUDA here, or a pool of threads, would spoil it for them.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import gpu_parts

OUT, BUDGET = Path("runs/gpu.jsonl"), 480.0  # seconds of all parts
# Seconds that each part may take, in order of worth; what a part leaves over serves the later ones.
PARTS = {
    "precision": (gpu_parts.precision, 60),
    "tests": (gpu_parts.gpu_tests, 60),
    "attention": (gpu_parts.attention, 60),
    "stage": (gpu_parts.dino_stage, 90),
    "sam": (gpu_parts.sam, 150),
    "train": (gpu_parts.training, 120),
    "bbox": (gpu_parts.candidates, 45),
    "compile": (gpu_parts.compiled, 90),
    "photos": (gpu_parts.photos, 300),
}
COLUMNS = ("part", "row", "result", "seconds")


def main(names: list[str], out: Path = OUT, budget: float = BUDGET) -> None:
    """Run the parts and print the table."""
    unknown = set(names) - PARTS.keys()
    if unknown:
        raise SystemExit(f"unknown parts {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    out = out.resolve()  # parts may work in another folder
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("")
    more = 1 if gpu_parts.on_cuda() else 10  # times: a CPU may be busy with other things
    end = time.monotonic() + more * budget
    run_part("machine", gpu_parts.machine, more * 60, out)
    for name, (part, limit) in PARTS.items():
        if not names or name in names:
            run_part(name, part, min(more * limit, end - time.monotonic()), out)
    print(table(out))


def run_part(name: str, part: gpu_parts.Part, limit: float, out: Path) -> None:
    """Run one part in a process of its own; what ends it before its end becomes a line too."""
    print(f"--- {name}", flush=True)
    if limit < 5:
        write(out, name, "not run", {"why": "no time was left"}, 0.0)
        return
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        process = multiprocessing.get_context("fork").Process(target=work, args=(name, part, out, Path(folder)))
        process.start()
        process.join(limit)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)  # its own processes too
            process.join()
            write(out, name, "cut off", {"why": f"its {limit:.0f} s were over"}, time.monotonic() - start)
        elif process.exitcode:
            write(out, name, "died", {"why": f"exit status {process.exitcode}"}, time.monotonic() - start)


def work(name: str, part: gpu_parts.Part, out: Path, folder: Path) -> None:
    """Write a line for each row of a part, or what went wrong."""
    os.setpgid(0, 0)
    start = time.monotonic()
    try:
        for row, found in part(folder):
            write(out, name, row, found, time.monotonic() - start)
    except ModuleNotFoundError as error:
        write(out, name, "not run", {"why": f"needs {error.name}, which is not installed"}, time.monotonic() - start)
    except BaseException as error:  # SystemExit too
        traceback.print_exc()
        write(out, name, "failed", {"why": f"{type(error).__name__}: {str(error)[:300]}"}, time.monotonic() - start)


def write(out: Path, part: str, row: str, found: dict, seconds: float) -> None:
    """Append one result and show it."""
    line = json.dumps({"part": part, "row": row, "seconds": round(seconds, 1)} | found)
    with open(out, "a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def table(out: Path) -> str:
    """Return the Markdown table of all lines."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for record in map(json.loads, out.read_text().splitlines()):
        found = {key: value for key, value in record.items() if key not in COLUMNS}
        result = "; ".join(f"{key} {value}" for key, value in found.items())
        lines.append(f"| {record['part']} | {record['row']} | {result} | {record['seconds']:g} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
