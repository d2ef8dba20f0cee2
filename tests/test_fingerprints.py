"""What a continuation compares: data, boxes, maps, and a saved state's names, shapes and dtypes."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from datasets import read_dataset
from training.fingerprints import fingerprints, first_difference, optimizer_state, structure
from training.optimization import build_optimizer


def taken(data, factor=1.0, views=1.0, maps="a"):
    boxes = np.arange(4.0 * len(data.ids)).reshape(-1, 4)
    return fingerprints(data, boxes * factor, boxes * views, SimpleNamespace(header={"sha256": maps}))


def swapped(values):
    changed = values.copy()
    first, last = 0, np.flatnonzero(values != values[0])[-1]
    changed[first], changed[last] = values[last], values[first]
    return changed


CHANGES = {
    "train and test swapped": lambda data: taken(replace(data, split=swapped(data.split))),
    "two labels swapped": lambda data: taken(replace(data, labels=swapped(data.labels))),
    "classes in another order": lambda data: taken(replace(data, class_names=data.class_names[::-1])),
    "an image less": lambda data: taken(
        replace(data, ids=data.ids[1:], paths=data.paths[np.arange(1, len(data.ids))], image_sizes=data.image_sizes[1:])
    ),
    "images in another order": lambda data: taken(replace(data, ids=data.ids[::-1])),
    "other boxes": lambda data: taken(data, factor=2),
    "other true boxes": lambda data: taken(replace(data, boxes=data.boxes / 2)),
    "other boxes at test": lambda data: taken(data, views=2),
    "other maps": lambda data: taken(data, maps="b"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_run_knows_what_it_was_made_from(birds, change):
    data = read_dataset("cub", birds)
    assert first_difference(taken(data), taken(read_dataset("cub", birds))) is None
    assert first_difference(taken(data), change(data)) is not None


def test_tensors_are_compared_by_name_shape_and_dtype():
    tensors = {"a": torch.zeros(2, 3), "b": [torch.zeros(()), {"c": 1}]}
    expected = structure(tensors)
    assert first_difference(structure(copy.deepcopy(tensors)), expected) is None
    changes = [{"a": tensors["b"][0]}, {"a": tensors["a"].int()}, {"b": 1}, {"b": [tensors["b"][0], {"c": "1"}]}]
    for other in ({"a": tensors["a"]}, *(tensors | change for change in changes)):
        assert first_difference(structure(other), expected)


def first_state(name, value):
    return lambda state: state["state"][0].update({name: value})


FAULTS = {
    "empty": lambda state: state.update(state={}),
    "without an average": lambda state: state["state"][0].pop("exp_avg_sq"),
    "a number": first_state("exp_avg", torch.tensor(1.0)),
    "another shape": first_state("exp_avg", torch.zeros(7)),
    "another dtype": first_state("exp_avg", torch.zeros(3, 2, dtype=torch.int8)),
    "several steps": first_state("step", torch.ones(3)),
    "no tensor": first_state("exp_avg", "text"),
    "without betas": lambda state: state["param_groups"][0].pop("betas"),
    "a weight less": lambda state: state["param_groups"][0]["params"].pop(),
    "a group less": lambda state: state["param_groups"].pop(),
}


@pytest.mark.parametrize("damage", FAULTS.values(), ids=FAULTS)
def test_a_state_that_would_crash_the_fused_kernels_is_found_before(damage):
    model, opt = nn.Linear(2, 3), {"type": "adamw", "lr": 0.1, "momentum": 0.9}
    optimizer = build_optimizer([{"params": [weight]} for weight in model.parameters()], opt)
    model(torch.ones(4, 2)).sum().backward()
    optimizer.step()
    state, expected = copy.deepcopy(optimizer.state_dict()), structure(optimizer_state(optimizer, opt))
    assert first_difference(structure(state), expected) is None
    damage(state)
    assert first_difference(structure(state), expected)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_state_of_sgd_is_known_too(momentum):
    model, opt = nn.Linear(2, 3), {"type": "sgd", "lr": 0.1, "momentum": momentum}
    optimizer = build_optimizer([{"params": list(model.parameters())}], opt)
    model(torch.ones(4, 2)).sum().backward()
    optimizer.step()
    assert first_difference(structure(optimizer.state_dict()), structure(optimizer_state(optimizer, opt))) is None
