import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import utils
from localized_crops import files
from localized_crops.files import UserError

ROOT = Path(__file__).parent.parent


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "value.json"
    files.save_json(path, {"a": 1})
    with pytest.raises(ValueError):
        files.save_json(path, {"a": float("nan")})
    with pytest.raises(RuntimeError), files.whole_file(path) as scratch:
        scratch.write_text("half")
        raise RuntimeError
    assert files.load_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


def test_files_have_the_mode_that_the_user_asked_for(tmp_path):
    before = os.umask(0o002)
    try:
        files.save_json(tmp_path / "shared.json", 1)
        utils.save_tensors(tmp_path / "shared.pt", torch.ones(1))
    finally:
        os.umask(before)
    for name in ("shared.json", "shared.pt"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o664


def test_a_log_comes_back_and_a_torn_line_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    assert utils.load_log(path) == []
    utils.save_log(path, [{"epoch": 1}, {"epoch": 2}])
    assert utils.load_log(path) == [{"epoch": 1}, {"epoch": 2}]
    path.write_text('{"epoch": 1}\n{"epo')
    with pytest.raises(UserError, match=r"log\.jsonl:2"):
        utils.load_log(path)


def test_new_folders_are_numbered(tmp_path):
    names = [utils.new_folder(tmp_path / "runs", "bird").name for _ in range(3)]
    assert names == ["bird_0", "bird_1", "bird_2"]


def test_a_folder_is_locked_for_others_until_its_holder_ends(tmp_path):
    code = f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); import utils\n" + (
        f"with utils.locked({str(tmp_path)!r}) as mine: print(mine, flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "True\n"
    with utils.locked(tmp_path) as mine:
        assert not mine
    holder.kill()
    holder.wait()
    with utils.locked(tmp_path) as mine:
        assert mine
        (tmp_path / "kept").touch()
    assert (tmp_path / "kept").exists()
    with utils.locked(tmp_path / "other"):
        pass
    assert not (tmp_path / "other").exists()  # an empty folder is not left behind


def test_torch_seed_repeats_and_leaves_no_trace():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with utils.torch_seed(5):
        first = torch.rand(3)
    with utils.torch_seed(5):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.rand(2), expected)


def test_seeding_reaches_numpy_and_torch():
    draws = []
    for _ in range(2):
        utils.seed_everything(3, deterministic=False)
        draws.append((np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]


SCRIPT = """
import sys, time; sys.path.insert(0, {root!r}); from jobs import guard; from localized_crops.files import UserError
def main(config):
    {body}
guard.run_script(main, lambda words: {config})
"""


def run(body, config="{}"):
    code = SCRIPT.format(root=str(ROOT), body=body, config=config)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells let background jobs ignore it
    )


@pytest.mark.parametrize(
    ("body", "config", "status", "told"),
    [
        ("pass", "{}", 0, ""),
        ("raise UserError('a.txt:3: wrong')", "{}", 2, "error: a.txt:3: wrong\n"),
        ("pass", "int('x')", 2, "error: invalid literal"),
        ("open('/nonexistent/folder/file')", "{}", 2, "error: No such file or directory: /nonexistent/folder/file"),
        ("1 / 0", "{}", 1, "ZeroDivisionError"),  # a fault of ours keeps its traceback
    ],
)
def test_the_guard_gives_one_line_and_the_right_status(body, config, status, told):
    process = run(body, config)
    _, error = process.communicate(timeout=300)
    assert process.returncode == status and told in error
    assert status == 1 or "Traceback" not in error


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_script_ends_with_its_status(sent, status):
    process = run("print('on', flush=True); time.sleep(60)")
    assert process.stdout.readline() == "on\n"
    time.sleep(0.1)
    process.send_signal(sent)
    _, error = process.communicate(timeout=300)
    assert process.returncode == status and "Traceback" not in error
