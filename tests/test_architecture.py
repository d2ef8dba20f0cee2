"""The import graph, and that importing a module does no work."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    "train",
    "check_dataset",
    "reproduce",
    "generate_dino_boxes",
    "generate_mask",
    "generate_bbox",
    "make_toy_localizer",
    "visualize",
}
# Who may import whom (of ours); scripts may import all modules, and reproduce.py is a script over train.py.
ALLOWED = {
    "config": set(),
    "crops": set(),
    "utils": set(),
    "boxes": {"crops", "utils"},
    "toybirds": set(),
    "transforms": {"boxes", "crops", "utils"},
    "attention": {"utils"},
    "map_boxes": {"boxes"},
    "map_cache": {"utils"},
    "records": {"utils"},
    "parallel": {"shared_work", "utils"},
    "mask_files": {"utils"},
    "mask_generator": {"sam_networks"},
    "sam_networks": set(),
    "sam_models": {"utils"},
    "sam_prompts": {"map_boxes", "mask_files", "sam_models"},
    "segments": {"boxes", "mask_files"},
    "shared_work": {"records", "utils"},
    "attention_maps": {"attention", "datasets", "localizer", "map_boxes", "utils"},
    "box_report": {"boxes", "datasets", "plots", "utils"},
    "localizer": {"attention", "models", "utils"},
    "dino_transform": {"attention", "boxes", "crops", "map_boxes", "utils"},
    "self_distillation": {"attention_maps", "datasets", "localizer", "map_cache"},
    "image_cache": {"utils"},
    "datasets": {"boxes", "image_cache", "toybirds", "utils"},
    "train_data": {
        *("config", "datasets", "dino_transform", "image_cache", "map_cache", "parallel", "transforms", "utils")
    },
    "models": {"utils"},
    "evaluation": {"parallel", "transforms"},
    "plots": {"utils"},
    "sweep": {"plots", "utils"},
    "tables": set(),
    "table_report": {"boxes", "datasets", "evaluation", "plots", "sweep", "tables", "utils"},
}
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))


def imports_of(module: str) -> set[str]:
    """Return all modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("module", MODULES)
def test_the_import_graph(module):
    ours = imports_of(module) & set(MODULES)
    if module not in SCRIPTS:
        assert ours <= ALLOWED[module]
    elif module != "reproduce":
        assert not ours & SCRIPTS


@pytest.mark.parametrize("module", sorted(SCRIPTS & set(MODULES)))
def test_a_script_has_a_guard_and_no_other_work_at_module_level(module):
    body = ast.parse((ROOT / f"{module}.py").read_text()).body
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    work = [node for node in body[1:-1] if not isinstance(node, allowed)]
    assert isinstance(body[0], ast.Expr) and isinstance(body[-1], ast.If) and not work


def test_importing_everything_prints_nothing_and_writes_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(MODULES)}"
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", MODULES)
def test_wandb_is_imported_only_where_it_is_on(module):
    body = ast.parse((ROOT / f"{module}.py").read_text()).body
    assert not [node for node in body if isinstance(node, ast.Import) and node.names[0].name == "wandb"]
