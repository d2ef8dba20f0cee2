"""How a run's settings come about: config.py as edited, presets, ``key=value`` words, all checked by jobs/schema.py."""

import ast
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

from jobs.schema import DERIVED, READ_BY, Config, check_together
from jobs.torchrun import local_world_size
from localized_crops.files import UserError

NONE_WORDS = ("None", "none", "null", "")
# What a sweep cannot go over: it changes no result, or has a key of its own.
NOT_SWEPT = {"preset", "run_dir", "resume", "save", "log_interval", "wandb", "A_machine", "sweeprun", "sweep", "seed"}
NOT_SWEPT |= {"num_workers", "device"}


class ConfigError(UserError):
    """A key or value that the config does not take. The message is one line with the remedy."""


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


DEFAULTS = Config().model_dump()
KNOWN = leaves(DEFAULTS)


def _check_known(key: str, presets: Iterable[str] = (), where: str = "") -> None:
    if key not in KNOWN:
        if near := _nearest(key, presets, cutoff=0.8):
            hint = f"; did you mean preset={near}?"
        else:
            hint = f"; did you mean {near}?" if (near := _nearest(key, KNOWN)) else ""
        raise ConfigError(f"{where}{key}: there is no such key{hint} (python train.py --help all lists all)")


def _nearest(word: str, names: Iterable[str], cutoff: float = 0.5) -> str | None:
    """Return the name most like ``word``, whatever the case; for a section's name its first key."""
    lower, word = {name.lower(): name for name in names}, word.lower()
    sections = [name for name in lower if name.startswith(f"{word}.")][:1]
    near = [word] if word in lower else sections or difflib.get_close_matches(word, lower, n=1, cutoff=cutoff)
    ends = {name.rpartition(".")[2]: name for name in reversed(lower)}
    near = near or [ends[end] for end in difflib.get_close_matches(word.rpartition(".")[2], ends, n=1, cutoff=cutoff)]
    return lower[near[0]] if near else None


# --- values -------------------------------------------------------------------------------------------------------


@functools.cache
def value_type(key: str) -> Any:
    """Return the type that jobs/schema.py gives a dotted key, with its range."""
    *sections, name = key.split(".")
    model = Config
    for section in sections:
        model = model.model_fields[section].annotation
    return model.model_fields[name].rebuild_annotation()


@functools.cache
def _adapter(key: str) -> TypeAdapter:
    return TypeAdapter(value_type(key), config={"strict": True, "allow_inf_nan": False})


def check_value(key: str, value: Any) -> None:
    """Check the value of one dotted key by itself.

    Raises:
        ConfigError: if it has the wrong type or is not allowed.
    """
    try:
        _adapter(key).validate_python(value)
    except ValidationError as error:
        raise ConfigError(_message(f"{key}={value!r}", error.errors()[0])) from None


def parse_value(key: str, text: str) -> Any:
    """Return the text after ``key=`` as a value of the key's type; lists are separated by commas.

    Raises:
        ConfigError: if there is no such key, or the value is not allowed.
    """
    _check_known(key)
    kinds = _kinds(key)
    if text in NONE_WORDS and "null" in kinds:
        return None
    if "boolean" in kinds and text.lower() not in ("true", "false"):
        raise ConfigError(f"{key}={text}: must be true or false")
    given = text
    if "array" in kinds:
        nested = re.findall(r"\[[^][]*\]", text[1:]) if key == "sweep.values" else []  # [[0.08,1],[0.2,1]]
        given = nested or [part.strip() for part in text.strip("[]").split(",") if part.strip()]
    try:
        return _adapter(key).validate_python(given, strict=False)
    except ValidationError as error:
        raise ConfigError(_message(f"{key}={text}", error.errors()[0])) from None


@functools.cache
def _kinds(key: str) -> set[str]:
    """Return the JSON types that a dotted key may have: "null" beside its own where it may be None."""
    schema = _adapter(key).json_schema()
    return {kind["type"] for kind in schema.get("anyOf", [schema])}


def _message(given: str, error: Mapping[str, Any]) -> str:
    """Return one line on a fault that pydantic found; ``error`` is its own account of it."""
    rule = re.sub("(Input|List|String) should|Value error, must", "must", error["msg"]).split(", unable to")[0]
    rule = rule.replace("a valid integer", "a whole number").replace("after validation, ", "")
    element = f"{error['input']!r} " if any(isinstance(part, int) for part in error["loc"]) else ""
    return f"{given}: {element}{rule}"


def word_of(key: str, value: Any) -> str:
    """Return the word of the command line that gives a dotted key this value."""
    if isinstance(value, list):
        return f"{key}={','.join(map(str, value))}"
    return f"{key}={'none' if value is None else str(value).lower() if isinstance(value, bool) else value}"


# --- a whole config -----------------------------------------------------------------------------------------------


def check_config(tree: Any, where: str = "", presets: Iterable[str] = (), *, together: bool = True) -> dict:
    """Return a checked copy of a config: whole numbers for floats and tuples for lists are converted.

    Args:
        tree: what should be a config with all keys.
        where: goes before the message, such as "config.py: ".
        presets: names that a misspelt key may have meant.
        together: check too what one key demands of another.

    Raises:
        ConfigError: on the first fault: an unknown key, a missing one, a value that is not allowed.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}holds no config, a dict with all keys was expected")
    flat = leaves(tree)
    for key in flat:
        _check_known(key, presets, where)
    for key in KNOWN.keys() - flat.keys():
        raise ConfigError(f"{where}{key} is missing; its default is {KNOWN[key]!r}")
    try:
        checked = Config.model_validate(tree).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(part for part in first["loc"] if isinstance(part, str))
        raise ConfigError(where + _message(f"{key}={flat.get(key)!r}", first)) from None
    if together and (fault := check_together(checked)):
        raise ConfigError(where + fault)
    return checked


def split_word(word: str) -> tuple[str, str]:
    """Split ``key=value`` at the first equals sign.

    Raises:
        ConfigError: if there is none, or the word begins with a dash.
    """
    key, equals, value = word.partition("=")
    if not equals or key.startswith("-"):
        raise ConfigError(f"{word!r} is not understood: write key=value, without dashes (or --help)")
    return key, value


def load(
    arguments: list[str],
    edited: dict,
    presets: dict[str, dict[str, Any]],
    *,
    base: dict | None = None,
    machine_workers: Mapping[str, int] | None = None,
) -> dict:
    """Return the settings of one run.

    Each of these goes over the one before: the defaults as shipped, the preset that config.py names (unless the command
    line names another), what was edited in config.py, the preset of the command line, its other words.

    Args:
        arguments: the command line without the script's name: ``preset=NAME`` and ``key=value`` words.
        edited: the dict of config.py.
        presets: its presets, name -> dotted key -> value.
        base: takes the place of the defaults: the config of the run that is gone on with or forked. What was edited in
            config.py goes over it only if resume or init_from stands there too, not on the command line.
        machine_workers: num_workers by A_machine.

    Raises:
        ConfigError: on an unknown key, a wrong type or a value that is not allowed.
    """
    words = [_split_known(word, presets) for word in arguments]
    file = check_config(edited, "config.py: ", presets, together=False)
    resolved = copy.deepcopy(base or DEFAULTS)
    given, asks = dict(words), {"resume", "init_from"}
    if base is None or (any(file[key] for key in asks) and not asks & given.keys()):
        if file["preset"] is not None and "preset" not in given:
            _apply_preset(resolved, file["preset"], presets, "config.py: ")
        for key in (key for key, value in leaves(file).items() if value != KNOWN[key]):
            set_key(resolved, key, get_key(file, key))
    for name in (name for key, name in words if key == "preset" and name not in NONE_WORDS):
        _apply_preset(resolved, name, presets)
    for key, text in words:
        set_key(resolved, key, parse_value(key, text))
    if base is not None and resolved["resume"]:
        for key in (key for key in DERIVED if get_key(resolved, key) is None):
            set_key(resolved, key, get_key(base, key))
    resolved = check_config(resolved)
    if resolved["sweeprun"]:
        resolved["sweep"]["values"] = _sweep_values(resolved)
    return _fill_in(resolved, machine_workers or {})


def _sweep_values(config: dict) -> list:
    """Return the values of the sweep as values of its key, each once; every training's config must be valid."""
    key, values = config["sweep"]["parameter"], []
    _check_known(key, where="sweep.parameter=")
    if key in NOT_SWEPT or key.split(".")[0] in NOT_SWEPT or not is_read_by("train", key):
        raise ConfigError(f"sweep.parameter={key}: no training's result depends on it (seeds: sweep.seeds)")
    for value in config["sweep"]["values"]:
        point = copy.deepcopy(config)
        set_key(point, key, parse_value(key, value) if isinstance(value, str) else value)
        value = get_key(check_config(point, "sweep.values: "), key)
        values += [value] if value not in values else []
    return values


def _split_known(word: str, presets: Iterable[str]) -> tuple[str, str]:
    if "=" not in word and (near := _nearest(word, presets, cutoff=0.8)):
        raise ConfigError(f"{word!r} is not understood: did you mean preset={near}?")
    key, value = split_word(word)
    _check_known(key, presets)
    return key, value


def _apply_preset(resolved: dict, name: str, presets: dict[str, dict[str, Any]], where: str = "") -> None:
    """Lay a preset's values over ``resolved``."""
    if name not in presets:
        near = _nearest(name, presets)
        hint = f"did you mean {near}? There are " if near else "there are "
        raise ConfigError(f"{where}preset={name}: there is no such preset; {hint}{', '.join(presets)}")
    preset = presets[name]
    if not isinstance(preset, dict) or not all(isinstance(key, str) for key in preset):
        raise ConfigError(f"config.py, preset {name}: must be a dict from dotted keys to values")
    with_preset = copy.deepcopy(DEFAULTS)
    for key, value in preset.items():
        _check_known(key, where=f"config.py, preset {name}: ")
        set_key(with_preset, key, value)
    checked = check_config(with_preset, f"config.py, preset {name}: ", together=False)
    for key in (*preset, "preset"):
        set_key(resolved, key, name if key == "preset" else copy.deepcopy(get_key(checked, key)))


def _fill_in(config: dict, machine_workers: Mapping[str, int]) -> dict:
    """Return ``config`` with what None leaves to this machine or to chance: A_machine, num_workers, seed."""
    config["A_machine"] = config["A_machine"] or platform.node()
    if config["num_workers"] is None:
        config["num_workers"] = worker_count(config["A_machine"], machine_workers)
    if config["seed"] is None:
        config["seed"] = secrets.randbelow(2**31)  # below the limit, for a sweep counts on from it
        if os.environ.get("RANK", "0") == "0":  # the other processes of a training take it over
            print(f"seed=none: seed={config['seed']} was drawn")
    return config


def worker_count(machine: str, machine_workers: Mapping[str, int]) -> int:
    """Return how many processes load images for this process.

    As many as ``machine_workers`` says of ``machine``, else one less than the cores, at most 8; the processes that
    torchrun started on the machine share them.

    Raises:
        ConfigError: if ``machine_workers`` says something else than a number of processes.
    """
    whole = machine_workers.get(machine, max(0, min(8, len(os.sched_getaffinity(0)) - 1)))
    try:
        check_value("num_workers", whole)
    except ConfigError as error:
        raise ConfigError(f"config.py, MACHINE_WORKERS of {machine}: {error}") from None
    return whole // local_world_size()


# --- help and warnings --------------------------------------------------------------------------------------------


def script_name() -> str:
    """Return the name of the script that runs, without its suffix."""
    return Path(sys.argv[0]).stem


def is_read_by(script: str, key: str) -> bool:
    """Tell whether a script reads a dotted key; true for scripts that READ_BY does not name."""
    return script not in READ_BY or key.split(".")[0] in ("preset", "dataset", *READ_BY[script].split())


def warnings_of(arguments: list[str], config: dict, script: str) -> list[str]:
    """Return a line for each word of the command line that the script does not use, and for toys on real data."""
    given = [split_word(word)[0] for word in arguments]
    lines = []
    for key in (key for key in given if not is_read_by(script, key)):
        parts = set(key.split("."))
        near = [one for one in KNOWN if is_read_by(script, one) and parts & set(one.split("."))]
        others = ", ".join(f"{other}.py" for other in READ_BY if is_read_by(other, key))
        lines.append(f"{key}: {script}.py does not use it; " + (f"did you mean {near[0]}?" if near else f"{others} do"))
    if script == "train" and config["dataset"]["name"] != "toybirds":
        toys = {"model.type": "toyresnet", "image_size": 64}
        small = [f"{key}={toy}" for key, toy in toys.items() if get_key(config, key) == toy and key not in given]
        if small:
            lines.append(f"{' and '.join(small)}: made for ToyBirds; for photographs see preset=finetune")
    return lines


def print_warnings(arguments: list[str], config: dict, script: str) -> None:
    """Print what `warnings_of` finds to stderr, once under torchrun."""
    if os.environ.get("RANK", "0") == "0":
        for line in warnings_of(arguments, config, script):
            print(f"warning: {line}", file=sys.stderr)


def help_text(path: Path, presets: Iterable[str], script: str, *, everything: bool) -> str:
    """Return the dict in the file at ``path`` with its comments, which are the manual.

    Args:
        path: config.py.
        presets: the names of its presets.
        script: print the keys that it reads.
        everything: print the others too.
    """
    source = path.read_text(encoding="utf-8")
    literal = next(
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "config"
    )
    lines, keys = source.splitlines(), [key.value for key in literal.keys]
    starts = [key.lineno - 1 for key in literal.keys] + [literal.end_lineno - 1]
    shown, headings = [], _headings(lines[literal.lineno : starts[0]])
    for key, start, end in zip(keys, starts, starts[1:], strict=False):
        if everything or is_read_by(script, key):
            shown += headings + [line for line in lines[start:end] if line not in _headings(lines[start:end])]
            headings = []
        headings = _headings(lines[start:end]) or headings
    usage = f"python {script}.py [preset=NAME] [key=value ...]    (nested keys with dots: dataset.root=PHOTOS)"
    rest = [] if everything else ["", "the keys that other scripts read: --help all"]
    return "\n".join([usage, f"presets: {', '.join(presets)}", "", *shown, *rest])


def _headings(lines: list[str]) -> list[str]:
    return [line for line in lines if line.lstrip().startswith("# ---")]
