"""make_toy_localizer.py: what is learnt from, that it learns, and the committed file."""

import numpy as np
import pytest
import torch

from config import load_config
from localized_crops import files
from localized_crops.attention import cls_attention
from localized_crops.files import UserError
from localizer import networks
from localizer.networks import build_localizer
from toybirds import drawing, make_localizer
from toybirds.network import build_toy_vit
from transforms import normalize
from utils import load_tensors

SMALL = {"image_size": 32, "stride": 8, "width": 32, "depth": 1, "heads": 2}


@pytest.fixture(scope="module")
def drawings():
    return make_localizer.draw_images(48, 32, seed=0)


def test_the_drawings(drawings):
    images, masks = drawings
    assert images.shape == (48, 3, 32, 32) and images.dtype == torch.uint8
    assert masks.shape == (48, 32, 32) and masks.min() >= 0 and 0.9 < masks.max() <= 1
    again, _ = make_localizer.draw_images(2, 32, seed=0)
    assert torch.equal(images[:2], again)
    other, _ = make_localizer.draw_images(2, 32, seed=1)
    assert not torch.equal(images[:2], other)


def test_a_palette_has_the_form_of_the_data_sets_and_other_colours():
    drawn = make_localizer.random_palette(np.random.default_rng(0))
    for kind, colors in drawing.PALETTE._asdict().items():
        assert np.shape(getattr(drawn, kind)) == np.shape(colors) and getattr(drawn, kind) != colors


def test_what_the_attention_shall_be():
    masks = torch.zeros(1, 16, 24)
    masks[0, :8, 8:16] = 1  # one cell wholly
    masks[0, 8:10, 16:24] = 1  # a quarter of another
    wanted = make_localizer.mask_to_density(masks, 8)
    assert torch.allclose(wanted, torch.tensor([[[0, 2 / 3, 0], [0, 0, 1 / 3]]]))


def test_divergence_is_zero_where_all_attention_is_right():
    wanted = torch.tensor([[[0.25, 0.75], [0.0, 0.0]]])
    assert make_localizer.divergence(wanted.flatten(1), wanted) == pytest.approx(0, abs=1e-6)
    half = make_localizer.divergence(wanted.flatten(1) / 2, wanted)  # the other half stays with CLS
    assert half == pytest.approx(np.log(2), rel=1e-5)


def test_the_trained_rows_are_those_that_cls_attention_reads(drawings):
    batch = normalize(drawings[0][:3])
    model = build_toy_vit(**SMALL)
    rows = make_localizer._attention_with_gradient(model)
    model.eval()  # the stem's batch norm must do the same in both
    ours, theirs = cls_attention(model, batch).mean(1).flatten(1), rows(batch)
    assert theirs.requires_grad
    torch.testing.assert_close(theirs.detach(), ours, rtol=1e-5, atol=1e-7)


def test_training_learns_where_the_birds_are(drawings):
    images, masks = drawings
    torch.manual_seed(0)
    model, wanted = build_toy_vit(**SMALL), make_localizer.mask_to_density(masks, 8)
    first = make_localizer.train(model, images, wanted, epochs=1)
    last = make_localizer.train(model, images, wanted, epochs=30)
    assert last < first - 0.1 and not model.training


def test_the_script_writes_a_file_that_the_localizer_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(make_localizer, "ARCHITECTURE", SMALL)
    monkeypatch.setattr(make_localizer, "NUM_IMAGES", 32)
    monkeypatch.setattr(make_localizer, "EPOCHS", 1)
    hashes = []
    for name in ("a.pt", "b.pt"):
        make_localizer.main(load_config([f"out={tmp_path / name}", "num_threads=1"]))
        found = build_localizer(None, str(tmp_path / name))
        hashes.append(found.weights_sha256)
        assert found.name == "toy_localizer" and found.image_size == 32
    assert hashes[0] == hashes[1]  # same seed, same weights
    torch.use_deterministic_algorithms(False)


def test_the_output_is_tried_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(make_localizer, "draw_images", lambda *_: pytest.fail("the work began"))
    (tmp_path / "mine.pt").write_text("mine")
    for name in ("mine.pt", "mine.pt/new.pt"):
        with pytest.raises(UserError, match="mine"):
            make_localizer.main(load_config([f"out={tmp_path / name}"]))
    files.check_output(networks.TOY_WEIGHTS, make_localizer.OURS)  # may be made again


def test_the_committed_file_says_what_it_is():
    content = load_tensors(networks.TOY_WEIGHTS)
    about = content["about"]
    assert networks.TOY_WEIGHTS.stat().st_size <= 2e6
    assert "drawn masks" in about["supervision"] and "stand-in for DINO" in about["supervision"]
    assert 1 <= about["toybirds_version"] <= drawing.VERSION  # birds of an older version teach birds too
    assert about["architecture"] == make_localizer.ARCHITECTURE
    assert all(value.dtype == torch.float16 for value in content["model"].values() if value.is_floating_point())
    assert build_localizer(None, None).name == "toy_localizer"
