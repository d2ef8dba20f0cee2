"""Two nodes of torchrun, two agents on this machine: the files of one process, and what a node's death leaves."""

import os
import signal
import socket

import pytest
import stages
import torch.distributed.run
from stages import Process, Stage

from localized_crops.files import load_json
from long_runs import descendants
from training.log import load_log

pytestmark = pytest.mark.slow  # each agent and each process imports torch anew
# Two processes see halves of a batch: with BatchNorm's statistics at rest its numbers are those of one process.
HALVES = ["model.freeze_bn_from=0", "num_epochs=2"]


def nodes(stage: Stage, folder, log, *more) -> list[Process]:
    """Start one process on each of two nodes, which meet at a port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [torch.distributed.run.__file__, "--nnodes=2", "--nproc-per-node=1"]
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test"]
    command = [*torchrun, *meeting, *stage.command(folder, *more)]
    return [Process(command, log.with_name(f"{log.name}_node_{number}")) for number in range(2)]


def die(node: Process) -> None:
    """Kill a node, agent and process: an agent alone that is killed leaves its process, which works on."""
    if node.running:
        for pid in (node.process.pid, *descendants(node.process.pid)):
            os.kill(pid, signal.SIGKILL)
        node.end()


def ends(both: list[Process]) -> list[int]:
    """Wait for both nodes; leave nothing of them running."""
    try:
        return [node.end() for node in both]
    finally:
        for node in both:
            die(node)


def test_a_generator_on_two_nodes_writes_the_files_of_one_process(few_birds, tmp_path):
    stage = stages.dino_stage(few_birds)
    stages.finish(stage, tmp_path / "one", tmp_path / "log")
    both = nodes(stage, tmp_path / "two", tmp_path / "log")
    assert ends(both) == [0, 0], [node.told() for node in both]
    one, two = (stages.contents(tmp_path / name) for name in ("one", "two"))
    assert list(one) == list(two)
    assert [name for name in one if one[name] != two[name]] == []


def test_a_training_on_two_nodes_has_the_curve_of_one_process(birds, tmp_path):
    stage = stages.train_stage(birds, *HALVES)
    stages.finish(stage, tmp_path / "one", tmp_path / "log")
    both = nodes(stage, tmp_path / "two", tmp_path / "log")
    assert ends(both) == [0, 0], [node.told() for node in both]
    one, two = (load_log(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    assert [record["train_loss"] for record in one] == pytest.approx([r["train_loss"] for r in two], rel=2e-4)
    predictions = [load_json(tmp_path / name / "predictions.json").keys() for name in ("one", "two")]
    assert predictions[0] == predictions[1]


def test_a_generator_goes_on_without_a_node_that_died(few_birds, tmp_path):
    stage, folder = stages.dino_stage(few_birds), tmp_path / "two"
    both = nodes(stage, folder, tmp_path / "log")
    try:
        both[1].wait_until(lambda: list(folder.glob("*.partial/process_*/*.safetensors")))
    finally:
        die(both[1])
        die(both[0])  # it would wait half an hour for the other's share
    stages.finish(stage, folder, tmp_path / "log")
    stages.finish(stage, tmp_path / "one", tmp_path / "log")
    one, two = (stages.contents(where) for where in (tmp_path / "one", folder))
    assert one["boxes.maps.safetensors"] == two["boxes.maps.safetensors"]
    assert one["boxes.json"]["boxes"] == two["boxes.json"]["boxes"]


def test_a_training_ends_when_a_node_dies_and_says_how_to_go_on(birds, tmp_path):
    stage, folder = stages.train_stage(birds, *HALVES), tmp_path / "run"
    both = nodes(stage, folder, tmp_path / "log", "num_epochs=2000")
    try:
        both[0].wait_until(lambda: (folder / "last.pt").exists())
        die(both[1])
        assert both[0].end() != 0
    finally:
        die(both[1])
        die(both[0])
    told = both[0].told() + both[1].told()
    assert "another process of this run is gone" in told and f"resume=true run_dir={folder}" in told
