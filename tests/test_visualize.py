"""visualize.py: each picture is made and shows what it should; bad input is one line."""

import json
import re
import shutil

import numpy as np
import PIL.Image
import pytest
import torch

import visualize
from config import load_config
from datasets import read_dataset
from experiments.grid import settings_key
from figures.plots import check_picture, paint_masks
from localized_crops.box_file import save_boxes
from localized_crops.boxes import center_boxes
from localized_crops.files import UserError, load_json, save_json
from localized_crops.map_file import save_map_cache
from masks.mask_files import mask_names, save_masks, save_masks_info
from training.log import save_log

GROUPS = ["image", "RandomResizedCrop", "reference, THR=0.7", "exact, THR=0.7"]


@pytest.fixture(scope="module")
def data(few_birds):
    return read_dataset("cub", few_birds)


@pytest.fixture(scope="module")
def found(data, tmp_path_factory):
    """Return a folder with boxes, maps and stored masks of the few birds."""
    folder = tmp_path_factory.mktemp("found")
    ids, rng = data.ids.tolist(), np.random.default_rng(0)
    boxes = dict(zip(ids, center_boxes(data.image_sizes, 0.4).tolist(), strict=True))
    save_boxes(folder / "boxes.json", boxes, dict(zip(ids, data.image_sizes.tolist(), strict=True)), made_by="test",
               settings={})  # fmt: skip
    maps = ((image_id, rng.random((5, 7))) for image_id in ids)
    save_map_cache(folder / "boxes.json", maps, {"dataset": data.fingerprint(), "model": "m", "weights_sha256": ""})
    for store in ("bool", "none"):
        write_masks(folder / store, data, store)
    return folder


def write_masks(folder, data, store):
    info = {}
    folder.mkdir()
    for name, (width, height) in zip(mask_names(data.ids.tolist(), data.paths), data.image_sizes.tolist(), strict=True):
        masks = torch.zeros(2, height, width, dtype=torch.bool)
        masks[0, :20, :30], masks[1, 10:15, 5:25] = True, True
        info[name] = [{"bbox": [0, 0, 30, 20]}, {"bbox": [5, 10, 20, 5]}]
        if store != "none":
            save_masks(folder / f"{name}.pt", masks, store)
    save_masks_info(folder, {"store": store, "dataset": data.fingerprint()}, info)


def config_of(root, *words):
    return load_config(["dataset.name=cub", f"dataset.root={root}", "THR=0.7", "image_size=48", *words])


def picture(root, *words):
    config = config_of(root, *words)
    return visualize.PICTURES[config["visualize"]["what"]](config)[0]


def titles(figure):
    return [part._suptitle.get_text() for part in figure.subfigs]


def notes(part):
    return [text.get_text() for axes in part.axes for text in axes.texts]


# --- crops --------------------------------------------------------------------------------------------------------


def test_without_more_there_are_the_image_and_three_methods(few_birds):
    figure = picture(few_birds, "visualize.images=2")
    assert titles(figure) == GROUPS
    assert [len(part.axes) for part in figure.subfigs] == [2, 4, 4, 4]  # two images, two crops each
    image, _, reference, exact = figure.subfigs
    assert all(re.fullmatch(r"\d+", note) for note in notes(image))
    assert all(len(axes.patches) == 1 for axes in image.axes)  # the true box alone
    assert all(int(note.removesuffix("%")) >= 70 for note in notes(exact)) and len(notes(reference)) == 4


def test_maps_masks_and_a_source_add_columns_and_boxes(few_birds, found, data):
    words = [
        f"source={found}/boxes.json",
        f"dino_maps={found}/boxes.json",
        f"visualize.ids={data.ids[5]},{data.ids[1]}",
    ]
    figure = picture(few_birds, *words, f"masks={found}/bool", "visualize.crops=1")
    assert titles(figure) == ["image", "attention", "candidates", *GROUPS[1:], "density map, T=0.1"]
    assert [len(part.axes) for part in figure.subfigs] == [2] * 7
    image, attention, candidates = figure.subfigs[:3]
    assert [note.split(",")[0] for note in notes(image)] == [str(data.ids[5]), str(data.ids[1])]
    assert all("IoU" in note for note in notes(image)) and all(len(axes.patches) == 2 for axes in image.axes)
    assert all(len(axes.images) == 2 for part in (attention, candidates) for axes in part.axes)


def test_candidates_that_were_not_stored_are_drawn_as_boxes(few_birds, found):
    figure = picture(few_birds, f"masks={found}/none", "visualize.images=1")
    assert titles(figure)[:2] == ["image", "candidates"]
    (axes,) = figure.subfigs[1].axes
    assert len(axes.images) == 1 and len(axes.patches) == 3  # two candidates and the true box


def test_without_a_threshold_no_crop_is_held_to_boxes(few_birds):
    assert titles(picture(few_birds, "THR=-1", "visualize.images=1")) == GROUPS[:2]


def test_a_target_maiou_gives_each_method_its_own_threshold(few_birds):
    names = titles(picture(few_birds, "maiou=0.9", "visualize.images=1"))[2:]
    assert len({name.partition("=")[2] for name in names}) == 2


def test_a_sample_is_of_its_split_and_follows_the_seed(few_birds, data):
    wanted = {"ids": [], "split": "train", "images": 3}
    first, again, other = (visualize.choose_rows(wanted, data, np.random.default_rng(n)).tolist() for n in (0, 0, 3))
    assert first == again != other and set(first + other) <= set(data.rows("train").tolist())


def test_small_masks_lie_over_large_ones():
    small, large = np.zeros((2, 9, 7), bool)
    small[2:4, 2:4], large[1:8, 1:6] = True, True
    for masks in ([small, large], [large, small]):
        colours = paint_masks(masks)
        assert colours[0, 0, 3] == 0 and not np.array_equal(colours[2, 2], colours[6, 2])


# --- boxes, runs --------------------------------------------------------------------------------------------------


def test_histograms_of_boxes_and_crops(few_birds, found):
    source = f"source={found}/boxes.json"
    figure = picture(few_birds, "visualize.what=boxes", source, f"dino_maps={found}/boxes.json")
    assert len(figure.axes) == 8  # training and test images; IoU, coverage, crops on true boxes and on the source's
    assert "train, 4 images" in figure.axes[0].get_ylabel() and "test, 3 images" in figure.axes[4].get_ylabel()
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert [label.partition(",")[0] for label in labels] == ["whole image", "centred box", "boxes.json"]
    crops = figure.axes[3]
    assert "boxes.json" in crops.get_xlabel() and not figure.axes[2].lines  # promised of the source's boxes alone
    exact = crops.patches[2].get_data()
    assert exact.values[exact.edges[1:] <= 0.7].sum() == 0
    assert len(crops.patches) == 4 and [line.get_xdata()[0] for line in crops.lines] == [0.7]
    assert all(patch.get_data().values.sum() == pytest.approx(100) for axes in figure.axes for patch in axes.patches)


def write_run(folder, root, seed, thr, epochs=3, summary=True):
    saved = config_of(root, f"THR={thr}", f"seed={seed}", f"run_dir={folder}")
    save_json(folder / "config.json", saved)
    keys = ("train_loss", "ema_top1", "maiou")
    save_log(folder / "log.jsonl", [{"epoch": n} | dict.fromkeys(keys, 0.1 * n + seed) for n in range(1, epochs + 1)])
    if summary:
        about = {"THR": thr, "maiou": 0.8 + 0.1 * thr + 0.01 * seed, "top1": {"full": {"ema": 0.5 + 0.2 * thr}}}
        save_json(folder / "summary.json", about | {"best_validation_top1": 0.5})
    return folder


@pytest.fixture
def runs(few_birds, tmp_path):
    """Return a folder of runs: two thresholds, one of them with two seeds."""
    write_run(tmp_path / "runs" / "THR=0,seed=0", few_birds, 0, 0.0)
    for seed in (0, 1):
        write_run(tmp_path / "runs" / f"THR=1,seed={seed}", few_birds, seed, 1.0, epochs=3 - seed)
    return tmp_path / "runs"


def test_curves_of_runs_that_differ_in_their_seed_are_one_with_a_band(few_birds, runs):
    figure = picture(few_birds, "visualize.what=curves", f"visualize.runs={runs}")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["THR=0", "THR=1, n = 2"]
    for axes in figure.axes:
        alone, both = axes.lines
        assert len(axes.collections) == 1 and len(alone.get_xdata()) == 3
        assert both.get_xdata().tolist() == [1, 2]  # the epochs that both seeds have
    assert figure.axes[0].lines[1].get_ydata() == pytest.approx([0.6, 0.7])
    assert figure.axes[1].lines[1].get_ydata() == pytest.approx([60, 70])


def test_accuracy_against_maiou(few_birds, runs):
    figure = picture(few_birds, "visualize.what=accuracy", f"visualize.runs={runs}")
    (axes,) = figure.axes
    assert len(axes.containers) == 2  # a point with bars for each threshold
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "THR=1, n = 2" in labels and not any("R²" in label for label in labels)  # three runs make no line


def test_a_line_goes_through_crops_of_one_kind_alone(few_birds, tmp_path):
    plain = [write_run(tmp_path / f"plain_{seed}", few_birds, seed, -1.0) for seed in (0, 1)]
    held = [write_run(tmp_path / f"held_{thr}", few_birds, 0, thr) for thr in (0.0, 0.3, 0.5, 0.8, 1.0)]
    figure = picture(few_birds, "visualize.what=accuracy", f"visualize.runs={','.join(map(str, [*plain, *held]))}")
    fits = [text.get_text() for text in figure.legends[0].get_texts() if "R² =" in text.get_text()]
    assert [fit.split(":")[0] for fit in fits] == ["exact, gt, 40 epochs"] and "n = 5" in fits[0]  # plain: one point


def test_runs_of_one_name_in_two_folders_keep_apart(few_birds, tmp_path):
    names = [str(write_run(tmp_path / part / "x", few_birds, 0, thr)) for part, thr in (("a", 0.0), ("b", 1.0))]
    assert list(visualize.group_runs([*names, names[0]])) == names


def test_the_seed_is_no_setting(few_birds):
    key, other, same = (settings_key(config_of(few_birds, word)) for word in ("seed=1", "THR=0.2", "seed=2"))
    assert key == same != other
    earlier = config_of(few_birds)  # of a version that had fewer keys
    del earlier["evaluate"]["averages"]
    assert settings_key(earlier) == key


def test_settings_of_other_stages_are_no_settings_of_a_training(few_birds):
    keys = [settings_key(config_of(few_birds, word)) for word in ("seed=1", "bbox.batch_size=5", "dino.threshold=0.5")]
    assert keys[0] == keys[1] == keys[2]
    own_maps = ("self_distillation.every=1", "use_box=false", "use_dino_maps=true")
    first, second = (settings_key(config_of(few_birds, *own_maps, f"dino.threshold={n}")) for n in (0.3, 0.5))
    assert first != second


# --- the file, and bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["crops", "boxes", "curves", "accuracy"])
def test_the_picture_is_written_and_not_blank(what, few_birds, runs, tmp_path, capsys):
    out = tmp_path / f"{what}.png"
    words = [f"visualize.what={what}", f"visualize.out={out}", f"visualize.runs={runs}", "visualize.images=1"]
    visualize.main(config_of(few_birds, *words))
    check_picture(out)  # it may be drawn again
    pixels = np.asarray(PIL.Image.open(out).convert("RGB"))
    assert pixels.shape[0] > 200 and pixels.std() > 3 and (pixels == 255).all(-1).mean() < 0.97
    assert str(out) in capsys.readouterr().out


def fault(root, *words):
    with pytest.raises(UserError) as error:
        visualize.main(config_of(root, *words))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_picture_has_a_pictures_name_and_replaces_none_of_the_users(few_birds, tmp_path):
    (tmp_path / "photo.png").write_bytes(b"mine")
    for name in ("photo.png", "photo", "photo.txt"):
        assert name in fault(few_birds, f"visualize.out={tmp_path / name}")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"mine"]


def test_unknown_images(few_birds):
    assert "no image 99999" in fault(few_birds, "visualize.ids=99999")
    assert "no image bird" in fault(few_birds, "visualize.ids=bird")
    assert "visualize.split=val" in fault(few_birds, "visualize.split=val", "dataset.val_fraction=0")
    (one,) = read_dataset("cub", few_birds).ids[:1].tolist()
    assert "names 65 images; 64 at most" in fault(few_birds, f"visualize.ids={','.join([str(one)] * 65)}")


def test_a_target_maiou_without_training_images(few_birds, tmp_path):
    root = tmp_path / "test_only"
    shutil.copytree(few_birds, root)
    split = (root / "train_test_split.txt").read_text()
    (root / "train_test_split.txt").write_text(re.sub(r" 1$", " 0", split, flags=re.MULTILINE))
    assert "no training image" in fault(root, "maiou=0.9")


def test_maps_and_masks_of_another_data_set(few_birds, birds, found):
    assert "another data set" in fault(birds, f"dino_maps={found}/boxes.json")
    assert "another data set" in fault(birds, f"masks={found}/bool")
    assert "no such file" in fault(few_birds, f"masks={found}/nothing")


def test_runs_that_are_none(few_birds, runs, tmp_path):
    curves, accuracy = "visualize.what=curves", "visualize.what=accuracy"
    assert "none given" in fault(few_birds, curves)
    assert "no run folder" in fault(few_birds, curves, f"visualize.runs={tmp_path}/nothing")
    write_run(tmp_path / "begun", few_birds, 0, 1.0, epochs=0, summary=False)
    assert "no epoch was logged" in fault(few_birds, curves, f"visualize.runs={tmp_path}/begun")
    assert "no summary.json" in fault(few_birds, accuracy, f"visualize.runs={tmp_path}/begun")
    assert "no view center" in fault(few_birds, accuracy, f"visualize.runs={runs}", "eval.views=center")


def test_runs_that_are_damaged(few_birds, runs, tmp_path):
    folder = runs / "THR=0,seed=0"
    (folder / "log.jsonl").write_text('{"epoch": 1}\n')
    assert "train_loss" in fault(few_birds, "visualize.what=curves", f"visualize.runs={folder.parent}")
    save_json(folder / "summary.json", {"maiou": 0.5})
    assert "summary.json" in fault(few_birds, "visualize.what=accuracy", f"visualize.runs={folder.parent}")
    (folder / "config.json").write_text(json.dumps([load_json(folder / "config.json")]))
    assert "not of this version" in fault(few_birds, "visualize.what=curves", f"visualize.runs={folder.parent}")


def test_of_many_candidates_the_best_are_drawn_and_all_counted(data):
    entries = [{"bbox": [number, 0, 9, 9], "predicted_iou": number / 40, "stability_score": 1} for number in range(40)]
    subject = visualize.Subject(data, data.boxes, data.has_box, None, [(None, entries), (None, [])])
    first, second = (visualize.candidates_panel(subject, row, PIL.Image.new("RGB", (53, 37))) for row in (0, 1))
    assert [box[0] for box in first.candidates_xywh] == [39, 38, 37, 36, 35] and "40" in first.title
    assert second.title == "0 found"


def test_an_image_without_a_box_says_so(few_birds, data, tmp_path):
    ids, sizes = data.ids.tolist(), data.image_sizes.tolist()
    boxes = dict(zip(ids, center_boxes(data.image_sizes).tolist(), strict=True)) | {ids[1]: None}
    save_boxes(tmp_path / "b.json", boxes, dict(zip(ids, sizes, strict=True)), made_by="test", settings={})
    figure = picture(few_birds, f"source={tmp_path}/b.json", f"visualize.ids={ids[0]},{ids[1]}")
    assert [note.endswith("no box") for note in notes(figure.subfigs[0])] == [False, True]
    assert [len(axes.patches) for axes in figure.subfigs[0].axes] == [2, 1]


def test_images_without_labels_and_true_boxes(few_birds, data, tmp_path):
    for path in list(data.paths)[:3]:
        shutil.copy(path, tmp_path)
    config = load_config(["dataset.name=folder", f"dataset.root={tmp_path}", "source=center", "image_size=48"])
    figure = visualize.crops_picture(config)[0]
    assert [len(part.axes) for part in figure.subfigs] == [3, 6, 6, 6]
    assert all(len(axes.patches) == 1 for axes in figure.subfigs[0].axes)  # the centred box alone
    with pytest.raises(UserError, match="has no true boxes to compare with"):
        visualize.boxes_picture(config)
