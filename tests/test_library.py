"""The library by itself: what is installed, that it works beside other modules of common names, and its page's code."""

import re
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

import localized_crops
from localized_crops import attention

ROOT = Path(__file__).parent.parent
USE = """
import sys
from localized_crops import LocalizedRandomResizedCrop, DinoRandomResizedCrop, sample_crops, iou, coverage
from localized_crops import load_boxes, save_boxes
heavy = {"timm", "scipy", "skimage", "safetensors", "pydantic", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
assert sys.modules["localized_crops"].__file__.startswith(sys.argv[1])
save_boxes("boxes.json", {"a/b.jpg": (1, 2, 3, 4)}, {"a/b.jpg": (80, 60)}, made_by="test", settings={})
assert load_boxes("boxes.json").boxes == {"a/b.jpg": (1, 2, 3, 4)}
from localized_crops import cls_attention
assert callable(cls_attention) and "timm" in sys.modules
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from a copy of what it is made of, as the build leaves files behind."""
    pytest.importorskip("setuptools", "77", reason="builds the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    for path in [ROOT / "pyproject.toml", *(ROOT / "localized_crops").iterdir()]:
        if path.is_file():
            (folder / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
            (folder / path.relative_to(ROOT)).write_bytes(path.read_bytes())
    (folder / "utils.py").write_text("")  # lies beside it in a checkout and must stay out
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "out", "."]
    done = subprocess.run(pip, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "out").glob("*.whl")
    return path


def test_the_wheel_holds_the_library_alone(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {f"localized_crops/{path.name}" for path in (ROOT / "localized_crops").glob("*.py")}
    assert names == sources | {"localized_crops/py.typed"}


def test_it_works_from_a_folder_with_modules_named_as_ours(wheel, tmp_path):
    installed, work = tmp_path / "installed", tmp_path / "work"
    zipfile.ZipFile(wheel).extractall(installed)
    work.mkdir()
    for name in ("utils", "datasets", "models", "transforms"):
        (work / f"{name}.py").write_text("raise RuntimeError('was imported')")
    (work / "use.py").write_text(USE)
    done = subprocess.run(
        [sys.executable, "use.py", str(installed)],
        cwd=work, env={"PYTHONPATH": str(installed)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_every_name_that_the_library_lists_is_there_and_others_are_not():
    for name in localized_crops.__all__:
        assert callable(getattr(localized_crops, name))
    assert localized_crops.cls_attention is attention.cls_attention
    with pytest.raises(AttributeError, match="no attribute 'cls_atention'"):
        localized_crops.cls_atention  # noqa: B018 - it is the access that fails


def test_the_code_of_the_librarys_page_runs(monkeypatch):
    stand_in = types.SimpleNamespace(LightningDataModule=object)
    monkeypatch.setitem(sys.modules, "lightning", stand_in)
    text = (ROOT / "docs" / "library.md").read_text()
    blocks = re.findall(r"<!-- run -->\n```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == text.count("```python") == 3
    names = {}
    for block in blocks:
        exec(block, names)
