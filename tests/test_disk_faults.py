"""A disk that fills, a folder that may not be written to or goes away: one line, nothing half, and it goes on."""

import os
import re
import resource
import shutil
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import stages
import torch
from sound_files import write_candidates
from stages import Stage

from datasets import read_dataset
from figures import plots
from localized_crops.box_file import save_boxes
from localized_crops.files import DiskError, save_json
from localized_crops.map_file import save_map_cache
from masks.mask_files import save_masks, save_masks_info
from training.log import save_log
from utils import load_tensors, save_tensors

KINDS = ("box JSON", "log", "checkpoint", "curves", "masks", "masks_info", "maps", "image list")


def write(kind: str, folder: Path, amount: int) -> Path:
    """Write one kind of file, of some hundred kilobytes where ``amount`` is 20,000; return its path."""
    numbers = np.random.default_rng(0).random(amount)  # what cannot be compressed
    if kind == "box JSON":
        boxes = {i: [1.0, 2.0, 3.0, 4.0] for i in range(amount)}
        save_boxes(folder / "boxes.json", boxes, dict.fromkeys(boxes, (9, 9)), made_by="test", settings={})
        return folder / "boxes.json"
    if kind == "log":
        save_log(folder / "log.jsonl", [{"epoch": n} for n in range(amount)])
        return folder / "log.jsonl"
    if kind == "checkpoint":
        save_tensors(folder / "last.pt", {"weights": torch.from_numpy(numbers), "small": torch.ones(3)})
        return folder / "last.pt"
    if kind == "curves":
        records = [dict.fromkeys(CURVES, float(value)) | {"epoch": n} for n, value in enumerate(numbers[:200])]
        plots.draw_curves(records, folder / "curves.png")
        return folder / "curves.png"
    if kind == "masks":
        save_masks(folder / "bird.pt", torch.from_numpy(numbers > 0.5)[None, None].repeat(5, 1, 1), "bool")
        return folder / "bird.pt"
    if kind == "masks_info":
        save_masks_info(folder, {}, {str(n): [] for n in range(amount)})
        return folder / "masks_info.json"
    if kind == "maps":
        save_map_cache(folder / "boxes.json", ((n, np.resize(numbers, (20, 20))) for n in range(amount // 100)), {})
        return folder / "boxes.maps.safetensors"
    save_json(folder / "decoded_images.json", {"key": list(range(amount))})
    return folder / "decoded_images.json"


CURVES = ("train_loss", "loss", "ema_loss", "train_top1", "top1", "ema_top1", "lr", "maiou")


@pytest.fixture
def small_disk(tmp_path):
    """Return a folder on a file system of its own that holds 64 KiB; skip the test where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or os.system(f"mount -t tmpfs -o size=64k tmpfs {folder} 2>/dev/null"):
        pytest.skip("only root can mount a small file system")
    yield folder
    os.system(f"umount {folder}")


@pytest.fixture
def file_limit():
    """Let files of this process end at 20,000 bytes, as on a full disk, until the fixture is called."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    lift = partial(resource.setrlimit, resource.RLIMIT_FSIZE, before)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield lift
    lift()
    signal.signal(signal.SIGXFSZ, handler)


def check_full(kind: str, folder: Path, reason: str) -> Path:
    """Fill the disk with one kind of file; check the message and that nothing but earlier files is left."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(DiskError, match=rf"^{re.escape(str(folder))}/\S+: {reason}; .*make room$"):
        write(kind, folder, 20_000)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_grows_too_large_leaves_the_earlier_one(kind, tmp_path, file_limit):
    if kind == "curves":
        with pytest.raises(DiskError, match=r"curves\.png: File too large; .*make room"):
            write(kind, tmp_path, 200)
        assert list(tmp_path.iterdir()) == []
    else:
        write(kind, tmp_path, 100)
        check_full(kind, tmp_path, "File too large")
    file_limit()
    assert write(kind, tmp_path, 20_000).stat().st_size > 20_000
    stages.check_whole(tmp_path)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "curves"])
def test_a_full_disk_leaves_the_earlier_file(kind, small_disk):
    write(kind, small_disk, 10)
    check_full(kind, small_disk, "No space left on device")
    write(kind, small_disk, 11)  # there is room again
    stages.check_whole(small_disk)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_cannot_be_is_named(kind, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        DiskError, match=r"/file/.*: (Not a directory|File exists); a file lies where a folder is needed"
    ):
        write(kind, tmp_path / "file", 100)


@pytest.mark.parametrize("kind", KINDS)
def test_a_read_only_file_system_is_named(kind, small_disk):
    os.system(f"mount -o remount,ro {small_disk}")
    with pytest.raises(DiskError, match="Read-only file system; name a folder that you may write to"):
        write(kind, small_disk, 100)


# --- whole stages -------------------------------------------------------------------------------------------------


def fail(stage: Stage, folder: Path, log: Path, **options) -> str:
    """Run a stage that must end with status 2; return its last line."""
    with stages.started(stage, folder, log, **options) as process:
        status, told = process.end(), process.told()
    assert status == 2 and "Traceback" not in told, told
    assert stages.scratch_files(folder) == []
    stages.check_whole(folder)
    return stages.last_line(told)


def test_a_training_on_a_full_disk_says_how_to_go_on(birds, tmp_path):
    stage, folder, log = stages.train_stage(birds), tmp_path / "run", tmp_path / "log"
    said = fail(stage, folder, log, file_limit=1_000_000)
    assert said == (
        f"error: {folder / 'best.pt'}: File too large; what was finished before is kept; make room; "
        f"to go on: python train.py resume=true run_dir={folder}"
    )
    assert not list(folder.glob("*.pt"))
    stages.finish(stage, folder, log)
    (tmp_path / "whole").mkdir()
    stages.finish(stage, tmp_path / "whole" / "run", log)
    stages.assert_same(tmp_path / "whole" / "run", folder)


def test_an_image_cache_on_a_full_disk_is_built_when_there_is_room(birds, tmp_path):
    stage, folder, log = stages.cache_stage(birds), tmp_path / "run", tmp_path / "log"
    said = fail(stage, folder, log, file_limit=100_000)
    assert re.match(rf"error: {folder}/cache/decoded_images_\w+\.bin: File too large", said)
    assert stages.visible_files(folder) == []
    assert "decoding 72 images" in stages.finish(stage, folder, log)


def test_masks_on_a_full_disk_are_gone_on_with(birds, tmp_path):
    stage, folder, log = stages.mask_stage(birds), tmp_path / "work", tmp_path / "log"
    said = fail(stage, folder, log, file_limit=200_000)
    assert re.match(
        rf"error: {folder}/masks_0/\S+: File too large; .*make room; to go on: python .*generate_mask", said
    )
    done = stages.units_done(folder)
    printed = stages.finish(stage, folder, log)
    assert (f"{done} of 72 images are done" in printed) == (done > 0)


def remove_in_work(stage: Stage, folder: Path, gone: Path, log: Path) -> str:
    """Remove the folder of a stage while it works; return the last line of its error."""
    with stages.started(stage, folder, log) as process:
        assert process.wait_until(lambda: stages.units_done(gone) > 1 or (gone / "last.pt").exists())
        os.rename(gone, gone.with_name("moved"))  # in one step, as removing is not
        status, told = process.end(), process.told()
    assert status == 2 and "Traceback" not in told, told
    assert not gone.exists() or not stages.visible_files(gone)
    return stages.last_line(told)


def test_a_training_whose_folder_goes_away_ends(birds, tmp_path):
    stage = stages.train_stage(birds, "num_epochs=200")
    said = remove_in_work(stage, tmp_path / "run", tmp_path / "run", tmp_path / "log")
    assert re.match(rf"error: {tmp_path}/run/\S+: No such file or directory; its folder was removed", said)
    assert load_tensors(tmp_path / "moved" / "last.pt")["epoch"] > 0


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("mask", "bbox")]


@pytest.mark.parametrize("name", ["dino", *SLOW])
def test_a_generator_whose_folder_goes_away_ends(name, birds, tmp_path):
    """It went on into a file without a name, and then wrote a result without its work."""
    log, folder = tmp_path / "log", tmp_path / "work"
    if name == "bbox":
        stages.finish(stages.train_stage(birds, "num_epochs=1"), tmp_path / "run", log)
        (tmp_path / "masks").mkdir()
        write_candidates(tmp_path / "masks", read_dataset("cub", birds))
        stage = stages.bbox_stage(birds, tmp_path / "masks", tmp_path / "run" / "best.pt")
    else:
        stage = getattr(stages, f"{name}_stage")(birds)
    said = remove_in_work(stage, folder, folder, log)
    assert "was removed" in said
    shutil.move(tmp_path / "moved", folder)
    done = stages.units_done(folder)
    assert f"{done} of 72 images" in stages.finish(stage, folder, log)


def test_an_error_that_is_not_of_the_disk_keeps_its_own_words(tmp_path):
    with pytest.raises(RuntimeError, match="no numbers"):
        save_tensors(tmp_path / "last.pt", Faulty())
    assert list(tmp_path.iterdir()) == []


class Faulty:
    """What torch.save cannot save."""

    def __reduce__(self):
        raise RuntimeError("no numbers")
