"""Data sets that are no CUB: class folders, tables, torchvision's; without true boxes."""

import json
import os
import shutil

import numpy as np
import PIL.Image
import pytest
import torch

import check_dataset
from config import load_config
from datasets import read_dataset, source_boxes
from localized_crops.files import UserError
from readers.data_set import UprightPath
from readers.images import FORMATS, image_sizes, read_image
from readers.splits import class_notes
from training import train_data
from training.train_run import train_run


def picture(path, size=(23, 17), value=90, exif=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = PIL.Image.new("RGB", size, (value, 2 * value % 256, 40))
    about = {}
    if exif:
        about["exif"] = PIL.Image.Exif()
        about["exif"][0x0112] = exif
    image.save(path, **about)


@pytest.fixture
def photos(tmp_path):
    """Return a folder of 3 classes x 10 photographs, without splits."""
    for number, name in enumerate(("ash", "oak tree", "yew")):
        for one in range(10):
            picture(tmp_path / "photos" / name / f"a  {one}.jpg", (20 + one, 31 - number), 8 * one + number)
    return tmp_path / "photos"


@pytest.fixture
def parts(tmp_path):
    """Return a folder with split folders, whose classes differ."""
    root = tmp_path / "parts"
    for split, classes in {"train": "abc", "valid": "ab", "test": "abd"}.items():
        for number, name in enumerate(classes):
            picture(root / split / name / f"{number}.png")
            picture(root / split / name / "deep" / f"{number}.jpg")
    (root / "train" / "empty").mkdir()
    (root / "train" / "a" / "Thumbs.db").write_bytes(b"x")
    return root


def words_of(root, *more):
    return ["dataset.name=folder", f"dataset.root={root}", "num_workers=0", *more]


# --- class folders ------------------------------------------------------------------------------------------------


def test_class_folders_get_a_drawn_split_that_is_the_same_every_time(photos):
    data = read_dataset("folder", photos, test_fraction=0.2, val_fraction=0.25)
    assert data.ids[0] == "ash/a  0.jpg" and data.paths[0] == photos / "ash" / "a  0.jpg"
    assert data.class_names == ["ash", "oak tree", "yew"]
    for split, each in (("test", 2), ("val", 2), ("train", 6)):
        assert np.bincount(data.labels[data.rows(split)]).tolist() == [each] * 3
    again = read_dataset("folder", photos, test_fraction=0.2, val_fraction=0.25)
    other = read_dataset("folder", photos, test_fraction=0.2, val_fraction=0.25, split_seed=1)
    assert (again.split == data.split).all() and (other.split != data.split).any()
    assert data.fingerprint() == again.fingerprint()


def test_an_image_more_moves_no_other_from_train_to_test(photos):
    before = read_dataset("folder", photos, test_fraction=0.2)
    picture(photos / "yew" / "new.jpg")
    after = read_dataset("folder", photos, test_fraction=0.2)
    old = {i: s for i, s in zip(after.ids.tolist(), after.split.tolist(), strict=True) if i in before.ids}
    changed = [i for i, s in zip(before.ids.tolist(), before.split.tolist(), strict=True) if old[i] != s]
    assert len(changed) <= 1


def test_split_folders_are_kept_and_what_is_odd_is_named(parts):
    data = read_dataset("folder", parts, test_fraction=0.3, val_fraction=0.5)
    counts = {split: len(data.rows(split)) for split in ("train", "val", "test")}
    assert counts == {"train": 6, "val": 4, "test": 6}
    assert "valid/a/deep/0.jpg" in data.ids.tolist()
    assert any("train/empty" in note for note in data.notes) and any("train/a" in note for note in data.notes)
    notes = "\n".join(class_notes(data))
    assert "'d'" in notes and "'c'" in notes and data.class_names == ["a", "b", "c", "d"]


def test_classes_whose_names_are_easily_confused_are_told(photos):
    picture(photos / "Oak  Tree" / "a.jpg")
    data = read_dataset("folder", photos)
    assert data.class_names == ["Oak  Tree", "ash", "oak tree", "yew"]
    (note,) = [note for note in data.notes if "case or spaces" in note]
    assert "'Oak  Tree', 'oak tree'" in note and "yew" not in note


def test_without_a_test_part_the_run_reports_on_val(photos):
    config = load_config(words_of(photos, "dataset.test_fraction=0", "dataset.val_fraction=0.3"))
    data = train_data.load_data(config)
    assert data.rows(*train_data.REPORTED).tolist() == data.rows("val").tolist()
    with pytest.raises(UserError, match=r"dataset\.test_fraction"):
        train_data.load_data(load_config(words_of(photos, "dataset.test_fraction=0", "dataset.val_fraction=0")))


def test_a_run_without_a_test_part_says_that_it_is_tested_on_val(photos, tmp_path, capsys):
    words = words_of(photos, "dataset.test_fraction=0", "dataset.val_fraction=0.3", "use_box=false", "num_epochs=1")
    summary = train_run(load_config([*words, "image_size=16", "device=cpu", f"run_dir={tmp_path / 'run'}"]))
    assert summary["n_test"] == 9
    assert "21 train, 9 val, 0 test images" in (told := capsys.readouterr().out)
    assert "validated on val, and tested on it too: there is no test part" in told


def test_names_may_hold_what_cannot_be_seen_but_no_control_characters(photos):
    first = photos / "yew" / "a  1.jpg"
    for name in ("soft\u00adhyphen.jpg", "joined\u200d.jpg", "10\u202fAM.jpg"):
        shutil.copy(first, photos / "yew" / name)
    assert len(read_dataset("folder", photos).ids) == 33
    shutil.copy(first, photos / "yew" / "line\n.jpg")
    with pytest.raises(UserError, match="rename"):
        read_dataset("folder", photos)


def test_images_without_class_folders_have_no_labels(photos, capsys):
    data = read_dataset("folder", photos / "yew", test_fraction=0.2, val_fraction=0.3)
    assert (data.labels == -1).all() and len(data.rows("test")) == 10 and data.class_names == []
    with pytest.raises(UserError, match="two classes"):
        train_data.load_data(load_config(words_of(photos / "yew")))
    check_dataset.main(load_config(words_of(photos / "yew")))
    assert "10 images without labels: there are no class folders" in capsys.readouterr().out
    (photos / "none").mkdir()
    with pytest.raises(UserError, match="none"):
        read_dataset("folder", photos / "none")


@pytest.mark.parametrize("name", ["toybirds", "folder", "csv", "cub"])
def test_a_root_that_does_not_exist_is_an_error_and_stays_absent(tmp_path, name):
    with pytest.raises(UserError, match="nowhere"):
        read_dataset(name, tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def test_photographs_taken_for_toybirds_are_sent_to_the_right_name_and_kept(photos):
    with pytest.raises(UserError, match=r"dataset\.name=folder") as error:
        read_dataset("toybirds", photos)
    assert "delete" not in str(error.value) and len(list(photos.rglob("*.jpg"))) == 30


# --- no true boxes ------------------------------------------------------------------------------------------------


def test_true_boxes_that_there_are_not_are_refused_with_the_remedy(photos):
    data = read_dataset("folder", photos)
    assert not data.has_box.any()
    with pytest.raises(UserError, match="source=center"):
        source_boxes("gt", data)


@pytest.mark.parametrize(
    ("words", "source"), [(["use_box=false"], "image"), (["source=center"], "center")], ids=["plain", "center"]
)
def test_maiou_is_measured_on_the_runs_own_boxes(photos, words, source):
    config = load_config(words_of(photos, *words, "image_size=16", "crop.scale=0.5,1"))
    data = train_data.load_data(config)
    boxes, notes = train_data.crop_boxes(config, data)
    crops = train_data.build_crops(config, data, boxes)
    loader = train_data.build_train_loader(config, data, crops, torch.device("cpu"), None)
    found = torch.cat([batch.coverage for batch in loader])
    assert notes["maiou_of"] == source and len(found) == len(data.rows("train"))
    least = 0.35 if source == "image" else 0.99  # the crop's share of the image, or of the box that it is held to
    assert found.isfinite().all() and least <= found.min() and (found.max() <= 1)


# --- EXIF and formats ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_size_and_pixels_agree_with_each_other(tmp_path, suffix, orientation):
    path = tmp_path / f"one.{suffix}"
    picture(path, (24, 15), exif=orientation)
    for one in (path, UprightPath(path)):
        sizes, _, _ = image_sizes([one])
        assert sizes[0].tolist() == list(read_image(one).size)
    upright = read_image(UprightPath(path)).size
    assert upright == ((15, 24) if orientation > 4 else (24, 15))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_damaged_exif_data_is_no_orientation(tmp_path, suffix):
    path = tmp_path / f"one.{suffix}"
    PIL.Image.new("RGB", (24, 15)).save(path, exif=b"Exif\0\0MM\0*\0\0")
    sizes, rotated, _ = image_sizes([UprightPath(path)])
    assert sizes[0].tolist() == [24, 15] == list(read_image(UprightPath(path)).size) and not rotated[0]


def test_upright_pixels_are_turned(tmp_path):
    image = PIL.Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "one.png", exif=exif)
    found = np.asarray(read_image(UprightPath(tmp_path / "one.png")))[..., 0]
    assert found.tolist() == np.rot90(np.asarray(image), -1).tolist()


def test_rotated_images_are_counted(photos, capsys):
    picture(photos / "yew" / "turned.jpg", (40, 20), exif=6)
    data = read_dataset("folder", photos)
    assert data.rotated == 1 and data.pixel_grid == "upright"
    row = data.ids.tolist().index("yew/turned.jpg")
    assert data.image_sizes[row].tolist() == [20, 40]
    check_dataset.main(load_config(words_of(photos)))
    assert "1 images are rotated" in capsys.readouterr().out


def test_pixels_of_unknown_range_are_refused_and_16_bits_are_scaled(tmp_path):
    ramp = np.linspace(0, 1, 20, dtype=np.float32).reshape(4, 5)
    PIL.Image.fromarray(ramp).save(tmp_path / "float.tif")
    PIL.Image.fromarray((ramp * 2**30).astype(np.int32)).save(tmp_path / "int.tif")
    PIL.Image.fromarray((ramp * 255).astype(np.int32)).save(tmp_path / "small.tif")
    for name in ("float.tif", "int.tif", "small.tif"):
        with pytest.raises(UserError, match=name):
            read_image(tmp_path / name)
    PIL.Image.fromarray((ramp * 65535).astype(np.uint16)).save(tmp_path / "short.tif")
    assert np.asarray(read_image(tmp_path / "short.tif"))[..., 0].ravel().tolist()[-1] == 255


def test_an_eps_file_starts_no_other_program(tmp_path):
    (tmp_path / "one.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    with pytest.raises(UserError, match="not an image"):
        read_image(tmp_path / "one.jpg")


def test_a_pipe_is_no_image_and_no_table(tmp_path, photos):
    os.mkfifo(photos / "yew" / "pipe.jpg")
    with pytest.raises(UserError, match=r"pipe\.jpg"):
        read_dataset("folder", photos)
    os.mkfifo(tmp_path / "table.csv")
    with pytest.raises(UserError, match=r"table\.csv"):
        read_dataset("csv", photos, table=tmp_path / "table.csv")


# --- tables -------------------------------------------------------------------------------------------------------


def table(root, *lines, header="path,label,split,x,y,width,height"):
    (root / "list.csv").write_text("\n".join([header, *lines]) + "\n")
    return read_dataset("csv", root)


def test_a_table_with_boxes_for_some(photos):
    lines = "yew/a  1.jpg,yew,train,1,2,10,11", '"ash/a  0.jpg",ash,validation,,,,', "ash/a  3.jpg,ash,test,0,0,50,9"
    data = table(photos, *lines)
    assert data.split.tolist() == ["train", "val", "test"] and data.class_names == ["ash", "yew"]
    assert data.has_box.tolist() == [True, False, True] and data.clipped == 1
    assert data.boxes[0].tolist() == [1, 2, 10, 11] and data.boxes[2].tolist() == [0, 0, 23, 9]
    boxes, missing = source_boxes("gt", data)
    assert missing == 1 and boxes[1].tolist() == [0, 0, *data.image_sizes[1]]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("yew/a  1.jpg,yew,train,1,2,10", "csv:2"),
        ("yew/a  1.jpg,yew,practice,1,2,10,11", "csv:2"),
        ("yew/a  1.jpg,,train,1,2,10,11", "csv:2"),
        (",yew,train,1,2,10,11", "csv:2"),
        ("yew/a  1.jpg,yew,train,1,2,ten,11", "csv:2"),
        ("yew/a  1.jpg,yew,train,1,,10,11", "csv:2"),
        ("yew/a  1.jpg,yew,train,1,2,0,11", "csv:2"),
        ("yew/a  1.jpg,yew,train,0.1,0.2,0.3,0.4", "pixels"),
        ("yew/a  1.jpg,yew,train,100,2,10,11", "outside"),
        ("yew/none.jpg,yew,train,1,2,10,11", r"none\.jpg"),
        ("yew/a  1.jpg,yew,train,1,2,10,11\nyew/a  1.jpg,yew,train,1,2,10,11", "csv:3"),
        (f"yew/a  1.jpg,{'yew' * 50_000},train,,,,", "csv:2: field larger"),  # a quotation mark that is never closed
    ],
)
def test_a_fault_in_a_table_is_named_by_its_line(photos, line, told):
    with pytest.raises(UserError, match=told) as error:
        table(photos, line)
    assert "\n" not in str(error.value)


def test_a_table_without_columns_of_boxes_has_none(photos):
    data = table(photos, "yew/a  1.jpg,yew,train", "ash/a  3.jpg,ash,test", header="path,label,split")
    assert not data.has_box.any() and np.isnan(data.boxes).all() and data.split.tolist() == ["train", "test"]


def test_one_of_several_tables_must_be_named(photos):
    for name in ("a.csv", "b.csv"):
        (photos / name).write_text("path,label\n")
    with pytest.raises(UserError, match=r"holds 2 CSV files.*dataset\.table"):
        read_dataset("csv", photos)


def test_an_image_of_more_pixels_than_pillow_opens_is_refused_before_it_is_decoded(photos, monkeypatch):
    for most in (100, 599):  # of 30 x 20 pixels: over twice as many Pillow raises, up to that it warns
        monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", most)
        PIL.Image.new("RGB", (30, 20)).save(photos / "huge.png")
        with pytest.raises(UserError, match=r"huge\.png: declares more pixels"):
            read_image(photos / "huge.png")


def test_a_table_without_a_column_or_rows(photos):
    for header, lines in (("path,class", ["a,b"]), ("path,label", []), ("path,label,x,y", ["a,b,1,2"])):
        with pytest.raises(UserError, match=r"list\.csv"):
            table(photos, *lines, header=header)


# --- check_dataset ------------------------------------------------------------------------------------------------


def test_unreadable_images_are_listed_and_counted(photos, capsys):
    for name in ("text.jpg", "more.jpg"):  # whose headers cannot be read
        (photos / "yew" / name).write_text("no image")
    cut = photos / "ash" / "cut.jpg"
    cut.write_bytes((photos / "ash" / "a  1.jpg").read_bytes()[:-200])
    with pytest.raises(UserError, match="3 of 33"):
        check_dataset.main(load_config(words_of(photos)))
    told = capsys.readouterr().out
    assert all(name in told for name in ("text.jpg", "more.jpg", "cut.jpg"))


def test_of_many_faults_some_are_listed_and_the_rest_is_counted(photos, capsys):
    for path in photos.rglob("*.jpg"):
        path.write_text("no image")
    with pytest.raises(UserError, match=r"none of 30 images can be read: .*not an image"):
        check_dataset.main(load_config(words_of(photos)))
    picture(photos / "yew" / "whole.jpg")
    with pytest.raises(UserError, match="30 of 31 images cannot be read"):
        check_dataset.main(load_config(words_of(photos)))
    told = capsys.readouterr().out.splitlines()
    assert sum("not an image" in line for line in told) == 20 and "... and 10 more like this" in told


def test_pillow_knows_every_format_that_is_tried_and_reads_the_first_of_two_pictures(tmp_path):
    PIL.Image.init()
    assert set(FORMATS) <= PIL.Image.OPEN.keys()
    first, second = (PIL.Image.new("RGB", (30, 20), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "pair.jpg", format="MPO", save_all=True, append_images=[second])
    image = read_image(tmp_path / "pair.jpg")
    assert image.size == (30, 20) and image.getpixel((5, 5))[0] > 200
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(UserError, match="identify"):  # Pillow's own reason
        read_image(tmp_path / "text.jpg")


def test_equal_images_and_links_are_named(photos, capsys):
    (photos / "yew" / "copy.jpg").write_bytes((photos / "ash" / "a  1.jpg").read_bytes())
    check_dataset.main(load_config(words_of(photos)))
    with pytest.raises(UserError, match="several ids"):
        check_dataset.main(load_config(words_of(photos, "find_duplicates=true")))
    assert "yew/copy.jpg" in capsys.readouterr().out
    (photos / "yew" / "copy.jpg").unlink()
    (photos / "yew" / "link.jpg").symlink_to(photos / "ash" / "a  1.jpg")
    with pytest.raises(UserError, match="several ids"):
        check_dataset.main(load_config(words_of(photos)))


# --- torchvision --------------------------------------------------------------------------------------------------


def aircraft(root):
    base = root / "fgvc-aircraft-2013b" / "data"
    base.mkdir(parents=True)
    (base / "variants.txt").write_text("707-320\nA 300\n")
    for split, names in {"train": "ab", "val": "c", "test": "de"}.items():
        (base / f"images_variant_{split}.txt").write_text("".join(f"{n} A 300\n" for n in names))
        for name in names:
            picture(base / "images" / f"{name}.jpg")
    return {"train": 2, "val": 1, "test": 2}, 1


def cars(root):
    from scipy.io import savemat

    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    kind = np.dtype([("fname", object), ("class", object)])
    for split, file in (("train", "devkit/cars_train_annos"), ("test", "cars_test_annos_withlabels")):
        names = [f"{n}.jpg" for n in range(3)]
        rows = np.array([(name, 2) for name in names], dtype=kind)
        savemat(base / f"{file}.mat", {"annotations": rows})
        for name in names:
            picture(base / f"cars_{split}" / name)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(["Audi", "BMW"], dtype=object)})
    return {"train": 3, "val": 0, "test": 3}, 1


def pets(root):
    base = root / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for split, first in (("trainval", 1), ("test", 3)):
        names = [("Abyssinian", 1), ("great_dane", 2)]
        lines = [f"{name}_{first} {label} 1 1" for name, label in names]
        (base / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")
        for name, _ in names:
            picture(base / "images" / f"{name}_{first}.jpg")
    return {"train": 2, "val": 0, "test": 2}, 0


def food(root):
    base = root / "food-101"
    (base / "meta").mkdir(parents=True)
    for split, number in (("train", 1), ("test", 2)):
        content = {name: [f"{name}/{number}"] for name in ("apple_pie", "waffles")}
        (base / "meta" / f"{split}.json").write_text(json.dumps(content))
        for name in content:
            picture(base / "images" / name / f"{number}.jpg")
    return {"train": 2, "val": 0, "test": 2}, 0


def flowers(root):
    from scipy.io import savemat

    base = root / "flowers-102"
    base.mkdir()
    savemat(base / "imagelabels.mat", {"labels": np.array([1, 2, 1, 5, 6, 7])})
    savemat(base / "setid.mat", {"trnid": [1, 2], "valid": [3, 4], "tstid": [5, 6]})
    for number in range(1, 7):
        picture(base / "jpg" / f"image_{number:05d}.jpg")
    return {"train": 2, "val": 2, "test": 2}, 0


WRITERS = {
    "FGVCAircraft": aircraft,
    "StanfordCars": cars,
    "OxfordIIITPet": pets,
    "Food101": food,
    "Flowers102": flowers,
}


@pytest.mark.parametrize(("name", "write"), WRITERS.items())
def test_torchvisions_sets_are_read_through_their_classes(tmp_path, monkeypatch, name, write):
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda path, md5: os.path.exists(path))
    with pytest.raises(UserError, match=r"dataset\.download"):
        read_dataset(name, tmp_path)
    counts, first_label = write(tmp_path)
    data = read_dataset(name, tmp_path)
    assert {split: len(data.rows(split)) for split in counts} == counts
    assert data.labels[0] == first_label and data.paths[0].exists() and not data.has_box.any()
    assert len(data.class_names) >= 2 and data.ids[0] == data.paths[0].relative_to(tmp_path).as_posix()
