#!/usr/bin/env python3
"""Run the tests with the oldest and with the newest packages that the requirements allow; print one table.

Each set is installed in a fresh virtual environment (about 5 GB, removed afterwards).

    .ci/versions.py oldest newest                                   # with the Python that runs this
    .ci/versions.py newest --python python3.12 -- tests/test_train.py
    .ci/versions.py newest --lock                                   # if the tests pass, write requirements-lock.txt
    .venv/bin/python .ci/versions.py licences                       # of the packages that this Python has
"""

import argparse
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHOWN = ("torch", "torchvision", "timm", "numpy", "scipy", "scikit-image", "pillow", "matplotlib")
PYTEST = ["-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider"]
LOCK_HEAD = """\
# Every package of an environment in which all tests passed: Python {python}, {system}.
# Made by .ci/versions.py newest --lock; install it with pip install -r requirements-lock.txt
"""


def main() -> int:
    """Install and test the sets that the command line names; return 1 if tests failed in one of them."""
    words = parse(sys.argv[1:])
    if words.sets == ["licences"]:
        print_licences()
        return 0
    results = [test_set(which, words) for which in words.sets]
    names = [*SHOWN, "seconds", "tests"]
    print("\n| set | Python | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 2))
    for which, result in zip(words.sets, results, strict=True):
        print(f"| {which} | {result['python']} | " + " | ".join(result.get(name, "") for name in names) + " |")
    return int(any(result["status"] for result in results))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the command line; what follows -- is for pytest."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", choices=("oldest", "newest", "licences"))
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the environments")
    parser.add_argument("--lock", action="store_true", help="write requirements-lock.txt from the newest set")
    words = parser.parse_args(arguments[:end])
    words.pytest = arguments[end + 1 :]
    if "licences" in words.sets and len(words.sets) > 1:
        parser.error("licences stands alone")
    return words


def test_set(which: str, words: argparse.Namespace) -> dict:
    """Install one set, run the tests, return what belongs in the table and pytest's status."""
    with tempfile.TemporaryDirectory(prefix="versions-") as folder:
        subprocess.run([words.python, "-m", "venv", folder], check=True)
        python = f"{folder}/bin/python"
        install(python, "requirements.txt", which)
        packages = frozen(python)
        install(python, "requirements-dev.txt", which)
        start = time.perf_counter()
        command = [python, *PYTEST, *words.pytest]
        tests = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        print(tests.stdout[-6000:], tests.stderr[-2000:], flush=True)
        version = subprocess.run([python, "-V"], check=True, capture_output=True, text=True).stdout.split()[1]
    if words.lock and which == "newest" and tests.returncode == 0:
        write_lock(packages, version)
    return packages | {
        "python": version,
        "seconds": f"{time.perf_counter() - start:.0f}",
        "tests": (tests.stdout.strip().splitlines() or ["none"])[-1].strip("= "),
        "status": tests.returncode,
    }


def install(python: str, name: str, which: str) -> None:
    """Install the requirements of one file, the oldest allowed or the newest."""
    wanted = requirements((ROOT / name).read_text())
    if which == "oldest":
        wanted = [line.replace(">=", "==") for line in wanted]
    subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True)


def requirements(text: str) -> list[str]:
    """Return the requirements of a file's text, without comments and options."""
    lines = [re.sub(r"\s*#.*", "", line).strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("-")]


def frozen(python: str) -> dict[str, str]:
    """Return the version of every package by name."""
    done = subprocess.run([python, "-m", "pip", "freeze"], check=True, capture_output=True, text=True)
    return dict(line.split("==") for line in done.stdout.split())


def print_licences() -> None:
    """Print a table of the installed requirements and their licences."""
    lines = [
        line
        for name in ("requirements.txt", "requirements-dev.txt")
        for line in requirements((ROOT / name).read_text())
    ]
    print("| package | version | licence |\n|---|---|---|")
    for name in (re.split("[<>=]", line)[0] for line in lines):
        print(f"| {name} | {distribution(name).version} | {licence(name)} |")


def licence(name: str) -> str:
    """Return the licence that an installed package's metadata states, or the head of the one that it brings."""
    package = distribution(name)
    classes = [c for c in package.metadata.get_all("Classifier") or [] if c.startswith("License :: ")]
    stated = package.metadata.get("License-Expression") or ", ".join(c.rpartition(" :: ")[2] for c in classes)
    text = stated or package.metadata.get("License") or package.read_text("LICENSE") or "not stated"
    head = [line.strip() for line in text.splitlines() if line.strip()][:2]
    return " ".join(head)


def write_lock(packages: dict[str, str], python: str) -> None:
    """Write requirements-lock.txt."""
    head = LOCK_HEAD.format(python=python, system=f"{platform.system()} {platform.machine()}")
    (ROOT / "requirements-lock.txt").write_text(head + "".join(f"{n}=={v}\n" for n, v in packages.items()))


if __name__ == "__main__":
    sys.exit(main())
