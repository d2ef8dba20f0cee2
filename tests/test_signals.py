"""Ctrl-C and SIGTERM: the right status, one line that says how to go on, nothing left running or in memory."""

import os
import shlex
import signal
import time
from pathlib import Path

import pytest
import stages

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def stop(process: stages.Process, number: int, *, group: bool) -> str:
    """Send a signal, check how the process ends, and return the command that it names."""
    process.send(number, group=group)
    status, told = process.end(), process.told()
    assert status == STATUS[number] and "Traceback" not in told and "Error" not in told, told
    assert not living(process.process.pid)
    line = stages.last_line(told)
    assert line.startswith(f"{SAID[number]}; to go on: python "), told
    return line.partition("to go on: python ")[2]


def living(group: int) -> list[str]:
    """Return the processes of a group that still run, after a moment in which helpers end by themselves."""
    for _ in range(200):
        found = [pid for pid in filter(str.isdigit, os.listdir("/proc")) if group_of(pid) == group]
        if not found:
            return []
        time.sleep(0.05)
    return found


def group_of(pid: str) -> int | None:
    """Return the process group of a process, None if it has ended."""
    try:
        state, _, group = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:3]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(group) if state != "Z" else None


def go_on(command: str, log: Path) -> None:
    """Run the command that a stopped stage named, in the folder of the scripts."""
    script, *words = shlex.split(command)
    process = stages.Process([str(stages.ROOT / script), *words], log)
    assert process.end() == 0, process.told()


@pytest.fixture
def shared_memory():
    """Check that the test leaves nothing in shared memory."""
    before = set(os.listdir("/dev/shm"))
    yield
    left = set(os.listdir("/dev/shm")) - before
    for _ in range(600):  # what other processes of this machine use goes when they end
        left &= set(os.listdir("/dev/shm"))
        if not left:
            return
        time.sleep(0.1)
    raise AssertionError(f"left in shared memory: {sorted(left)}")


@pytest.fixture(scope="module")
def whole(birds, tmp_path_factory):
    """Return the folder of an unbroken training."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    stages.finish(stages.train_stage(birds), folder, folder.with_name("log"), "cache=disk")
    return folder


@pytest.mark.parametrize(
    ("number", "group", "workers"),
    [
        (signal.SIGTERM, False, 0),
        (signal.SIGINT, True, 1),
        pytest.param(signal.SIGTERM, True, 1, marks=pytest.mark.slow),
    ],
    ids=["SIGTERM", "Ctrl-C with a worker", "SIGTERM to all with a worker"],
)
def test_a_stopped_training_goes_on_to_the_same_weights(birds, whole, tmp_path, shared_memory, number, group, workers):
    folder, log = tmp_path / "run", tmp_path / "log"
    stage = stages.train_stage(birds)
    with stages.started(stage, folder, log, f"num_workers={workers}", "cache=disk") as process:
        assert process.wait_until(lambda: (folder / "last.pt").exists())
        command = stop(process, number, group=group)
    assert command == f"train.py resume=true run_dir={folder}"
    stages.check_whole(folder)
    assert stages.scratch_files(tmp_path) == [] and not (folder / "summary.json").exists()
    go_on(command, log)
    stages.assert_same(whole, folder)


def test_ctrl_c_while_workers_start_is_one_line(birds, tmp_path, shared_memory):
    """Workers that are still importing would each print a traceback."""
    folder = tmp_path / "run"
    log = tmp_path / "log"
    with stages.started(stages.train_stage(birds), folder, log, "num_workers=2", forked=False) as process:
        assert process.wait_until(lambda: (folder / "config.json").exists())
        time.sleep(0.7)
        stop(process, signal.SIGINT, group=True)


@pytest.mark.parametrize("name", ["mask", "dino"])
def test_a_stopped_generator_names_the_command_that_goes_on(name, birds, tmp_path):
    stage = getattr(stages, f"{name}_stage")(birds)
    with stages.started(stage, tmp_path / "work", tmp_path / "log") as process:
        assert process.wait_until(lambda: stages.units_done(tmp_path / "work") > 1)
        command = stop(process, signal.SIGINT, group=True)
    assert stages.scratch_files(tmp_path) == []
    assert shlex.split(command) == [str(stages.ROOT / stage.script), *stage.command(tmp_path / "work")[1:]]


def test_masks_without_a_named_folder_are_gone_on_with(birds_copy, tmp_path):
    stage = stages.mask_stage(birds_copy)
    process = stages.Process([str(stages.ROOT / stage.script), *stage.words], tmp_path / "log")
    assert process.wait_until(lambda: stages.units_done(birds_copy / "masks_0") > 0)
    command = stop(process, signal.SIGTERM, group=False)
    assert command.endswith(f" mask.folder={birds_copy / 'masks_0'}")


def test_a_stopped_sweep_names_its_own_command(birds, tmp_path):
    stage = stages.sweep_stage(birds)
    with stages.started(stage, tmp_path / "sweep", tmp_path / "log") as process:
        assert process.wait_until(lambda: list((tmp_path / "sweep").glob("*/last.pt")))
        command = stop(process, signal.SIGTERM, group=False)
    assert "sweeprun=true" in command and f"run_dir={tmp_path / 'sweep'}" in command and "resume" not in command


def test_a_second_signal_ends_a_script_that_is_slow_to_end(tmp_path):
    code = "import time; from jobs import guard\n" + (
        "def main(config):\n"
        "    try:\n        print('on'); time.sleep(60)\n"
        "    finally:\n        print('slow'); time.sleep(60)\n"
        "guard.run_script(main, lambda words: {})"
    )
    (tmp_path / "slow.py").write_text(code)
    process = stages.Process([str(tmp_path / "slow.py")], tmp_path / "log")
    for word in ("on", "slow"):
        assert process.wait_until(lambda: word in process.printed())  # noqa: B023 - called before it changes
        process.send(signal.SIGINT, group=False)
    assert process.end() == -signal.SIGINT and process.told() == ""


def test_an_interruption_before_the_work_names_no_command(birds, tmp_path):
    stage = stages.train_stage(birds, "dataset.root=/nowhere/at/all")
    with stages.started(stage, tmp_path / "run", tmp_path / "log") as process:
        assert process.end() == 2
        assert "to go on" not in process.told()
