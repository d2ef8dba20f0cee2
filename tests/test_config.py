import ast
import copy
import sys
from pathlib import Path

import numpy as np
import pytest

import config
import train
from config import load_config, presets
from jobs import schema, settings
from jobs.settings import check_config, leaves
from localized_crops.density import map_to_density
from localized_crops.files import UserError, save_json

ROOT = Path(__file__).parent.parent


@pytest.fixture
def edit(monkeypatch):
    """Return a function that edits config.py's dict for one test."""
    fresh = copy.deepcopy(config.config)
    monkeypatch.setattr(config, "config", fresh)
    return lambda key, value: settings.set_key(fresh, key, value)


# --- the dict, the schema, presets --------------------------------------------------------------------------------


def test_the_dict_as_shipped_holds_the_keys_and_defaults_of_the_schema():
    assert leaves(config.config) == settings.DEFAULTS
    assert check_config(config.config) == config.config


def test_a_load_does_not_touch_the_dict():
    before = copy.deepcopy(config.config)
    loaded = load_config(["THR=0.5", "crop.scale=.2,1", "dataset.root=a=b"])
    loaded["crop"]["scale"].append(3)
    assert config.config == before and load_config([])["crop"] == before["crop"]
    assert loaded["THR"] == 0.5 and loaded["dataset"]["root"] == "a=b"  # the first = splits


@pytest.mark.parametrize("name", presets)
def test_presets_are_valid(name):
    assert load_config([f"preset={name}"])["preset"] == name


def test_the_command_line_goes_over_the_preset_wherever_it_stands():
    assert load_config(["num_epochs=7", "preset=cub_second_training"])["num_epochs"] == 7


def test_values_have_the_type_of_the_schema():
    loaded = load_config(["opt.lr=1", "save=False", "num_threads=none", "eval.views=full@96, box", "model.n_classes=3"])
    assert isinstance(loaded["opt"]["lr"], float) and loaded["opt"]["lr"] == 1.0
    assert loaded["save"] is False and loaded["num_threads"] is None
    assert loaded["eval"]["views"] == ["full@96", "box"] and loaded["model"]["n_classes"] == 3


# --- faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("THRR=1", "THR?"),
        ("thr=1", "THR?"),
        ("lr=1", "opt.lr?"),
        ("model=resnet50", "model.type?"),
        ("model.typ=x", "model.type?"),
        ("CUB_DINO=true", "preset=cub_dino?"),
        ("cub_dino", "preset=NAME"),
        ("preset=Cub_Dino", "cub_dino?"),
        ("num_epochs=1.5", "num_epochs=1.5"),
        ("num_epochs=0", "num_epochs=0"),
        ("num_epochs=none", "num_epochs=none"),
        ("opt.lr=fast", "opt.lr=fast"),
        ("opt.lr=nan", "opt.lr=nan"),
        ("opt.lr=inf", "opt.lr=inf"),
        ("opt.lr=0", "opt.lr=0"),
        ("wandb=1", "wandb=1"),
        ("source=", "source="),
        ("seed=__import__('os').getpid()", "seed=__import__('os').getpid()"),
        ("sweep.count=99999999999999999999", "sweep.count=99999999999999999999"),
        ("--wandb", "'--wandb'"),
        ("wandb", "'wandb'"),
        ("opt.type=lamb", "'adamw'"),
        ("crop.scale=1,.5", "crop.scale=1,.5"),
        ("crop.scale=.5", "crop.scale=.5"),
        ("THR=1.1", "THR=1.1"),
        ("maiou=.3", "0.5"),
        ("use_dino_maps=true", "use_box=false"),
        ("opt.target_lr=1", "opt.lr=0.004"),
        ("opt.accumulate=17", "batch_size=16"),
        ("sweep.resume=true", "sweep.id"),
        ("eval.views=", "eval.views="),
        ("=1", "no such key"),
        ("num_epochs=", "num_epochs="),
        ("save=__import__('os').getpid()", "save=__import__('os').getpid()"),
        ("crop.scale=[__import__('os').getpid(),1]", "crop.scale="),
        ("crop.scale=a,b", "crop.scale=a,b"),
        ("crop.scale=.1,.2,.3", "crop.scale=.1,.2,.3"),
        ("model.std=.1,.2", "model.std=.1,.2"),
        ("model.resumed_ema=1", "model.resumed_ema=1"),
        (f"opt.step_size={10**400}", "opt.step_size="),
        ("model.n_classes=1000000000000", "model.n_classes="),
        ("preset=cub", "cub_first_training"),
    ],
)
def test_faults_are_one_line_that_names_the_key(word, told):
    with pytest.raises(UserError) as error:
        load_config([word])
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_epochs", 2.5),
        ("num_epochs", "40"),
        ("use_box", "False"),
        ("use_box", 1),
        ("patch_size", None),
        ("opt.lr", "1e-3"),
        ("opt.lr", True),
        ("opt.lr", float("nan")),
        ("opt.weight_decay", None),
        ("THR", [1.0]),
        ("crop.scale", 0.5),
        ("crop.scale", "0.5,1"),
        ("sweep.values", 0.5),
        ("eval.views", "full"),
        ("opt.type", "lamb"),
        ("dataset.root", Path("photos")),
    ],
)
def test_an_edited_value_that_is_not_allowed_is_named_with_its_file(edit, key, value):
    edit(key, value)
    with pytest.raises(UserError) as error:
        load_config([])
    assert str(error.value).startswith(f"config.py: {key}=") and "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["opt", "opt.LR", "THRR", "opt.lr.x", "FineTune"])
def test_an_edited_key_that_does_not_exist_is_named_with_the_nearest(edit, key):
    if key.startswith("opt.lr"):
        edit("opt.lr", {})
    edit(key, 1.0)
    with pytest.raises(UserError, match=rf"^config\.py: {key}: .*did you mean (opt\.|THR|preset=finetune)"):
        load_config([])


@pytest.mark.parametrize("key", ["THR", "opt.lr", "sam"])
def test_a_missing_key_is_named_with_its_default(edit, key):
    section, _, name = key.rpartition(".")
    del (config.config[section] if section else config.config)[name]
    with pytest.raises(UserError, match=rf"^config\.py: {key}.* is missing; its default is "):
        load_config([])


def test_a_fault_of_a_preset_names_the_preset(monkeypatch):
    monkeypatch.setitem(presets, "mine", {"num_epochs": "many"})
    with pytest.raises(UserError, match=r"^config\.py, preset mine: num_epochs='many'"):
        load_config(["preset=mine"])
    monkeypatch.setitem(presets, "mine", {"num_epoch": 3})
    with pytest.raises(UserError, match=r"^config\.py, preset mine: num_epoch: .*num_epochs\?"):
        load_config(["preset=mine"])
    for value in (None, ["num_epochs"], {3: 1}):
        monkeypatch.setitem(presets, "mine", value)
        with pytest.raises(UserError, match=r"^config\.py, preset mine: "):
            load_config(["preset=mine"])


# --- edited by hand -----------------------------------------------------------------------------------------------


def test_an_int_is_a_float_and_a_tuple_a_list(edit):
    for key, value in {"THR": 1, "opt.weight_decay": 0, "crop.scale": (0.1, 1), "sweep.values": [-1, 0, 0.2]}.items():
        edit(key, value)
    edit("dino.heads", 3)
    loaded = load_config(["THR=0.5"])
    assert loaded["THR"] == 0.5 and loaded["crop"]["scale"] == [0.1, 1.0] and loaded["dino"]["heads"] == "3"
    assert type(loaded["opt"]["weight_decay"]) is float and loaded["sweep"]["values"] == [-1.0, 0.0, 0.2]
    assert load_config(["preset=cub_second_training"])["opt"]["weight_decay"] == 1e-4


EDITED = {
    **{"THR": 0.25, "resume": True, "run_dir": "runs/mine", "seed": None, "num_workers": 3, "opt.clip": 1.5},
    **{
        "crop.ratio": [1.0, 1.0],
        "sweep.id": "x",
        "visualize.runs": ["a", "b"],
        "model.freeze_bn_from": 2,
        "amp": "none",
    },
    **{"preset": "cub_second_training", "num_epochs": 5},
}


@pytest.mark.parametrize("key", EDITED)
def test_an_edit_does_what_the_word_does(edit, key, monkeypatch):
    monkeypatch.setattr(settings.secrets, "randbelow", lambda _: 17)
    wanted = load_config([settings.word_of(key, EDITED[key])])
    edit(key, EDITED[key])
    assert load_config([]) == wanted


def test_edits_go_over_the_preset_of_the_file_and_the_command_line_over_both(edit):
    edit("preset", "cub_second_training")
    edit("num_epochs", 7)
    assert (load_config([])["num_epochs"], load_config([])["opt"]["lr"]) == (7, 2e-4)
    assert load_config(["num_epochs=9"])["num_epochs"] == 9
    other = load_config(["preset=cub_first_training"])  # in place of the file's
    assert (other["preset"], other["num_epochs"], other["opt"]["lr"]) == ("cub_first_training", 90, 1e-3)
    with pytest.raises(UserError, match=r"^config\.py: preset=none-such"):
        edit("preset", "none-such")
        load_config([])


@pytest.mark.parametrize(("key", "value"), [("resume", True), ("init_from", "runs/first")])
def test_edits_go_over_the_settings_of_a_run_only_if_the_file_asks_for_the_run(edit, key, value):
    saved = load_config(["num_epochs=3", "log_interval=2"])
    edit("log_interval", 9)
    assert load_config([settings.word_of(key, value)], base=saved)["log_interval"] == 2
    edit(key, value)
    loaded = load_config([], base=saved)
    assert loaded[key] == value and (loaded["log_interval"], loaded["num_epochs"]) == (9, 3)


def test_a_run_goes_on_by_editing_alone(edit, tmp_path):
    save_json(tmp_path / "config.json", load_config(["num_epochs=3", f"run_dir={tmp_path}"]))
    edit("resume", True)
    edit("run_dir", str(tmp_path))
    loaded = train.load_run_config([])
    assert (loaded["resume"], loaded["run_dir"], loaded["num_epochs"]) == (True, str(tmp_path), 3)
    for key in schema.DERIVED:  # as edited when the run began
        edit(key, None)
    assert leaves(train.load_run_config([])) == leaves(loaded)
    edit("opt.lr", 0.5)
    with pytest.raises(UserError, match=r"opt\.lr=0\.5"):
        train.load_run_config([])


# --- what None leaves to the machine or to chance -----------------------------------------------------------------


def test_a_seed_that_is_none_is_drawn_anew_and_told(capsys):
    seeds = {load_config(["seed=none"])["seed"] for _ in range(4)}
    assert len(seeds) > 1 and all(type(seed) is int for seed in seeds)
    told = capsys.readouterr().out
    assert all(f"seed={seed} " in told for seed in seeds) and load_config([])["seed"] == 0


def test_of_several_processes_the_first_alone_tells_its_seed(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    load_config(["seed=none"])
    assert capsys.readouterr().out == ""


def test_workers_come_from_the_key_the_machines_name_or_its_cores(edit, monkeypatch):
    monkeypatch.setattr(settings.os, "sched_getaffinity", lambda _: set(range(32)))
    monkeypatch.setattr(settings.platform, "node", lambda: "here")
    monkeypatch.setitem(config.MACHINE_WORKERS, "bird", 3)
    found = {word: load_config([word]) for word in ("A_machine=bird", "A_machine=none", "A_machine=other")}
    assert [one["num_workers"] for one in found.values()] == [3, 8, 8]
    assert found["A_machine=none"]["A_machine"] == "here"
    assert load_config(["num_workers=5", "A_machine=bird"])["num_workers"] == 5
    assert load_config(["num_workers=0"])["num_workers"] == 0
    monkeypatch.setattr(settings.os, "sched_getaffinity", lambda _: {0, 1})
    assert load_config([])["num_workers"] == 1
    for value in ("4", -1, 2.5):
        monkeypatch.setitem(config.MACHINE_WORKERS, "bird", value)
        with pytest.raises(UserError, match=r"MACHINE_WORKERS of bird"):
            load_config(["A_machine=bird"])


def test_the_processes_of_torchrun_share_the_workers_of_a_machine(monkeypatch):
    monkeypatch.setattr(settings.os, "sched_getaffinity", lambda _: set(range(32)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert load_config([])["num_workers"] == 2
    assert load_config(["num_workers=5"])["num_workers"] == 5


# --- help and warnings --------------------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch):
    """Return a function that lets load_config think it is called by a script."""
    return lambda name: monkeypatch.setattr(sys, "argv", [f"/somewhere/{name}.py"])


def test_help_prints_what_the_script_reads_and_all_on_demand(script, capsys):
    script("generate_bbox")
    assert load_config(["--help"]) is None
    own = capsys.readouterr().out
    assert own.startswith("python generate_bbox.py") and "cub_first_training" in own
    assert '"padding": 0.1' in own and "share of the box's side" in own and "label_smoothing" not in own
    assert load_config(["--help", "all"]) is None
    everything = capsys.readouterr().out.splitlines()
    assert set(own.splitlines()[3:-2]) < set(everything)
    lines = Path(config.__file__).read_text().splitlines()
    assert everything[3:] == lines[lines.index("config = {") + 1 : lines.index("}")]


@pytest.mark.parametrize(
    ("name", "word", "told"),
    [
        ("visualize", "out=a.png", "visualize.out"),
        ("generate_dino_boxes", "batch_size=4", "dino.batch_size"),
        ("check_dataset", "opt.lr=1", "train.py"),
        ("train", "mask.store=none", "generate_mask.py"),
    ],
)
def test_a_word_that_the_script_does_not_use_is_told_with_the_right_one(script, capsys, name, word, told):
    script(name)
    load_config([word, "dataset.check=true"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {word.partition('=')[0]}: ") and told in line


def test_toys_on_photographs_are_told_with_the_preset_to_use(script, capsys):
    script("train")
    load_config(["dataset.name=cub"])
    line = capsys.readouterr().err
    assert "model.type=toyresnet" in line and "image_size=64" in line and "preset=" in line
    for words in (["preset=cub_first_training"], [], ["dataset.name=cub", "model.type=toyresnet", "image_size=64"]):
        load_config(words)
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", schema.READ_BY)
def test_a_script_is_said_to_read_what_it_reads(name):
    path = next(path for path in (ROOT / f"{name}.py", ROOT / "toybirds" / f"{name}.py") if path.exists())
    subscripts = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Subscript))
    read = {
        node.slice.value
        for node in subscripts
        if ast.unparse(node.value).split(".")[-1] in ("config", "cfg") and isinstance(node.slice, ast.Constant)
    }
    assert read and not [key for key in read if not settings.is_read_by(name, key)]
    assert {*schema.READ_BY[name].split()} <= config.config.keys()


def test_a_sweep_goes_over_any_key_with_values_of_its_type():
    def values(*words):
        return load_config(["sweeprun=true", *words])["sweep"]["values"]

    assert values("sweep.parameter=opt.lr", "sweep.values=0.002,4e-3,0.0040") == [0.002, 0.004]
    assert values("sweep.parameter=model.type", "sweep.values=resnet18,toyresnet") == ["resnet18", "toyresnet"]
    assert values("sweep.parameter=crop.scale", "sweep.values=[[0.1,1],[0.2,1]]") == [[0.1, 1.0], [0.2, 1.0]]
    assert values("sweep.parameter=maiou", "sweep.values=none,0.7") == [None, 0.7]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["sweep.parameter=opt.LR"], "opt.lr"),
        (["sweep.parameter=seed"], "sweep.seeds"),
        (["sweep.values="], "sweep.values is empty"),
        (["sweep.parameter=maiou", "sweep.values=0.3"], "maiou=0.3"),
        (["sweep.parameter=opt.lr", "sweep.values=0.1,1e-9"], "opt.target_lr"),  # with target_lr it is too low
    ],
)
def test_a_sweep_that_cannot_be_trained_is_refused_before_its_first_training(words, named):
    with pytest.raises(UserError) as error:
        load_config(["sweeprun=true", *words])
    assert named in str(error.value)


# --- presets ------------------------------------------------------------------------------------------------------


def test_the_published_rule_from_map_to_box_is_a_preset():
    found = load_config(["preset=cub_dino_published"])["dino"]
    steps = ["heads", "outlier", "filter", "min_max"]
    published = {"image_size": 500, "autocontrast": True, "steps": steps, "filter_size": None, "threshold": 0.5}
    assert found | published | {"method": "published"} == found
    assert load_config(["preset=cub_dino"])["dino"]["method"] == "component"


def test_the_published_temperature_is_the_published_presets_alone():
    at = {name: load_config([f"preset={name}"])["crop"]["temperature"] for name in presets}
    assert at.pop("cub_density_maps_published") == 2.0 and set(at.values()) == {0.1}


def test_the_default_temperature_puts_centres_into_the_object():
    y, x = np.mgrid[:31, :37]
    bump = np.exp(-(((x - 9) / 4) ** 2 + ((y - 20) / 3) ** 2))  # a map in [0, 1]; the object is where it is high
    shares = [map_to_density(bump, at)[bump > 0.1].sum() for at in (load_config([])["crop"]["temperature"], 2.0)]
    assert shares[0] > 0.9 and shares[1] < 0.2
