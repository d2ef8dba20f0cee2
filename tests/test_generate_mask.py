"""generate_mask.py: its artefacts, whole, killed, shared out, and with bad input."""

import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import stages
import torch

import generate_mask as stage
from config import load_config
from datasets import read_dataset
from figures import box_report
from jobs.guard import DeadWorkerError
from localized_crops.box_file import load_boxes
from localized_crops.files import UserError, load_json
from localized_crops.map_file import save_map_cache
from mask_speed import build_small_sam
from masks import sam_models
from masks.mask_files import load_masks, load_masks_info, mask_names

SAM = ["mask.engine=sam", "sam.model=vit_b", "sam.checkpoint=random"]
ENTRY_KEYS = {"bbox", "area", "predicted_iou", "stability_score", "point_coords", "crop_box"}
LOOSE = ["sam.points_per_side=3", "sam.pred_iou_thresh=-9", "sam.stability_score_thresh=0", "sam.box_nms_thresh=1"]


@pytest.fixture(autouse=True)
def small_sam(monkeypatch):
    monkeypatch.setattr(sam_models, "sam_model_registry", {"vit_b": lambda: build_small_sam(64, 64, 2)})
    monkeypatch.setattr(box_report, "draw_contact_sheet", lambda *_: None)


@pytest.fixture
def root(few_birds, tmp_path):
    return Path(shutil.copytree(few_birds, tmp_path / "birds"))


def words(root, *more):
    return ["dataset.name=cub", f"dataset.root={root}", "num_workers=0", "num_threads=1", "mask.image_batch=2", *more]


def run(root, *more):
    stage.main(load_config(words(root, *more)))


def command(root, log, *more, **env):
    return stages.Process([str(stages.ROOT / "generate_mask.py"), *words(root, *more)], log, **env)


def content(folder):
    """Return masks and entries by image name."""
    setup, info = load_masks_info(folder)
    return {name: (load_masks(folder / f"{name}.pt"), entries) for name, entries in info.items()}, setup


def assert_same(one, other):
    (a, setup_a), (b, setup_b) = content(one), content(other)
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name][0], b[name][0]) and a[name][1] == b[name][1]
    assert setup_a | {"seconds": 0} == setup_b | {"seconds": 0}


# --- artefacts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "engine",
    [[], [*SAM, *LOOSE], ["mask.engine=official", *SAM[1:], *LOOSE], [*SAM, *LOOSE, "sam.crop_n_layers=1"]],
    ids=["segments", "sam", "official", "crops"],
)
def test_a_folder_holds_what_was_published(root, engine, capsys):
    run(root, *engine)
    folder, data = root / "masks_0", read_dataset("cub", root)
    assert "masks_0: " in capsys.readouterr().out
    names = mask_names(data.ids.tolist(), data.paths)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*(f"{name}.pt" for name in names), "masks_info.json", "errors.txt"]
    )
    assert (folder / "errors.txt").read_text() == "0 images failed\n"
    masks, setup = content(folder)
    assert setup["made_by"] == "generate_mask.py" and setup["dataset"] == data.fingerprint()
    for name, (width, height) in zip(names, data.image_sizes.tolist(), strict=True):
        tensor, entries = masks[name]
        raw = torch.load(folder / f"{name}.pt", weights_only=True)
        assert raw.dtype == torch.bool and raw.shape == (len(entries), height, width) and torch.equal(raw, tensor)
        assert all(entry.keys() == ENTRY_KEYS for entry in entries)
        assert [int(mask.sum()) for mask in tensor] == [entry["area"] for entry in entries]
    assert sum(len(entries) for _, entries in masks.values()) >= 7


def test_ours_and_the_official_engine_agree(root):
    run(root, *SAM, *LOOSE)
    run(root, "mask.engine=official", *SAM[1:], *LOOSE)
    (ours, _), (theirs, _) = content(root / "masks_0"), content(root / "masks_1")
    for name in ours:
        assert [e["bbox"] for e in ours[name][1]] == [e["bbox"] for e in theirs[name][1]]


def test_an_image_without_a_mask_has_an_empty_tensor(root):
    run(root, *SAM, "sam.pred_iou_thresh=1e9")
    data = read_dataset("cub", root)
    name, (width, height) = data.paths[0].stem, data.image_sizes[0].tolist()
    assert load_masks(root / "masks_0" / f"{name}.pt").shape == (0, height, width)
    assert load_masks_info(root / "masks_0")[1][name] == []


@pytest.mark.parametrize("store", ["packed", "none"])
def test_small_stores(root, store):
    run(root)
    run(root, f"mask.store={store}")
    one, other = load_masks_info(root / "masks_0")[1], load_masks_info(root / "masks_1")[1]
    assert one == other
    for name in one:
        path = root / "masks_1" / f"{name}.pt"
        assert path.exists() == (store == "packed")
        assert store == "none" or torch.equal(load_masks(path), load_masks(root / "masks_0" / f"{name}.pt"))


def test_equal_names_of_two_class_folders_do_not_meet(root):
    lines = (root / "images.txt").read_text().splitlines()
    (i, a), (j, b) = lines[0].split(), lines[5].split()
    twin = Path(b).with_name(Path(a).name)
    (root / "images" / b).rename(root / "images" / twin)
    lines[5] = f"{j} {twin}"
    (root / "images.txt").write_text("\n".join(lines))
    run(root)
    for image_id in (i, j):
        assert (root / "masks_0" / f"{Path(a).stem}.{image_id}.pt").exists()
    data = read_dataset("cub", root)
    assert len(load_masks_info(root / "masks_0")[1]) == len(data.ids)


# --- killed, shared out -------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_and_does_nothing_twice(root, tmp_path, monkeypatch):
    run(root)
    folder = root / "masks_1"
    with command(root, tmp_path / "log") as process:
        assert process.wait_until(lambda: list(folder.glob("unfinished/process_0/[0-9]*.safetensors")))
    assert not (folder / "masks_info.json").exists(), "killed too late to show anything"
    with pytest.raises(UserError, match="begun with store=bool, now packed"):
        run(root, f"mask.folder={folder}", "mask.store=packed")
    done = stage.prepare(load_config(words(root, f"mask.folder={folder}"))).work.finished().keys()
    original, made = stage.masks_of_batch, []

    def spy(one, rows, *rest):
        made.append(one.work.units.index(rows))
        return original(one, rows, *rest)

    monkeypatch.setattr(stage, "masks_of_batch", spy)
    run(root, f"mask.folder={folder}")
    assert done and sorted(made) == sorted(set(range(4)) - done)
    assert not (folder / "unfinished").exists()
    assert_same(root / "masks_0", folder)
    made.clear()
    run(root, f"mask.folder={folder}")  # there is nothing left to do
    assert made == []
    assert_same(root / "masks_0", folder)


def test_two_processes_make_the_same_folder(root, tmp_path):
    run(root)
    folder = f"mask.folder={root / 'masks_7'}"
    shared = [command(root, tmp_path / str(rank), folder, RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)]
    with shared[0], shared[1]:
        assert [process.end() for process in shared] == [0, 0], [process.told() for process in shared]
    assert_same(root / "masks_0", root / "masks_7")


def test_several_processes_need_a_named_folder(root, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"name it, such as mask\.folder="):
        run(root)
    assert not (root / "masks_0").exists()


# --- prompts ------------------------------------------------------------------------------------------------------


def test_one_prompt_an_image_gives_boxes_directly(root, tmp_path):
    data = read_dataset("cub", root)
    rng = np.random.default_rng(0)
    maps = {i: rng.random((6, 7)) for i in data.ids.tolist()}
    maps[int(data.ids[2])][:] = 0  # points nowhere
    save_map_cache(tmp_path / "maps.json", maps.items(), {"dataset": data.fingerprint()})
    out = tmp_path / "out" / "boxes.json"
    run(root, *SAM, "mask.prompt=dino", f"dino_maps={tmp_path / 'maps.json'}", f"out={out}")
    masks, _ = content(root / "masks_0")
    boxes = load_boxes(out)
    assert boxes.boxes[int(data.ids[2])] is None and boxes.made_by == "generate_mask.py"
    found = 0
    for path, image_id in zip(data.paths, data.ids.tolist(), strict=True):
        tensor, entries = masks[path.stem]
        assert len(tensor) == len(entries) <= 1
        if entries:
            rows, columns = np.flatnonzero(tensor[0].any(1)), np.flatnonzero(tensor[0].any(0))
            tight = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
            assert list(boxes.boxes[image_id]) == tight
            found += 1
    assert found >= 1
    assert load_json(out.with_suffix(".eval.json"))["boxes"]["train"]["n"] == 4


# --- bad input ----------------------------------------------------------------------------------------------------


def test_images_that_fail_are_listed_and_the_rest_goes_on(root, monkeypatch):
    data = read_dataset("cub", root)
    kept = data.paths[1].read_bytes()
    data.paths[1].write_bytes(kept[: len(kept) // 2])
    kept_5 = data.paths[5].read_bytes()
    data.paths[5].write_bytes(b"no image")
    original = stage.segment_image

    def fail(image):
        if image.shape[1::-1] == tuple(data.image_sizes[3]):
            raise RuntimeError("out of\nmemory")
        return original(image)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "segment_image", fail)
        with pytest.raises(UserError, match="3 images failed"):
            run(root)
    lines = (root / "masks_0" / "errors.txt").read_text().splitlines()
    assert lines[0] == "3 images failed" and len(lines) == 4
    assert any(line.startswith(f"{data.ids[3]}: out of memory") for line in lines)
    assert any(line.startswith(f"{data.ids[1]}: ") and "damaged" in line for line in lines)
    assert len(load_masks_info(root / "masks_0")[1]) == 4
    data.paths[1].write_bytes(kept)
    data.paths[5].write_bytes(kept_5)  # another data set than before, whose size was unknown
    with pytest.raises(UserError, match="made with dataset="):
        run(root, f"mask.folder={root / 'masks_0'}")


def test_a_worker_that_dies_while_an_image_is_in_work_is_no_fault_of_the_image(root, monkeypatch):
    def die(_image):
        raise DeadWorkerError("processes that load images died")  # from a signal handler

    monkeypatch.setattr(stage, "segment_image", die)
    with pytest.raises(DeadWorkerError):
        run(root)
    assert not list(root.rglob("errors.txt")) and not list(root.rglob("masks_0/**/*.safetensors"))


def test_a_mended_image_is_done_by_the_same_command(root):
    data = read_dataset("cub", root)
    kept = data.paths[1].read_bytes()
    data.paths[1].write_bytes(kept[: len(kept) // 2])
    with pytest.raises(UserError, match="1 images failed"):
        run(root)
    data.paths[1].write_bytes(kept)
    run(root, f"mask.folder={root / 'masks_0'}")
    assert (root / "masks_0" / "errors.txt").read_text() == "0 images failed\n"
    run(root)
    assert_same(root / "masks_1", root / "masks_0")


def test_masks_of_another_data_set_are_not_gone_on_with(root, tmp_path):
    run(root)
    other = Path(shutil.copytree(root, tmp_path / "other"))
    image = read_dataset("cub", other).paths[0]
    PIL.Image.new("RGB", (300, 298)).save(image)
    with pytest.raises(UserError, match=r"made with dataset=.*give another out, or start anew: remove"):
        run(other, f"mask.folder={root / 'masks_0'}")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["mask.engine=sam"], r"sam_vit_h_4b8939\.pth"),
        ([*SAM[:2], "sam.checkpoint=none.pth"], "there is no such file"),
        (["mask.prompt=dino"], r"needs mask\.engine=sam and dino_maps"),
        ([*SAM, "mask.prompt=dino", "dino_maps=none.json"], "there is no such file"),
        (["mask.engine=sand"], "mask.engine=sand"),
        (["mask.image_batch=0"], "mask.image_batch=0"),
        (["mask.folder=."], "is no folder of this script"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_leaves_nothing(root, more, told):
    with pytest.raises(UserError, match=told) as error:
        run(root, *more)
    assert "\n" not in str(error.value) and not list(root.glob("masks_*"))


def test_the_presets_are_the_published_settings():
    for name, points, stability in (("cub_sam_masks_0", 10, 0.5), ("cub_sam_masks_1", 3, 0.3)):
        sam = load_config([f"preset={name}"])["sam"]
        assert (sam["model"], sam["points_per_side"], sam["stability_score_thresh"]) == ("vit_h", points, stability)
        assert sam["pred_iou_thresh"] == 0.88 and sam["crop_n_layers"] == 0


def test_real_photographs(cub24, tmp_path):
    """Four of them, linked: formats and sizes; random weights segment nothing."""
    root = tmp_path / "cub"
    root.mkdir()
    shutil.copy(cub24 / "classes.txt", root)
    kept = [line.split()[0] for line in (cub24 / "images.txt").read_text().splitlines()[:4]]
    for name in ("images.txt", "image_class_labels.txt", "bounding_boxes.txt", "train_test_split.txt"):
        lines = [line for line in (cub24 / name).read_text().splitlines() if line.split()[0] in kept]
        (root / name).write_text("\n".join(lines) + "\n")
    (root / "images").symlink_to(cub24 / "images")
    run(root, *SAM, *LOOSE)
    data = read_dataset("cub", root)
    masks, _ = content(root / "masks_0")
    for path, (width, height) in zip(data.paths, data.image_sizes.tolist(), strict=True):
        assert masks[path.stem][0].shape[1:] == (height, width)
