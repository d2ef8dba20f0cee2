"""What is printed never breaks a script, and what a signal does before, during and after the first one."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest

from jobs import guard

ROOT = Path(__file__).parent.parent
SCRIPT = r"""
import os, sys, types
package = sys.modules["localized_crops"] = types.ModuleType("localized_crops")  # without its __init__, which imports
package.__path__ = [os.path.join(os.environ["PYTHONPATH"], "localized_crops")]  # torch, this takes a tenth of the time
from jobs.guard import run_script

def main(config):
    for stream in (sys.stdout, sys.stderr):
        print("92.1 \xb1 0.3 M\xf6we \udce4", file=stream, flush=config["flush"])
    open("done", "w").close()

run_script(main, lambda words: {"flush": "flush" in words})
"""


def run(folder: Path, *words: str, shell: str = '"$@"', env: dict | None = None, **streams) -> tuple[int, bytes, bytes]:
    """Run SCRIPT; return its status and what it printed."""
    (folder / "script.py").write_text(SCRIPT)
    command = ["bash", "-c", shell, "bash", sys.executable, "script.py", *words]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | (env or {})
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    done = subprocess.run(command, cwd=folder, env=env, timeout=120, **streams)
    return done.returncode, done.stdout or b"", done.stderr or b""


@pytest.mark.parametrize("words", [(), ("flush",)], ids=["at the end", "at once"])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_has_gone_ends_the_script_without_a_word(tmp_path, stream, words):
    reader, writer = os.pipe()
    os.close(reader)
    status, *printed = run(tmp_path, *words, **{stream: writer})
    os.close(writer)
    assert status in (0, 141) and not [text for text in printed if b"rror" in text or b"Traceback" in text]


def test_closed_streams_are_nothing_to_a_script(tmp_path):
    assert run(tmp_path, shell='"$@" >&- 2>&-') == (0, b"", b"")
    assert (tmp_path / "done").exists()


def test_an_ascii_locale_does_not_break_a_finished_run(tmp_path):
    status, out, err = run(tmp_path, env={"PYTHONIOENCODING": "ascii:strict"})
    assert status == 0 and out.startswith(b"92.1 ") and err.startswith(b"92.1 ") and (tmp_path / "done").exists()


def test_what_may_not_be_read_is_not_told_to_be_written():
    line = guard._one_line(PermissionError(13, "Permission denied", "/data/images.txt"))
    assert "/data/images.txt" in line and "write" not in line


# --- signals ------------------------------------------------------------------------------------------------------


def allow_interrupt() -> None:
    """Let SIGINT through (shells let background jobs ignore it)."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_during_the_imports_ends_a_command_without_a_traceback():
    code = f"import sys; sys.modules['__main__'].__file__ = {str(ROOT / 'train.py')!r}; import jobs.early; "
    code += "print('on', flush=True); import time; time.sleep(60)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT}
    process = subprocess.Popen([sys.executable, "-c", code], preexec_fn=allow_interrupt, **pipes)
    assert process.stdout.readline() == b"on\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == b"" and process.returncode == -signal.SIGINT


@pytest.mark.parametrize("number", guard.STOPPING)
def test_a_second_signal_of_any_kind_ends_a_script_that_is_slow_to_end(number):
    before = {one: signal.getsignal(one) for one in guard.STOPPING}
    try:
        with pytest.raises((KeyboardInterrupt, guard.Terminated)):
            guard._stop(number, None)
        assert all(signal.getsignal(one) is signal.SIG_DFL for one in guard.STOPPING)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def test_a_worker_that_was_stopped_does_not_keep_a_script_from_ending():
    worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    worker.start()
    os.kill(worker.pid, signal.SIGSTOP)
    worker.terminate()  # as torch and multiprocessing do; a stopped process does not see it
    try:
        with pytest.raises(SystemExit):
            guard._exit("terminated", guard.Terminated(signal.SIGTERM), 143)
        worker.join(60)
        assert worker.exitcode == -signal.SIGTERM
    finally:
        worker.kill()


def test_workers_may_change_while_they_are_looked_at(monkeypatch):
    """A signal can come at any time, and its handler looks at the workers too."""

    class Worker:
        sentinel = 0

    kept = [Worker() for _ in range(5)]
    monkeypatch.setattr(guard, "WORKERS", weakref.WeakSet(kept))

    def wait(_sentinels, timeout):
        kept.append(Worker())
        guard.WORKERS.add(kept[-1])
        guard.WORKERS.discard(kept[0])
        return []

    monkeypatch.setattr(guard.multiprocessing.connection, "wait", wait)
    guard.raise_for_dead_workers()
    assert len(guard.WORKERS) == 9
