"""Runs of Weights & Biases, which is imported only when it is asked for."""

import hashlib
import re
from pathlib import Path
from typing import Any

from localized_crops.files import UserError, first_line

LONGEST_NAME = 100  # characters of a name that is made of a longer text


def start_wandb(config: dict, folder: Path) -> Any:
    """Start the wandb run of a run folder, or after an interruption go on with it; UserError where that fails."""
    wandb = import_wandb()
    stem = re.sub(r"[^A-Za-z0-9]", "_", folder.name)[:LONGEST_NAME]
    try:
        return wandb.init(
            project=config["sweep"]["project"],
            name=folder.name,
            id=f"{stem}_{short_hash(str(folder.resolve()))}",  # names repeat, paths do not
            resume="allow" if config["resume"] else None,
            dir=str(folder),
            config=config,
        )
    except wandb.errors.Error as error:
        raise UserError(f"wandb=true: {first_line(error)}; set WANDB_MODE=offline, or wandb=false") from None


def import_wandb() -> Any:
    """Return the module; UserError if it is not installed."""
    try:
        import wandb  # takes seconds: only when it is asked for
    except ImportError:
        raise UserError("wandb=true: wandb is not installed; pip install wandb, or set wandb=false") from None
    return wandb


def short_hash(text: str) -> str:
    """Return eight hexadecimal digits of a hash."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]
