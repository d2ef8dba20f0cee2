import copy

import pytest

import config
from config import ConfigError, load_config, presets, step_gamma


def test_the_literal_itself_is_valid_and_a_load_does_not_touch_it():
    before = copy.deepcopy(config.config)
    loaded = load_config(["THR=0.5", "crop.scale=.2,1", "dataset.root=a=b"])
    assert config.config == before
    assert loaded["THR"] == 0.5 and loaded["crop"]["scale"] == [0.2, 1.0]
    assert loaded["dataset"]["root"] == "a=b"  # the first = splits


@pytest.mark.parametrize("name", presets)
def test_presets_are_valid(name):
    load_config([f"preset={name}"])


def test_the_command_line_goes_over_the_preset_wherever_it_stands():
    assert load_config(["num_epochs=7", "preset=cub_second_training"])["num_epochs"] == 7


def test_every_rule_is_about_a_key_that_exists():
    known = config.leaves(config.config)
    assert {*config.OPTIONAL, *config.CHOICES, *config.RANGES} <= known.keys()
    assert {key for key, value in known.items() if value is None} <= config.OPTIONAL.keys()


def test_values_have_the_type_of_the_default():
    loaded = load_config(["opt.lr=1", "save=False", "num_workers=none", "eval.views=full@96, box"])
    assert isinstance(loaded["opt"]["lr"], float) and loaded["opt"]["lr"] == 1.0
    assert loaded["save"] is False and loaded["num_workers"] is None
    assert loaded["eval"]["views"] == ["full@96", "box"]


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("THRR=1", "did you mean THR"),
        ("lr=1", "did you mean opt.lr"),
        ("model=resnet50", "did you mean model.type"),
        ("model.typ=x", "did you mean model.type"),
        ("num_epochs=1.5", "a whole number"),
        ("num_epochs=0", "between 1"),
        ("opt.lr=fast", "a number"),
        ("opt.lr=nan", "finite"),
        ("opt.lr=inf", "finite"),
        ("wandb=1", "true or false"),
        ("seed=__import__('os').getpid()", "a whole number"),
        ("--wandb", "without dashes"),
        ("wandb", "key=value"),
        ("preset=cub", "cub_first_training"),
        ("opt.type=lamb", "sgd, adam, adamw"),
        ("crop.scale=1,.5", "lower one first"),
        ("crop.scale=.5", "two numbers"),
        ("THR=1.1", "between"),
        ("maiou=.3", "between 0.5"),
        ("use_dino_maps=true", "use_box=false"),
        ("opt.target_lr=1", "above opt.lr"),
        ("sweep.resume=true", "sweep.id"),
        ("eval.views=", "at least one view"),
        ("num_epochs=none", "a whole number"),
    ],
)
def test_faults_are_one_line_that_names_the_key(word, told):
    with pytest.raises(ConfigError) as error:
        load_config([word])
    assert told in str(error.value) and "\n" not in str(error.value)


def test_an_edited_dict_is_checked_too(monkeypatch):
    monkeypatch.setitem(config.config, "num_epochs", 2.5)
    with pytest.raises(ConfigError, match=r"num_epochs=2\.5: must be a whole number"):
        load_config([])


def test_gamma_leads_from_lr_to_target_lr():
    opt = load_config(["preset=cub_second_training"])["opt"]
    falls = 200 // opt["step_size"]
    assert opt["lr"] * step_gamma(opt, 200) ** falls == pytest.approx(opt["target_lr"])
    assert step_gamma(opt | {"gamma": 0.3}, 200) == 0.3


def test_workers_come_from_the_key_the_machines_name_or_its_cores(monkeypatch):
    monkeypatch.setitem(config.MACHINE_WORKERS, "bird", 3)
    monkeypatch.setattr(config.os, "sched_getaffinity", lambda _: set(range(32)))
    assert config.worker_count(5, "bird") == 5 and config.worker_count(0, "bird") == 0
    assert config.worker_count(None, "bird") == 3 and config.worker_count(None, "other") == 8
    monkeypatch.setattr(config.os, "sched_getaffinity", lambda _: {0, 1})
    assert config.worker_count(None, "other") == 1


def test_help_prints_the_dict_with_its_comments(capsys):
    assert load_config(["--help"]) is None
    printed = capsys.readouterr().out
    assert '"label_smoothing": 0.1' in printed and "share of the box that a crop keeps" in printed
    assert "cub_first_training" in printed
