"""The classifier of cells that attention teaches: on made features, on a random network, on photographs."""

from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import timm
import torch

from datasets import read_dataset
from localized_crops.boxes import center_boxes, iou
from localized_crops.files import UserError
from localized_crops.map_boxes import component_mask
from localizer import object_head
from localizer.attention_maps import map_batches, plan_batches
from localizer.networks import build_localizer
from localizer.object_head import (
    ObjectHead,
    attention_mask,
    build_features,
    cell_features,
    find_objects,
    learn_head,
    object_box,
    object_map,
    teach,
)
from models import fit_linear
from readers.data_set import DataSet

GRID, OBJECT_AT = (9, 13), (slice(2, 6), slice(3, 8))


def scenes(count: int = 12) -> tuple[dict, dict, dict]:
    """Return features, true masks and pseudo masks: each pseudo mask takes a piece of background for object too."""
    rng = np.random.default_rng(0)
    features, truth, taught = {}, {}, {}
    for row in range(count):
        truth[row] = np.zeros(GRID, bool)
        truth[row][OBJECT_AT] = True
        taught[row] = truth[row].copy()
        taught[row][6:, 3 + row % 5] = True  # touches the object: one component
        features[row] = rng.normal(size=(*GRID, 7)) + 8 * truth[row][..., None] * np.eye(7)[2]
    return features, truth, taught


def test_what_single_masks_get_wrong_is_mended_over_many_images():
    features, truth, taught = scenes()
    head = teach(features, taught, rounds=3)
    found = [object_map(features[row], head) >= 0.5 for row in features]
    wrong = np.mean([mask != truth[row] for row, mask in zip(features, found, strict=True)])
    assert wrong < 0.2 * np.mean([taught[row] != truth[row] for row in features])


def test_the_box_is_in_pixels_of_the_image():
    cells = np.zeros(GRID)
    cells[OBJECT_AT] = 1
    box = object_box(cells, (130, 90), upsample=1)
    assert box.xywh == pytest.approx((30, 20, 50, 40))


def test_a_map_under_the_border_everywhere_still_gives_a_box():
    cells = np.full(GRID, 0.1)
    cells[4, 5] = 0.3
    assert object_box(cells, (130, 90), upsample=1).xywh == pytest.approx((50, 40, 10, 10))


def test_the_attention_mask_is_one_component_on_another_grid():
    cells = np.zeros((5, 7))
    cells[1:3, 2:5], cells[4, 6] = 1, 0.9
    mask = attention_mask(cells, (10, 14), 0.5)
    assert mask.shape == (10, 14)
    assert mask[3, 6]
    assert not mask[9, 13]


def test_a_component_of_nothing_is_empty():
    assert not component_mask(np.zeros((3, 4)), 0.5).any()


def test_the_linear_classifier_takes_features_as_they_are():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    features = (rng.normal(size=(90, 5)) + 6 * np.eye(5)[labels]) * (1, 100, 0.01, 1, 1) + 50
    weights, biases = fit_linear(features, labels, 3, 1e-3)
    assert weights.shape == (3, 5)
    assert ((features @ weights.T + biases).argmax(1) == labels).mean() > 0.95


def test_features_lie_on_the_finer_grid():
    network = build_features("tf_efficientnet_lite0", "random")
    assert network.patch == (32, 32)
    assert network.mean == (0.5, 0.5, 0.5)
    found = cell_features(network, torch.zeros(2, 3, 96, 160, dtype=torch.uint8))
    assert found.shape == (2, 6, 10, 112 + 320)


def test_weights_from_before_batch_norm_counted_batches_are_taken(tmp_path):
    state = timm.create_model("resnet18", num_classes=3).state_dict()
    torch.save({key: value for key, value in state.items() if "num_batches_tracked" not in key}, tmp_path / "old.pt")
    network = build_features("resnet18", str(tmp_path / "old.pt"))
    assert torch.equal(network.model.state_dict()["conv1.weight"], state["conv1.weight"])


def test_a_network_that_timm_does_not_know_is_named():
    with pytest.raises(UserError, match=r"dino\.object_model=no_such_net"):
        build_features("no_such_net", "random")


def test_a_network_without_feature_maps_is_named(monkeypatch):
    """timm 1.0.20 has some, such as its DenseNets."""
    monkeypatch.setattr(object_head, "create_network", lambda *_: torch.nn.Identity())
    with pytest.raises(UserError, match=r"dino\.object_model=densenet121: gives no feature maps"):
        build_features("densenet121", "random")


def test_maps_that_point_nowhere_teach_nothing(few_birds):
    data, settings = read_dataset("cub", few_birds), {"object_image_size": 64, "threshold": 0.5, "object_images": 9}
    maps = {image_id: np.zeros((4, 4)) for image_id in data.ids.tolist()}
    maps[data.ids[data.rows("test")[0]].item()] = np.eye(4)  # of a test image: it must not teach
    network = build_features("test_efficientnet", "random")
    with pytest.raises(UserError, match=r"no training image whose attention map points anywhere; see dino\.model"):
        learn_head(network, data, maps, settings | {"object_rounds": 1}, 0)


def test_images_smaller_than_a_patch_teach_and_a_torn_one_is_told(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(4):
        (tmp_path / f"{number % 2}").mkdir(exist_ok=True)
        pixels = rng.integers(256, size=(15, 20, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / f"{number % 2}" / f"{number}.png")
    data = read_dataset("folder", tmp_path)
    torn = data.paths[3]
    torn.write_bytes(torn.read_bytes()[:200])
    maps = {image_id: np.eye(4) + 0.1 for image_id in data.ids.tolist()}
    network = build_features("test_efficientnet", "random")
    settings = {"object_image_size": 64, "threshold": 0.5, "object_rounds": 1, "object_images": 9, "upsample": 1}
    head = learn_head(network, data, maps, settings, 0)
    assert ObjectHead.of_plain(head.plain()).weight.tolist() == head.weight.tolist()
    found = find_objects(network, head, data.paths, data.image_sizes, settings, 0)
    by_row = {row: (box, error) for row, box, error in found}
    assert [by_row[row][1] is None for row in range(4)] == [True, True, True, False]
    assert torn.name in by_row[3][1] and not by_row[3][0].found
    for path in data.paths:
        path.write_text("no image")
    with pytest.raises(UserError, match="training images"):
        learn_head(network, data, maps, settings, 0)


def test_without_a_network_the_file_to_fetch_is_named(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(UserError, match=r"dino\.object_weights=hub.*tf_efficientnet_lite0.*dino\.object_weights=FILE"):
        build_features("tf_efficientnet_lite0", "hub")


def test_object_boxes_of_photographs_beat_the_centred_box(cub24, weights_folder):
    """Real attention (DINOv2 fine-tuned for salient regions by a third party) teaches an ImageNet network."""
    data = subset(read_dataset("cub", cub24), step=40)
    wanted = {"autocontrast": False, "heads": "5", "filter_size": None}
    wanted["steps"] = ["heads", "outlier", "filter", "min_max"]
    localizer = build_localizer("dinov2_vits14", str(weights_folder / "dinov2_vits14_salient.safetensors"))
    batches, maps = plan_batches(data.image_sizes, 224, localizer.patch, 8), {}
    for one in map_batches(localizer, batches, data.paths, wanted, amp="none", num_workers=0):
        maps |= dict(zip(data.ids[one.rows].tolist(), one.maps, strict=True))
    network = build_features("tf_efficientnet_lite0", str(weights_folder / "tf_efficientnet_lite0.safetensors"))
    settings = {"object_image_size": 256, "threshold": 0.15, "object_rounds": 2, "object_images": 100, "upsample": 4}
    head = learn_head(network, data, maps, settings, 0)
    found = find_objects(network, head, data.paths, data.image_sizes, settings, 0)
    boxes = [box.xywh for _, box, error in sorted(found) if error is None]
    control = iou(center_boxes(data.image_sizes), data.boxes).mean()
    assert iou(np.array(boxes), data.boxes).mean() > control + 0.08


def subset(data: DataSet, step: int) -> DataSet:
    """Return every so many images of a data set, all of them training images."""
    rows = np.arange(0, len(data.ids), step)
    columns = {name: getattr(data, name)[rows] for name in ("ids", "labels", "boxes", "image_sizes")}
    return replace(data, paths=data.paths[rows], split=np.full(len(rows), "train"), **columns)
