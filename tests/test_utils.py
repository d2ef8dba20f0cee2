import os
import platform
import resource
import signal
import stat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import stages
import torch

import utils
from jobs import guard, machine
from localized_crops import files
from localized_crops.files import UserError
from training import log


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
    assert log.load_log(path) == []
    log.save_log(path, [{"epoch": 1}, {"epoch": 2}])
    assert log.load_log(path) == [{"epoch": 1}, {"epoch": 2}]
    path.write_text('{"epoch": 1}\n{"epo')
    with pytest.raises(UserError, match=r"log\.jsonl:2"):
        log.load_log(path)


def test_new_folders_are_numbered(tmp_path):
    names = [utils.new_folder(tmp_path / "runs", "bird").name for _ in range(3)]
    assert names == ["bird_0", "bird_1", "bird_2"]


HOLDER = "import sys, time, utils\nwith utils.locked(sys.argv[1], 'out'):\n    print('held')\n    time.sleep(60)\n"


def test_a_folder_is_locked_for_others_until_its_holder_ends(tmp_path_factory, tmp_path):
    script = tmp_path_factory.mktemp("script") / "hold.py"
    script.write_text(HOLDER)
    with stages.Process([str(script), str(tmp_path)], script.with_name("log")) as holder:
        assert holder.wait_until(lambda: holder.printed() == "held\n"), holder.told()
        with pytest.raises(utils.FolderInUseError, match="give another out"), utils.locked(tmp_path, "out"):
            pass
    with utils.locked(tmp_path, "out"):
        (tmp_path / "kept").touch()
    assert (tmp_path / "kept").exists()
    with utils.locked(tmp_path / "other", "out"):
        pass
    assert not (tmp_path / "other").exists()  # an empty folder is not left behind


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_an_empty_folder_of_the_user_stays_and_new_ones_go(tmp_path, kind):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with pytest.raises(KeyError), utils.locked(tmp_path / kind, "out"):
        raise KeyError
    assert list((tmp_path / kind).iterdir()) == []
    for is_new, place in ((False, tmp_path / "a" / "b"), (True, utils.new_folder(tmp_path, "run"))):
        with pytest.raises(KeyError), utils.locked(place, "out", is_new=is_new):
            raise KeyError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link"]


def test_a_folder_that_takes_no_files_is_an_error_and_no_loop():
    with pytest.raises(UserError, match="/proc"), utils.locked("/proc", "out"):
        pass


def test_pipes_and_devices_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.pt").symlink_to("/dev/zero")
    (tmp_path / "lock").mkdir()
    os.mkfifo(tmp_path / "lock" / ".lock")
    for read in (files.load_json, utils.load_tensors, files.check_output):
        for name in ("pipe.json", "zero.pt"):
            with pytest.raises(UserError, match=name):
                read(tmp_path / name)
    with pytest.raises(UserError, match="lock"), utils.locked(tmp_path / "lock", "out"):
        pass


def test_an_output_is_tried_before_the_work_and_replaces_nothing_else(tmp_path):
    (tmp_path / "ours.csv").write_text("path,class\n")
    files.check_output(tmp_path / "ours.csv", rb"\Apath,")
    files.check_output(tmp_path / "new" / "folder" / "one.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["ours.csv"]
    (tmp_path / "folder.csv").mkdir()
    for name in ("ours.csv", "folder.csv", "ours.csv/one.csv"):
        with pytest.raises(UserError, match=r"\.csv"):
            files.check_output(tmp_path / name, rb"\Aimage,")
    with pytest.raises(files.DiskError, match="/proc"):
        files.check_output("/proc/one.csv")


def test_a_folder_in_the_making_is_left_whole_or_not_at_all(tmp_path):
    (tmp_path / ".birds.123.tmp" / "half").mkdir(parents=True)  # of a killed process
    with files.scratch_folder(tmp_path / "birds") as scratch:
        files.remove_scratch(tmp_path)  # another process leaves what is in the making
        (scratch / "one").touch()
        scratch.rename(tmp_path / "birds")
    with pytest.raises(KeyError), files.scratch_folder(tmp_path / "fish"):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["birds"] and (tmp_path / "birds" / "one").exists()


def test_memory_that_ran_out_is_one_line_and_other_errors_are_their_own():
    on_cpu = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA"), on_cpu):
        with pytest.raises(UserError, match="view full"), utils.memory_errors("view full", "lower eval.size"):
            raise error
    with pytest.raises(RuntimeError, match="shapes"), utils.memory_errors("view full", ""):
        raise RuntimeError("shapes differ")


def test_there_are_no_more_threads_than_cores():
    before = torch.get_num_threads()
    machine.set_up_cpu(1024)
    assert torch.get_num_threads() <= os.cpu_count()
    torch.set_num_threads(before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_freed_memory_is_there_for_the_next_step():
    machine.set_up_cpu(None)

    def page_faults(values):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(values)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    page_faults(2**26)
    assert page_faults(2**25) < 1000  # of 32,768 pages, 128 MiB


def test_an_older_glibc_is_asked_for_as_much_as_it_takes(monkeypatch):
    asked = []

    def mallopt(option, value):
        asked.append((option, value))
        return int(option != machine.M_MMAP_THRESHOLD or value <= 2**25)

    monkeypatch.setattr(machine.ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    machine.set_up_cpu(None)
    assert (machine.M_MMAP_THRESHOLD, 2**25) in asked and asked[-1] == (machine.M_TRIM_THRESHOLD, 2**31 - 1)
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda _: SimpleNamespace())  # another C library
    machine.set_up_cpu(None)


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
        machine.seed_everything(3, deterministic=False)
        draws.append((np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]


@pytest.fixture
def handlers():
    """Put back the signal handlers that a script leaves behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("main", "load", "told"),
    [
        (lambda _: fail(UserError("a.txt:3: wrong")), lambda _: {}, "error: a.txt:3: wrong\n"),
        (lambda _: None, lambda _: int("x"), "error: invalid literal"),
        (
            lambda _: Path("/nonexistent/file").read_text(),
            lambda _: {},
            "error: No such file or directory: /nonexistent/file",
        ),
    ],
)
def test_what_the_user_can_mend_ends_a_script_with_one_line_and_status_2(handlers, capsys, main, load, told):
    with pytest.raises(SystemExit) as end:
        guard.run_script(main, load)
    assert end.value.code == 2 and capsys.readouterr().err.startswith(told)


def test_a_fault_of_ours_keeps_its_traceback_and_a_good_script_ends_as_any(handlers, capsys):
    with pytest.raises(ZeroDivisionError):
        guard.run_script(lambda _: 1 / 0, lambda _: {})
    assert guard.run_script(lambda _: None, lambda _: {}) is None


@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError, UserError])
def test_what_interrupts_a_checkpoint_is_told_and_not_torchs_word_for_it(tmp_path, monkeypatch, kind):
    def broken(_value, _file):
        try:
            raise kind("stop")
        finally:
            raise RuntimeError("unexpected pos")

    monkeypatch.setattr(utils.torch, "save", broken)
    with pytest.raises((kind, UserError), match="stop"):
        utils.save_tensors(tmp_path / "a.pt", {})
