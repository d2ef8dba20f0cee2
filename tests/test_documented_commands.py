"""Every command in README.md and docs/ names a script that exists, and settings that this script reads and accepts."""

import re
import shlex
from pathlib import Path

import pytest

from config import load_config
from jobs.settings import is_read_by, split_word

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:python|torchrun(?: --[\w-]+[ =]\S+)*) ((?:-m [\w.]+)|[\w/]+\.py)(.*)", re.DOTALL)
HAVE_NO_CONFIG = {"boxes.py"}  # takes two file names behind a verb


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Return (script, its words) of the commands in code blocks and in inline code that begins with one."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = [
        " ".join(code.split()) for code in re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    ]
    found = []
    for line in [*lines, *inline]:
        match = COMMAND.search(line.partition("  #")[0])
        if match and match[1] != "-m pytest" and (line in lines or match.start() == 0):
            words = [
                word
                for word in shlex.split(match[2], comments=True)
                if not word.startswith(("...", "--help")) and not word.startswith("[")
            ]
            module = match[1].removeprefix("-m ")
            found.append((module if module == match[1] else module.replace(".", "/") + ".py", words))
    return found


CASES = [pytest.param(*command, id=f"{page.stem}: {' '.join([command[0], *command[1]])[:60]}")
         for page in PAGES for command in commands(page.read_text())]  # fmt: skip


@pytest.mark.parametrize(("script", "words"), CASES)
def test_a_command_of_the_docs_is_understood(script, words, monkeypatch):
    path = ROOT / script
    assert path.exists()
    if path.parent != ROOT or script in HAVE_NO_CONFIG:
        return
    monkeypatch.setattr("sys.argv", [str(path), *words])
    assert load_config(words) is not None
    unread = [key for key, _ in map(split_word, words) if key != "preset" and not is_read_by(path.stem, key)]
    assert script == "reproduce.py" or not unread


def test_the_docs_hold_commands():
    assert len(CASES) > 40
