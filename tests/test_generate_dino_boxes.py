"""generate_dino_boxes.py: the whole stage on a few drawings, unbroken, killed, shared out, and with bad input."""

import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import stages
import torch

import generate_dino_boxes as stage
import train
from config import load_config
from datasets import read_dataset, source_boxes
from figures import box_report
from figures.box_report import evaluate_boxes
from inference.classifier import load_classifier
from jobs import shared_work
from localized_crops import map_boxes
from localized_crops.attention import cls_attention
from localized_crops.box_file import load_boxes
from localized_crops.files import UserError, load_json
from localized_crops.map_file import MapCache, maps_path, save_map_cache
from localizer import attention_maps, networks
from localizer.networks import build_localizer
from toybirds.make_localizer import save_localizer
from toybirds.network import build_toy_vit

TINY = {"image_size": 32, "stride": 8, "width": 32, "depth": 1, "heads": 2}
TOY = f"dino.weights={stages.ROOT / 'toybirds' / 'toy_localizer.pt'}"
SMALL = ["dataset.name=cub", "num_workers=0", "dino.batch_size=8"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The weights file of a tiny network that has learnt nothing."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    save_localizer(path, build_toy_vit(**TINY), {"architecture": TINY})
    return path


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Leave out the contact sheet, which takes longer than all the rest; one test draws it."""
    monkeypatch.setattr(box_report, "draw_contact_sheet", lambda *_: None)


def words(birds, tiny, out, *more):
    return [*SMALL, f"dataset.root={birds}", f"dino.weights={tiny}", f"out={out}", *more]


def run(birds, tiny, out, *more):
    stage.main(load_config(words(birds, tiny, out, *more)))
    return out


def command(birds, tiny, out, log, *more, **env):
    return stages.Process([str(stages.ROOT / "generate_dino_boxes.py"), *words(birds, tiny, out, *more)], log, **env)


@pytest.fixture(scope="module")
def unbroken(birds, tiny, tmp_path_factory):
    """The files of an unbroken run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(box_report, "draw_contact_sheet", lambda *_: None)
        return run(birds, tiny, tmp_path_factory.mktemp("unbroken") / "boxes.json")


def assert_same_files(a, b):
    for one, two in zip((a, maps_path(a)), (b, maps_path(b)), strict=True):
        assert one.read_bytes().replace(str(a).encode(), b"") == two.read_bytes().replace(str(b).encode(), b""), one
    assert not b.with_name("boxes.partial").exists()


# --- what is written ----------------------------------------------------------------------------------------------


def test_the_maps_are_those_of_the_network(birds, tiny, unbroken):
    data, localizer, cache = read_dataset("cub", birds), build_localizer(None, str(tiny)), MapCache.open(unbroken)
    assert sorted(cache) == sorted(data.ids.tolist())
    for row in (0, 17, 50):
        with PIL.Image.open(data.paths[row]) as image:
            scale = 32 / min(image.size)
            width, height = (max(1, round(side * scale / 8)) * 8 for side in image.size)
            pixels = np.asarray(image.convert("RGB").resize((width, height), PIL.Image.Resampling.BICUBIC))
        images = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
        expected = cls_attention(localizer.model, localizer.normalize(images))[0].mean(0).numpy()
        found = cache[int(data.ids[row])]
        assert found.shape == (height // 8, width // 8)
        assert np.allclose(found, map_boxes.min_max(expected), atol=2e-3)


def test_the_boxes_are_those_of_the_maps(birds, unbroken):
    data, cache, file = read_dataset("cub", birds), MapCache.open(unbroken), load_boxes(unbroken)
    for image_id, size in zip(data.ids.tolist(), data.image_sizes.tolist(), strict=True):
        expected = map_boxes.component_box(map_boxes.min_max(cache[image_id].astype(float)), tuple(size), **DEFAULT_BOX)
        assert file.boxes[image_id] == pytest.approx(expected.xywh)
        assert file.image_sizes[image_id] == tuple(size)
    assert file.made_by == "generate_dino_boxes.py" and file.settings["dino"]["method"] == "component"


DEFAULT_BOX = {key: load_config([])["dino"][key] for key in ("threshold", "upsample", "choose", "size_factor")}


def test_the_header_tells_what_the_maps_are(birds, tiny, unbroken):
    data, header = read_dataset("cub", birds), MapCache.open(unbroken).header
    assert header["dataset"] == data.fingerprint()
    assert header["model"] == "toy_localizer" and header["precision"] == "float32" and header["errors"] == {}
    assert header["weights_sha256"] == build_localizer(None, str(tiny)).weights_sha256
    assert header["settings"]["image_size"] == 32 and header["settings"]["steps"] == ["heads", "min_max"]


def test_the_evaluation(birds, unbroken):
    data = read_dataset("cub", birds)
    boxes, missing = source_boxes(str(unbroken), data)
    expected = evaluate_boxes(boxes, data.boxes, data.image_sizes, data.split)
    content = load_json(unbroken.with_suffix(".eval.json"))
    assert missing == 0 and {key: content[key] for key in expected} == expected
    assert content["boxes"]["test"]["n"] == 24 and set(content["boxes"]["train"]["iou_at"]) == {"0.3", "0.5", "0.7"}
    assert {"data", "model", "maps", "cache", "boxes"} <= set(content["seconds"])
    assert unbroken.with_name("errors.txt").read_text() == "0 images failed\n"


def test_training_takes_the_boxes(birds, unbroken, tmp_path):
    small = ["num_epochs=1", "image_size=32", "num_workers=0", "dataset.name=cub", f"dataset.root={birds}"]
    summary = train.train_run(train.load_run_config([*small, f"run_dir={tmp_path / 'run'}", f"source={unbroken}"]))
    assert summary["epochs"] == 1


def test_the_contact_sheet(birds, tiny, unbroken, tmp_path, monkeypatch):
    monkeypatch.undo()
    out = Path(shutil.copytree(unbroken.parent, tmp_path / "copy")) / unbroken.name
    run(birds, tiny, out)
    with PIL.Image.open(out.with_suffix(".png")) as sheet:
        assert min(sheet.size) > 300


def test_the_default_localizer_beats_the_trivial_boxes(birds, tmp_path):
    stage.main(load_config([*SMALL, f"dataset.root={birds}", f"out={tmp_path / 'boxes.json'}", TOY]))
    scores = load_json(tmp_path / "boxes.eval.json")
    for split in ("train", "test"):
        best = max(scores[name][split]["mean_iou"] for name in ("whole_image", "center", "median_train"))
        assert scores["boxes"][split]["mean_iou"] > best + 0.2
        assert scores["boxes"][split]["coverage"] > 0.75


# --- killed, shared out, used again -------------------------------------------------------------------------------


def test_workers_change_nothing(birds, tiny, unbroken, tmp_path):
    with command(birds, tiny, tmp_path / "boxes.json", tmp_path / "log", "num_workers=2") as process:
        assert process.end() == 0, process.told()
    assert "images/s" in process.told()
    assert maps_path(unbroken).read_bytes() == maps_path(tmp_path / "boxes.json").read_bytes()


def test_a_killed_run_goes_on_to_the_same_files(birds, tiny, tmp_path):
    slow = ["dino.batch_size=1", "dino.image_size=160"]  # many batches, so that the kill comes in between
    out = tmp_path / "killed" / "boxes.json"
    with command(birds, tiny, out, tmp_path / "log", *slow) as process:
        assert process.wait_until(lambda: stages.units_done(out.parent) > 2)
    assert not out.exists(), "killed too late to show anything"
    work = stage.prepare(load_config(words(birds, tiny, out, *slow))).work
    done = work.finished()
    assert 1 <= len(done) < 72
    with pytest.raises(UserError, match=r"begun with dino\.image_size=160, now 32; .* dino\.again=true"):
        run(birds, tiny, out, "dino.batch_size=1")
    assert work.finished() == done
    mapped = spy_on_batches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "mapped_batches", mapped)
        run(birds, tiny, out, *slow)
    assert mapped.numbers == set(range(72)) - done.keys()  # nothing done twice, nothing lost
    whole = run(birds, tiny, tmp_path / "whole" / "boxes.json", *slow)
    assert_same_files(whole, out)


def spy_on_batches():
    original = stage.mapped_batches

    def spy(run, numbers):
        spy.numbers |= set(numbers)
        return original(run, numbers)

    spy.numbers = set()
    return spy


def test_two_processes_make_the_same_files(birds, tiny, unbroken, tmp_path):
    out = tmp_path / "boxes.json"
    shared = [command(birds, tiny, out, tmp_path / str(rank), RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)]
    with shared[0], shared[1]:
        assert [process.end() for process in shared] == [0, 0], [process.told() for process in shared]
    assert_same_files(unbroken, out)
    assert shared[1].printed() == ""  # one of them speaks
    data, cache = read_dataset("cub", birds), MapCache.open(out)
    assert len(cache) == len(data.ids)


def test_a_share_is_left_to_the_others(birds, tiny, unbroken, tmp_path, monkeypatch):
    out = tmp_path / "boxes.json"
    for rank in (2, 1):
        monkeypatch.setenv("WORLD_SIZE", "3")
        monkeypatch.setenv("RANK", str(rank))
        run(birds, tiny, out)
        assert not out.exists()
    monkeypatch.setenv("WORLD_SIZE", "1")  # resumed by one process: the shares of the two are used
    monkeypatch.setenv("RANK", "0")
    mapped = spy_on_batches()
    monkeypatch.setattr(stage, "mapped_batches", mapped)
    run(birds, tiny, out)
    assert mapped.numbers and {number % 3 for number in mapped.numbers} == {0}
    assert_same_files(unbroken, out)


def test_processes_that_do_not_come_are_named(birds, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(shared_work, "STALLED_SECONDS", 0.1)
    with pytest.raises(UserError, match="batches of other processes"):
        run(birds, tiny, tmp_path / "boxes.json")


def test_maps_are_used_again_for_other_boxes(birds, tiny, unbroken, tmp_path, monkeypatch, capsys):
    out = Path(shutil.copytree(unbroken.parent, tmp_path / "copy")) / unbroken.name
    monkeypatch.setattr(stage, "mapped_batches", lambda *_: pytest.fail("maps are made again"))
    run(birds, tiny, out, "dino.method=published", "dino.threshold=0.5")
    assert "72 of 72 images are done already" in capsys.readouterr().out
    assert load_boxes(out).boxes != load_boxes(unbroken).boxes
    assert load_json(out.with_suffix(".eval.json"))["images_mapped"] == 0


def test_maps_of_something_else_are_refused(birds_copy, birds, tiny, unbroken, tmp_path):
    out = Path(shutil.copytree(unbroken.parent, tmp_path / "copy")) / unbroken.name
    with pytest.raises(UserError, match=r"made with dino\.image_size=32, now 48; .*dino\.again=true"):
        run(birds, tiny, out, "dino.image_size=48")
    PIL.Image.new("RGB", (150, 140)).save(read_dataset("cub", birds_copy).paths[0])
    with pytest.raises(UserError, match="made with dataset="):
        run(birds_copy, tiny, out)
    torch.manual_seed(1)
    save_localizer(tmp_path / "other.pt", build_toy_vit(**TINY), {"architecture": TINY})
    with pytest.raises(UserError, match="made with weights_sha256="):
        run(birds, tmp_path / "other.pt", out)
    maps_path(out).write_bytes(b"")
    with pytest.raises(UserError, match=r"make the maps again: python generate_dino_boxes\.py"):
        run(birds, tiny, out)
    run(birds, tiny, out, "dino.again=true")
    assert_same_maps(unbroken, out)


def test_maps_that_do_not_say_which_images_failed_are_refused(birds, tiny, unbroken, tmp_path):
    out = Path(shutil.copytree(unbroken.parent, tmp_path / "copy")) / unbroken.name
    cache = MapCache.open(out)
    save_map_cache(out, dict(cache).items(), cache.header | {"errors": None})
    with pytest.raises(UserError, match=r"does not say which images failed; start anew: .*dino\.again=true"):
        run(birds, tiny, out)


def test_what_was_begun_is_done_anew_by_one_process_alone(birds, tiny, unbroken, tmp_path, monkeypatch):
    out = tmp_path / "boxes.json"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    run(birds, tiny, out, "dino.image_size=48")
    begun = sorted(tmp_path.rglob("process_1/*.safetensors"))
    with pytest.raises(UserError, match=r"again=true is for one process: start anew with .*dino\.again=true"):
        run(birds, tiny, out, "dino.again=true")
    assert begun and sorted(tmp_path.rglob("process_1/*.safetensors")) == begun
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    original, left = stage.mapped_batches, []
    monkeypatch.setattr(stage, "mapped_batches", lambda *a: left.extend(filter(Path.exists, begun)) or original(*a))
    run(birds, tiny, out, "dino.again=true")
    assert left == []
    assert_same_maps(unbroken, out)


def assert_same_maps(a, b):
    one, two = MapCache.open(a), MapCache.open(b)
    assert all(np.array_equal(one[i], two[i]) for i in one)


def test_another_scripts_box_file_is_not_overwritten(birds, tiny, unbroken, tmp_path):
    out = tmp_path / "boxes.json"
    shutil.copy(unbroken, out)
    with pytest.raises(UserError, match="was not made by this script"):
        run(birds, tiny, out)


# --- bad input ----------------------------------------------------------------------------------------------------


def test_images_that_fail_are_listed_and_the_rest_goes_on(birds_copy, tiny, unbroken, tmp_path):
    data = read_dataset("cub", birds_copy)
    kept = data.paths[4].read_bytes()
    data.paths[4].write_bytes(kept[: len(kept) // 2])
    out = tmp_path / "out" / "boxes.json"
    with command(birds_copy, tiny, out, tmp_path / "log") as process:
        assert process.end() == 2 and "Traceback" not in process.told()
    assert "1 images failed and have no box" in process.told()
    lines = out.with_name("errors.txt").read_text().splitlines()
    assert lines[0] == "1 images failed" and lines[1].startswith(f"{data.ids[4]}: ") and "damaged" in lines[1]
    assert load_boxes(out).boxes[int(data.ids[4])] is None
    assert sum(box is None for box in load_boxes(out).boxes.values()) == 1
    assert load_json(out.with_suffix(".eval.json"))["boxes"]["train"]["n_without_box"] == 1
    assert not MapCache.open(out)[int(data.ids[4])].any() and out.with_suffix(".png").exists()
    data.paths[4].write_bytes(kept)  # mended: only its batch is done again
    mapped = spy_on_batches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "mapped_batches", mapped)
        run(birds_copy, tiny, out)
    assert len(mapped.numbers) == 1
    assert_same_maps(unbroken, out)
    assert out.with_name("errors.txt").read_text() == "0 images failed\n"


def test_an_image_smaller_than_a_patch_fails(birds_copy, tiny, tmp_path):
    data = read_dataset("cub", birds_copy)
    PIL.Image.new("RGB", (300, 5)).save(data.paths[0])
    (birds_copy / "bounding_boxes.txt").write_text(
        (birds_copy / "bounding_boxes.txt").read_text().replace(box_line(birds_copy), "1 0 0 4 4")
    )
    with pytest.raises(UserError, match="1 images failed"):
        run(birds_copy, tiny, tmp_path / "boxes.json")
    assert "300 x 5 pixels, smaller than one patch of 8" in (tmp_path / "errors.txt").read_text()


def box_line(folder):
    return (folder / "bounding_boxes.txt").read_text().splitlines()[0]


@pytest.mark.parametrize("value", [np.nan, 0.25])
def test_blank_maps_give_the_whole_image_and_are_counted(birds, tiny, tmp_path, monkeypatch, value):
    def attend(*args):
        attention = cls_attention(*args).clone()
        attention[0] = value
        return attention

    monkeypatch.setattr(attention_maps, "cls_attention", attend)
    out = run(birds, tiny, tmp_path / "boxes.json")
    missing = [image_id for image_id, box in load_boxes(out).boxes.items() if box is None]
    scores = load_json(out.with_suffix(".eval.json"))["boxes"]
    assert len(missing) == sum(scores[split]["n_without_box"] for split in scores) >= 9
    assert not any(MapCache.open(out)[image_id].any() for image_id in missing)
    data = read_dataset("cub", birds)
    boxes, count = source_boxes(str(out), data)
    assert count == len(missing) and boxes[data.ids == missing[0]][0].tolist()[:2] == [0, 0]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["dino.image_size=5"], "set at least 8"),
        (["dino.heads=7"], "heads=7"),
        (["dino.heads=best"], "heads='best'"),
        (["dino.steps=heads,blur"], "steps="),
        (["dino.steps=min_max"], "steps="),
        (["dino.model=vit_tiny_patch16_224"], "another architecture"),
        (["dino.model=dinov2_vitx14"], "there is no such model"),
        (["dino.weights=none.pt"], "there is no such file"),
        (["device=cuda:77"], "device=cuda:77"),
        (["dataset.root=nowhere"], "nowhere: there is no such folder"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_leaves_nothing(birds, tiny, tmp_path, more, told):
    with pytest.raises(UserError, match=told) as error:
        run(birds, tiny, tmp_path / "out" / "boxes.json", *more)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_two_runs_do_not_work_in_one_place(birds, tiny, tmp_path):
    prepared = stage.prepare(load_config(words(birds, tiny, tmp_path / "boxes.json")))
    with prepared.work.claimed(), pytest.raises(UserError, match="another process works there"):
        run(birds, tiny, tmp_path / "boxes.json")
    assert list(tmp_path.iterdir()) == []  # nothing came of it


def test_a_file_that_is_no_image_is_listed_and_the_rest_goes_on(birds_copy, tiny, tmp_path):
    """Its size is unknown too, so that it has no row in the evaluation; training takes the whole image once mended."""
    data = read_dataset("cub", birds_copy)
    kept, broken = data.paths[4].read_bytes(), int(data.ids[4])
    data.paths[4].write_bytes(b"no image at all")
    out = tmp_path / "out" / "boxes.json"
    with pytest.raises(UserError, match="1 images failed and have no box"):
        run(birds_copy, tiny, out)
    assert f"{broken}: {data.paths[4]}: not an image" in out.with_name("errors.txt").read_text()
    file = load_boxes(out)
    assert file.boxes[broken] is None and file.image_sizes[broken] is None and len(file.boxes) == 72
    data.paths[4].write_bytes(kept)
    boxes, missing = source_boxes(str(out), data)
    assert missing == 1 and boxes[4].tolist() == [0, 0, *data.image_sizes[4].tolist()]
    with pytest.raises(UserError, match=r"made with dataset=.*dino\.again=true"):
        run(birds_copy, tiny, out)


def test_attention_teaches_a_classifier_of_another_networks_cells(birds, tiny, tmp_path):
    more = ["dino.method=object_head", "dino.object_model=resnet18", "dino.object_weights=random"]
    out = run(birds, tiny, tmp_path / "boxes.json", *more, "dino.object_image_size=64", "dino.object_rounds=1")
    boxes = load_boxes(out)
    data = read_dataset("cub", birds)
    assert set(boxes.boxes) == set(data.ids.tolist())
    assert load_json(out)["settings"]["dino"]["object_rounds"] == 1


def test_an_image_that_fails_when_its_map_is_made_into_a_box_is_listed(few_birds, tiny, tmp_path, monkeypatch):
    """It was whole when the maps were made."""
    found, data = stage.find_objects, read_dataset("cub", few_birds)

    def fail_once(*arguments):
        return ((row, box, "truncated" if row == 2 else error) for row, box, error in found(*arguments))

    monkeypatch.setattr(stage, "find_objects", fail_once)
    more = ["dino.method=object_head", "dino.object_model=test_efficientnet", "dino.object_weights=random"]
    with pytest.raises(UserError, match="1 images failed"):
        run(few_birds, tiny, tmp_path / "boxes.json", *more, "dino.object_image_size=64", "dino.object_rounds=1")
    assert (tmp_path / "errors.txt").read_text() == f"1 images failed\n{data.ids[2]}: truncated\n"


def test_a_wrong_object_model_is_told_before_the_maps_are_made(birds, tiny, tmp_path):
    more = ["dino.method=object_head", "dino.object_model=no_such_net"]
    with pytest.raises(UserError, match=r"dino\.object_model"):
        run(birds, tiny, tmp_path / "boxes.json", *more)
    assert not list(tmp_path.iterdir())


def test_photographs_are_not_looked_at_by_the_network_of_the_drawn_birds(birds, site, tmp_path, monkeypatch):
    asked = []

    def stop(*names):
        asked.append(names)
        raise UserError("far enough")

    monkeypatch.setattr(networks, "build_localizer", stop)
    with pytest.raises(UserError):
        stage.prepare(load_config([*SMALL, f"dataset.root={birds}", f"out={tmp_path / 'boxes.json'}"]))
    with pytest.raises(UserError):  # nor where predict.py looks for the box
        load_classifier(site / "run" / "best.pt", config=load_config(["dataset.name=cub", "eval_box=center"]))
    assert asked == [("dinov2_vits14", None)] * 2


def test_files_of_the_user_are_not_replaced(birds, tiny, tmp_path):
    for name in ("boxes.png", "errors.txt", "boxes.eval.md"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(UserError, match=name):
            run(birds, tiny, tmp_path / "boxes.json")
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]
        (tmp_path / name).unlink()


def test_an_image_that_was_replaced_by_one_of_its_size_gets_a_new_map(birds_copy, tiny, tmp_path):
    out = run(birds_copy, tiny, tmp_path / "boxes.json")
    data = read_dataset("cub", birds_copy)
    with PIL.Image.open(data.paths[0]) as image:
        turned = image.transpose(PIL.Image.Transpose.ROTATE_180)
    before = MapCache.open(out)[data.ids[0].item()].copy()
    turned.save(data.paths[0], quality=95)
    mapped = spy_on_batches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "mapped_batches", mapped)
        run(birds_copy, tiny, out)
    assert len(mapped.numbers) == 1
    assert (MapCache.open(out)[data.ids[0].item()] != before).any()
