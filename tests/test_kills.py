"""Every stage killed at random moments and started again: the same results, nothing half, nothing done twice."""

import random
import re
import shutil
import time
from pathlib import Path

import PIL.Image
import pytest
import stages
from sound_files import write_candidates
from stages import Stage

from datasets import read_dataset
from utils import load_tensors

ROUNDS, KILLS = 2, 3  # folders of each stage, kills in each before it may end
# Seconds of work, from its first file on, in which the kill falls.
SPANS = {"cache": 0.6, "mask": 3.0, "bbox": 1.5, "dino": 2.5, "train": 3.0, "sweep": 4.0}


@pytest.fixture(scope="module")
def photographs(birds, tmp_path_factory):
    """Return the birds enlarged, so that decoding them takes a moment; their boxes stay inside."""
    root = shutil.copytree(birds, tmp_path_factory.mktemp("photographs") / "birds")
    for path in (root / "images").rglob("*.jpg"):
        with PIL.Image.open(path) as image:
            image.resize((image.width * 8, image.height * 8)).save(path, quality=90)
    return Path(root)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Return a function that gives the folder of a stage's unbroken run."""
    made = {}

    def run(name: str, stage: Stage) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(f"unbroken_{name}") / "run"
            stages.finish(stage, made[name], made[name].with_name("log"))
        return made[name]

    return run


@pytest.fixture
def build(birds, request, unbroken, tmp_path_factory):
    """Return a function that builds a stage by name; the choice among candidates needs a trained network."""

    def stage(name: str) -> Stage:
        if name == "cache":
            return stages.cache_stage(request.getfixturevalue("photographs"))
        if name == "bbox":
            masks = tmp_path_factory.mktemp("masks")
            write_candidates(masks, read_dataset("cub", birds))
            return stages.bbox_stage(birds, masks, unbroken("train", stages.train_stage(birds)) / "best.pt")
        return getattr(stages, f"{name}_stage")(birds)

    return stage


def finished_work(name: str, folder: Path) -> list[str]:
    """Return what the next run must say of the work that is done; it is redone if that is not said."""
    if name == "cache" and not list((folder / "cache").glob("decoded_*.bin")):
        return ["decoding 72 images once"]
    if name in ("cache", "train"):
        return finished_epochs(folder)
    if name == "sweep":
        points = sorted(folder.glob("*/config.json"))
        done = [path.parent for path in points if (path.parent / "summary.json").exists()]
        begun = [line for path in points if path.parent not in done for line in finished_epochs(path.parent)]
        return [f"--- {place.name}: done already" for place in done] + begun
    finished = {"mask": "masks_0/masks_info.json", "dino": "boxes.maps.safetensors", "bbox": "boxes.json"}[name]
    if (folder / finished).exists():
        return ["72 of 72 images"]
    return [f"{done} of 72 images" for done in [stages.units_done(folder)] if done]


def finished_epochs(folder: Path) -> list[str]:
    """Return what a training says when it goes on."""
    if not (folder / "config.json").exists():
        return []
    last = folder / "last.pt"
    return [f"going on after epoch {load_tensors(last)['epoch']}" if last.exists() else "starting from the first epoch"]


SAID = (
    r"decoding \d+ images once|--- \S+: done already|going on after epoch \d+|starting from the first epoch"
    r"|\d+ of 72 images"
)


def kill_in_work(name: str, stage: Stage, folder: Path, log: Path, delay: float) -> bool:
    """Start a stage, kill it some time after it went on with its work; return whether the kill came in time."""
    expected, before = finished_work(name, folder), stages.state(folder)
    with stages.started(stage, folder, log) as process:
        if process.wait_until(lambda: stages.state(folder) != before):
            time.sleep(delay)
        killed = process.running
        process.kill()
    assert killed or process.end() == 0, process.told()
    stages.check_whole(folder)
    said = re.findall(SAID, process.printed())
    too_early = killed and finished_work(name, folder) == expected  # it may not have come to say all
    assert sorted(said) == sorted(expected) or (too_early and set(said) < set(expected))
    return killed


def kill_and_finish(name: str, stage: Stage, whole: Path, folder: Path, delays: list[float]) -> int:
    """Kill a stage some times, then let it end; compare; return how many kills came in time."""
    folder.parent.mkdir(exist_ok=True)
    log = folder.with_name("log")
    kills = sum(kill_in_work(name, stage, folder, log, delay) for delay in delays)
    expected = finished_work(name, folder)
    printed = stages.finish(stage, folder, log)
    assert set(expected) <= set(re.findall(SAID, printed))
    stages.assert_same(whole, folder)
    assert stages.scratch_files(folder) == []
    return kills


@pytest.mark.slow
@pytest.mark.parametrize("name", SPANS)
def test_a_stage_killed_at_random_moments_ends_as_an_unbroken_one(name, build, unbroken, tmp_path):
    rng, stage, kills = random.Random(name), build(name), 0
    whole = unbroken(name, stage)
    for number in range(ROUNDS):
        delays = [rng.uniform(0, SPANS[name]) for _ in range(KILLS)]
        kills += kill_and_finish(name, stage, whole, tmp_path / str(number) / "run", delays)
    print(f"{name}: {kills} kills")
    assert kills >= ROUNDS * KILLS - 1, "the kills came too late to show anything"


def test_a_killed_training_ends_as_an_unbroken_one(build, unbroken, tmp_path):
    """The generators are killed in their own test files."""
    stage = build("train")
    assert kill_and_finish("train", stage, unbroken("train", stage), tmp_path / "run", [0.5]) == 1
