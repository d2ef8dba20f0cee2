"""The import graph of the folders, and that importing a module does no work."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Layers, from the ground: a folder or top-level module imports from its own folder and from layers above its line in
# this table. Whatever stands here nowhere is an error: it belongs nowhere.
LAYERS = [
    {"localized_crops"},
    {"utils"},
    {"jobs"},
    {"models", "readers", "transforms", "dino_transform"},
    {"toybirds"},
    {"datasets", "masks"},
    {"localizer", "figures"},
    {"training"},
    {"experiments"},
    {"inference"},
]
COMMANDS = {
    *("config", "train", "check_dataset", "boxes", "generate_dino_boxes", "generate_mask", "generate_bbox"),
    *("visualize", "reproduce", "evaluate", "predict"),
}
RUN_AS_MODULES = {"toybirds.make_localizer"}  # python -m; they read the config as the commands do
FILES = sorted(
    path
    for pattern in ("*.py", "*/*.py")
    for path in ROOT.glob(pattern)
    if not str(path.relative_to(ROOT)).startswith(("tests/", "benchmarks/", "."))
)
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


def imports_of(path: Path) -> set[str]:
    """Return all modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found & set(MODULES)


def layer_of(module: str) -> int:
    place = module.split(".")[0]
    return next((n for n, layer in enumerate(LAYERS) if place in layer), -1)


@pytest.mark.parametrize("module", sorted(set(MODULES) - COMMANDS - RUN_AS_MODULES))
def test_a_module_imports_from_the_layers_below_it(module):
    assert layer_of(module) >= 0, f"{module} stands in no layer"
    place = module.split(".")[0]
    for other in imports_of(MODULES[module]):
        same = other.split(".")[0] == place
        assert same or (other not in COMMANDS and 0 <= layer_of(other) < layer_of(module)), f"{module} -> {other}"


def test_few_arrows_lead_from_room_to_room():
    """A room is a folder or a file at the top; an arrow says that something in one imports something in another."""
    room_of = {module: module.split(".")[0] for module in MODULES}
    pairs = ((room_of[module], room_of[other]) for module, path in MODULES.items() for other in imports_of(path))
    assert len({pair for pair in pairs if pair[0] != pair[1]}) < 120


def test_the_readme_says_what_every_folder_is():
    readme = (ROOT / "README.md").read_text()
    folders = {module.split(".")[0] for module, path in MODULES.items() if path.name == "__init__.py"}
    assert [folder for folder in sorted(folders) if f"| `{folder}/` |" not in readme] == []


def test_no_two_modules_import_each_other():
    graph = {module: imports_of(path) for module, path in MODULES.items()}
    done, path = set(), []

    def visit(module: str) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            path.append(module)
            for other in graph[module] - {module.split(".")[0]}:
                visit(other)
            done.add(path.pop())

    for module in graph:
        visit(module)


@pytest.mark.parametrize("module", sorted(COMMANDS))
def test_no_command_imports_another_but_for_its_config(module):
    assert not imports_of(MODULES[module]) & COMMANDS - {"config"}


@pytest.mark.parametrize("module", sorted(COMMANDS - {"config"} | RUN_AS_MODULES))
def test_a_script_has_a_guard_and_no_other_work_at_module_level(module):
    body = ast.parse(MODULES[module].read_text()).body
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    work = [node for node in body[1:-1] if not isinstance(node, allowed)]
    assert isinstance(body[0], ast.Expr) and isinstance(body[-1], ast.If) and not work
    assert ast.unparse(body[1]) == "import jobs.early"  # before what takes seconds to import


def test_importing_everything_prints_nothing_and_writes_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(MODULES)}"
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_wandb_is_imported_only_where_it_is_on(module):
    body = ast.parse(MODULES[module].read_text()).body
    assert not [node for node in body if isinstance(node, ast.Import) and node.names[0].name == "wandb"]


def test_no_test_file_imports_another():
    for path in (ROOT / "tests").glob("*.py"):
        tree = ast.parse(path.read_text())
        names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not [name for name in names if str(name).startswith("test_")], path


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_evaluates_text_or_loads_a_pickle_that_can_run_code(module):
    for call in (node for node in ast.walk(ast.parse(MODULES[module].read_text())) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        options = {option.arg: ast.unparse(option.value) for option in call.keywords}
        assert name not in ("eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "yaml.load")
        assert not name.endswith("torch.load") or options.get("weights_only") == "True"
        assert not name.startswith("np.load") or options.get("allow_pickle", "False") == "False"
