"""experiments/sweep.py: names of runs and the values of the grid; the trainings themselves are in test_train.py."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from config import load_config
from experiments.grid import Point, point_config
from experiments.sweep import start_wandb, sweep_table
from experiments.table_report import table_points


def table_of(*words):
    return sweep_table(load_config(["sweeprun=true", *words]))


def folders(*words, seeds=range(1)):
    return [point.folder.name for point in table_points(table_of(*words), seeds, Path())]


def test_a_value_that_is_given_twice_is_one_row():
    assert folders("sweep.values=0.5,0.50,1") == ["THR=0.5,seed=0", "THR=1,seed=0"]


def test_close_values_and_long_seeds_have_folders_of_their_own():
    close = folders(
        "sweep.parameter=opt.lr", "sweep.values=0.00123456,0.00123457,0.001234567", seeds=range(999999, 1000002)
    )
    assert len(set(close)) == 9 and "opt.lr=0.00123456,seed=1000001" in close


def test_values_that_are_no_file_names_have_folders_of_their_own():
    names = folders("sweep.parameter=source", "sweep.values=a/b.json,a_b.json,../x")
    assert len(set(names)) == 3 and not any("/" in name or name.startswith(".") for name in names)
    assert len(folders("sweep.parameter=source", f"sweep.values={'long/' * 80}")[0]) < 150


def test_plain_crops_are_the_control_where_there_are_some():
    assert table_of().controls == ("RandomResizedCrop (THR=-1)",)
    table = table_of("sweep.parameter=opt.lr", "sweep.values=0.001,0.002")
    assert table.controls == tuple(table.rows) == ("opt.lr=0.001", "opt.lr=0.002")


def test_a_point_changes_its_own_config_alone(tmp_path):
    config = load_config([])
    changed = point_config(config, Point("", {"opt.lr": 0.5, "seed": 3}, tmp_path))
    assert (changed["opt"]["lr"], changed["seed"], changed["resume"]) == (0.5, 3, False)
    assert config == load_config([])


def test_runs_of_one_name_in_two_folders_are_two_runs_of_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "init", lambda **given: SimpleNamespace(**given))
    places = [tmp_path / part / "runs" / "toybirds_0" for part in "abb"]
    ids = [start_wandb(load_config([]), place).id for place in places]
    assert ids[0] != ids[1] == ids[2]
