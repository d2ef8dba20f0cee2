import copy
import itertools
import os
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.optim import param_groups_weight_decay
from torch import nn

import models
from localized_crops.files import UserError
from utils import save_tensors

TINY_VIT = "vit_tiny_patch16_224"


def build(model_type="toyresnet", n_classes=5, image_size=64, patch_size=16, weights=None):
    return models.build_model(model_type, n_classes, image_size=image_size, patch_size=patch_size, weights=weights)


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("dinov2_vits14", "vit_small_patch14_dinov2.lvd142m"),
        ("base", "vit_base_patch14_dinov2.lvd142m"),
        ("large", "vit_large_patch14_dinov2.lvd142m"),
        ("huge", "vit_giant_patch14_dinov2.lvd142m"),
        ("dinov2_vitg14", "vit_giant_patch14_dinov2.lvd142m"),
        ("dinov2_vitsmall14", "vit_small_patch14_dinov2.lvd142m"),
        ("dinov2_vitbase14", "vit_base_patch14_dinov2.lvd142m"),
        ("dinov2_vitlarge14", "vit_large_patch14_dinov2.lvd142m"),
        ("dinov2_vithuge14", "vit_giant_patch14_dinov2.lvd142m"),
        ("resnet18", "resnet18"),
        ("s", "s"),
        ("dinov2_vitx14", "dinov2_vitx14"),
    ],
)
def test_the_short_names_of_dinov2(word, name):
    assert models.timm_name(word) == name
    assert word == name != "resnet18" or timm.is_model(name)


@pytest.mark.parametrize("model_type", ["toyresnet", "resnet50", "resnet18", TINY_VIT])
def test_a_model_has_the_wanted_classes(model_type):
    assert build(model_type).eval()(torch.randn(2, 3, 64, 64)).shape == (2, 5)


def test_a_dinov2_classifier_takes_multiples_of_14():
    model = build("dinov2_vits14", image_size=42, patch_size=14).eval()
    assert model(torch.randn(1, 3, 42, 42)).shape == (1, 5)
    with pytest.raises(UserError, match=r"image_size=100: no multiple .* set 98"):
        build("dinov2_vits14", image_size=100, patch_size=14)
    assert model(torch.randn(1, 3, 28, 70)).shape == (1, 5)  # test views may have other sizes
    with pytest.raises(UserError, match="set patch_size=16"):
        build(TINY_VIT, patch_size=14)
    with pytest.raises(UserError, match="no such model"):
        build("resnet5000")


@pytest.mark.parametrize(
    ("model_type", "told"),
    [("resnet50", "resnet50-11ad3fa6.pth"), ("small", "timm/vit_small_patch14_dinov2.lvd142m/model.safetensors")],
)
def test_without_a_network_the_file_to_fetch_is_named(model_type, told, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no network\nat all")

    monkeypatch.setattr(torchvision.models, "resnet50", no_network)
    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(UserError, match=told) as error:
        build(model_type, image_size=56, patch_size=14, weights="hub")
    assert "model.weights=FILE" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("weights", [None, "hub"])
def test_a_fault_is_the_networks_only_where_weights_are_fetched(monkeypatch, weights):
    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(RuntimeError if weights is None else UserError, match="out of memory"):
        build(weights=weights)


def test_an_option_that_a_network_does_not_take_is_named_with_it():
    with pytest.raises(UserError, match=r"model\.type=vgg11, model\.drop_path=0\.1: .*drop_path_rate"):
        models.build_model("vgg11", 2, image_size=32, patch_size=16, drop_path=0.1)


def test_a_network_is_compiled_after_a_trial(monkeypatch):
    compiled, model = [], build()
    monkeypatch.setattr(torch, "compile", lambda one: compiled.append(one) or one)
    assert models.compiled(model, torch.device("cpu")) is model
    assert [type(one) for one in compiled] == [nn.Linear, type(model)]


# --- parameter groups, what learns --------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["resnet50", "toyresnet", TINY_VIT])
def test_groups_hold_each_parameter_once_and_agree_with_timms(model_type):
    model = build(model_type)
    groups = models.parameter_groups(model, lr=0.1, weight_decay=0.1)
    grouped = [p for group in groups for p in group["params"]]
    assert len({id(p) for p in grouped}) == len(grouped) == len(list(model.parameters()))
    skip = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    theirs = param_groups_weight_decay(model, 0.1, no_weight_decay_list=skip)
    for group in theirs:
        same = [p for ours in groups if ours["weight_decay"] == group["weight_decay"] for p in ours["params"]]
        assert {id(p) for p in same} == {id(p) for p in group["params"]}


def test_rates_of_the_head_and_of_the_layers():
    model = build(TINY_VIT)
    groups = models.parameter_groups(model, lr=0.1, weight_decay=0.1, head_lr=10, layer_decay=0.5)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rate[id(model.head.weight)] == pytest.approx(1.0)
    rates = [rate[id(block.mlp.fc1.weight)] for block in model.blocks]
    assert all(later == pytest.approx(2 * earlier) for earlier, later in itertools.pairwise(rates))
    assert rates[-1] == pytest.approx(0.05) and rate[id(model.pos_embed)] < rates[0]


def test_drop_path():
    model = models.build_model("toyresnet", 2, image_size=32, patch_size=14, drop_path=0.5)
    assert any(getattr(module, "drop_prob", 0) for module in model.modules())
    with pytest.raises(UserError, match="drop_path"):
        models.build_model("resnet50", 2, image_size=32, patch_size=14, drop_path=0.5)


def test_frozen_parameters_are_in_no_group():
    model = build()
    models.set_trainable(model, freeze_backbone=True, train_cls=False)
    groups = models.parameter_groups(model, lr=0.1, weight_decay=0.1)
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in model.fc.parameters()}


@pytest.mark.parametrize("train_cls", [False, True])
def test_only_what_should_learn_changes_bit_for_bit(train_cls):
    model = build(TINY_VIT, image_size=32)
    models.set_trainable(model, freeze_backbone=not train_cls, train_cls=train_cls)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(models.parameter_groups(model, lr=0.1, weight_decay=0.1), lr=0.1)
    model(torch.randn(3, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"head.weight", "head.bias"} | ({"cls_token"} if train_cls else set())


@pytest.mark.parametrize("name", ["toyresnet", "resnet50", TINY_VIT])
def test_frozen_layers_are_those_next_to_the_input(name):
    model = models.build_model(name, 3, image_size=32, patch_size=16)
    models.set_trainable(model, freeze_backbone=False, train_cls=False, freeze_layers=2)
    before = copy.deepcopy(model.state_dict())
    models.train_mode(model, freeze_bn=False)
    optimizer = torch.optim.AdamW(models.parameter_groups(model, lr=0.1, weight_decay=0.1), lr=0.1)
    model(torch.randn(3, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    changed = {key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    later = {"layer2", "layer3", "layer4", "fc"} if name in ("toyresnet", "resnet50") else {"blocks", "norm", "head"}
    assert changed == later
    if name == TINY_VIT:  # the embedding and the first block stand still
        assert torch.equal(model.blocks[0].mlp.fc1.weight, before["blocks.0.mlp.fc1.weight"])
        assert not torch.equal(model.blocks[1].mlp.fc1.weight, before["blocks.1.mlp.fc1.weight"])


def test_more_frozen_layers_than_there_are():
    with pytest.raises(UserError, match=r"model\.freeze_layers=9"):
        models.set_trainable(build(), freeze_backbone=False, train_cls=False, freeze_layers=9)


def test_train_cls_needs_a_cls_token():
    with pytest.raises(UserError, match="no CLS token"):
        models.set_trainable(build(), freeze_backbone=False, train_cls=True)


@pytest.mark.parametrize("how", ["free", "freeze_bn", "freeze_backbone"])
def test_batchnorm_statistics_stand_still_when_told(how):
    model = build()
    models.set_trainable(model, freeze_backbone=how == "freeze_backbone", train_cls=False)
    models.train_mode(model, freeze_bn=how == "freeze_bn")
    before = model.bn1.running_mean.clone()
    model(torch.randn(4, 3, 64, 64) + 3)
    assert torch.equal(before, model.bn1.running_mean) == (how != "free")
    assert model.training


# --- EMA ----------------------------------------------------------------------------------------------------------


def test_ema_follows_its_formula_for_weights_and_buffers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    ema, expected = models.build_ema(model, 0.9), None
    for n in range(4):
        with torch.no_grad():
            model[0].weight.add_(torch.randn(3, 3))
            model(torch.randn(8, 3))
        ema.update_parameters(model)
        now = {key: value.clone().float() for key, value in model.state_dict().items()}
        decay = (1 + n) / (10 + n)  # under 0.9 in these first updates
        expected = now if expected is None else {k: decay * expected[k] + (1 - decay) * now[k] for k in now}
    for key in ("0.weight", "1.running_mean", "1.running_var"):
        torch.testing.assert_close(ema.module.state_dict()[key], expected[key])


@pytest.mark.parametrize("updates", [22, 725])
def test_the_first_weights_do_not_stay_in_the_ema_of_a_short_training(updates):
    left = np.prod([models.warmed_up_decay(0.999, n) for n in range(1, updates)])  # the first update is a copy
    assert left < 1e-3 and models.warmed_up_decay(0.999, 10**6) == 0.999


@pytest.mark.parametrize(
    ("name", "mean"),
    [
        ("toyresnet", 0.485),
        ("resnet50", 0.485),
        ("tf_efficientnet_lite0", 0.5),
        ("vit_small_patch16_224.augreg_in21k", 0.5),
        ("dinov2_vits14", 0.485),
        ("vit_base_patch16_clip_224.openai", 0.48145466),
    ],
)
def test_the_input_statistics_are_the_networks_own(name, mean):
    assert models.input_config(name)["mean"][0] == mean


def test_a_size_that_a_network_refuses_to_be_told_may_still_be_taken():
    """This one wants to be told whole patches, and enlarges other images by itself."""
    model = models.build_model("xcit_nano_12_p16_224", 2, image_size=41, patch_size=16).eval()
    assert model(torch.zeros(1, 3, 41, 41)).shape == (1, 2)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto", "deit3_small_patch16_224"])
def test_a_size_that_a_network_cannot_take_is_named_with_those_that_work(name):
    with pytest.raises(UserError, match="image_size") as error:
        models.build_model(name, 2, image_size=10, patch_size=16)
    sizes = [int(text) for text in re.findall(r"\d+", str(error.value).rpartition(" takes ")[2])]
    assert len(sizes) > 0
    for size in sizes:
        models.build_model(name, 2, image_size=size, patch_size=16)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "backbone.", "module._orig_mod."])
def test_names_of_wrapped_weights(tmp_path, prefix):
    model = models.build_model("toyresnet", 3, image_size=32, patch_size=14)
    path = tmp_path / "wrapped.pt"
    torch.save({prefix + key: value for key, value in model.state_dict().items()}, path)
    other = models.build_model("toyresnet", 3, image_size=32, patch_size=14)
    models.load_trained(other, path)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_foreign_state_dict_shows_names_that_are_missing_and_unexpected(tmp_path):
    path = tmp_path / "foreign.pt"
    torch.save({"stem.weight": torch.zeros(2)}, path)
    with pytest.raises(UserError) as caught:
        models.load_trained(models.build_model("toyresnet", 3, image_size=32, patch_size=14), path)
    assert "stem.weight" in str(caught.value) and "bn1.bias" in str(caught.value)


def test_hub_weights_of_resnet50_are_loaded_as_weights_only(monkeypatch):
    asked = {}
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_a, **how: asked.update(how) or {})
    with pytest.raises(UserError, match="hub"):
        models.build_model("resnet50", 2, image_size=32, patch_size=14, weights="hub")
    assert asked["weights_only"] and asked["check_hash"]


class Bomb:
    """What runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("model_type", ["resnet50", "resnet18.a1_in1k"])
def test_weights_in_the_hubs_cache_that_hold_code_never_run_it(tmp_path, monkeypatch, model_type):
    monkeypatch.chdir(tmp_path)
    cached = tmp_path / "hub" / "checkpoints" / Path(torchvision.models.ResNet50_Weights.IMAGENET1K_V2.url).name
    cached.parent.mkdir(parents=True)
    torch.save({"conv1.weight": Bomb()}, cached)

    def cached_file(*_, filename, **__):
        if filename.endswith(".safetensors"):
            raise timm.models._hub.EntryNotFoundError("none")
        return str(cached)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(timm.models._hub, "hf_hub_download", cached_file)
    with pytest.raises(UserError, match="hub"):
        models.build_model(model_type, 2, image_size=32, patch_size=14, weights="hub")
    assert not (tmp_path / "ran").exists()
    torch.load(cached, weights_only=False)
    assert (tmp_path / "ran").exists()  # the bomb is one


# --- checkpoints --------------------------------------------------------------------------------------------------


def save(tmp_path, value):
    save_tensors(tmp_path / "weights.pt", value)
    return tmp_path / "weights.pt"


def equal_states(a, b, leave_out=()):
    return all(torch.equal(a[key], b[key]) for key in a if not key.startswith(leave_out))


def test_a_checkpoint_gives_its_ema_or_its_model(tmp_path):
    one, other, into = build(), build(), build()
    path = save(tmp_path, {"model": one.state_dict(), "ema": other.state_dict(), "epoch": 3, "config": {"seed": 0}})
    models.load_trained(into, path, ema=False)
    assert equal_states(into.state_dict(), one.state_dict())
    models.load_trained(into, path, ema=True)
    assert equal_states(into.state_dict(), other.state_dict())


def test_a_torchvision_state_dict_starts_the_backbone_and_leaves_the_head(tmp_path):
    theirs = torchvision.models.resnet50()
    model = build("resnet50", weights=save(tmp_path, theirs.state_dict()))
    assert equal_states(model.state_dict(), theirs.state_dict(), leave_out="fc.")
    assert model.fc.weight.shape == (5, 2048)


def test_a_timm_state_dict_is_resampled_to_the_image_size(tmp_path):
    theirs = timm.create_model(TINY_VIT)  # 224 px: 14 x 14 patches
    path = save(tmp_path, {"state_dict": theirs.state_dict()})
    model = build(TINY_VIT, image_size=64, weights=path)
    assert model.pos_embed.shape[1] == 1 + 4 * 4
    assert equal_states(model.blocks.state_dict(), theirs.blocks.state_dict())


def test_safetensors_are_read_too(tmp_path):
    theirs = timm.create_model("resnet18")
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    model = build("resnet18", weights=tmp_path / "model.safetensors")
    assert equal_states(model.state_dict(), theirs.state_dict(), leave_out="fc.")
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:999])
    with pytest.raises(UserError, match=r"torn\.safetensors"):
        build("resnet18", weights=tmp_path / "torn.safetensors")


def test_an_official_dinov2_state_dict_is_understood(tmp_path):
    theirs = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=42, depth=12)
    state = dict(theirs.state_dict()) | {"mask_token": torch.zeros(1, 384)}
    model = build("dinov2_vits14", image_size=42, patch_size=14, weights=save(tmp_path, state))
    assert equal_states(model.blocks.state_dict(), theirs.blocks.state_dict())


class Boom:
    def __reduce__(self):
        return print, ("code in a pickle was run",)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (lambda: build(n_classes=7).state_dict(), "trained on 7 classes, the data set has 5"),
        (lambda: build("resnet18").state_dict(), "another architecture"),
        (lambda: {"model": {"a": 1}}, "no state dict"),
        (lambda: [1, 2], "no state dict"),
        (lambda: {}, "no state dict"),
        (lambda: Boom(), "refused"),
    ],
)
def test_a_wrong_checkpoint_is_one_line(tmp_path, capsys, value, told):
    path = save(tmp_path, value())
    with pytest.raises(UserError, match=told) as error:
        models.load_trained(build(), path, ema=True)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert "code in a pickle" not in capsys.readouterr().out


def test_torn_and_missing_checkpoints(tmp_path):
    path = save(tmp_path, build().state_dict())
    path.write_bytes(path.read_bytes()[:5000])
    for wrong in (path, tmp_path / "none.pt", tmp_path):
        with pytest.raises(UserError, match=wrong.name):
            models.load_trained(build(), wrong, ema=True)


@pytest.mark.parametrize("load", [models.load_backbone, models.load_trained])
def test_weights_that_are_no_numbers_are_refused(tmp_path, load):
    model = models.build_model("toyresnet", 3, image_size=32, patch_size=14)
    state = model.state_dict() | {"conv1.weight": torch.full_like(model.conv1.weight, torch.nan)}
    with pytest.raises(UserError, match=r"weights\.pt"):
        load(model, save(tmp_path, state))


def test_weights_without_batchnorms_counters_load(tmp_path):
    model = build(n_classes=3)
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "weights.safetensors")  # as converters and older tools write them
    other = build(n_classes=5, weights=str(tmp_path / "weights.safetensors"))
    assert torch.equal(other.conv1.weight, model.conv1.weight)
