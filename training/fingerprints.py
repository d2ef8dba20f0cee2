"""Fingerprints of a run's inputs and the structure of its checkpoint: it is resumed only if both are the same."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from readers.data_set import DataSet
from training.optimization import build_optimizer


def fingerprints(data: DataSet, boxes: np.ndarray, views: np.ndarray, maps: Any) -> dict[str, str]:
    """Return hashes of all inputs, besides the settings, that the results of a run depend on.

    ``boxes`` (N, 4) are those of the training crops, ``views`` (N, 4) those of the test views; ``maps``: anything with
    the ``header`` of a map file, or there are none.
    """
    header = getattr(maps, "header", {})
    return {
        "images": data.fingerprint(),
        "order of the images": _hash(data.ids),
        "labels": _hash(data.labels),
        "classes": _hash(np.array(data.class_names)),
        "split": _hash(data.split),
        "boxes": _hash(boxes),
        "true boxes": _hash(data.boxes),
        "boxes of the test views": _hash(views),
        "maps": str(header.get("sha256", header.get("weights_sha256", "none"))),
    }


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return the first key of ``now`` that has another value in ``before``, None if there is none."""
    return next((key for key in now if before.get(key) != now[key]), None)


def structure(value: Any, path: str = "") -> dict[str, str]:
    """Return dtype and shape of each tensor in nested dicts and lists, the type of other values, by path."""
    if torch.is_tensor(value):
        return {path: f"{value.dtype} {tuple(value.shape)}"}
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        return {path: type(value).__name__}
    return {
        name: kind
        for key, child in value.items()
        for name, kind in structure(child, f"{path}.{key}" if path else str(key)).items()
    }


def optimizer_state(optimizer: torch.optim.Optimizer, opt: dict[str, Any]) -> dict[str, Any]:
    """Return what the state dict of an optimizer holds after a step, with tensors that have no values.

    A saved state is compared with it before it is loaded: fused kernels do not check the shapes of what they are given.
    """
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.zeros(2)
    sample = build_optimizer([{"params": [weight]}], opt)
    sample.step()
    tensors = {name: value for name, value in sample.state[weight].items() if torch.is_tensor(value)}
    state = [
        {name: torch.empty_like(parameter, device="meta") if value.ndim else value for name, value in tensors.items()}
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    return {"state": dict(enumerate(state)), "param_groups": optimizer.state_dict()["param_groups"]}


def _hash(values: np.ndarray) -> str:
    content = np.ascontiguousarray(values)
    content = content if content.dtype != object else content.astype(str)
    return hashlib.sha256(f"{content.dtype} {content.shape}".encode() + content.tobytes()).hexdigest()
