"""The commands of docs/using.md, at toy size, one after the other in one process."""

import importlib
import json
import re
import shutil
from pathlib import Path

import pytest

from config import load_config
from localized_crops.box_file import load_boxes
from localized_crops.files import UserError
from localizer.networks import TOY_WEIGHTS

PAGE = Path(__file__).parent.parent / "docs" / "using.md"
LOADERS = {
    "train": "load_run_config",
    "evaluate": "load_evaluation_configs",
    "predict": "load_prediction_config",
}
TOYS = {  # boxes.json and best.pt tell the later commands
    "train.py": ["model.type=toyresnet", "model.weights=none", "image_size=32", "num_epochs=1", "batch_size=8"],
    "generate_dino_boxes.py": [
        *("dino.model=none", f"dino.weights={TOY_WEIGHTS}", "dino.image_size=none", "dino.steps=heads,min_max"),
        *("dino.object_model=test_efficientnet", "dino.object_weights=random", "dino.object_image_size=64"),
    ],
}


def commands() -> list[list[str]]:
    """Return the words of the six commands."""
    block = re.search(r"<!-- test: six commands -->\n```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return [line.split() for line in block[1].splitlines()]


def run(script: str, *words: str) -> None:
    """Run a script in this process."""
    name = script.removesuffix(".py")
    module = importlib.import_module(name)
    load = getattr(module, LOADERS[name]) if name in LOADERS else load_config
    module.main(load([*words, "num_workers=0", "device=cpu"]))


def test_the_six_commands_lead_from_photographs_to_predictions(birds, tmp_path, monkeypatch):
    for number, path in enumerate(sorted((birds / "images").rglob("*.jpg"))):
        folder = tmp_path / ("new_photos" if number % 9 == 8 else f"photos/{path.parent.name}")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    monkeypatch.chdir(tmp_path)
    assert len(commands()) == 6
    for _python, script, *words in commands():
        monkeypatch.setattr("sys.argv", [script])
        run(script, *words, *TOYS.get(script, []))
    assert (tmp_path / "runs/photos_0/evaluation_test_0/evaluation.md").exists()
    rows = (tmp_path / "runs/photos_0/predictions_new_photos.csv").read_text().splitlines()
    assert len(rows) == 1 + len(list((tmp_path / "new_photos").iterdir()))
    assert (tmp_path / "runs/crops.png").exists()
    run("predict.py", "checkpoint=runs/photos_0/best.pt", "images=photos", "out=known.jsonl")
    made = load_boxes("runs/dino_boxes_photos/boxes.json").boxes
    for line in map(json.loads, Path("known.jsonl").read_text().splitlines()):
        box = made[line["path"].removeprefix("photos/")]
        assert box is None or line["box"] == pytest.approx(box, abs=1e-3)
    with pytest.raises(UserError, match=r"dino\.object_model=test_resnet"):
        run("predict.py", "checkpoint=runs/photos_0/best.pt", "images=photos", "dino.object_model=test_resnet")


@pytest.mark.parametrize("words", commands(), ids=lambda words: words[1])
def test_every_word_is_one_that_the_command_takes(words):
    load_config([word for word in words[2:] if not word.startswith("images=")])
