"""experiments/sweep.py: names of runs, the values of the grid, the trainings, and wandb."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_runs import run, words

import train
from config import load_config
from experiments.grid import FolderInUseError, Point, crop_family, point_config, run_grid
from experiments.sweep import sweep_table
from experiments.table_report import table_points
from jobs.wandb_runs import start_wandb
from localized_crops.files import UserError, load_json


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


def test_a_point_that_another_process_trains_is_left_to_it(tmp_path, capsys):
    trained = []

    def train_free(config, _wandb_run):
        if config["run_dir"] == str(tmp_path / "taken"):
            raise FolderInUseError("another process works there")
        trained.append(config["run_dir"])

    run_grid(load_config([]), [Point(name, {}, tmp_path / name) for name in ("taken", "free")], train_free)
    assert trained == [str(tmp_path / "free")] and "another process works on it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "family"),
    [
        (["use_dino_maps=true", "use_box=false", "dino_maps=a.json"], "density maps"),
        (["use_box=false"], "RandomResizedCrop"),
        (["THR=-1"], "RandomResizedCrop"),
        (["THR=0.7", "crop.mode=reference", "source=center"], "reference, center"),
    ],
)
def test_crops_of_one_kind_are_called_alike(words, family):
    assert crop_family(load_config(words)) == family


# --- wandb --------------------------------------------------------------------------------------------------------


class FakeRun:
    """A run of wandb that keeps what it is given."""

    def __init__(self, config):
        self.config, self.summary, self.logged, self.finished = config, {}, [], False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def log(self, record, step=None):
        self.logged.append(record)

    def finish(self):
        self.finished = True


def test_a_training_logs_its_epochs_and_ends_the_run_that_it_began(birds, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    began = []
    monkeypatch.setattr(wandb, "init", lambda **given: began.append(FakeRun(given["config"])) or began[0])
    summary = run(birds, tmp_path / "run", "num_epochs=2", "wandb=true")
    (one,) = began
    assert [record["epoch"] for record in one.logged] == [1, 2] and one.finished
    assert one.summary == {"test": summary["top1"], "THR": summary["THR"], "maiou": summary["maiou"]}


def test_a_run_that_cannot_start_says_why_in_one_line(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def fail(**_):
        raise wandb.errors.CommError("no route to host\nand more")

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.raises(UserError, match=r"^wandb=true: no route to host; set WANDB_MODE=offline, or wandb=false$"):
        start_wandb(load_config([]), tmp_path)


def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb, or set wandb=false"):
        start_wandb(load_config([]), tmp_path)


def test_runs_of_one_name_in_two_folders_are_two_runs_of_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "init", lambda **given: SimpleNamespace(**given))
    places = [tmp_path / part / "runs" / "toybirds_0" for part in "abb"]
    ids = [start_wandb(load_config([]), place).id for place in places]
    assert ids[0] != ids[1] == ids[2]


# --- the trainings ------------------------------------------------------------------------------------------------

SWEEP = ["sweeprun=true", "sweep.values=-1,0.5,1", "sweep.seeds=1", "num_epochs=1"]


def sweep(birds, folder, *more):
    train.main(train.load_run_config(words(birds, folder, *SWEEP, *more)))


def test_a_local_sweep_does_each_point_once(birds, tmp_path, capsys, monkeypatch):
    sweep(birds, tmp_path, "sweep.count=2")
    assert "2 trainings done by this process" in capsys.readouterr().out
    assert len(load_json(tmp_path / "sweep.json")["rows"]) == 2
    trained = []
    once = train.train_run
    monkeypatch.setattr(train, "train_run", lambda *a: trained.append(a) or once(*a))
    sweep(birds, tmp_path)
    assert len(trained) == 1
    found = load_json(tmp_path / "sweep.json")
    assert [row["value"] for row in found["rows"]] == [-1, 0.5, 1] and found["parameter"] == "THR"
    assert (tmp_path / "sweep.png").exists() and "RandomResizedCrop" in (tmp_path / "sweep.md").read_text()
    with pytest.raises(UserError, match="holds a run with batch_size=8"):
        sweep(birds, tmp_path, "batch_size=4")
    with pytest.raises(UserError, match=r"holds a run with opt\.lr=0\.004; give another run_dir"):
        sweep(birds, tmp_path, "opt.lr=0.5")


def test_a_sweep_over_maiou(birds, tmp_path):
    sweep(birds, tmp_path, "sweep.parameter=maiou", "sweep.values=0.85,1.0")
    rows = load_json(tmp_path / "sweep.json")["rows"]
    assert rows[0]["THR"] < rows[1]["THR"] and rows[0]["maiou"] == pytest.approx(0.85, abs=0.05)
    sweep(birds, tmp_path, "sweep.parameter=maiou", "sweep.values=0.85,1.0")  # recognised, though THR was derived


def test_a_sweep_whose_config_sets_maiou_is_recognised(birds, tmp_path):
    for _ in range(2):  # the second finds each run's THR derived from the maIoU of the config
        sweep(birds, tmp_path, "maiou=0.9", "sweep.parameter=flip", "sweep.values=0.0,0.5")
    assert len(load_json(tmp_path / "sweep.json")["rows"]) == 2


def test_a_sweep_over_another_key_is_judged_on_validation_images(birds, tmp_path, capsys):
    sweep(birds, tmp_path, "sweep.parameter=opt.lr", "sweep.values=1e-5,4e-3", "sweep.seeds=2")
    found, lines = load_json(tmp_path / "sweep.json"), (tmp_path / "sweep.md").read_text().splitlines()
    assert [(row["value"], row["seed"]) for row in found["rows"]] == [(1e-5, 0), (1e-5, 1), (4e-3, 0), (4e-3, 1)]
    means = {v: sum(row["validation"] for row in found["rows"] if row["value"] == v) for v in (1e-5, 4e-3)}
    assert means[found["best"]] == max(means.values())
    (marked,) = [line for line in lines if line.startswith("|") and "**" in line]
    assert marked.startswith(f"| opt.lr={found['best']:g} |")
    assert f"opt.lr={found['best']:g}" in capsys.readouterr().out.splitlines()[-1]


def test_a_wandb_sweep_without_a_network_is_one_line(birds, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "2")
    with pytest.raises(UserError, match="wandb cannot be reached") as error:
        sweep(birds, tmp_path, "wandb=true")
    assert "\n" not in str(error.value)


def test_a_wandb_sweeps_finished_points_are_not_trained_again(birds, tmp_path, monkeypatch):
    import wandb

    folder, trained, runs = tmp_path / "sweep", [], []
    folder.mkdir()
    run(birds, folder / "THR=0.5,seed=0", "num_epochs=1", "THR=0.5")

    points = iter([{"THR": 0.5, "seed": 0}, {"THR": 1.0, "seed": 0}])
    monkeypatch.setattr(wandb, "init", lambda **_: runs.append(FakeRun(next(points))) or runs[-1])
    monkeypatch.setattr(wandb, "sweep", lambda grid, project: f"{sorted(grid['parameters'])}")
    monkeypatch.setattr(wandb, "agent", lambda sweep_id, function, project, count: [function() for _ in range(2)])
    once = train.train_run
    monkeypatch.setattr(train, "train_run", lambda *a: trained.append(a[0]["THR"]) or once(*a))
    sweep(birds, folder, "wandb=true", "sweep.values=0.5,1.0")
    assert trained == [1.0] and [run.config["opt"]["lr"] for run in runs] == [4e-3, 4e-3]  # the whole config
    logged = [record for run in runs for record in run.logged]
    assert [record["test_top1"] for record in logged if "test_top1" in record] and len(logged) == 3


def test_a_wandb_sweep_over_other_values_is_not_joined(birds, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **_: FakeRun({"THR": 0.3, "seed": 0}))
    monkeypatch.setattr(wandb, "agent", lambda sweep_id, function, project, count: function())
    words = ["wandb=true", "sweep.values=0.5,1.0", "sweep.resume=true", "sweep.id=abc"]
    with pytest.raises(UserError, match=r"sweep\.id=abc: asks for .*'THR': 0\.3.*not among sweep\.values"):
        sweep(birds, tmp_path, *words)
    assert not list(tmp_path.rglob("summary.json"))
