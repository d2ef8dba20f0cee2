"""A run's log.jsonl: an object for each epoch that was validated."""

import json
from collections.abc import Collection
from pathlib import Path

from localized_crops.files import is_finite_number, parse_json, read_text, user_errors, whole_file


def load_log(path: Path | str, numbers: Collection[str] = ()) -> list[dict]:
    """Return the objects of a ``log.jsonl``; no file means no epoch yet.

    Raises:
        UserError: if a line is not a JSON object with a number under each key of ``numbers``.
    """
    path = Path(path)
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        with user_errors(ValueError, f"{path}:{number}: not a JSON object with its numbers, remove the line: "):
            record = parse_json(line)
            if not isinstance(record, dict):
                raise ValueError(line[:60])
            lacking = [key for key in numbers if not is_finite_number(record.get(key))]
            if lacking:
                raise ValueError(f"{lacking[0]!r} is no number")
        records.append(record)
    return records


def save_log(path: Path | str, records: list[dict]) -> None:
    """Write a ``log.jsonl``, whole or not at all (a run has a few hundred lines), into a folder that exists."""
    with whole_file(path, new_folder=False) as scratch:
        lines = (json.dumps(record, allow_nan=False) + "\n" for record in records)
        scratch.write_text("".join(lines), encoding="utf-8")
