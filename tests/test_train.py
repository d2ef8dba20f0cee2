import contextlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import stages
import timm
import torch
from small_runs import SMALL, assert_same_run, run, words
from torchvision.transforms.v2.functional import pil_to_tensor

import config
import models
import train
from datasets import read_dataset
from experiments.grid import FolderInUseError
from jobs.settings import leaves
from localized_crops.box_file import save_boxes
from localized_crops.files import UserError, load_json, save_json
from localized_crops.map_file import save_map_cache
from readers.images import read_image
from training import train_run
from training.log import load_log
from training.loop import out_of_patience
from transforms import View, normalize
from utils import load_tensors, locked

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def unbroken(birds, tmp_path_factory):
    """Return the folder of an unbroken run, with augmentation, a step schedule and an EMA that skips steps."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    run(birds, folder, *FULL)
    return folder


FULL = ["augment=true", "model.ema_step=3", "opt.scheduler=step", "opt.step_size=2", "dataset.check=true"]


# --- how it starts ---------------------------------------------------------------------------------------------------


def test_a_head_that_starts_as_a_probe_classifies_by_the_features_that_are_there(birds, tmp_path):
    """With a rate of nearly nothing the run ends with the head that it began with."""
    whole = ["flip=0", "THR=-1", "crop.scale=0.999,1", "crop.ratio=1,1", "model.freeze_bn_from=0", "num_epochs=1"]
    run(birds, tmp_path, *whole, "opt.lr=1e-9", "opt.target_lr=1e-9", "model.head_start=probe")
    data, model = read_dataset("cub", birds), models.build_model("toyresnet", 8, image_size=32, patch_size=14)
    models.load_trained(model, tmp_path / "best.pt")
    about, view, rows = models.input_config("toyresnet"), View("center", 32, 1.0, 0.0), data.rows("train")
    images = torch.stack([view(pil_to_tensor(read_image(path)), None) for path in data.paths[rows]])
    with torch.no_grad():
        logits = model.eval()(normalize(images, about["mean"], about["std"]))
    assert (logits.argmax(1).numpy() == data.labels[rows]).mean() > 0.6  # of 8 classes; a random head: 0.125


def test_a_trained_model_keeps_its_head(birds, tmp_path):
    """A fork of a run whose head started as a probe begins with what it has learned."""
    still = ["num_epochs=1", "opt.lr=1e-9", "opt.target_lr=1e-9", "model.freeze_bn_from=0", "model.resumed_ema=false"]
    run(birds, tmp_path / "first", "num_epochs=1", "model.head_start=probe")
    run(birds, tmp_path / "fork", *still, "model.head_start=probe", f"model.resumed_model={tmp_path / 'first/best.pt'}")
    first, fork = (load_tensors(tmp_path / name / "best.pt")["model"]["fc.weight"] for name in ("first", "fork"))
    torch.testing.assert_close(fork, first, atol=1e-6, rtol=0)


# --- what a run leaves behind -------------------------------------------------------------------------------------


def test_a_run_folder_holds_all_that_was_promised(birds, unbroken):
    wanted = {"config.json", "log.jsonl", "last.pt", "best.pt", "predictions.json", "summary.json", "curves.png"}
    assert wanted <= {path.name for path in unbroken.iterdir()}
    resolved = load_json(unbroken / "config.json")
    assert resolved["model"]["n_classes"] == 8 and resolved["A_machine"]
    log = load_log(unbroken / "log.jsonl")
    keys = {
        "epoch",
        "train_loss",
        "loss",
        "top1",
        "ema_loss",
        "ema_top1",
        "lr",
        "seconds",
        "images_per_second",
        "maiou",
    }
    assert [record["epoch"] for record in log] == [1, 2, 3, 4] and all(keys <= record.keys() for record in log)
    assert all(record["maiou"] == 1.0 for record in log)  # THR 1, exact: every crop holds its box
    data = read_dataset("cub", birds)
    predictions = load_json(unbroken / "predictions.json")
    rows = data.rows("test")
    assert list(predictions) == [str(i) for i in data.ids[rows]]
    summary = load_json(unbroken / "summary.json")
    for which in ("model", "ema"):
        right = [predictions[str(data.ids[row])][which] == data.labels[row] for row in rows]
        assert np.mean(right) == pytest.approx(summary["top1"]["full"][which])
    assert set(summary["top1"]) == {"full", "center", "average"}


def test_training_learns(birds, tmp_path):
    run(birds, tmp_path / "run", "num_epochs=12", "THR=1", "opt.lr=0.003")
    log = load_log(tmp_path / "run" / "log.jsonl")
    assert log[-1]["train_loss"] < log[0]["train_loss"] - 0.15


def test_real_images_train_too(cub24, tmp_path):
    small = ["dataset.split=70/30", "num_epochs=1", "log_interval=1", "use_box=true", "THR=0.5", "crop.mode=reference"]
    summary = run(cub24, tmp_path / "run", *small)
    assert summary["n_test"] == 419 and summary["boxes_clipped"] > 0
    assert 0.85 < summary["maiou"] < 0.93  # .891 on all of CUB


# --- the same numbers again ---------------------------------------------------------------------------------------


def test_workers_change_nothing(birds, unbroken, tmp_path):
    run(birds, tmp_path / "run", *FULL, "num_workers=2")
    assert_same_run(unbroken, tmp_path / "run")


def test_another_seed_changes_the_run(birds, unbroken, tmp_path):
    run(birds, tmp_path / "run", *FULL, "seed=1")
    assert load_log(tmp_path / "run" / "log.jsonl") != load_log(unbroken / "log.jsonl")


def test_a_run_goes_on_from_its_own_config(unbroken, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(unbroken, tmp_path / "run"))
    monkeypatch.setitem(config.config, "num_epochs", 99)  # config.py was edited meanwhile
    resumed = train.load_run_config(["resume=true", f"run_dir={folder}"])
    assert resumed["num_epochs"] == 4 and resumed["model"]["ema_step"] == 3
    with pytest.raises(UserError, match=r"THR=0\.5: the run in .* has 1\.0"):
        train.load_run_config(["resume=true", f"run_dir={folder}", "THR=0.5"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no unfinished run"):
        train.load_run_config([*SMALL, *FULL, "resume=true"])
    begun = Path(shutil.copytree(unbroken, tmp_path / "runs" / "cub_3"))
    (begun / "summary.json").unlink()
    found = train.load_run_config([*SMALL, *FULL, "resume=true", f"dataset.root={resumed['dataset']['root']}"])
    assert found["run_dir"] == "runs/cub_3"  # the same command with one word more
    with pytest.raises(UserError, match="no run to go on with"):
        train.load_run_config(["resume=true", f"run_dir={tmp_path / 'none'}"])


def test_a_run_of_an_earlier_version_which_had_fewer_keys_goes_on(birds, unbroken, tmp_path):
    folder = Path(shutil.copytree(unbroken, tmp_path / "run"))
    saved, checkpoint = load_json(folder / "config.json"), load_tensors(folder / "last.pt")
    for config_ in (saved, checkpoint["config"]):
        del config_["evaluate"]["averages"], config_["model"]["head_start"]
    save_json(folder / "config.json", saved)
    torch.save(checkpoint, folder / "last.pt")
    forked = train.load_run_config([f"init_from={folder}"])
    assert forked["evaluate"]["averages"] == [] and forked["num_epochs"] == 4
    assert run(birds, folder, *FULL, "resume=true", "num_epochs=5")["epochs"] == 5
    save_json(folder / "config.json", saved | {"THR": "much"})
    with pytest.raises(UserError, match=r"config\.json: THR='much'"):
        train.load_run_config(["resume=true", f"run_dir={folder}"])


def test_a_finished_run_is_not_overwritten(birds, unbroken):
    before = (unbroken / "last.pt").read_bytes()
    with pytest.raises(UserError, match="holds a run already"):
        run(birds, unbroken, *FULL)
    assert (unbroken / "last.pt").read_bytes() == before


def test_a_checkpoint_of_another_run_is_refused(birds, unbroken, tmp_path):
    folder = Path(shutil.copytree(unbroken, tmp_path / "run"))
    checkpoint = load_tensors(folder / "last.pt")
    checkpoint["model"].pop("conv1.weight")
    torch.save(checkpoint, folder / "last.pt")
    with pytest.raises(UserError, match="not of this run"):
        run(birds, folder, *FULL, "resume=true")


# --- settings -----------------------------------------------------------------------------------------------------


def test_a_target_maiou_sets_the_threshold(birds, tmp_path):
    summary = run(birds, tmp_path / "run", "maiou=0.9", "num_epochs=3")
    assert 0 < summary["THR"] < 1 and summary["maiou"] == pytest.approx(0.9, abs=0.02)
    assert load_json(tmp_path / "run" / "config.json")["THR"] == summary["THR"]


def test_plain_random_resized_crop_ignores_the_boxes(birds, tmp_path):
    one = run(birds, tmp_path / "one", "use_box=false", "num_epochs=1")
    two = run(birds, tmp_path / "two", "THR=-1", "num_epochs=1", "source=image")
    assert one["maiou"] == two["maiou"] < 0.9 and one["top1"] == two["top1"]


def test_boxes_of_a_file_and_images_without_one(birds, tmp_path, capsys):
    data = read_dataset("cub", birds)
    sizes = dict(zip(data.ids.tolist(), data.image_sizes.tolist(), strict=True))
    found = dict(zip(data.ids.tolist(), data.boxes.tolist(), strict=True))
    save_boxes(tmp_path / "true.json", found, sizes, made_by="test", settings={})
    save_boxes(tmp_path / "some.json", found | {1: None, 2: None}, sizes, made_by="test", settings={})
    one = run(birds, tmp_path / "gt", "num_epochs=1")
    two = run(birds, tmp_path / "true", "num_epochs=1", f"source={tmp_path / 'true.json'}")
    assert one["top1"] == two["top1"]
    some = run(birds, tmp_path / "some", "num_epochs=1", f"source={tmp_path / 'some.json'}")
    assert some["images_without_box"] == 2 and "no box for 2 images" in capsys.readouterr().out


def test_a_second_training_starts_from_the_first(birds, unbroken, tmp_path):
    best = unbroken / "best.pt"
    still = ["num_epochs=1", f"model.resumed_model={best}", "opt.lr=1e-12", "opt.target_lr=1e-12", "augment=false"]
    run(birds, tmp_path / "run", *still, "model.freeze_bn_from=0", "opt.type=sgd", "opt.weight_decay=0")
    ours, theirs = load_tensors(tmp_path / "run" / "last.pt")["model"], load_tensors(best)["state_dict"]
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-9)


def test_box_view_and_views_of_other_sizes(birds, tmp_path, capsys):
    summary = run(birds, tmp_path / "run", "num_epochs=1", "eval_box=gt", "eval.views=full,whole@40")
    assert set(summary["top1"]) == {"full", "whole@40", "box", "average"}
    assert "oracle" in capsys.readouterr().out


def test_a_short_training_with_the_published_ema_does_not_end_at_its_start(birds, tmp_path):
    run(birds, tmp_path / "run", "num_epochs=2", "model.ema_step=1", "other.ema_decay=0.9999")
    state = load_tensors(tmp_path / "run" / "last.pt")
    key = "layer1.0.conv1.weight"
    moved, behind = (state["model"][key] - state["ema"][key]).norm(), state["model"][key].norm()
    assert moved < 0.2 * behind


def test_timm_loads_what_best_pt_was_chosen_by(unbroken):
    best = load_tensors(unbroken / "best.pt")
    model = timm.create_model(
        "resnet18", channels=models.TOY_CHANNELS, num_classes=8, checkpoint_path=str(unbroken / "best.pt")
    )
    for key, value in model.state_dict().items():
        assert torch.equal(value, best[best["chosen"]][key])
    late = load_log(unbroken / "log.jsonl")
    assert best["best_top1"] == max(max(record["top1"], record["ema_top1"]) for record in late)


def test_a_checkpoint_says_all_that_prediction_needs(unbroken, birds):
    best = load_tensors(unbroken / "best.pt")
    assert best["class_names"] == read_dataset("cub", birds).class_names and len(best["class_names"]) == 8
    told = best["config"]
    assert told["model"]["mean"] == pytest.approx([0.485, 0.456, 0.406]) and told["image_size"] == 32
    assert told["eval"]["views"] and told["eval"]["crop_pct"] and best["versions"]["torch"]


def test_a_run_that_cannot_take_its_first_step_leaves_nothing(birds, tmp_path, monkeypatch):
    def fail(*_arguments):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"8 images of image_size=32"):
        patch.setattr("training.loop.backward", fail)
        run(birds, tmp_path / "run", "num_epochs=1")
    assert not (tmp_path / "run").exists()
    run(birds, tmp_path / "run", "num_epochs=1")


@pytest.fixture
def stopped(birds_copy, tmp_path, monkeypatch):
    """Return the folder of a run that was stopped after two epochs of four, and its data set's."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_run, "finish", lambda *_a: 1 / 0)
        once = train_run.train_and_log_epoch

        def two_epochs(one, *arguments):
            if one.epoch == 2:
                raise KeyboardInterrupt
            once(one, *arguments)

        patch.setattr(train_run, "train_and_log_epoch", two_epochs)
        run(birds_copy, tmp_path / "run")
    return tmp_path / "run", birds_copy


def swap_splits(root):
    lines = [line.split() for line in (root / "train_test_split.txt").read_text().splitlines()]
    (root / "train_test_split.txt").write_text("\n".join(f"{i} {1 - int(flag)}" for i, flag in lines))


def test_a_run_does_not_go_on_with_other_data_or_from_another_checkpoint(stopped):
    folder, root = stopped
    state = load_tensors(folder / "last.pt")
    torch.save(state | {"config": state["config"] | {"seed": 99}}, folder / "seed.pt")
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save(state, folder / "reshaped.pt")
    swap_splits(root)
    for name in ("last.pt", "reshaped.pt", "seed.pt"):
        (folder / name).rename(folder / "last.pt")
        with pytest.raises(UserError, match=r"last\.pt"):
            train.train_run(train.load_run_config(["resume=true", f"run_dir={folder}"]))
        swap_splits(root) if name == "last.pt" else None


def test_a_run_does_not_go_on_without_its_log(stopped):
    folder, _ = stopped
    (folder / "log.jsonl").unlink()
    with pytest.raises(UserError, match=r"log\.jsonl"):
        train.train_run(train.load_run_config(["resume=true", f"run_dir={folder}"]))


def test_a_run_that_was_stopped_before_its_first_epoch_starts_with_it(birds, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_run, "train_and_log_epoch", lambda run, *_: run.begin() or interrupt())
        run(birds, tmp_path / "run", "num_epochs=2")
    assert (tmp_path / "run" / "config.json").exists()
    assert run(birds, tmp_path / "run", "num_epochs=2", "resume=true")["epochs"] == 2
    assert "no last.pt yet: starting from the first epoch" in capsys.readouterr().out
    run(birds, tmp_path / "unbroken", "num_epochs=2")
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")


def interrupt():
    raise KeyboardInterrupt


def test_the_command_that_goes_on_is_told_once_there_is_a_run(tmp_path):
    assert train_run.resume_command(tmp_path) is None
    folder = tmp_path / "my runs"
    save_json(folder / "config.json", {})
    assert train_run.resume_command(folder) == f"python train.py resume=true run_dir='{folder}'"


def test_a_terminal_is_shown_loss_accuracy_and_speed_on_the_way(birds, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("training.loop.tqdm.set_postfix_str", lambda _, text: shown.append(text))
    run(birds, tmp_path / "run", "num_epochs=1", "batch_size=2", "dataset.val_fraction=0.1667")
    (text,) = shown  # every twentieth batch, here the last one of 40 images
    loss, top1, speed = re.fullmatch(r"loss ([\d.]+), top-1 ([\d.]+)%, (\d+) images/s", text).groups()
    (record,) = load_log(tmp_path / "run" / "log.jsonl")
    assert int(speed) > 0 and float(loss) == pytest.approx(record["train_loss"], abs=6e-4)
    assert float(top1) == pytest.approx(100 * record["train_top1"], abs=0.06)


def test_a_finished_run_can_be_extended(birds, tmp_path):
    run(birds, tmp_path / "run", "num_epochs=2")
    longer = train.load_run_config(["resume=true", f"run_dir={tmp_path / 'run'}", "num_epochs=3"])
    assert train.train_run(longer)["epochs"] == 3
    rates = [record["lr"] for record in load_log(tmp_path / "run" / "log.jsonl")]
    assert len(rates) == 3 and rates[-1] == pytest.approx(1e-5)
    with pytest.raises(UserError, match="num_epochs"):
        train.load_run_config(["resume=true", f"run_dir={tmp_path / 'run'}", "num_epochs=1"])


def test_a_run_can_be_forked_with_other_settings(unbroken, tmp_path, capsys):
    words = [f"init_from={unbroken}", "THR=0.5", "num_epochs=1", f"run_dir={tmp_path / 'fork'}"]
    config = train.load_run_config(words)
    saved = load_json(unbroken / "config.json")
    assert config["THR"] == 0.5 and config["image_size"] == saved["image_size"] and not config["resume"]
    train.train_run(config)
    assert f"starting from {unbroken / 'best.pt'}" in capsys.readouterr().out


def test_patience_counts_validations_in_a_row_without_a_gain(birds, tmp_path, monkeypatch):
    accuracies = iter([0.4, 0.5, 0.5, 0.1, *[0.1] * 6])  # of model and EMA, at epochs 2, 4, ...: a tie is no gain
    monkeypatch.setattr("training.loop.loss_and_top1", lambda *_a: (1.0, next(accuracies)))
    stop = ["patience=1", "num_epochs=8", "log_interval=2"]
    assert run(birds, tmp_path / "run", *stop)["epochs"] == 4
    resume = ["resume=true", f"run_dir={tmp_path / 'run'}"]
    assert train.train_run(train.load_run_config(resume))["epochs"] == 4  # it had stopped, and trains no further
    assert train.train_run(train.load_run_config([*resume, "patience=2"]))["epochs"] == 6


@pytest.mark.parametrize(
    ("top1", "patience", "ends"),
    [
        ([0.3, 0.2, 0.2], 2, True),
        ([0.3, 0.3, 0.3], 2, True),
        ([0.3, 0.2, 0.4], 2, False),
        ([0.3, 0.2], 2, False),
        ([], 1, False),
        ([0.3] * 9, None, False),
    ],
)
def test_patience_ends_after_validations_without_a_gain(top1, patience, ends):
    records = [{"top1": 0.1, "ema_top1": one} for one in top1]
    assert out_of_patience(records, patience) == ends


def test_the_published_measure_is_of_the_last_hundred_epochs():
    records = [{"epoch": n, "top1": n / 1000, "ema_top1": 0.5} for n in range(5, 205, 5)]
    late = train_run.last_epochs(records, 200)
    assert late["model"] == {"mean": pytest.approx(0.1525), "first": 0.105, "last": 0.2} and late["ema"]["mean"] == 0.5


@pytest.mark.parametrize(("word", "some"), [("crop.mode=exact", True), ("crop.mode=reference", False)])
def test_ratios_that_gave_way_are_counted_on_the_boxes_of_the_run(birds, tmp_path, word, some):
    summary = run(birds, tmp_path / "run", "num_epochs=1", "crop.ratio=2.9,3", "source=center", "THR=1", word)
    assert (summary["images_whose_crop_ratio_gave_way"] > 0) == some


def test_the_ema_is_updated_every_so_many_steps(birds, tmp_path):
    run(birds, tmp_path / "run", "num_epochs=3", "model.ema_step=5")  # 21 images a class less val: 4 steps an epoch
    state = load_tensors(tmp_path / "run" / "last.pt")
    assert state["ema_updates"] == state["step"] // 5 > 0


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["source=none.json"], r"none\.json: there is no such file"),
        (["model.type=resnet9000"], "no such model"),
        (["model.resumed_model=none.pt"], r"none\.pt: there is no such file"),
        (["model.n_classes=3"], "the data set has 8"),
        (["eval.views=box"], "eval_box is None"),
        (["eval.views=ful"], "not understood"),
        (["device=cuda:77"], "device=cuda:77"),
        (["model.type=dinov2_vits14", "image_size=33"], "set 28"),
        (["dataset.val_fraction=0.9", "opt.lr=1e30", "opt.target_lr=1e-5"], "opt.lr="),
        (["maiou=0.51"], "reach from"),
    ],
)
def test_what_the_user_can_mend_is_one_line(birds, tmp_path, more, told):
    with pytest.raises(UserError, match=told) as error:
        run(birds, tmp_path / "run", *more)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()  # nothing that a new try would trip over


def test_a_loss_that_is_no_number_ends_the_run(birds, tmp_path):
    with pytest.raises(UserError, match=r"lower opt\.lr"):
        run(birds, tmp_path / "run", "opt.type=sgd", "opt.lr=900", "opt.warmup_epochs=0", "num_epochs=30")


@pytest.mark.parametrize("name", train_run.RUN_FILES)
def test_files_of_the_user_are_not_replaced(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=str(tmp_path)), contextlib.ExitStack() as held:
        train_run.claim_folder(train.load_run_config([f"run_dir={tmp_path}"]), held)
    assert (tmp_path / name).read_text() == "mine"


def test_two_processes_do_not_work_in_one_folder(birds, tmp_path):
    with locked(tmp_path / "run", "run_dir"), pytest.raises(FolderInUseError):
        run(birds, tmp_path / "run")


def test_the_command_line_ends_with_status_2_and_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "THRR=0.5"], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: THRR: ") and "THR?" in line
    assert list(tmp_path.iterdir()) == []


def test_fine_tuning_the_cls_token_changes_it_and_the_head_only(birds, tmp_path):
    vit = ["model.type=vit_tiny_patch16_224", "patch_size=16", "model.train_cls=true", "num_epochs=1"]
    summary = run(birds, tmp_path / "run", *vit)
    assert summary["epochs"] == 1
    torch.manual_seed(0)
    start = models.build_model("vit_tiny_patch16_224", 8, image_size=32, patch_size=16).state_dict()
    end = load_tensors(tmp_path / "run" / "last.pt")["model"]
    assert {key for key in end if not torch.equal(end[key], start[key])} == {"cls_token", "head.weight", "head.bias"}


def test_wandb_logs_offline(birds, tmp_path):
    # in a process of its own: wandb reads its environment once a process
    command = [str(ROOT / "train.py"), *words(birds, tmp_path / "run", "num_epochs=1", "wandb=true")]
    with stages.Process(command, tmp_path / "log", WANDB_MODE="offline", WANDB_SILENT="true") as process:
        assert process.end() == 0, process.told()
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def test_config_json_is_the_dict_itself(unbroken):
    assert leaves(json.loads((unbroken / "config.json").read_text())).keys() == leaves(config.config).keys()


# --- density maps -------------------------------------------------------------------------------------------------


@pytest.fixture
def corner_maps(birds, tmp_path):
    """Return a map cache whose maps hold one bright cell in the corner at the top left; images 1 and 2 have none."""
    data = read_dataset("cub", birds)
    maps = np.zeros((7, 9))
    maps[0, 0] = 1.0
    identity = data.fingerprint()
    save_map_cache(tmp_path / "maps.json", ((i, maps) for i in data.ids.tolist() if i > 2), {"dataset": identity})
    return tmp_path / "maps.json"


def test_density_crops_follow_the_maps(birds, tmp_path, corner_maps):
    dino = ["use_box=false", "use_dino_maps=true", f"dino_maps={corner_maps}", "num_epochs=3", "crop.scale=0.08,0.2"]
    pointed = run(birds, tmp_path / "pointed", *dino, "crop.temperature=0.01")
    flat = run(birds, tmp_path / "flat", *dino, "crop.temperature=1000")
    assert pointed["maiou"] < 0.8 * flat["maiou"]  # the birds are not in the corner
    spawned = run(birds, tmp_path / "spawned", *dino, "crop.temperature=0.01", "num_workers=1")
    assert spawned["maiou"] == pointed["maiou"] and spawned["top1"] == pointed["top1"]


def test_maps_of_another_data_set_are_refused(birds, birds_copy, tmp_path, corner_maps):
    lines = (birds_copy / "images.txt").read_text().splitlines()
    lines[0], lines[1] = "1" + lines[1][1:], "2" + lines[0][1:]  # two images change places
    (birds_copy / "images.txt").write_text("\n".join(lines))
    with pytest.raises(UserError, match="another data set"):
        run(birds_copy, tmp_path / "run", "use_box=false", "use_dino_maps=true", f"dino_maps={corner_maps}")
    with pytest.raises(UserError, match="needs dino_maps=FILE"):
        run(birds, tmp_path / "run", "use_box=false", "use_dino_maps=true")
