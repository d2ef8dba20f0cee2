"""What is printed never breaks a script: readers that have gone, closed streams, an encoding that lacks a character."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
