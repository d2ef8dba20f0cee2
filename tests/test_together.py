"""Several processes of a stage in one place at once: each waits, shares the work or says why not; nothing is lost."""

import re
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import stages
from stages import Stage

import utils
from datasets import read_dataset
from localized_crops import files
from localized_crops.files import load_json
from readers import image_cache
from readers.image_cache import LOCK, cached_images
from readers.images import read_image


def run_both(stage: Stage, folder: Path) -> list[tuple[int, str, str]]:
    """Start a stage twice in one place; return status, standard output and standard error of both."""
    with ExitStack() as both:
        started = [both.enter_context(stages.started(stage, folder, folder.with_name(f"log{n}"))) for n in range(2)]
        return [(process.end(), process.printed(), process.told()) for process in started]


@pytest.mark.parametrize("name", ["mask", "dino"])
def test_of_two_generators_one_says_why_not(name, birds, tmp_path):
    stage, folder = getattr(stages, f"{name}_stage")(birds), tmp_path / "work"
    answers = run_both(stage, folder)
    assert 0 in [status for status, *_ in answers], answers
    for status, _, told in answers:  # one that starts late finds all done
        assert status == 0 or (status == 2 and "another process works there; wait for it" in stages.last_line(told))
    assert stages.scratch_files(folder) == [] and stages.units_done(folder) == 0
    before = stages.contents(folder)
    assert "72 of 72 images" in stages.finish(stage, folder, tmp_path / "log")
    assert stages.contents(folder) == before


def test_two_sweeps_share_the_work(birds, tmp_path):
    stage, folder = stages.sweep_stage(birds), tmp_path / "sweep"
    answers = run_both(stage, folder)
    assert [status for status, *_ in answers] == [0, 0], answers
    assert [row["value"] for row in load_json(folder / "sweep.json")["rows"]] == [-1, 0.5, 1]
    trained = [name for _, printed, _ in answers for name in re.findall(r"run folder: (\S+)", printed)]
    assert len(trained) == len(set(trained)) == 3


def test_of_two_that_wait_for_a_failed_build_one_builds(birds, tmp_path, monkeypatch):
    data, decoded, caches = read_dataset("cub", birds), [], []

    def read(path):
        decoded.append(path)
        return read_image(path)

    monkeypatch.setattr(image_cache, "read_image", read)
    threads = [threading.Thread(target=lambda: caches.append(cached_images(tmp_path, data))) for _ in range(2)]
    with utils.lock_file(tmp_path / LOCK):  # a builder that ends without a cache
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        assert decoded == []
    for thread in threads:
        thread.join()
    assert sorted(decoded) == sorted(data.paths) and len(caches) == 2


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path):
    path, taken = tmp_path / "folder" / ".lock", []
    with utils.lock_file(path):
        waiter = threading.Thread(target=lambda: taken.append(utils.lock_file(path)))
        waiter.start()
        time.sleep(0.2)
        path.unlink()
    waiter.join()
    with taken[0]:
        assert utils.is_at(taken[0].fileno(), path)
        assert utils.lock_file(path, wait=False) is None


def test_scratch_files_of_the_dead_are_removed_and_of_the_living_kept(tmp_path):
    (tmp_path / ".last.pt.12345.tmp.pt").write_bytes(b"half")
    (tmp_path / ".notes.tmp").touch()  # not ours
    with files.whole_file(tmp_path / "best.pt") as scratch:
        scratch.write_bytes(b"whole")
        files.remove_scratch(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([scratch.name, ".notes.tmp"])
    assert (tmp_path / "best.pt").read_bytes() == b"whole"
