"""What a run was made from, so that a continuation is refused where the data, boxes, maps or settings are others."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from readers.data_set import DataSet


def fingerprints(data: DataSet, boxes: np.ndarray, maps: Any) -> dict[str, str]:
    """Return a hash of each thing that the numbers of a run depend on beside its settings.

    Args:
        data: the data set, with its split.
        boxes: (N, 4), that training crops are held to.
        maps: the attention maps (anything with a ``header``), or None.
    """
    header = getattr(maps, "header", {})
    return {
        "images": data.fingerprint(),
        "order of the images": _hash(data.ids),
        "labels": _hash(data.labels),
        "classes": _hash(np.array(data.class_names)),
        "split": _hash(data.split),
        "boxes": _hash(np.asarray(boxes)),
        "maps": str(header.get("sha256", header.get("weights_sha256", "none"))),
    }


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return the first key under which two mappings differ, None if they are the same."""
    return next((key for key in now if before.get(key) != now[key]), None)


def optimizer_fault(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], step: int) -> str | None:
    """Return why a saved state is not of this optimizer, None if it fits.

    A state of other shapes would only be noticed inside the fused kernels, which do not check.
    """
    own = [p for group in optimizer.param_groups for p in group["params"]]
    saved = [number for group in state["param_groups"] for number in group["params"]]
    if len(own) != len(saved):
        return f"it holds the optimizer of {len(saved)} weights, this run has {len(own)}"
    if step and optimizer.defaults.get("momentum") != 0 and len(state["state"]) != len(saved):
        return f"its optimizer knows {len(state['state'])} of {len(saved)} weights after {step} steps"
    for parameter, number in zip(own, saved, strict=True):
        for name, value in state["state"].get(number, {}).items():
            if torch.is_tensor(value) and value.ndim and value.shape != parameter.shape:
                return f"{name} of weight {number} has the shape {tuple(value.shape)}, not {tuple(parameter.shape)}"
    return None


def _hash(values: np.ndarray) -> str:
    content = np.ascontiguousarray(values)
    content = content if content.dtype != object else content.astype(str)
    return hashlib.sha256(f"{content.dtype} {content.shape}".encode() + content.tobytes()).hexdigest()
