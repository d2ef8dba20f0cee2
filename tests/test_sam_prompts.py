"""sam_prompts.py: what SAM is asked where a map points, and which of its answers is taken."""

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor

from mask_speed import build_small_sam
from masks.sam_prompts import PromptedMasks, agreement, prompt_from_map
from measuring import build_images

PROMPT = {"box": True, "points": 3, "background": 2, "threshold": 0.5}
PROMPT |= {"upsample": 4, "choose": "heaviest", "size_factor": 1.0}
FEAT = (5, 8)
SIZE = (80, 50)  # width, height: cells of 10 x 10 pixels


def bump():
    """A map with an object of four cells, the strongest at row 1, column 6."""
    cells = np.random.default_rng(0).random(FEAT) * 0.2
    cells[1:3, 5:7] = [[0.8, 1.0], [0.7, 0.9]]
    cells[4, 0] = -0.5  # the weakest
    return cells


def test_a_prompt_asks_with_the_strongest_and_the_weakest_cells():
    prompt = prompt_from_map(bump(), SIZE, **PROMPT)
    assert prompt.labels.tolist() == [1, 1, 1, 0, 0]
    assert prompt.points[:3].tolist() == [[65, 15], [65, 25], [55, 15]]
    assert prompt.points[3].tolist() == [5, 45]
    x0, y0, x1, y1 = prompt.box_xyxy
    assert 40 < x0 < 55 and 65 < x1 < 80 and 0 < y0 < 15 and 25 < y1 < 40


def test_background_points_lie_outside_the_box():
    cells = bump()
    cells[2, 5] = -9.0  # the weakest of all, but inside the box
    prompt = prompt_from_map(cells, SIZE, **PROMPT | {"threshold": 0.97})
    x0, y0, x1, y1 = prompt.box_xyxy
    for x, y in prompt.points[prompt.labels == 0]:
        assert not (x0 <= x <= x1 and y0 <= y <= y1)


def test_without_box_or_points():
    prompt = prompt_from_map(bump(), SIZE, **PROMPT | {"box": False, "background": 0})
    assert prompt.box_xyxy is None and prompt.labels.tolist() == [1, 1, 1]


@pytest.mark.parametrize("value", [0.0, 0.3, np.nan])
def test_a_blank_map_asks_nothing(value):
    assert prompt_from_map(np.full(FEAT, value), SIZE, **PROMPT) is None


def test_agreement_is_a_soft_iou():
    cells = np.zeros(FEAT, np.float32)
    cells[1:3, 5:7] = 1
    fine = torch.from_numpy(cells)[None, None]
    fine = torch.nn.functional.interpolate(fine, (50, 80), mode="bilinear")[0] > 0.5
    masks = torch.cat([fine, ~fine, torch.zeros(1, 50, 80, dtype=torch.bool)])
    good, bad, empty = agreement(masks, cells).tolist()
    assert good > 0.6 > 0.2 > bad and empty == 0


@pytest.fixture(scope="module")
def sam():
    torch.manual_seed(1)
    return build_small_sam(128, width=64, depth=2)


@pytest.mark.parametrize("asked", [{}, {"box": False}, {"points": 0, "background": 0}])
def test_the_answers_are_those_of_the_packages_predictor(sam, asked):
    images, maps = build_images(2, ((50, 80), (70, 45))), [bump(), bump()[:, ::-1]]
    prompt = PROMPT | asked
    prompted = PromptedMasks(sam, **prompt)
    for image, attention_map in zip(images, maps, strict=True):
        records = prompted.generate(image, attention_map)
        question = prompt_from_map(attention_map, image.shape[1::-1], **prompt)
        predictor = SamPredictor(sam)
        predictor.set_image(image)
        points = question.points if len(question.points) else None
        masks, predicted, _ = predictor.predict(
            points, question.labels if points is not None else None, box=question.box_xyxy, multimask_output=True
        )
        agreed = agreement(torch.from_numpy(masks), attention_map).numpy()
        best = int((predicted + agreed).argmax())
        if not masks[best].any():
            assert records == []
            continue
        (record,) = records
        assert (record["segmentation"] != masks[best]).mean() < 1e-3
        assert record["predicted_iou"] == pytest.approx(float(predicted[best]), abs=1e-4)
        assert record["area"] == record["segmentation"].sum()


def test_an_empty_answer_is_no_mask(sam, monkeypatch):
    nothing = np.zeros((3, 50, 80), bool), np.array([0.9, 0.8, 0.7], np.float32), None
    monkeypatch.setattr(SamPredictor, "predict", lambda *_: nothing)
    (image,) = build_images(1, ((50, 80),))
    assert PromptedMasks(sam, **PROMPT).generate(image, bump()) == []


def test_an_image_with_a_blank_map_gets_no_mask(sam):
    images = build_images(2, ((50, 80), (70, 45)))
    first, second = map(PromptedMasks(sam, **PROMPT).generate, images, [np.zeros(FEAT), bump()])
    assert first == [] and len(second) <= 1
