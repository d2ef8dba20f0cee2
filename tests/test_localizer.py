"""localizer.py: the right network from each kind of file, and one line for the rest."""

import pytest
import timm
import torch

from localized_crops.attention import cls_attention
from localized_crops.files import UserError
from localizer import networks
from localizer.networks import build_localizer
from models import build_model
from toybirds.network import build_toy_vit

VIT = "vit_tiny_patch16_224"
TOY = {"image_size": 32, "stride": 8, "width": 32, "depth": 1, "heads": 2}


def images(height=64, width=96):
    return torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def maps_of(found):
    with torch.inference_mode():
        return cls_attention(found.model, found.normalize(images()))


def same_weights(model, state):
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_timm_state_dict(tmp_path):
    model = timm.create_model(VIT, num_classes=7)
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    found = build_localizer(VIT, str(tmp_path / "timm.pth"))
    assert same_weights(found.model, model.state_dict()) and not found.model.training
    assert maps_of(found).shape == (2, 3, 4, 6) and (found.patch, found.image_size) == ((16, 16), 224)
    assert found.mean == (0.5, 0.5, 0.5)  # of this timm model


def test_an_official_dino_state_dict(tmp_path):
    state = timm.create_model("vit_small_patch8_224", num_classes=0, depth=12).state_dict()
    torch.save(state, tmp_path / "dino_deitsmall8_pretrain.pth")
    found = build_localizer("vit_small_patch8_224.dino", str(tmp_path / "dino_deitsmall8_pretrain.pth"))
    assert same_weights(found.model, state) and found.mean == networks.IMAGENET_DEFAULT_MEAN


def test_an_official_dinov2_state_dict(tmp_path):
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    state = model.state_dict()
    official = {key.replace("reg_token", "register_tokens"): value for key, value in state.items()}
    torch.save(official | {"mask_token": torch.zeros(1, 384)}, tmp_path / "dinov2.pth")
    found = build_localizer("dinov2_vits14", str(tmp_path / "dinov2.pth"))
    assert same_weights(found.model, state) and (found.patch, found.image_size) == ((14, 14), 518)


def test_a_checkpoint_of_training_gives_its_ema_and_its_size(tmp_path):
    model, ema = (build_model(VIT, 5, image_size=32, patch_size=16) for _ in range(2))
    config = {"model": {"type": VIT}, "image_size": 32}
    content = {"model": model.state_dict(), "ema": ema.state_dict(), "config": config}
    torch.save(content, tmp_path / "best.pt")
    found = build_localizer(None, str(tmp_path / "best.pt"))
    assert same_weights(found.model, ema.state_dict()) and found.image_size == 32
    assert found.mean == networks.IMAGENET_DEFAULT_MEAN  # train.py's, whatever timm says of the model
    assert found.weights_sha256 == build_localizer(VIT, str(tmp_path / "best.pt")).weights_sha256
    with pytest.raises(UserError, match=r"dino\.model=vit_small_patch16_224"):
        build_localizer("vit_small_patch16_224", str(tmp_path / "best.pt"))


def test_the_hash_is_of_the_weights():
    one, two = build_localizer(VIT, "random"), build_localizer(VIT, "random")
    assert one.weights_sha256 == two.weights_sha256
    with torch.no_grad():
        two.model.cls_token[0, 0, 3] += 1
    assert networks.state_hash(two.model) != one.weights_sha256


def test_a_toy_vit_takes_other_sizes_and_shapes():
    model = build_toy_vit(**TOY).eval()
    assert isinstance(model, timm.models.VisionTransformer)
    with torch.inference_mode():
        assert cls_attention(model, torch.rand(2, 3, 40, 56)).shape == (2, 2, 5, 7)


@pytest.mark.parametrize(
    ("model_type", "weights", "told"),
    [
        (None, "hub", "dino.model=dinov2_vits14"),
        (None, "none.pt", "there is no such file"),
        ("vit_tiny_patch16_2244", "random", "there is no such model"),
        ("resnet18", "random", "no Vision Transformer"),
        ("swin_tiny_patch4_window7_224", "random", "dino.model"),
    ],
)
def test_what_the_user_can_mend_is_one_line(model_type, weights, told):
    with pytest.raises(UserError, match=told) as error:
        build_localizer(model_type, weights)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0).state_dict(), "another architecture"),
        (timm.create_model("resnet18", num_classes=0).state_dict(), "another architecture"),
        ({"pos_embed": torch.zeros(3)}, "another architecture"),
        ({"a": 1}, "holds no state dict"),
        ([1, 2], "holds no state dict"),
    ],
)
def test_weights_of_another_architecture_are_one_line(tmp_path, content, told):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UserError, match=told) as error:
        build_localizer(VIT, str(tmp_path / "w.pt"))
    assert "\n" not in str(error.value) and "w.pt" in str(error.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"model": {}, "about": {"architecture": TOY}}, "make_localizer"),
        ({"model": {}, "about": {"architecture": TOY | {"legs": 2}}}, "make_localizer"),
        ({"model": {}, "about": {}}, "make_localizer"),
        ({"model": {}}, "dino.model"),
        ({"model": {}, "config": {"model": {}}}, "names no model.type"),
        ({"model": {}, "config": {"model": {"type": "toyresnet"}, "image_size": 64}}, "no attention"),
    ],
)
def test_files_that_should_say_what_they_are(tmp_path, content, told):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UserError, match=told) as error:
        build_localizer(None, str(tmp_path / "w.pt"))
    assert "\n" not in str(error.value)


def test_a_fault_of_another_kind_is_not_told_as_one_of_the_network(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        networks.create_network(VIT, "random", "dino.model", "dino.weights")


def test_no_network_names_the_file_to_fetch(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("Network is unreachable\nand more")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(UserError, match=r"fetch \S+dinov2_vits14|fetch \S+vit_small_patch14_dinov2") as error:
        build_localizer("dinov2_vits14", None)
    assert "\n" not in str(error.value) and "dino.weights=FILE" in str(error.value)
