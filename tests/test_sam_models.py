"""sam_models.py: checkpoints in the published format, and those that are not."""

import pytest
import torch

from localized_crops.files import UserError
from mask_speed import build_small_sam
from masks import sam_models
from masks.sam_models import CHECKPOINTS, load_sam
from utils import file_sha256


@pytest.fixture
def small(monkeypatch):
    """Let the registry build small networks under the published names."""
    registry = {"vit_b": lambda: build_small_sam(64, 64, 2), "vit_h": lambda: build_small_sam(64, 128, 2)}
    monkeypatch.setattr(sam_models, "sam_model_registry", registry)
    return registry


@pytest.fixture
def checkpoint(small, tmp_path):
    torch.manual_seed(3)
    model = small["vit_b"]()
    torch.save(model.state_dict(), tmp_path / "sam.pth")
    return tmp_path / "sam.pth", model


def test_a_checkpoint_is_loaded(checkpoint):
    path, model = checkpoint
    sam, sha256 = load_sam("vit_b", str(path))
    assert sha256 == file_sha256(path) and not sam.training
    loaded = sam.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in model.state_dict().items())


def test_random_weights_repeat(small):
    (one, name), (other, _) = load_sam("vit_b", "random"), load_sam("vit_b", "random")
    assert name == "random"
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_the_remedy_names_metas_file(small):
    with pytest.raises(UserError, match=r"fetch https://dl\.fbaipublicfiles\.com/.*sam_vit_b_01ec64\.pth and give"):
        load_sam("vit_b", None)


def test_an_official_name_with_other_content_is_damaged(checkpoint, tmp_path):
    path = checkpoint[0].rename(tmp_path / CHECKPOINTS["vit_b"][0])
    with pytest.raises(UserError, match=r"damaged, its sha256 is \w{12}\.\.\., not ec2df6273261\.\.\."):
        load_sam("vit_b", str(path))


def test_the_official_hashes_carry_no_typing_error():
    """The published names end in the first digits of another hash; these are whole sha256."""
    assert {len(sha256) for _, sha256 in CHECKPOINTS.values()} == {64} and len(CHECKPOINTS) == 3


def test_a_checkpoint_of_another_size(checkpoint):
    with pytest.raises(UserError, match=r"of .*, not of sam\.model=vit_h; give the model that it is of") as error:
        load_sam("vit_h", str(checkpoint[0]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_torn_and_missing_files(small, tmp_path, content):
    if content is not None:
        (tmp_path / "sam.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"sam\.pth") as error:
        load_sam("vit_b", str(tmp_path / "sam.pth"))
    assert "\n" not in str(error.value)


def test_a_cut_checkpoint(checkpoint):
    path = checkpoint[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"sam\.pth"):
        load_sam("vit_b", str(path))


def test_the_size_of_a_real_mismatch_is_named(small, tmp_path, monkeypatch):
    monkeypatch.setitem(small, "vit_l", lambda: build_small_sam(64, 1024, 1))
    monkeypatch.setitem(small, "vit_b", lambda: build_small_sam(64, 768, 1))
    torch.save(small["vit_l"]().state_dict(), tmp_path / "sam.pth")
    with pytest.raises(UserError, match=r"of vit_l, not of sam\.model=vit_b"):
        load_sam("vit_b", str(tmp_path / "sam.pth"))
