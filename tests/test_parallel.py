"""One training by two CPU processes, in parts, clipped, compiled: the same numbers as the plain one."""

import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import stages
import torch
from torch import distributed as dist
from torch import nn

import models
import train
from jobs import torchrun
from jobs.guard import DeadWorkerError
from jobs.torchrun import process_numbers
from localized_crops.files import UserError, load_json
from training import distributed
from training.batches import EpochBatches
from training.log import load_log
from training.loop import backward, update
from training.run import Run
from utils import load_tensors

TRAIN = str(stages.ROOT / "train.py")
SMALL = [
    "num_epochs=3",
    "log_interval=1",
    "image_size=32",
    "batch_size=7",
    "num_workers=0",
    "dataset.name=cub",
    "model.freeze_bn_from=0",
    "model.ema_step=2",
    "augment=true",
]


def run(birds, folder, *more):
    return train.train_run(train.load_run_config([*SMALL, f"dataset.root={birds}", f"run_dir={folder}", *more]))


def start_ranks(words, folder, world_size=2):
    """Start one process for each rank, as torchrun would, without its guard that ends them together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world_size)}
    return [
        stages.Process([TRAIN, *words], folder / f"rank{rank}", **shared, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(world_size)
    ]


def assert_same_curve(a, b):
    """Check that two runs logged the same numbers to float tolerance and answered the same."""
    logs = [load_log(folder / "log.jsonl") for folder in (a, b)]
    assert len(logs[0]) == len(logs[1]) == 3
    for first, second in zip(*logs, strict=True):
        for key in ("train_loss", "train_top1", "loss", "ema_loss", "maiou", "lr"):
            assert first[key] == pytest.approx(second[key], rel=2e-4), key
    weights = [load_tensors(folder / "last.pt")["model"] for folder in (a, b)]
    assert all(torch.allclose(weights[0][key], weights[1][key], atol=2e-3) for key in weights[0])
    assert load_json(a / "predictions.json").keys() == load_json(b / "predictions.json").keys()


@pytest.fixture(scope="module")
def plain(birds, tmp_path_factory):
    """Return the folder of a plain run."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    run(birds, folder)
    return folder


# --- the same numbers ---------------------------------------------------------------------------------------------


def test_torchrun_with_two_processes_trains_the_same_and_one_writes(birds, plain, tmp_path):
    folder = tmp_path / "two"
    words = [*SMALL, f"dataset.root={birds}", f"run_dir={folder}", "num_workers=1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, TRAIN, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "on cpu in 2 processes" in done.stdout and done.stdout.count("epoch   1/3") == 1
    assert_same_curve(plain, folder)
    assert {p.name for p in folder.iterdir()} == {p.name for p in plain.iterdir()}


@pytest.mark.parametrize("more", [["opt.accumulate=3"], ["opt.clip=1e6"]])
def test_parts_and_a_clip_that_clips_nothing_change_nothing(birds, plain, tmp_path, more):
    run(birds, tmp_path / "run", *more)
    assert_same_curve(plain, tmp_path / "run")


@pytest.mark.slow
def test_a_compiled_network_trains_the_same(birds, plain, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a compiler on the CPU")
    run(birds, tmp_path / "run", "compile=true")
    assert_same_curve(plain, tmp_path / "run")
    run(birds, tmp_path / "other", f"model.resumed_model={tmp_path / 'run' / 'best.pt'}", "num_epochs=1")


def test_a_clip_shortens_the_gradient_to_its_norm():
    model = nn.Linear(3, 2)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    off = torch.amp.GradScaler("cpu", enabled=False)
    config = {"opt": {"clip": 0.5}, "model": {"ema_step": 1}}
    parts = {"model": model, "ema": models.build_ema(model, 0.5), "optimizer": sgd, "scaler": off}
    one = SimpleNamespace(config=config, step=0, **parts)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    (1000 * model(torch.ones(4, 3)).sum()).backward()
    update(one)
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, model.parameters(), strict=True)])
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize(("size", "batch_size", "parts", "world_size"), [(17, 7, 1, 2), (18, 8, 3, 2), (9, 4, 2, 3)])
def test_parts_of_all_processes_make_up_the_batches(size, batch_size, parts, world_size):
    whole = [rows for _, rows, _, _ in EpochBatches(size, batch_size, 0)]
    shares = [
        list(EpochBatches(size, batch_size, 0, parts=parts, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert all(len(share) == parts * len(whole) for share in shares)
    for number, rows in enumerate(whole):
        mine = [part for share in shares for part in share[number * parts : (number + 1) * parts]]
        assert [row for _, part, real, _ in mine for row in part[:real]] == rows
        assert all(len(part) >= 2 and count == len(rows) for _, part, _, count in mine)


# --- a process that dies ------------------------------------------------------------------------------------------


def test_a_rank_that_dies_ends_the_others_with_a_line_and_the_run_goes_on(birds, tmp_path):
    folder = tmp_path / "run"
    words = [*SMALL, f"dataset.root={birds}", f"run_dir={folder}"]
    first, second = start_ranks([*words, "num_epochs=200"], tmp_path)
    with first, second:
        assert first.wait_until((folder / "last.pt").exists)
        second.kill()
        assert first.end() == 2 and "Traceback" not in first.told()
    lines = first.told().splitlines()
    assert any("another process of this run is gone" in line for line in lines)
    assert any(f"resume=true run_dir={folder}" in line for line in lines)
    done = load_tensors(folder / "last.pt")["epoch"]
    first, second = start_ranks([f"run_dir={folder}", "resume=true", "num_epochs=200"], tmp_path)
    with first, second:
        assert first.wait_until(lambda: load_tensors(folder / "last.pt")["epoch"] > done)
    assert "going on after epoch" in first.printed()


def test_a_fault_of_rank_0_is_told_once(birds, plain, tmp_path):
    first, second = start_ranks([*SMALL, f"dataset.root={birds}", f"run_dir={plain}"], tmp_path)
    with first, second:
        assert (first.end(), second.end()) == (2, 2)
    told = first.told(), second.told()
    assert "holds a run already" in told[0] and "Traceback" not in told[0] + told[1]
    assert "error" not in told[1]


# --- what is refused ----------------------------------------------------------------------------------------------


def test_synchronised_batchnorm_needs_gpus(birds, tmp_path):
    with pytest.raises(UserError, match=r"set model\.sync_bn=false"):
        run(birds, tmp_path / "run", "model.sync_bn=true")


def test_a_compiler_that_is_not_there_is_one_line(birds, tmp_path, monkeypatch):
    def fail(_model):
        raise RuntimeError("Failed to find C compiler.\nmore lines")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(UserError, match=r"does not work here \(Failed to find C compiler.\); set compile=false"):
        run(birds, tmp_path / "run", "compile=true")


def test_a_sweep_is_not_for_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start the plain command several times"):
        torchrun.require_single_process("sweeprun=true")


@pytest.mark.parametrize(
    "given",
    [
        *({"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "two"}, {"RANK": "2", "WORLD_SIZE": "2"}),
        *({"RANK": "-1", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": ""}, {"WORLD_SIZE": "0"}),
    ],
)
def test_process_numbers_that_torchrun_never_sets_are_one_line(given, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"RANK|WORLD_SIZE"):
        process_numbers()


@pytest.mark.parametrize("value", ["0", "x", ""])
def test_a_machine_with_no_process_is_one_line(value, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
    with pytest.raises(UserError, match="LOCAL_WORLD_SIZE"):
        train.load_run_config([])


@pytest.fixture
def used_port():
    """Return a port at which another program listens and never answers."""
    with socket.socket() as listening:
        listening.bind(("", 0))
        listening.listen()
        yield str(listening.getsockname()[1])


@pytest.mark.parametrize(
    ("rank", "address", "port"),
    [(0, "127.0.0.1", port) for port in ("used", "x", "99999")] + [(1, "127.0.0.1", "1"), (0, None, None)],
)
def test_processes_that_do_not_come_together_are_one_line(rank, address, port, used_port, monkeypatch):
    monkeypatch.setattr(distributed, "JOIN_SECONDS", 1)
    port = used_port if port == "used" else port
    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": address, "MASTER_PORT": port}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=f"rank {rank} of 2.*MASTER_PORT={port}"):
        distributed.meet()


def test_a_process_that_nobody_joins_waits_no_longer_than_told(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(distributed, "JOIN_SECONDS", 1)
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="rank 0 of 2"):
        distributed.meet()


def test_more_parts_than_images_are_refused():
    with pytest.raises(UserError, match="a batch has batch_size=16 images"):
        train.load_run_config(["opt.accumulate=17"])


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
            "Connection closed by peer",
        ),
        (dist.DistBackendError("[rank 1] NCCL error\nand a page more"), "NCCL error"),
    ],
)
def test_an_error_of_the_connection_is_told_as_a_lost_process(error, told):
    lost = pytest.raises(DeadWorkerError, match=rf"is gone \(seen by rank 0: {told}\); its own")
    with lost, distributed.lost_process():
        raise error


def test_an_error_of_another_kind_is_no_lost_process():
    with pytest.raises(RuntimeError, match="shapes differ"), distributed.lost_process():
        raise RuntimeError("shapes differ")


@pytest.fixture
def as_rank(monkeypatch):
    """Return a function that lets this process be one of two; what rank 0 sends, rank 1 receives afterwards."""
    sent = []

    def broadcast(objects):
        if distributed.rank():
            objects[:] = sent.pop()
        else:
            sent.append(objects[:])

    def become(rank):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        monkeypatch.setattr(distributed.dist, "broadcast_object_list", broadcast)

    return become


def test_what_rank_0_finds_reaches_the_others_and_its_fault_ends_them(as_rank):
    def fail():
        raise UserError("holds a run already")

    as_rank(0)
    assert distributed.on_rank_0(lambda: None) is None
    as_rank(1)
    assert distributed.on_rank_0(fail) is None  # not called here
    as_rank(0)
    with pytest.raises(UserError, match="holds a run already"):
        distributed.on_rank_0(fail)
    as_rank(1)
    with pytest.raises(SystemExit) as end:
        distributed.on_rank_0(fail)
    assert end.value.code == 2


def test_processes_share_all_rows_and_each_needs_one(as_rank):
    shares = []
    for number in (0, 1):
        as_rank(number)
        shares.append(distributed.my_rows(np.arange(5)).tolist())
        with pytest.raises(UserError, match="1 images for 2 processes: start fewer"):
            distributed.my_rows(np.arange(1))
    assert shares == [[0, 1, 2], [3, 4]]


def test_rows_of_one_process_are_all_rows():
    assert distributed.my_rows(np.arange(5)).tolist() == [0, 1, 2, 3, 4]
    assert distributed.all_rows(torch.arange(3)).tolist() == [0, 1, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_waits_for_nothing(birds, tmp_path):
    from training.batches import Batch

    config = train.load_run_config([*SMALL, "amp=bf16", "deterministic=false", "device=cuda", "opt.clip=1"])
    config["model"] |= {"n_classes": 8, "ema_step": 1} | models.input_config("toyresnet")
    device = torch.device("cuda")
    one = Run(tmp_path, config, ["a", "b"], {}, device)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8).pin_memory()
    labels, flips = torch.arange(8).pin_memory(), torch.zeros(8, dtype=torch.bool).pin_memory()
    batch = Batch(images, labels, flips, torch.ones(8), 8, 8)
    for checked in (False, True):  # the first step warms up
        torch.cuda.set_sync_debug_mode("error" if checked else "default")
        try:
            backward(one, batch, True)
            update(one)
        finally:
            torch.cuda.set_sync_debug_mode("default")
