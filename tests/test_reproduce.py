import numpy as np
import pytest

import config
import reproduce
from utils import UserError, load_json

SMALL = ["num_workers=0", "reproduce.table=small", "reproduce.seeds=2", "dataset.name=cub"]


@pytest.fixture
def small_table(monkeypatch):
    """Put a table of two rows and one epoch beside the real ones."""
    table = reproduce.Table(
        title="Small",
        preset="toybirds",
        rows={"plain": {"use_box": False}, "held": {"THR": 1.0}},
        controls=("plain",),
        budgets={"one epoch": {"num_epochs": 1}},
        common={"image_size": 32, "eval_box": "gt", "dataset.name": "cub"},
        oracles=("box",),
    )
    monkeypatch.setitem(reproduce.TABLES, "small", table)


def make(birds, folder, *more):
    reproduce.main(config.load_config([*SMALL, f"dataset.root={birds}", f"run_dir={folder}", *more]))


def test_a_table_is_made_once_from_its_runs(birds, small_table, tmp_path, monkeypatch):
    make(birds, tmp_path)
    text = (tmp_path / "table.md").read_text()
    found = load_json(tmp_path / "table.json")["one epoch"]
    assert found["held"]["maiou"] == [1.0, 1.0] and found["plain"]["seeds"] == [0, 1]
    mean = 100 * np.mean(found["held"]["top1"]["full"])
    assert f"| held | 1.000 | {mean:.1f} ± " in text and "view box (oracle)" in text and "against plain" in text
    monkeypatch.setattr(reproduce, "train_run", None)  # nothing is left to train
    make(birds, tmp_path)
    assert (tmp_path / "table.md").read_text() == text


def test_runs_with_other_settings_are_not_taken_for_these(birds, small_table, tmp_path):
    make(birds, tmp_path, "reproduce.seeds=1")
    with pytest.raises(UserError, match="holds a run with batch_size"):
        make(birds, tmp_path, "batch_size=4")


def test_an_unknown_table_is_one_line(tmp_path):
    with pytest.raises(UserError, match="toybirds_crops"):
        make("none", tmp_path, "reproduce.table=cifar")
