import functools
import hashlib
import http.server
import io
import itertools
import shutil
import tarfile
import threading
from collections import Counter

import numpy as np
import PIL.Image
import pytest
import torch

import datasets
from datasets import known_boxes, read_dataset, source_boxes, stem_of
from jobs.loader import build_loader
from localized_crops.box_file import save_boxes
from localized_crops.files import UserError
from readers import cub, images
from readers.images import read_image
from readers.splits import class_notes
from toybirds import writing
from training.batches import EpochBatches, TrainImages, ViewImages
from training.epoch_crops import BoxCrops
from transforms import TrainTransform, build_views


def read(root, **options):
    return read_dataset("cub", root, **options)


def edit(path, change):
    """Change the lines of a text file."""
    lines = path.read_text().splitlines()
    path.write_text("\n".join(change(lines)) + "\n")


# --- reading ------------------------------------------------------------------------------------------------------


def test_real_images_with_their_own_ids_classes_and_quirks(cub24):
    data = read(cub24)
    assert len(data.ids) == 1398 and len(data.class_names) == 24
    assert data.ids.min() == 425 and (np.diff(data.ids) > 1).any()  # ids are not contiguous, labels are
    assert set(data.labels) == set(range(24))
    assert Counter(data.split.tolist()) == {"train": 720, "test": 678}
    far = data.boxes[:, :2] + data.boxes[:, 2:]
    assert (data.boxes[:, :2] >= 0).all() and (far <= data.image_sizes + 1e-9).all() and data.clipped > 0
    raw = np.loadtxt(cub24 / "bounding_boxes.txt")
    assert (np.abs(raw[:, 1:] - data.boxes) > 1e-6).any(1).sum() == data.clipped
    assert data.paths[0].exists() and data.image_sizes[0].tolist() == list(PIL.Image.open(data.paths[0]).size)


def test_70_30_split_fills_train_with_the_first_test_images(cub24):
    official, filled = read(cub24), read(cub24, split="70/30")
    moved = np.flatnonzero(official.split != filled.split)
    assert len(filled.rows("train")) == int(np.ceil(0.7 * 1398))
    assert (moved == official.rows("test")[: len(moved)]).all()


def test_classes_that_the_70_30_split_leaves_nothing_to_test_on_are_counted(birds):
    data = read(birds, split="70/30")
    tested = len(set(data.labels[data.rows("test")]))
    assert 0 < tested < 8
    assert any(
        f"{8 - tested} of 8 classes" in note and f"{tested} classes are left" in note for note in class_notes(data)
    )


def test_validation_is_the_end_of_each_class_of_train(birds):
    plain, held = read(birds), read(birds, val_fraction=1 / 3)
    assert (np.bincount(held.labels[held.rows("val")]) == 2).all()
    for label in range(8):
        train = plain.rows("train")[plain.labels[plain.rows("train")] == label]
        assert set(train[-2:]) == set(held.rows("val")[held.labels[held.rows("val")] == label])
    assert (plain.rows("test") == held.rows("test")).all()


def test_toybirds_are_drawn_once_and_another_version_is_not_taken_for_this_one(tmp_path, monkeypatch):
    draw = writing.write_toybirds
    small = functools.partial(draw, train_per_class=2, test_per_class=1)
    monkeypatch.setattr(writing, "write_toybirds", small)
    monkeypatch.setitem(datasets.DEFAULT_ROOTS, "toybirds", tmp_path / "toy")
    first = read_dataset("toybirds")
    written = first.paths[0].stat().st_mtime_ns
    second = read_dataset("toybirds")
    assert (first.boxes == second.boxes).all() and len(first.ids) == 24
    assert second.paths[0].stat().st_mtime_ns == written
    monkeypatch.setattr(writing, "VERSION", 999)
    with pytest.raises(UserError, match="toy"):
        read_dataset("toybirds", tmp_path / "toy")


def replace_line(number, text):
    return lambda lines: [*lines[:number], text, *lines[number + 1 :]]


FAULTS = {
    "no row": ("bounding_boxes.txt", lambda lines: lines[:-1], "has no row here"),
    "no label": ("image_class_labels.txt", lambda lines: lines[1:], "image id 1 has no row here"),
    "no split": ("train_test_split.txt", lambda lines: lines[1:], "image id 1 has no row here"),
    "row too many": ("train_test_split.txt", lambda lines: [*lines, "9999 1"], "9999 is not in images.txt"),
    "doubled id": ("images.txt", lambda lines: [*lines, lines[0]], "id 1 "),
    "doubled box": ("bounding_boxes.txt", lambda lines: [*lines, lines[0]], "image id 1 "),
    "class unknown": ("image_class_labels.txt", replace_line(0, "1 77"), "class 77"),
    "nan box": ("bounding_boxes.txt", replace_line(2, "3 nan 1 5 5"), "txt:3"),
    "inf box": ("bounding_boxes.txt", replace_line(2, "3 1 1 inf 5"), "txt:3"),
    "flat box": ("bounding_boxes.txt", replace_line(2, "3 1 1 0 5"), "txt:3"),
    "negative box": ("bounding_boxes.txt", replace_line(2, "3 1 1 5 -5"), "txt:3"),
    "short box": ("bounding_boxes.txt", replace_line(2, "3 1 1 5"), "txt:3"),
    "word in box": ("bounding_boxes.txt", replace_line(2, "3 1 1 5 x"), "txt:3"),
    "box outside": ("bounding_boxes.txt", replace_line(2, "3 900 900 5 5"), "image 3"),
    "half a class": ("image_class_labels.txt", replace_line(2, "3 1.5"), "txt:3"),
    "far box": ("bounding_boxes.txt", replace_line(2, "3 1 1 5 2e9"), "txt:3"),
    "split value": ("train_test_split.txt", replace_line(2, "3 2"), "txt:3"),
    "negative id": ("images.txt", replace_line(2, "-3 a.jpg"), "txt:3"),
    "word as id": ("images.txt", replace_line(2, "three a.jpg"), "txt:3"),
    "no path": ("images.txt", replace_line(2, "3"), "txt:3"),
    "leaves the folder": ("images.txt", replace_line(2, "3 ../../secret.jpg"), "leaves the images folder"),
    "absolute path": ("images.txt", replace_line(2, "3 /etc/passwd"), "leaves the images folder"),
    "missing image": ("images.txt", replace_line(2, "3 001.none/none.jpg"), "the image is missing"),
    "empty": ("classes.txt", lambda lines: [], "is empty"),
}


@pytest.mark.parametrize("prefix", ["../images/", "./", "{root}/images/"])
def test_names_that_lead_back_into_the_folder_of_images_are_taken(birds, birds_copy, prefix):
    lines = [line.split(" ", 1) for line in (birds / "images.txt").read_text().splitlines()]
    prefix = prefix.format(root=birds_copy)
    (birds_copy / "images.txt").write_text("\n".join(f"{number} {prefix}{name}" for number, name in lines))
    assert [path.relative_to(birds_copy / "images") for path in read(birds_copy).paths] == [
        path.relative_to(birds / "images") for path in read(birds).paths
    ]


def test_tables_may_be_written_in_any_order_and_spacing(birds, birds_copy):
    for name in ("bounding_boxes.txt", "image_class_labels.txt", "train_test_split.txt"):
        lines = (birds / name).read_text().splitlines()
        (birds_copy / name).write_text("\r\n\n".join(line.replace(" ", " \t") for line in reversed(lines)))
    plain, odd = read(birds), read(birds_copy)
    for column in ("ids", "boxes", "labels", "split"):
        assert np.array_equal(getattr(plain, column), getattr(odd, column))


def fingerprint(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(p).encode() + p.read_bytes() for p in files)).hexdigest()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_files_is_one_line_and_damages_nothing(birds_copy, fault):
    name, change, told = FAULTS[fault]
    edit(birds_copy / name, change)
    before = fingerprint(birds_copy)
    with pytest.raises(UserError, match=told) as error:
        read(birds_copy)
    assert str(birds_copy) in str(error.value) and "\n" not in str(error.value)
    assert fingerprint(birds_copy) == before


@pytest.mark.parametrize("name", ["images.txt", "classes.txt", "bounding_boxes.txt"])
def test_a_missing_or_binary_file(birds_copy, name):
    (birds_copy / name).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        read(birds_copy)
    (birds_copy / name).unlink()
    with pytest.raises(UserError, match=f"{name}: missing"):
        read(birds_copy)


def test_a_loop_of_links_is_no_folder(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert stem_of("folder", tmp_path / "loop") == "loop"
    with pytest.raises(UserError, match="loop"):
        read_dataset("folder", tmp_path / "loop")


def test_a_missing_folder_names_the_way_to_get_it(tmp_path):
    with pytest.raises(UserError, match=r"dataset\.download=true"):
        read(tmp_path / "none")


# --- images -------------------------------------------------------------------------------------------------------


def test_images_of_every_mode_become_rgb(tmp_path, recwarn):
    ramp = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (23, 1))  # H 23, W 40
    grey = PIL.Image.fromarray(ramp)
    for name, image in {
        "grey.png": grey,
        "palette.png": grey.convert("P"),
        "palette_alpha.png": palette_with_alpha(grey),
        "alpha.png": grey.convert("RGBA"),
        "grey_alpha.png": grey.convert("LA"),
        "sixteen.png": PIL.Image.fromarray(ramp.astype(np.uint16) * 257),
        "cmyk.tif": grey.convert("RGB").convert("CMYK"),
        "grey.jpg": grey,
    }.items():
        image.save(tmp_path / name)
        read = read_image(tmp_path / name)
        assert read.mode == "RGB" and read.size == (40, 23)
        assert np.abs(np.asarray(read).astype(int) - ramp[..., None]).max() <= 3, name
    assert not recwarn.list  # Pillow warns of an alpha that is dropped from a palette at once


def palette_with_alpha(grey):
    """Return a palette image whose every colour has an alpha."""
    image = grey.convert("P")
    image.info["transparency"] = bytes(range(256))
    return image


def test_an_exif_rotation_is_not_applied(tmp_path):
    image = PIL.Image.fromarray(np.arange(23 * 40, dtype=np.uint8).reshape(23, 40))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # stored lying, shown standing
    image.save(tmp_path / "lying.jpg", exif=exif)
    assert read_image(tmp_path / "lying.jpg").size == (40, 23)  # boxes are in the stored grid


def test_a_damaged_image_is_named(birds_copy):
    data = read(birds_copy)
    whole = data.paths[5].read_bytes()
    data.paths[5].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=data.paths[5].name):
        read_image(data.paths[5])
    assert [data.paths[5].name in line for line in images.unreadable_images(data.paths)] == [True]
    data.paths[5].write_bytes(b"not an image")
    with pytest.raises(UserError, match="not an image"):
        read(birds_copy)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    PIL.Image.new("L", (60, 60)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="pixels"):
        read_image(tmp_path / "bomb.png")


# --- boxes of a source --------------------------------------------------------------------------------------------


def test_sources(birds, tmp_path):
    data = read(birds)
    assert source_boxes("gt", data)[0] is data.boxes
    assert (source_boxes("image", data)[0][:, 2:] == data.image_sizes).all()
    assert np.allclose(source_boxes("center", data)[0][:, 2:], 0.65 * data.image_sizes)
    sizes = dict(zip(data.ids.tolist(), data.image_sizes.tolist(), strict=True))
    found = {i: None if i == 4 else (1, 2, 3, 4) for i in sizes}
    save_boxes(tmp_path / "boxes.json", found, sizes, made_by="test", settings={})
    boxes, missing = source_boxes(str(tmp_path / "boxes.json"), data)
    assert missing == 1 and boxes[0].tolist() == [1, 2, 3, 4]
    assert boxes[3].tolist() == [0, 0, *data.image_sizes[3]]


def test_the_word_dino_names_the_boxes_of_the_localizer(birds, tmp_path, monkeypatch):
    data = read(birds)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"dino_boxes_cub.boxes\.json"):
        source_boxes("dino", data)
    sizes = dict(zip(data.ids.tolist(), data.image_sizes.tolist(), strict=True))
    found = {i: None if i == 4 else (1, 2, 3, 4) for i in sizes}
    save_boxes("runs/dino_boxes_cub/boxes.json", found, sizes, made_by="test", settings={})
    boxes, missing = source_boxes("dino", data)
    assert missing == 1 and boxes[0].tolist() == [1, 2, 3, 4]
    assert np.isnan(known_boxes("dino", data)[:, 0]).tolist() == [i == 4 for i in sizes]


# --- loaders ------------------------------------------------------------------------------------------------------


def train_images(data, seed=0):
    rows = data.rows("train")
    transform = TrainTransform(24, "bilinear", augment=True, augment_p=1.0, use_augment_mix=False)
    return TrainImages(
        data, rows, BoxCrops(data.boxes[rows], data.image_sizes[rows], thr=0.8), transform, flip=0.5, seed=seed
    )


def one_epoch(images, epoch, num_workers, batch_size=7):
    batches = EpochBatches(len(images), batch_size, images.seed)
    batches.epoch = epoch
    loader = build_loader(images, num_workers=num_workers, pin_memory=False, batch_size=None, sampler=batches)
    return [torch.cat(column) for column in list(zip(*loader, strict=True))[:4]]


def test_what_is_drawn_depends_on_seed_and_epoch_alone(birds):
    images = train_images(read(birds))
    torch.manual_seed(0)
    here = one_epoch(images, 3, num_workers=0)
    torch.manual_seed(99)
    spawned = one_epoch(images, 3, num_workers=2)
    assert all(torch.equal(a, b) for a, b in zip(here, spawned, strict=True))
    assert here[0].dtype == torch.uint8 and here[3].min() >= 0.8  # every crop keeps its share of the true box
    assert torch.equal(one_epoch(images, 3, 0, batch_size=5)[0], here[0])
    assert not torch.equal(one_epoch(images, 4, 0)[0], here[0])
    assert not torch.equal(one_epoch(train_images(read(birds), seed=1), 3, 0)[0], here[0])


def test_epochs_in_any_order_are_the_same(birds):
    images, rows = train_images(read(birds)), [0, 3, 5]
    for epoch in (0, 1, 33, 1):
        first, again = images[epoch, rows, 3, 3], train_images(read(birds))[epoch, rows, 3, 3]
        assert all(torch.equal(a, b) for a, b in zip(first[:4], again[:4], strict=True))


def test_loading_leaves_torchs_generator_as_it_was(birds):
    images = train_images(read(birds))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    batch = images[0, [0, 3], 2, 2]
    assert batch.images.shape == (2, 3, 24, 24) and batch.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(before, torch.get_rng_state())


def test_every_image_once_an_epoch_and_no_batch_of_one():
    for size in (1, 7, 15, 16, 17):
        batches = EpochBatches(size, 4, 0)
        drawn = [rows for _, rows, _, _ in batches]
        assert sorted(itertools.chain(*drawn)) == list(range(size)) and len(drawn) == len(batches)
        assert size == 1 or min(map(len, drawn)) > 1


def test_an_image_that_breaks_in_training_is_named_by_the_worker(birds_copy):
    data = read(birds_copy)
    broken = data.paths[data.rows("train")[3]]
    broken.write_bytes(broken.read_bytes()[:600])
    with pytest.raises(UserError, match=broken.name) as error:
        one_epoch(train_images(data), 0, num_workers=1)
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)


def test_views_of_test_images(birds):
    data = read(birds)
    views = build_views(["full", "box@20"], 24, 0.875, 0.1)
    images = ViewImages(data, data.rows("test"), data.boxes, list(views.values()))
    (full, box), labels = next(iter(build_loader(images, num_workers=0, pin_memory=False, batch_size=5)))
    assert full.shape == (5, 3, 24, 24) and box.shape == (5, 3, 20, 20)
    assert labels.tolist() == data.labels[data.rows("test")[:5]].tolist()


# --- download -----------------------------------------------------------------------------------------------------


def archive_of(birds, path, extra=None):
    with tarfile.open(path, "w:gz") as tar:
        tar.add(birds, arcname="CUB_200_2011")
        if extra:
            member = tarfile.TarInfo(extra)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"bad"))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def server(tmp_path):
    """Serve a folder on the loopback address; yield the folder and its address."""
    folder = tmp_path / "server"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_the_archive_is_fetched_checked_and_unpacked(birds, tmp_path, monkeypatch, server):
    folder, address = server
    monkeypatch.setattr(cub, "CUB_SHA256", archive_of(birds, folder / "cub.tgz"))
    monkeypatch.setattr(cub, "CUB_URL", f"{address}/cub.tgz")
    data = read(tmp_path / "new" / "CUB_200_2011", download=True)
    assert len(data.ids) == 72
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["CUB_200_2011", "CUB_200_2011.tgz"]


def test_what_a_killed_process_had_fetched_and_unpacked_is_removed_by_the_next(birds, tmp_path, monkeypatch):
    monkeypatch.setattr(cub, "CUB_SHA256", archive_of(birds, tmp_path / cub.CUB_ARCHIVE))
    (tmp_path / f".{cub.CUB_ARCHIVE}.123.tmp.tgz").write_bytes(b"half")
    (tmp_path / ".CUB_200_2011.123.tmp" / "CUB_200_2011").mkdir(parents=True)
    read(tmp_path / "CUB_200_2011", download=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["CUB_200_2011", cub.CUB_ARCHIVE]


def test_an_archive_with_another_checksum_is_refused(birds, tmp_path, monkeypatch):
    archive_of(birds, tmp_path / cub.CUB_ARCHIVE)
    with pytest.raises(UserError, match="sha256"):
        read(tmp_path / "CUB_200_2011", download=True)
    assert not (tmp_path / "CUB_200_2011").exists()


@pytest.mark.parametrize("member", ["../outside.txt", "/outside.txt"])
def test_an_archive_member_cannot_leave_the_folder(birds, tmp_path, monkeypatch, member):
    folder = tmp_path / "deep" / "data"
    folder.mkdir(parents=True)
    monkeypatch.setattr(cub, "CUB_SHA256", archive_of(birds, folder / cub.CUB_ARCHIVE, member))
    if member.startswith("/"):  # tarfile's data filter makes it relative
        assert len(read(folder / "CUB_200_2011", download=True).ids) == 72
    else:
        with pytest.raises(UserError, match="unpacked"):
            read(folder / "CUB_200_2011", download=True)
    assert not list(tmp_path.rglob("outside.txt")) and not list(folder.glob(".*.tmp"))


def test_an_archive_that_cannot_be_fetched_is_one_line(tmp_path, monkeypatch, server):
    monkeypatch.setattr(cub, "CUB_URL", f"{server[1]}/nowhere.tgz")
    with pytest.raises(UserError, match="fetch it by hand"):
        read(tmp_path / "CUB_200_2011", download=True)
    assert [path.name for path in tmp_path.iterdir()] == ["server"]


def test_a_torn_archive_leaves_nothing_behind(birds, tmp_path, monkeypatch):
    whole = tmp_path / "whole.tgz"
    archive_of(birds, whole)
    torn = tmp_path / cub.CUB_ARCHIVE
    torn.write_bytes(whole.read_bytes()[:20000])
    monkeypatch.setattr(cub, "CUB_SHA256", hashlib.sha256(torn.read_bytes()).hexdigest())
    with pytest.raises(UserError, match="cannot be unpacked"):
        read(tmp_path / "CUB_200_2011", download=True)
    assert not (tmp_path / "CUB_200_2011").exists() and not list(tmp_path.glob(".*.tmp"))
    shutil.copy(whole, torn)
    monkeypatch.setattr(cub, "CUB_SHA256", hashlib.sha256(torn.read_bytes()).hexdigest())
    assert len(read(tmp_path / "CUB_200_2011", download=True).ids) == 72
