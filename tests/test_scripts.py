"""The small scripts, run as a user would, and what every command says of itself."""

import runpy
import signal
import sys

import pytest
import stages

from jobs.guard import STOPPING

FILES = [*stages.ROOT.glob("*.py"), *stages.ROOT.glob("toybirds/*.py")]
COMMANDS = sorted(path for path in FILES if "run_script(" in path.read_text())


def run(folder, script, *words):
    with stages.Process([str(stages.ROOT / script), *words], folder / "log") as process:
        return process.end(), process.printed(), stages.last_line(process.told())


def test_a_report_on_a_data_set_names_what_is_broken(birds_copy, tmp_path):
    status, printed, _ = run(tmp_path, "check_dataset.py", "dataset.name=cub", f"dataset.root={birds_copy}")
    assert status == 0 and "72 images, 8 classes" in printed and "all 72 images can be read" in printed
    broken = sorted((birds_copy / "images").rglob("*.jpg"))[:2]
    for path in broken:
        path.write_bytes(path.read_bytes()[:900])
    status, printed, error = run(tmp_path, "check_dataset.py", "dataset.name=cub", f"dataset.root={birds_copy}")
    assert status == 2 and all(path.name in printed for path in broken)
    assert error == f"error: {birds_copy}: 2 of 72 images cannot be read; they are listed above"


def test_boxes_and_crops_are_drawn(birds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["dataset.name=cub", f"dataset.root={birds}", f"visualize.out={tmp_path / 'a.png'}", "visualize.images=2"]
    status, printed, _ = run(tmp_path, "visualize.py", *words)
    assert status == 0 and "2 images" in printed
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def handlers():
    """Put back the signal handlers that a command leaves behind."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_every_command_prints_its_settings_on_demand_and_does_no_work(path, handlers, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr()
    assert printed.out.startswith(f"python {path.name} ") and '"dataset": {' in printed.out and printed.err == ""
    assert list(tmp_path.iterdir()) == []


def test_the_commands_are_found():
    assert len(COMMANDS) > 10
