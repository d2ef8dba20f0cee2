"""ToyBirds: the drawings hold what the data set promises, and the folder is CUB's, whole or absent."""

import os
import pathlib
import stat

import numpy as np
import pytest
from PIL import Image

from toybirds import drawing, writing

LISTS = {"images", "image_class_labels", "classes", "bounding_boxes", "train_test_split"}
SMALL = {"train_per_class": 3, "test_per_class": 2}


def _draw(seed: int, label: int, **kwargs) -> drawing.ToyBird:
    return drawing.draw_toybird(np.random.default_rng(seed), label, **kwargs)


def _read(root: pathlib.Path, name: str) -> list[list[str]]:
    return [line.split() for line in (root / f"{name}.txt").read_text().splitlines()]


def _contents(root: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def drawings() -> list[drawing.ToyBird]:
    """240 drawings, their labels 0 to 7 in turn."""
    return [_draw(seed, seed % 8) for seed in range(240)]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("written") / "toybirds"
    writing.write_toybirds(root, **SMALL)
    return root


# --- one drawing ---


def test_there_are_eight_classes_and_every_part_splits_them_in_half():
    assert len(set(drawing.CLASS_NAMES)) == len(set(drawing.PARTS)) == 8
    assert np.sum(drawing.PARTS, axis=0).tolist() == [4, 4, 4]


def test_the_box_is_tight_around_the_mask(drawings):
    for _, mask, (x, y, width, height) in drawings[:50]:
        x, y, width, height = int(x), int(y), int(width), int(height)
        inside = mask[y : y + height, x : x + width]
        assert inside.sum() == mask.sum()
        assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()


def test_images_are_oblong_both_ways_and_masks_have_their_size(drawings):
    sizes = np.array([drawing.image.size for drawing in drawings])
    assert sizes.min() >= 128 and sizes.max() <= 176
    assert (sizes[:, 0] != sizes[:, 1]).all()
    assert 0.4 < (sizes[:, 0] > sizes[:, 1]).mean() < 0.6
    for image, mask, _ in drawings:
        assert image.mode == "RGB" and mask.dtype == bool and mask.shape == (image.height, image.width)


def test_birds_fill_10_to_45_percent_of_the_image_and_lie_off_centre(drawings):
    boxes = np.array([drawing.box_xywh for drawing in drawings])
    sizes = np.array([drawing.image.size for drawing in drawings])
    share = boxes[:, 2:].prod(axis=1) / sizes.prod(axis=1)
    assert share.min() >= 0.10 and share.max() <= 0.45
    assert 0.15 < np.median(share) < 0.22
    centers = (boxes[:, :2] + boxes[:, 2:] / 2) / sizes
    assert (centers.std(axis=0) > 0.08).all()
    np.testing.assert_allclose(centers.mean(axis=0), 0.5, atol=0.03)


def test_size_place_and_light_say_nothing_of_the_class(drawings):
    """Class means differ by no more than chance: F with 7 and 232 degrees of freedom is < 3.6 in 99.9%."""
    features = np.array([[*d.box_xywh, *d.image.size, np.asarray(d.image).mean(), d.mask.mean()] for d in drawings])
    groups = features.reshape(30, 8, -1)  # (images a class, classes, features)
    between = 30 * groups.mean(axis=0).var(axis=0, ddof=1)
    within = groups.var(axis=0, ddof=1).mean(axis=0)
    assert (between / within < 3.6).all(), between / within


@pytest.mark.parametrize("part", [0, 1, 2], ids=["crown", "wing", "beak"])
def test_a_part_alone_changes_and_only_where_it_is(part):
    """The same random numbers with one part changed: the same scene, but for a small patch on the bird."""
    pairs = [(a, b) for a in range(8) for b in range(a) if _parts_that_differ(a, b) == [part]]
    assert len(pairs) == 4
    for seed in range(10):
        first, second = (_draw(seed, label) for label in pairs[seed % 4])
        changed = np.abs(np.asarray(first.image, int) - np.asarray(second.image, int)).max(axis=-1)  # (H, W)
        assert (changed > 40).sum() > 0.01 * first.mask.sum()  # visible to a person
        rows, columns = np.nonzero(changed)
        extent = np.hypot(np.ptp(rows), np.ptp(columns))
        assert extent < 0.4 * np.hypot(*first.box_xywh[2:])  # and all in one place
        # Half a pixel of the mask is enough to be bird: a pixel at its rim may change outside of it.
        assert (changed[first.mask | second.mask] > 0).sum() > 0.85 * (changed > 0).sum()
        np.testing.assert_allclose(first.box_xywh, second.box_xywh, atol=1)


def _parts_that_differ(first: int, second: int) -> list[int]:
    return np.flatnonzero(np.not_equal(drawing.PARTS[first], drawing.PARTS[second])).tolist()


def test_nothing_in_front_covers_a_part(monkeypatch):
    """With and without leaves and twigs, changing all three parts changes the same pixels."""
    foliage = drawing._foliage
    for seed in range(30):
        with_leaves = _changed(seed)
        monkeypatch.setattr(drawing, "_foliage", lambda *args: foliage(*args)[:0])
        np.testing.assert_array_equal(with_leaves, _changed(seed))
        monkeypatch.setattr(drawing, "_foliage", foliage)


def _changed(seed: int) -> np.ndarray:
    """Return (H, W) bool: where the classes 0 and 7, which share no part, clearly differ."""
    first, second = (np.asarray(_draw(seed, label).image, int) for label in (0, 7))
    return np.abs(first - second).max(axis=-1) > 10


def test_leaves_hide_some_of_most_birds(monkeypatch, drawings):
    visible = np.array([_draw(seed, 0).mask.sum() for seed in range(40)])
    foliage = drawing._foliage
    monkeypatch.setattr(drawing, "_foliage", lambda *args: foliage(*args)[:0])
    whole = np.array([_draw(seed, 0).mask.sum() for seed in range(40)])
    assert (visible < whole).mean() > 0.5
    assert (visible > 0.5 * whole).all()


def test_another_palette_draws_the_same_scene_in_other_colours():
    palette = drawing.PALETTE._replace(crowns=((240, 220, 40), (160, 60, 180)))
    usual, other = _draw(3, 0), _draw(3, 0, palette=palette)
    np.testing.assert_array_equal(usual.mask, other.mask)
    assert (np.asarray(usual.image) != np.asarray(other.image)).any()


# --- the folder ---


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(written, tmp_path):
    writing.write_toybirds(tmp_path / "again", **SMALL)
    assert _contents(tmp_path / "again") == _contents(written)
    writing.write_toybirds(tmp_path / "other", seed=1, **SMALL)
    images = written / "images"
    for path in images.rglob("*.jpg"):
        assert (tmp_path / "other" / "images" / path.relative_to(images)).read_bytes() != path.read_bytes()


def test_the_lists_are_cubs_and_agree_with_each_other_and_the_images(written):
    ids = [str(number) for number in range(1, 41)]
    for name in LISTS - {"classes"}:
        assert [row[0] for row in _read(written, name)] == ids
    classes = dict(_read(written, "classes"))
    assert list(classes) == [str(number) for number in range(1, 9)]
    labels = dict(_read(written, "image_class_labels"))
    for image_id, name in _read(written, "images"):
        assert name.split("/")[0] == classes[labels[image_id]]
    names = {name for _, name in _read(written, "images")}
    assert names == {path.relative_to(written / "images").as_posix() for path in written.rglob("*.jpg")}


def test_every_class_has_as_many_images_and_the_splits_are_mixed(written):
    labels = np.array([int(row[1]) for row in _read(written, "image_class_labels")]).reshape(8, 5)
    assert (labels == np.arange(1, 9)[:, None]).all()
    split = np.array([int(row[1]) for row in _read(written, "train_test_split")]).reshape(8, 5)
    assert (split.sum(axis=1) == 3).all()
    assert (split == split[0]).all() and split[0].tolist() not in ([1, 1, 1, 0, 0], [0, 0, 1, 1, 1])


def test_written_boxes_are_in_pixels_of_the_written_images(written):
    for (_, name), row in zip(_read(written, "images"), _read(written, "bounding_boxes"), strict=True):
        assert all(len(number.partition(".")[2]) == 1 for number in row[1:])  # "60.0", as CUB writes it
        x, y, width, height = map(float, row[1:])
        with Image.open(written / "images" / name) as image:
            image.load()
            assert image.format == "JPEG" and image.mode == "RGB"
            assert x >= 0 and y >= 0 and x + width <= image.width and y + height <= image.height
            assert 0.10 <= width * height / (image.width * image.height) <= 0.45


def test_readme_says_what_it_is(written):
    first = (written / "README.txt").read_text().splitlines()[0]
    assert first == f"ToyBirds version {drawing.VERSION}, seed 0, 3 training and 2 test images a class"


def test_others_may_read_what_is_written(written):
    mask = os.umask(0)
    os.umask(mask)
    for folder in (written, written / "images"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_broken_off_writing_leaves_nothing(tmp_path, monkeypatch, error):
    draw, drawn = drawing.draw_toybird, []

    def draw_some(rng, label):
        drawn.append(label)
        if len(drawn) > 7:
            raise error("no space left")
        return draw(rng, label)

    monkeypatch.setattr(writing, "draw_toybird", draw_some)
    with pytest.raises(error):
        writing.write_toybirds(tmp_path / "toybirds", **SMALL)
    assert len(drawn) == 8 and list(tmp_path.iterdir()) == []


def test_a_killed_writing_leaves_only_its_scratch_folder(tmp_path):
    """Until the very end the final name is free, so that no kill at any time can leave half a set there."""
    seen = []
    replace = os.replace

    def spy(source, target):
        seen.append((pathlib.Path(source).name, pathlib.Path(target).exists()))
        assert {path.stem for path in pathlib.Path(source).glob("*.txt")} == LISTS | {"README"}
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", spy)
        writing.write_toybirds(tmp_path / "toybirds", **SMALL)
    assert seen == [(f".toybirds.{os.getpid()}.tmp", False)]


def test_a_set_that_cannot_take_its_final_name_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("not here")

    monkeypatch.setattr(writing, "_write_into", lambda *_: None)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError, match="not here"):
        writing.write_toybirds(tmp_path / "toybirds", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_faster_process_keeps_its_copy(written, tmp_path, monkeypatch):
    root = tmp_path / "toybirds"
    write_into = writing._write_into

    def write_and_lose(scratch, *args):
        write_into(scratch, *args)
        monkeypatch.setattr(writing, "_write_into", write_into)
        monkeypatch.setattr(os, "getpid", lambda: 1)  # the other process
        writing.write_toybirds(root, **SMALL)
        (root / "mark").touch()

    monkeypatch.setattr(writing, "_write_into", write_and_lose)
    writing.write_toybirds(root, **SMALL)
    assert (root / "mark").exists() and list(tmp_path.iterdir()) == [root]
    (root / "mark").unlink()
    assert _contents(root) == _contents(written)


def test_a_folder_with_something_else_is_refused_and_left_alone(written, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="something else"):
        writing.write_toybirds(tmp_path / "mine", **SMALL)
    assert _contents(tmp_path / "mine") == {"photo.jpg": b"mine"}
    with pytest.raises(FileExistsError, match=r"seed 0.*seed 5"):
        writing.write_toybirds(written, seed=5, **SMALL)
