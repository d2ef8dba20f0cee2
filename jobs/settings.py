"""How a run's settings come about: config.py as edited, presets, ``key=value`` words, all checked by jobs/schema.py."""

import copy
import difflib
import functools
import operator
import os
import platform
import re
import secrets
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from jobs.schema import DEFAULTS, DERIVED, NOT_SWEPT, READ_BY, SCHEMA, check_together
from jobs.torchrun import torchrun_number
from localized_crops.files import UserError, user_errors

NONE_WORDS = ("None", "none", "null", "")


# --- keys ---------------------------------------------------------------------------------------------------------


def get_key(tree: dict, key: str) -> Any:
    """Return the value of a dotted key."""
    return functools.reduce(operator.getitem, key.split("."), tree)


def set_key(tree: dict, key: str, value: Any) -> None:
    """Set the value of a dotted key; its section must exist."""
    section, _, name = key.rpartition(".")
    (get_key(tree, section) if section else tree)[name] = value


def leaves(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Return the dotted keys of a config and their values."""
    flat = {}
    for key, value in tree.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def nested(flat: Mapping[str, Any]) -> dict:
    """Return the config of dotted keys, the inverse of `leaves`, with values of its own."""
    tree = {key.partition(".")[0]: {} for key in flat}
    for key, value in flat.items():
        set_key(tree, key, copy.deepcopy(value))
    return tree


def _check_known(key: str, presets: Iterable[str] = ()) -> None:
    if key not in SCHEMA:
        raise UserError(f"{key}: there is no such key{_hint(key, presets)} (python train.py --help all lists all)")


def _hint(word: str, presets: Iterable[str] = ()) -> str:
    """Return which key or preset a misspelt word may mean, by its whole name, its section or its last part."""
    names = {key.rpartition(".")[2].lower(): key for key in reversed(SCHEMA)}
    names |= {key.partition(".")[0].lower(): key for key in reversed(SCHEMA)}
    names |= {key.lower(): key for key in SCHEMA} | {name.lower(): f"preset={name}" for name in presets}
    near = [*difflib.get_close_matches(str(word).lower(), names, n=1, cutoff=0.5)]
    return f"; did you mean {names[near[0]]}?" if near else ""


# --- values -------------------------------------------------------------------------------------------------------


@functools.cache
def _adapter(key: str) -> TypeAdapter:
    return TypeAdapter(SCHEMA[key][0], config={"strict": True, "allow_inf_nan": False})


def check_value(key: str, value: Any) -> Any:
    """Return the value of one dotted key, an int as a float, a tuple as a list where these belong.

    Raises UserError if there is no such key, or the value, looked at by itself, is not allowed.
    """
    _check_known(key)
    return _validated(key, value, repr(value))


def parse_value(key: str, text: str) -> Any:
    """Return the text after ``key=`` as a value of the key's type, checked; lists are separated by commas."""
    _check_known(key)
    schema = _adapter(key).json_schema()
    kinds = {kind["type"] for kind in schema.get("anyOf", [schema])}
    if text in NONE_WORDS and "null" in kinds:
        return None
    if "boolean" in kinds and text.lower() not in ("true", "false"):
        raise UserError(f"{key}={text}: must be true or false")
    given = text
    if "array" in kinds:
        pairs = re.findall(r"\[[^][]*\]", text[1:]) if key == "sweep.values" else []  # [[0.08,1],[0.2,1]]
        given = pairs or [part.strip() for part in text.strip("[]").split(",") if part.strip()]
    return _validated(key, given, text, strict=False)


def _validated(key: str, value: Any, text: str, strict: bool | None = None) -> Any:
    """Return ``value`` as a value of the key's type; the error on its first fault shows it as ``text``."""
    try:
        return _adapter(key).validate_python(value, strict=strict)
    except ValidationError as error:
        fault = error.errors()[0]
        rule = re.sub("(Input|List|String) should|Value error, must", "must", fault["msg"]).split(", unable to")[0]
        rule = rule.replace("a valid integer", "a whole number").replace("after validation, ", "")
        element = f"{fault['input']!r} " if fault["loc"] else ""  # of a list
        raise UserError(f"{key}={text}: {element}{rule}") from None


def word_of(key: str, value: Any) -> str:
    """Return the word of the command line that gives a dotted key this value."""
    if isinstance(value, list):
        value = ",".join(map(str, value))
    elif value is None or isinstance(value, bool):
        value = str(value).lower()
    return f"{key}={value}"


# --- a whole config -----------------------------------------------------------------------------------------------


def check_leaves(tree: Any, presets: Iterable[str] = (), *, is_saved: bool = False) -> dict[str, Any]:
    """Return the values of a config by dotted key; raise UserError on a key or value that the schema does not allow.

    With ``is_saved`` keys may be missing, as in a config that an earlier version saved, and get their defaults.
    ``presets``: what a misspelt key may mean as well.
    """
    if not isinstance(tree, dict):
        raise UserError("holds no config, a dict with all keys was expected")
    for key in (key for key in tree if key in SCHEMA and "." in key):
        raise UserError(f"{key}: belongs into the dict of its section, without a dot")
    flat = leaves(tree)
    for key in flat:
        _check_known(key, presets)
    flat = {key: check_value(key, value) for key, value in flat.items()}
    missing = [key for key in SCHEMA if key not in flat]
    if missing and not is_saved:
        raise UserError(f"{missing[0]} is missing; its default is {DEFAULTS[missing[0]]!r}")
    return DEFAULTS | flat


def check_config(tree: Any, where: str = "", *, is_saved: bool = False) -> dict:
    """Return a checked copy of a config; ``where``, such as the name of its file, goes before the error's message."""
    with user_errors(UserError, where):
        checked = nested(check_leaves(tree, is_saved=is_saved))
        if fault := check_together(checked):
            raise UserError(fault)
    return checked


def split_word(word: str) -> tuple[str, str]:
    """Split ``key=value`` at the first equals sign; UserError if there is none, or the word begins with a dash."""
    key, equals, value = word.partition("=")
    if not equals or key.startswith("-"):
        raise UserError(f"{word!r} is not understood: write key=value or preset=NAME, without dashes (or --help)")
    return key, value


def load(
    arguments: list[str],
    edited: dict,
    presets: dict[str, dict[str, Any]],
    *,
    base: dict | None,
    machine_workers: Mapping[str, int],
) -> dict:
    """Return the settings of one run; raise UserError on an unknown key or a value that is not allowed.

    Each of these goes over the one before: the defaults as shipped, the preset that config.py names (unless the command
    line names another), what was edited in config.py, the preset of the command line, its other words.

    Args:
        arguments: the command line without the script's name: ``preset=NAME`` and ``key=value`` words.
        edited: the dict of config.py.
        presets: its presets, name -> dotted key -> value.
        base: takes the place of the defaults: the config of the run that is gone on with or forked. What was edited in
            config.py goes over it only if resume or init_from stands there too, not on the command line.
        machine_workers: num_workers by A_machine.
    """
    words = list(map(split_word, arguments))
    for key, _ in words:
        _check_known(key, presets)
    given, asks = dict(words), {"resume", "init_from"}
    values = DEFAULTS | leaves(base or {})
    with user_errors(UserError, "config.py: "):
        edits = {key: value for key, value in check_leaves(edited, presets).items() if value != DEFAULTS[key]}
        if base is None or (asks & edits.keys() and not asks & given.keys()):
            if "preset" in edits and "preset" not in given:
                values |= _preset_values(edits["preset"], presets)
            values |= edits
    for name in (name for key, name in words if key == "preset" and name not in NONE_WORDS):
        values |= _preset_values(name, presets)
    values |= {key: parse_value(key, text) for key, text in words}
    if base is not None and values["resume"]:
        values |= {key: get_key(base, key) for key in DERIVED if values[key] is None}
    resolved = check_config(nested(values))
    if resolved["sweeprun"]:
        resolved["sweep"]["values"] = _sweep_values(resolved)
    return _fill_in(resolved, machine_workers)


def _preset_values(name: str, presets: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the checked values of a preset by their dotted keys."""
    if name not in presets:
        raise UserError(f"preset={name}: there is no such preset{_hint(name, presets)}; there are {', '.join(presets)}")
    with user_errors(UserError, f"config.py, preset {name}: "):
        if not isinstance(presets[name], dict):
            raise UserError("must be a dict from dotted keys to values")
        return {key: check_value(key, value) for key, value in presets[name].items()} | {"preset": name}


def _sweep_values(config: dict) -> list:
    """Return the values of the sweep as values of its key, each once; every training's config must be valid."""
    key, values = config["sweep"]["parameter"], []
    with user_errors(UserError, "sweep.parameter="):
        _check_known(key)
    if key.split(".")[0] in NOT_SWEPT or not is_read_by("train", key):
        raise UserError(f"sweep.parameter={key}: no training's result depends on it (seeds: sweep.seeds)")
    for value in config["sweep"]["values"]:
        point = copy.deepcopy(config)
        set_key(point, key, parse_value(key, value) if isinstance(value, str) else value)
        value = get_key(check_config(point, "sweep.values: "), key)
        values += [value] if value not in values else []
    return values


def _fill_in(config: dict, machine_workers: Mapping[str, int]) -> dict:
    """Return ``config`` with what None leaves to this machine or to chance: A_machine, num_workers, seed.

    The processes that torchrun started on a machine share its workers.
    """
    machine = config["A_machine"] = config["A_machine"] or platform.node()
    if config["num_workers"] is None:
        whole = machine_workers.get(machine, max(0, min(8, len(os.sched_getaffinity(0)) - 1)))
        with user_errors(UserError, f"config.py, MACHINE_WORKERS of {machine}: "):
            check_value("num_workers", whole)
        config["num_workers"] = whole // torchrun_number("LOCAL_WORLD_SIZE", 1)
    if config["seed"] is None:
        config["seed"] = secrets.randbelow(2**31)  # below the limit, for a sweep counts on from it
        if os.environ.get("RANK", "0") == "0":  # the other processes of a training take it over
            print(f"seed=none: seed={config['seed']} was drawn")
    return config


# --- help and warnings --------------------------------------------------------------------------------------------


def is_read_by(script: str, key: str) -> bool:
    """Tell whether a script reads a dotted key; true for scripts that READ_BY does not name."""
    return script not in READ_BY or key.split(".")[0] in ("preset", "dataset", *READ_BY[script].split())


def print_warnings(arguments: list[str], config: dict, script: str) -> None:
    """Warn on stderr, once under torchrun, of words that the script does not use, and of toys on real photographs."""
    if os.environ.get("RANK", "0") != "0":
        return
    given = [split_word(word)[0] for word in arguments]
    for key in (key for key in given if not is_read_by(script, key)):
        parts = set(key.split("."))
        near = [other for other in SCHEMA if is_read_by(script, other) and parts & set(other.split("."))]
        others = ", ".join(f"{other}.py" for other in READ_BY if is_read_by(other, key))
        remedy = f"did you mean {near[0]}?" if near else f"{others} do"
        print(f"warning: {key}: {script}.py does not use it; {remedy}", file=sys.stderr)
    if script == "train" and config["dataset"]["name"] != "toybirds":
        toys = {"model.type": "toyresnet", "image_size": 64}
        small = [f"{key}={toy}" for key, toy in toys.items() if get_key(config, key) == toy and key not in given]
        if small:
            remedy = "made for ToyBirds; for photographs see preset=finetune"
            print(f"warning: {' and '.join(small)}: {remedy}", file=sys.stderr)


def help_text(path: Path, presets: Iterable[str], script: str, *, everything: bool) -> str:
    """Return the dict in config.py, at ``path``, with its comments, which are the manual, and the names of its presets.

    Only the keys that ``script`` reads, under their headings; ``everything``: the others too.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    shown, heading, is_shown = [], [], everything
    for line in lines[lines.index("config = {") + 1 : lines.index("}")]:
        if line.startswith("    # ---"):
            heading, is_shown = [line], everything
            continue
        if found := re.match(r'    "(\w+)":', line):
            is_shown = everything or is_read_by(script, found[1])
        if is_shown:
            shown += [*heading, line]
            heading = []
    usage = f"python {script}.py [preset=NAME] [key=value ...]    (nested keys with dots: dataset.root=PHOTOS)"
    rest = [] if everything else ["", "the keys that other scripts read: --help all"]
    return "\n".join([usage, f"presets: {', '.join(presets)}", "", *shown, *rest])
