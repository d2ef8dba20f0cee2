import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import config
import reproduce
from datasets import read_dataset
from experiments.grid import FolderInUseError
from experiments.table_report import load_run, table_points, views_text, write_report
from experiments.tables import TABLES, Step, Table
from jobs.settings import word_of
from localized_crops.boxes import coverage, whole_image_boxes
from localized_crops.files import UserError, load_json, save_json

TOY = f"dino.weights={Path(__file__).parent.parent / 'toybirds/toy_localizer.pt'}"
SMALL = ["num_workers=0", "reproduce.table=small", "reproduce.seeds=2", "dataset.name=cub"]


@pytest.fixture(scope="module")
def small_table():
    """Put a table of two rows and one epoch beside the real ones."""
    table = Table(
        title="Small",
        preset="toybirds",
        rows={"plain": {"use_box": False}, "held": {"THR": 1.0}},
        controls=("plain",),
        budgets={"one epoch": {"num_epochs": 1}},
        common={"image_size": 32, "eval_box": "gt", "dataset.name": "cub"},
        published={"held": "99.9"},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TABLES, "small", table)
        yield table


def make(birds, folder, *more):
    reproduce.main(reproduce.load_request([*SMALL, f"dataset.root={birds}", f"run_dir={folder}", *more]))


@pytest.fixture(scope="module")
def made(birds, small_table, tmp_path_factory):
    """Return the folder of the small table, made."""
    folder = tmp_path_factory.mktemp("table")
    make(birds, folder)
    return folder


def test_a_table_is_made_once_from_its_runs(birds, made, monkeypatch):
    text = (made / "small.md").read_text()
    found = load_json(made / "small.json")["one epoch"]
    assert found["held"]["maiou"] == [1.0, 1.0] and found["plain"]["seeds"] == [0, 1]
    summaries = [load_json(made / f"0_held_seed_{seed}" / "summary.json") for seed in range(2)]
    assert found["held"]["validation"] == [summary["best_validation_top1"] for summary in summaries]
    validation, test = (100 * np.mean(one) for one in (found["held"]["validation"], found["held"]["top1"]["full"]))
    line = next(line for line in text.splitlines() if line.startswith("| held | 1.000 |"))
    assert [float(cell.split()[0]) for cell in line.split("|")[3:5]] == pytest.approx([validation, test], abs=0.05)
    assert "view box (oracle)" in text and "against plain" in text
    views = next(line for line in text.splitlines() if line.startswith("| plain |") and line.count("|") == 3)
    gain = 100 * np.mean(np.subtract(found["plain"]["top1"]["center"], found["plain"]["top1"]["full"]))
    assert float(views.split("|")[2].split("(")[0].split()[-1]) == pytest.approx(gain, abs=0.051)
    assert "| 2 | 99.9 |" in text and "published (quoted)" in text
    assert (made / "small.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(reproduce, "train_run", None)  # nothing is left to train
    make(birds, made)
    assert (made / "small.md").read_text() == text


def test_accuracy_by_the_size_of_the_object_is_that_of_the_thirds(birds, made):
    make(birds, made, "reproduce.seeds=1")
    data = read_dataset("cub", birds, val_fraction=0.3333)
    rows = data.rows("test")
    share = coverage(data.boxes, whole_image_boxes(data.image_sizes))[rows]
    predictions = load_json(made / "0_held_seed_0" / "predictions.json")
    right = np.array([predictions[str(i)]["ema"] == predictions[str(i)]["label"] for i in data.ids[rows]])
    third = np.digitize(share, np.quantile(share, (1 / 3, 2 / 3)))
    tops = [f"{100 * right[third == number].mean():.1f}" for number in range(3)]
    line = (made / "small.md").read_text().splitlines()[-3]
    assert [cell.split()[0] for cell in line.split("|")[2:5]] == tops


def test_rows_that_share_no_seed_are_not_compared_and_objects_without_boxes_have_no_size(
    birds, made, small_table, tmp_path
):
    folder, data = Path(shutil.copytree(made, tmp_path / "table")), read_dataset("cub", birds, val_fraction=0.3333)
    for name in ("0_plain_seed_1", "0_held_seed_0"):
        shutil.rmtree(folder / name)
    found = write_report(small_table, "some", range(2), folder, replace(data, boxes=np.full_like(data.boxes, np.nan)))
    text = (folder / "some.md").read_text()
    assert {row: [run.seed for run in runs] for row, runs in found["one epoch"].items()} == {"plain": [0], "held": [1]}
    held = [line for line in text.splitlines() if line.startswith("| held |")]
    assert len(held) == 2 and not any("McNemar" in line for line in held) and "By the share" not in text


def test_views_are_compared_where_there_are_several_and_a_control(made, small_table):
    runs = [load_run(made / f"0_plain_seed_{seed}", seed) for seed in (0, 1)]
    assert views_text(small_table, {"plain": runs}, "plain") and views_text(small_table, {"held": runs}, None) == []
    first = next(iter(runs[0].correct))
    one_view = [run._replace(correct={first: run.correct[first]}) for run in runs]
    assert views_text(small_table, {"plain": one_view}, "plain") == []


def test_a_table_without_a_finished_training_is_not_written(birds, small_table, tmp_path, monkeypatch):
    def work_elsewhere(*_):
        raise FolderInUseError("another process works there")

    monkeypatch.setattr(reproduce, "train_run", work_elsewhere)
    make(birds, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_steps_of_a_table_are_done_in_turn_before_its_trainings(birds, small_table, tmp_path, monkeypatch):
    steps, done = tuple(Step(str(tmp_path / name), "generate_mask.py", ()) for name in ("a", "b")), []
    monkeypatch.setitem(TABLES, "small", replace(small_table, steps=steps))
    monkeypatch.setattr(reproduce, "run_step", lambda step, overrides: done.append((step, overrides["dataset.name"])))
    monkeypatch.setattr(reproduce, "make_table", lambda *_: done.append("table"))
    make(birds, tmp_path)
    assert done == [(steps[0], "cub"), (steps[1], "cub"), "table"]


def test_runs_with_other_settings_are_not_taken_for_these(birds, made):
    with pytest.raises(UserError, match="holds a run with batch_size"):
        make(birds, made, "batch_size=4")


def test_seeds_start_at_seed(birds, small_table, tmp_path):
    make(birds, tmp_path, "seed=6")
    assert load_json(tmp_path / "small.json")["one epoch"]["held"]["seeds"] == [6, 7]
    seeds = [load_json(tmp_path / f"0_held_seed_{seed}" / "config.json")["seed"] for seed in (6, 7)]
    assert seeds == [6, 7] and not (tmp_path / "0_held_seed_0").exists()


def test_an_unknown_table_is_one_line(tmp_path):
    with pytest.raises(UserError, match="toybirds_crops"):
        make("none", tmp_path, "reproduce.table=cifar")


def test_a_step_is_done_once_with_the_words_of_the_command_line(birds, tmp_path, capfd):
    out = tmp_path / "boxes.json"
    step = Step(str(out), "generate_dino_boxes.py", ("dataset.name=cub", TOY, f"out={out}"))
    own = {"dataset.root": str(birds), "num_workers": 0, "dino.steps": ["heads", "min_max"]}
    reproduce.run_step(step, own)
    words = f"dataset.root={birds} num_workers=0 dino.steps=heads,min_max dataset.name=cub {TOY} out="
    assert words in capfd.readouterr().out
    before = out.stat().st_mtime_ns
    reproduce.run_step(step, own)
    assert out.stat().st_mtime_ns == before


def test_a_training_that_a_table_needs_goes_on_where_it_stopped(tmp_path, monkeypatch):
    asked = []

    class Done:
        returncode = 0

    def run(words):
        asked.append(words)
        save_json(tmp_path / "summary.json", {})
        return Done

    monkeypatch.setattr(reproduce.subprocess, "run", run)
    step = Step(str(tmp_path / "summary.json"), "train.py", (f"run_dir={tmp_path}",))
    reproduce.run_step(step, {})
    (tmp_path / "summary.json").unlink()
    save_json(tmp_path / "config.json", {})
    reproduce.run_step(step, {})
    assert [words[-1] for words in asked] == [f"run_dir={tmp_path}", "resume=true"]


def test_a_step_that_fails_ends_the_table_with_its_name(tmp_path):
    step = Step(str(tmp_path / "none.json"), "generate_dino_boxes.py", (f"dataset.root={tmp_path / 'none'}",))
    with pytest.raises(UserError, match=r"generate_dino_boxes.py ended with status 2 and did not make .*none.json"):
        reproduce.run_step(step, {"dataset.name": "cub"})


@pytest.mark.parametrize("name", TABLES)
def test_every_table_can_be_trained(name):
    table = TABLES[name]
    shared = reproduce.point_config(table, {})
    assert set(table.controls) | set(table.published) <= set(table.rows)
    places = [point.folder for point in table_points(table, range(2), Path())]
    assert len(set(places)) == 2 * len(table.rows) * len(table.budgets)
    for overrides in table.rows.values():
        reproduce.point_config(table, overrides)
    for step in table.steps:
        config.load_config(step.words)
    assert shared["num_epochs"] > 1


def test_tables_on_disk_that_share_a_folder_share_trainings():
    shared = [table for table in TABLES.values() if table.folder == "cub_second"]
    assert len(shared) == 4
    settings = [(reproduce.point_config(table, {}), table.budgets) for table in shared]
    assert all(one == settings[0] for one in settings)


def test_words_give_back_the_values_that_they_were_made_of():
    given = ["crop.scale=0.3,1.0", "maiou=0.7", "save=false", "eval.views=full,whole", "num_workers=none", "out=a b"]
    own = reproduce.load_request(given)["overrides"]
    assert own["crop.scale"] == [0.3, 1.0] and own["num_workers"] is None and own["out"] == "a b"
    assert reproduce.load_request([word_of(*one) for one in own.items()])["overrides"] == own


def test_the_preset_is_the_tables():
    with pytest.raises(UserError, match="each table has its own preset"):
        reproduce.load_request(["preset=toybirds"])
