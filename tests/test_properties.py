"""What holds for every input, tried on inputs that Hypothesis makes up."""

import math
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.ops
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import TypeAdapter

import config
from config import load_config
from jobs.schema import SCHEMA
from jobs.settings import (
    check_config,
    check_value,
    leaves,
    parse_value,
    split_word,
    word_of,
)
from localized_crops.box_file import load_boxes, save_boxes
from localized_crops.boxes import clip_boxes, coverage, expand_boxes, intersection, iou
from localized_crops.crops import MODES, ratio_gives_way, sample_crops
from localized_crops.density import map_to_density, sample_density_crops
from localized_crops.files import UserError
from localized_crops.transforms import DinoRandomResizedCrop, LocalizedRandomResizedCrop
from localizer.attention_maps import map_to_box
from training.epoch_crops import MapCrops
from transforms import square_crop

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # NumPy's: a script would print them
# The same examples in every run, so that a change is to blame for a failure; PROPERTY_EXAMPLES=5000 looks further.
EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "60"))
quick = settings(deadline=None, derandomize=True, max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow])
KEYS = sorted(leaves(config.config))
SIDE = st.integers(1, 2000)  # pixels


# --- config -------------------------------------------------------------------------------------------------------


@quick
@given(st.one_of(st.sampled_from(KEYS), st.text(max_size=30)), st.text(max_size=40))
def test_any_key_and_value_is_taken_or_refused_in_one_line(key, value):
    try:
        loaded = load_config([f"{key}={value}"])
    except UserError as error:
        assert str(error)
    else:
        check_config(loaded)
        assert leaves(loaded).keys() == leaves(config.config).keys()


WORDS = st.text("abcXYZ012_./-@", min_size=1, max_size=12).filter(lambda text: text.lower() not in ("none", "null"))


def values(key: str) -> st.SearchStrategy:
    """Return a strategy for values, other than None, that one key takes by itself."""
    kind = TypeAdapter(SCHEMA[key][0]).json_schema()
    kind = next((one for one in kind.get("anyOf", []) if one["type"] != "null"), kind)
    if kind["type"] != "array":
        return scalars(kind)
    low, high = (2, 2) if key in ("crop.scale", "crop.ratio") else (kind.get("minItems", 1), kind.get("maxItems", 4))
    return st.lists(scalars(kind["items"]), min_size=low, max_size=high).map(sorted)


def scalars(kind: dict) -> st.SearchStrategy:
    """Return a strategy for what a JSON schema allows."""
    if "enum" in kind:
        return st.sampled_from(kind["enum"])
    low = max(kind.get("minimum", -1e6), kind.get("exclusiveMinimum", -1e6))
    high = min(kind.get("maximum", 1e6), 1e6)
    numbers = {"exclude_min": "exclusiveMinimum" in kind, "allow_nan": False}
    return {
        "boolean": st.booleans,
        "integer": lambda: st.integers(math.ceil(low), math.floor(high)),
        "number": lambda: st.floats(low, high, **numbers),
        "string": lambda: WORDS,
    }[kind["type"]]()


@quick
@given(st.sampled_from(sorted({*KEYS} - {"sweep.values"})).flatmap(lambda key: st.tuples(st.just(key), values(key))))
def test_a_value_comes_back_from_its_own_word(pair):
    key, value = pair
    check_value(key, value)
    found = parse_value(*split_word(word_of(key, value)))
    assert found == value and (type(found) is type(value) or isinstance(found, float))


# --- boxes --------------------------------------------------------------------------------------------------------


@st.composite
def whole_boxes(draw, side=12):
    """Draw two boxes x y width height of whole pixels in a small image."""
    edges = [draw(st.lists(st.integers(0, side), min_size=2, max_size=2, unique=True)) for _ in range(4)]
    (ax, ay, bx, by) = (sorted(pair) for pair in edges)
    return [(x[0], y[0], x[1] - x[0], y[1] - y[0]) for x, y in ((ax, ay), (bx, by))]


def pixels(box, side=12) -> np.ndarray:
    """Return the pixels (side, side) bool that a box of whole pixels covers."""
    covered = np.zeros((side, side), dtype=bool)
    x, y, width, height = box
    covered[y : y + height, x : x + width] = True
    return covered


@quick
@given(whole_boxes())
def test_areas_are_those_that_counting_pixels_gives(pair):
    a, b = (np.array([box]) for box in pair)
    in_a, in_b = map(pixels, pair)
    assert intersection(a, b)[0] == (in_a & in_b).sum()
    assert iou(a, b)[0] == (in_a & in_b).sum() / (in_a | in_b).sum()
    assert coverage(a, b)[0] == (in_a & in_b).sum() / in_b.sum()


coordinates = st.floats(0, 1000, width=32)
lengths = st.floats(0.125, 1000, width=32)
real_box = st.tuples(coordinates, coordinates, lengths, lengths)


@quick
@given(st.lists(st.tuples(real_box, real_box), min_size=1, max_size=20))
def test_iou_is_torchvisions(pairs):
    a, b = np.array(pairs, dtype=np.float64).transpose(1, 0, 2)
    xyxy = (torchvision.ops.box_convert(torch.from_numpy(boxes.copy()), "xywh", "xyxy") for boxes in (a, b))
    expected = torchvision.ops.box_iou(*xyxy).diagonal().numpy()
    assert np.allclose(iou(a, b), expected, atol=1e-9)
    assert np.allclose(iou(a, b), iou(b, a)) and (iou(a, a) == 1).all() and (coverage(a, a) == 1).all()


@quick
@given(st.tuples(*[st.floats(-3000, 3000)] * 2, *[st.floats(0, 3000)] * 2), SIDE, SIDE, st.floats(0, 3))
def test_clipped_and_expanded_boxes_lie_in_the_image(box, width, height, margin):
    boxes, sizes = np.array([box]), np.array([[width, height]])
    clipped = clip_boxes(boxes, sizes)
    expanded = expand_boxes(clipped, sizes, margin)
    for inside in (clipped, expanded):
        assert (inside >= 0).all() and (inside[:, :2] + inside[:, 2:] <= sizes + 1e-9).all()
    assert np.allclose(clip_boxes(clipped, sizes), clipped)
    assert np.allclose(intersection(expanded, clipped), clipped[:, 2:].prod(1))


@st.composite
def image_and_box(draw, side=SIDE):
    """Draw (width, height) and a box x y width height of real numbers in such an image."""
    width, height = draw(side), draw(side)
    shares = draw(st.tuples(*[st.floats(0, 0.999)] * 2, *[st.floats(1e-4, 1)] * 2))
    x, y = shares[0] * width, shares[1] * height
    return (width, height), (x, y, shares[2] * (width - x), shares[3] * (height - y))


ids = st.integers(0, 10**18 - 1)


@quick
@given(
    st.dictionaries(ids, st.tuples(image_and_box(), st.booleans(), st.none() | st.floats(-1e300, 1e300)), max_size=9)
)
def test_a_box_file_comes_back_as_it_was_saved(images):
    sizes = {i: size for i, ((size, _), _, _) in images.items()}
    boxes = {i: box if found else None for i, ((_, box), found, _) in images.items()}
    beliefs = {i: score for i, (_, _, score) in images.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "boxes.json"
        save_boxes(path, boxes, sizes, made_by="test", settings={"seed": 3}, scores=beliefs)
        file = load_boxes(path)
    assert (file.boxes, file.image_sizes, file.scores) == (boxes, sizes, beliefs)
    assert (file.made_by, file.settings) == ("test", {"seed": 3})


# --- crops --------------------------------------------------------------------------------------------------------


@st.composite
def scale_and_ratio(draw):
    """Draw the ranges of a crop's area and ratio: the usual ones, or any."""
    scale = sorted(draw(st.tuples(*[st.floats(1e-4, 1)] * 2)))
    ratio = sorted(draw(st.tuples(*[st.floats(0.05, 20)] * 2)))
    return draw(st.sampled_from([((0.08, 1.0), (3 / 4, 4 / 3)), (tuple(scale), tuple(ratio))]))


def check_inside(crops: np.ndarray, width: int, height: int) -> None:
    """Check that crops, (N, 4) top left height width, have at least a whole pixel and lie in the image."""
    assert crops.shape[1] == 4 and crops.dtype == np.int64
    assert (crops[:, :2] >= 0).all() and (crops[:, 2:] >= 1).all()
    assert (crops[:, 0] + crops[:, 2] <= height).all() and (crops[:, 1] + crops[:, 3] <= width).all()


THR = st.one_of(st.sampled_from([-1.0, 0.0, 1.0]), st.floats(0, 1), st.floats(-5, -1e-9))


@settings(quick, max_examples=3 * EXAMPLES)
@given(image_and_box(), THR, st.sampled_from(MODES), scale_and_ratio(), st.integers(0, 2**32))
def test_a_crop_lies_in_its_image_and_keeps_its_promise(image, thr, mode, ranges, seed):
    (width, height), box = image
    boxes, sizes = np.tile(box, (16, 1)), np.tile((width, height), (16, 1))
    crops = sample_crops(boxes, sizes, thr, mode, *ranges, np.random.default_rng(seed))
    check_inside(crops, width, height)
    if mode == "exact" and thr >= 0:
        kept = coverage(crops[:, [1, 0, 3, 2]], boxes)
        assert kept.min() >= (thr if thr < 1 else 1 - 1e-12), kept.min() - thr


# large images and crops: on small ones, going to whole pixels moves a ratio by more than the tolerance
large = image_and_box(st.integers(200, 2000))
near_ratios = st.tuples(st.floats(0.3, 1), st.floats(1, 3))


@quick
@given(large, st.floats(0, 1), st.floats(0.08, 1), near_ratios, st.integers(0, 2**32))
def test_only_the_boxes_that_are_told_leave_the_range_of_ratios(image, thr, least, ratio, seed):
    (width, height), box = image
    boxes, sizes, scale = np.tile(box, (16, 1)), np.tile((width, height), (16, 1)), (least, 1.0)
    crops = sample_crops(boxes, sizes, thr, "exact", scale, ratio, np.random.default_rng(seed))
    found, slack = crops[:, 3] / crops[:, 2], 1 + 4 / crops[:, 2:].min()
    inside = ratio[0] / slack <= found.min() and found.max() <= ratio[1] * slack
    assert inside or ratio_gives_way(boxes, sizes, thr, scale, ratio).all()


@quick
@given(st.integers(1, 60), st.integers(1, 60), THR, st.sampled_from(MODES), st.integers(0, 2**32), st.data())
def test_the_transform_gives_an_image_of_its_size(width, height, thr, mode, seed, data):
    shares = data.draw(st.tuples(*[st.floats(0, 0.9)] * 2, *[st.floats(0.01, 1)] * 2))
    x, y = shares[0] * width, shares[1] * height
    torch.manual_seed(seed)
    crop = LocalizedRandomResizedCrop((5, 7), thr, mode)
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    assert crop(image, box=(x, y, shares[2] * (width - x), shares[3] * (height - y))).shape == (3, 5, 7)


@quick
@given(image_and_box(), st.floats(0, 3))
def test_a_square_view_holds_its_box_inside_the_image(image, margin):
    (width, height), box = image
    crop = np.array([square_crop(box, (width, height), margin)])
    check_inside(crop, width, height)
    assert math.isclose(coverage(crop[:, [1, 0, 3, 2]], np.array([box]))[0], 1, abs_tol=1e-9)


# --- maps ---------------------------------------------------------------------------------------------------------

shapes = hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)
sound_maps = hnp.arrays(np.float16, shapes, elements=st.floats(0, 1, width=16))
any_maps = hnp.arrays(np.float16, shapes, elements=st.floats(width=16))  # NaN and infinity too


@quick
@given(st.one_of(sound_maps, any_maps), st.floats(1e-4, 1e6))
def test_a_density_sums_to_one_whatever_the_map(attention_map, temperature):
    density = map_to_density(attention_map, temperature)
    assert density.shape == attention_map.shape and (density >= 0).all() and math.isclose(density.sum(), 1)


@quick
@given(st.one_of(sound_maps, any_maps), SIDE, SIDE, st.floats(1e-4, 1e6), scale_and_ratio(), st.integers(0, 2**32))
def test_a_density_crop_lies_in_its_image(attention_map, width, height, temperature, ranges, seed):
    density = map_to_density(attention_map, temperature)
    rng = np.random.default_rng(seed)
    check_inside(sample_density_crops(density, (width, height), 16, *ranges, rng), width, height)
    ids, sizes = np.arange(2), np.array([[width, height]] * 2)
    how = {"temperature": temperature, "scale": ranges[0], "ratio": ranges[1]}
    check_inside(MapCrops({0: attention_map}, ids, sizes, **how).draw(rng), width, height)  # image 1 has no map


@quick
@given(sound_maps, st.integers(1, 60), st.integers(1, 60), st.integers(0, 2**32))
def test_the_density_transform_gives_an_image_of_its_size(attention_map, width, height, seed):
    torch.manual_seed(seed)
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for given_map in (attention_map, None):
        assert DinoRandomResizedCrop((5, 7))(image, given_map).shape == (3, 5, 7)


box_settings = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["component", "published"]),
        "threshold": st.floats(0, 1),
        "otsu": st.booleans(),
        "upsample": st.integers(1, 6),
        "choose": st.sampled_from(["heaviest", "strongest"]),
        "size_factor": st.floats(0.01, 100),
    }
)


@settings(quick, max_examples=2 * EXAMPLES)
@given(st.one_of(sound_maps, any_maps), SIDE, SIDE, box_settings)
def test_any_map_gives_a_box_with_an_area_in_the_image(attention_map, width, height, wanted):
    box = map_to_box(attention_map, (width, height), wanted)
    assert min(box.xywh[:2]) >= 0 and min(box.xywh[2:]) > 0
    assert box.x + box.width <= width + 1e-6 and box.y + box.height <= height + 1e-6
    if not np.isfinite(attention_map).all():
        assert not box.found and box.xywh == (0, 0, width, height)
