"""self_distillation.py: a ViT in training makes its own maps, for the images that it classifies rightly."""

import numpy as np
import pytest
import torch
from small_runs import assert_same_run, run, words

import train
from config import load_config
from datasets import read_dataset
from localized_crops.attention import cls_attention_and_logits
from localized_crops.files import UserError
from localized_crops.map_file import MapCache
from localizer.attention_maps import clean
from localizer.networks import as_localizer
from models import build_model, input_config
from readers.images import read_image
from training import train_run
from training.loop import train_and_log_epoch
from training.self_distillation import refresh_epoch
from utils import load_tensors

OWN = [
    "model.type=test_vit",
    "patch_size=16",
    "image_size=64",
    "use_box=false",
    "use_dino_maps=true",
    "self_distillation.every=2",
    "self_distillation.start=1",
    "dino.batch_size=7",
    "opt.lr=3e-3",
]


@pytest.fixture(scope="module")
def distilled(birds, tmp_path_factory):
    """Return the folder of a run of four epochs: plain, own maps, the same maps, newer maps."""
    folder = tmp_path_factory.mktemp("distilled") / "run"
    run(birds, folder, *OWN)
    return folder


@pytest.mark.parametrize(
    ("epoch", "every", "start", "expected"),
    [(0, 2, 1, None), (1, 2, 1, 1), (2, 2, 1, 1), (3, 2, 1, 3), (9, 0, 0, None), (7, 5, 0, 5)],
)
def test_which_maps_serve_an_epoch(epoch, every, start, expected):
    assert refresh_epoch(epoch, every, start) == expected


def test_the_last_maps_are_of_the_images_that_the_ema_classified_rightly(birds, distilled, tmp_path):
    assert [path.name for path in sorted(distilled.glob("own_*"))] == ["own_epoch_3.maps.safetensors"]
    run(birds, tmp_path / "short", *OWN, "num_epochs=3", "opt.target_lr=3e-3")  # a constant rate: as far as epoch 3
    run(birds, tmp_path / "long", *OWN, "opt.target_lr=3e-3")
    data = read_dataset("cub", birds, val_fraction=0.3333)
    maps = MapCache.open(tmp_path / "long" / "own_epoch_3.maps.safetensors", dataset=data.fingerprint())
    model = build_model("test_vit", len(data.class_names), image_size=64, patch_size=16)
    model.load_state_dict(load_tensors(tmp_path / "short" / "last.pt")["ema"])
    statistics = {key: tuple(input_config("test_vit")[key]) for key in ("mean", "std")}
    localizer = as_localizer(model, "test_vit", "test", image_size=64, **statistics)
    assert maps.header["weights_sha256"] == localizer.weights_sha256
    right = 0
    for row in data.rows("train"):
        attention, label = look(localizer, data, row)
        if label == data.labels[row]:
            right += 1
            wanted = load_config([])["dino"]
            assert np.abs(maps[int(data.ids[row])] - clean(attention, wanted)).max() < 2e-3
        else:
            assert maps.get(int(data.ids[row])) is None
    assert 0 < right < len(data.rows("train"))


def look(localizer, data, row):
    """Return (attention (heads, feat_h, feat_w), predicted label) of one image, by itself."""
    image = read_image(data.paths[row])
    scale = 64 / min(image.size)
    width, height = (max(16, round(side * scale / 16) * 16) for side in image.size)
    pixels = torch.from_numpy(np.array(image.resize((width, height), 3))).permute(2, 0, 1)[None]
    attention, logits = cls_attention_and_logits(localizer.model, localizer.normalize(pixels))
    return attention[0].numpy(), int(logits.argmax())


def test_the_maps_change_the_training(birds, distilled, tmp_path):
    run(birds, tmp_path / "plain", *OWN[:4], "opt.lr=3e-3")
    with pytest.raises(AssertionError):
        assert_same_run(distilled, tmp_path / "plain")


@pytest.mark.parametrize("epochs_done", [1, 2, 3])
def test_a_run_goes_on_with_the_maps_of_its_epoch(birds, distilled, tmp_path, monkeypatch, epochs_done):
    original = train_and_log_epoch

    def break_off(one, *args):
        if one.epoch == epochs_done:
            raise KeyboardInterrupt  # after the maps of this epoch were made
        original(one, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_run, "train_and_log_epoch", break_off)
        run(birds, tmp_path / "broken", *OWN)
    train.train_run(train.load_run_config([f"run_dir={tmp_path / 'broken'}", "resume=true"]))
    assert_same_run(distilled, tmp_path / "broken")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["model.type=toyresnet"], "toyresnet gives no maps"),
        (["use_dino_maps=false"], "set use_dino_maps=true"),
        (["dino_maps=boxes.json"], "dino_maps=none"),
        (["self_distillation.every=-1"], "self_distillation.every=-1"),
    ],
)
def test_what_does_not_go_together_is_one_line(birds, tmp_path, more, told):
    with pytest.raises(UserError, match=told):
        train.train_run(train.load_run_config(words(birds, tmp_path / "run", *OWN, *more)))
