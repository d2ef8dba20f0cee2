"""training/optimization.py: the learning rate over the epochs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import config
from training.optimization import build_optimizer, build_scheduler, learning_rate


@given(
    st.sampled_from(["cosine", "step"]),
    st.integers(1, 60),
    st.integers(0, 8),
    st.integers(1, 20),
    st.floats(1e-6, 1e-2),
)
def test_the_last_epoch_is_trained_at_target_lr(scheduler, num_epochs, warmup, step_size, target):
    opt = {"scheduler": scheduler, "lr": 1e-2, "target_lr": target, "warmup_epochs": warmup, "step_size": step_size}
    rates = [learning_rate(epoch, opt | {"gamma": None}, num_epochs) for epoch in range(num_epochs)]
    rise = min(warmup, num_epochs - 1)
    assert rates[: rise + 1] == sorted(rates[: rise + 1]) and rates[rise] == pytest.approx(1e-2)
    assert rates[rise:] == sorted(rates[rise:], reverse=True)
    room_to_fall = num_epochs - 1 - rise >= (step_size if scheduler == "step" else 1)
    assert rates[-1] == pytest.approx(target if room_to_fall else 1e-2)


def test_the_published_steps():
    cfg = config.load_config(["preset=cub_second_training"])
    rates = [learning_rate(epoch, cfg["opt"], cfg["num_epochs"]) for epoch in range(200)]
    assert rates[10] / rates[9] == pytest.approx((1e-5 / 2e-4) ** (10 / 200), abs=1e-4)
    assert rates[0] == 2e-4 and rates[-1] == pytest.approx(1.16e-5, rel=0.01)


def test_warmup_rises_to_lr():
    cfg = config.load_config(["opt.warmup_epochs=3", "num_epochs=9"])
    optimizer = build_optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))]}], cfg["opt"])
    schedule, rates = build_scheduler(optimizer, cfg["opt"], 9), []
    for _ in range(9):
        rates.append(schedule.get_last_lr()[0] / cfg["opt"]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0]) and rates[4] < 1
