"""The lists of packages agree: lower bounds, the lock file, the table of licences."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
LISTS = ("requirements.txt", "requirements-dev.txt")


def required(name: str) -> dict[str, Requirement]:
    """Return the requirements of a file by name."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    found = [Requirement(line) for line in lines if line and not line.startswith("-")]
    return {one.name: one for one in found}


def locked() -> dict[str, str]:
    """Return the versions of the lock file by name."""
    lines = [line for line in (ROOT / "requirements-lock.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.+!]+", line)] == []  # no paths, no addresses
    return dict(line.split("==") for line in lines)


@pytest.mark.parametrize("name", LISTS)
def test_every_requirement_has_a_lower_bound(name):
    assert all(re.fullmatch(r">=[\d.]+", str(one.specifier)) for one in required(name).values())


def test_the_lock_file_keeps_the_bounds_and_holds_nothing_for_developers_alone():
    versions, wanted = locked(), required("requirements.txt")
    assert [name for name in wanted if name not in versions] == []
    assert [name for name, one in wanted.items() if Version(versions[name]) not in one.specifier] == []
    assert required("requirements-dev.txt").keys() & versions.keys() == set()


def test_every_requirement_has_a_licence_here_and_in_the_table():
    command = [sys.executable, ROOT / ".ci" / "versions.py", "licences"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    table = (ROOT / "docs" / "reliability.md").read_text()
    for name in (name for file in LISTS for name in required(file)):
        assert re.search(rf"^\| {name} \| [\w.+]+ \| \w", printed, re.MULTILINE)
        assert re.search(rf"^\| {name} \| [\w.+]+ \| \w", table, re.MULTILINE)
    assert "not stated" not in printed
