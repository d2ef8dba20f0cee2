"""What a run was made from, so that a continuation is refused where the data, boxes, maps or settings are others."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from readers.data_set import DataSet
from training.optimization import build_optimizer


def fingerprints(data: DataSet, boxes: np.ndarray, views: np.ndarray, maps: Any) -> dict[str, str]:
    """Return a hash of each thing that the numbers of a run depend on beside its settings.

    Args:
        data: the data set, with its split.
        boxes: (N, 4), that training crops are held to.
        views: (N, 4), that test views look at.
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
        "true boxes": _hash(data.boxes),
        "boxes of the test views": _hash(views),
        "maps": str(header.get("sha256", header.get("weights_sha256", "none"))),
    }


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return the first key under which two mappings differ, None if they are the same."""
    return next((key for key in now if before.get(key) != now[key]), None)


def misfit(own: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> str | None:
    """Return the first difference in names, shapes and dtypes between two dicts of tensors, None if they agree."""
    if own.keys() != saved.keys():
        return f"{min(own.keys() ^ saved.keys())} is there in one of them alone"
    for name, value in own.items():
        found = saved[name]
        if not torch.is_tensor(found) or (found.shape, found.dtype) != (value.shape, value.dtype):
            what = f"{found.dtype} {tuple(found.shape)}" if torch.is_tensor(found) else type(found).__name__
            return f"{name} is {what}, not {value.dtype} {tuple(value.shape)}"
    return None


def optimizer_fault(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], opt: dict[str, Any]) -> str | None:
    """Return why a saved state is not of this optimizer after a step, None if it fits.

    Another state would only be noticed inside the fused kernels, which do not check.

    Args:
        optimizer: of the run.
        state: what was saved.
        opt: the section of the config that the optimizer is of.
    """
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if len(state["param_groups"]) != len(optimizer.param_groups):
        return "its optimizer has another number of groups of weights"
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        if group.keys() - saved.keys():  # the schedule adds some
            return f"its optimizer lacks {min(group.keys() - saved.keys())}"
    saved = [number for group in state["param_groups"] for number in group["params"]]
    if len(own) != len(saved):
        return f"it holds the optimizer of {len(saved)} weights, this run has {len(own)}"
    sample = _state_after_a_step(opt)
    for parameter, number in zip(own, saved, strict=True):
        like = torch.empty_like(parameter, device="meta")
        expected = {name: like if value.ndim else value for name, value in sample.items()}
        if fault := misfit(expected, state["state"].get(number, {})):
            return f"its optimizer, weight {number}: {fault}"
    return None


def _state_after_a_step(opt: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return what an optimizer knows of a weight (2,) after its first step."""
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.zeros(2)
    optimizer = build_optimizer([{"params": [weight]}], opt)
    optimizer.step()
    return {name: value for name, value in optimizer.state[weight].items() if torch.is_tensor(value)}


def _hash(values: np.ndarray) -> str:
    content = np.ascontiguousarray(values)
    content = content if content.dtype != object else content.astype(str)
    return hashlib.sha256(f"{content.dtype} {content.shape}".encode() + content.tobytes()).hexdigest()
