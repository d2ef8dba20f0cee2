"""The learned head: windows cut where they should be, and boxes that a threshold cannot give are learned."""

import numpy as np
import pytest
import torch

import box_head
from box_head import BoxHead, fit_box_head, head_box
from localized_crops.boxes import iou
from localized_crops.map_boxes import component_box

IMAGE_SIZE = (106, 74)


def ramp_maps():
    """(2, 64, 64) torch maps whose cells hold their own x and y position in the image, from 0 to 1."""
    middles = (np.arange(box_head.GRID) + 0.5) / box_head.GRID
    return torch.tensor(np.stack([np.tile(middles, (64, 1)), np.tile(middles[:, None], (1, 64))]), dtype=torch.float32)


@pytest.mark.parametrize("flip", [False, True])
def test_windows_are_cut_at_their_place(flip):
    window = np.array([[53.0, 30.0, 24.0]])  # centre and side in pixels: square in pixels, not in cells
    cut = box_head.cut_windows(ramp_maps()[None], window, np.array([IMAGE_SIZE]), np.array([flip]))[0].numpy()
    steps = ((np.arange(48) + 0.5) / 48 - 0.5) * 24
    assert np.allclose(cut[0, 0] * IMAGE_SIZE[0], 53 + steps * (-1 if flip else 1), atol=1e-3)
    assert np.allclose(cut[1, :, 0] * IMAGE_SIZE[1], 30 + steps, atol=1e-3)


def test_targets_and_edges_are_each_others_inverse():
    window, box = np.array([[50.0, 40.0, 60.0]]), np.array([[35.0, 30.0, 20.0, 25.0]])
    columns, rows = box_head.inside_box(window, box, np.array([False]))
    logits = torch.minimum(columns[0][None, :], rows[0][:, None]).numpy() * 2.0 - 1
    assert box_head._window_edges(logits, window[0]) == pytest.approx([35, 30, 55, 55], abs=60 / 48)


def test_varied_maps_stay_maps():
    stacked = box_head.stack_maps(list(np.random.default_rng(2).random((6, 7, 11))))
    for seed in range(5):
        varied = box_head.vary_maps(stacked, np.random.default_rng(seed))
        assert varied.shape == stacked.shape and (varied[:, 1] == 1).all()
        assert varied[:, 0].min() >= 0 and varied[:, 0].amax((1, 2)).allclose(torch.ones(6))


def blob_with_perch(rng):
    """A map of an ellipse (the object) on a bright thin post that reaches the bottom (not the object); its box."""
    height = width = 32
    centre, radii = rng.uniform(10, 18, 2), rng.uniform(4, 7, 2)  # x y in cells
    rows, columns = np.mgrid[:height, :width] + 0.5
    cells = ((columns - centre[0]) / radii[0]) ** 2 + ((rows - centre[1]) / radii[1]) ** 2 <= 1
    post = (np.abs(columns - centre[0]) < 1.2) & (rows > centre[1])
    attention_map = np.maximum(cells, 0.8 * post) + 0.02 * rng.random((height, width))
    box = np.concatenate([centre - radii, 2 * radii]) * np.tile(np.array(IMAGE_SIZE) / 32, 2)
    return attention_map / attention_map.max(), box


def test_learns_to_leave_out_what_a_threshold_takes_in():
    rng = np.random.default_rng(0)
    maps, true_boxes = zip(*(blob_with_perch(rng) for _ in range(96)), strict=True)
    true_boxes, sizes = np.array(true_boxes), np.tile(IMAGE_SIZE, (96, 1))
    head = fit_box_head(maps[:64], sizes[:64], true_boxes[:64], threshold=0.3, epochs=8, batch_size=16)
    learned = np.array([head_box(head, cells, IMAGE_SIZE, 0.3).xywh for cells in maps[64:]])
    component = np.array([component_box(cells, IMAGE_SIZE, threshold=0.3).xywh for cells in maps[64:]])
    assert iou(learned, true_boxes[64:]).mean() > max(0.75, iou(component, true_boxes[64:]).mean() + 0.1)
    assert (learned[:, 2:] > 0).all() and (learned[:, :2] + learned[:, 2:] <= np.array(IMAGE_SIZE) + 1e-9).all()


def test_fitting_is_repeatable_and_leaves_the_global_generator_alone():
    maps, true_boxes = zip(*(blob_with_perch(np.random.default_rng(seed)) for seed in range(4)), strict=True)
    sizes = np.tile(IMAGE_SIZE, (4, 1))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    heads = [fit_box_head(maps, sizes, np.array(true_boxes), threshold=0.3, epochs=1) for _ in range(2)]
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(heads[0].parameters(), heads[1].parameters(), strict=True))


def test_blank_map_gives_the_whole_image():
    assert head_box(BoxHead().eval(), np.zeros((5, 7)), IMAGE_SIZE, 0.3) == (0, 0, 106, 74, False)


def test_maps_of_other_sizes_and_a_large_network_output():
    rng = np.random.default_rng(1)
    box = head_box(BoxHead().eval(), rng.random((13, 21)), IMAGE_SIZE, 0.3)
    assert box.found and box.x + box.width <= 106 and box.y + box.height <= 74
