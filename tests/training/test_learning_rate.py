"""A learning rate that does what its name says, at every step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from smore_cli.errors import UsageError
from smore_cli.recipe.schema import TrainConfig
from smore_cli.training.learning_rate import Schedule, build_scheduler


def rates(train: TrainConfig, total: int) -> list[float]:
    """The learning rate of every step, and what it would be after the last."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=train.learning_rate)
    scheduler, found = build_scheduler(optimizer, train, total), []
    for _ in range(total + 1):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(("name", "theirs"), [("constant", "constant_with_warmup"), ("linear",) * 2, ("cosine",) * 2])
def test_the_rates_are_those_of_transformers_to_the_last_bit(name: str, theirs: str) -> None:
    train = TrainConfig(learning_rate=3e-4, lr_scheduler=name, warmup_ratio=0.15)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=4, num_training_steps=21)
    expected = []
    for _ in range(22):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates(train, 21) == expected


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("linear", lambda p: 1 - p),
        ("cosine", lambda p: (1 + math.cos(math.pi * p)) / 2),
        ("1-sqrt", lambda p: 1 - math.sqrt(p)),
    ],
)
def test_wsd_warms_up_stays_and_decays_as_written(kind, shape) -> None:  # type: ignore[no-untyped-def]
    train = TrainConfig(
        learning_rate=2.0, lr_scheduler="wsd", warmup_steps=3, decay_ratio=0.25, decay_type=kind, min_lr_ratio=0.1
    )
    found = rates(train, 20)
    assert found[:3] == pytest.approx([0, 2 / 3, 4 / 3])
    assert found[3:16] == [2.0] * 13  # step 15 is the first of the decay: nothing of it is done
    assert found[15:] == pytest.approx([2 * (0.1 + 0.9 * shape(done / 5)) for done in range(6)])


def test_linear_and_cosine_end_at_the_floor() -> None:
    for name in ("linear", "cosine"):
        found = rates(TrainConfig(learning_rate=1.0, lr_scheduler=name, min_lr_ratio=0.2), 10)  # type: ignore[arg-type]
        assert (found[0], found[5], found[10]) == pytest.approx((1.0, 0.6, 0.2))
        assert found == sorted(found, reverse=True)


def test_steps_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="warmup_steps is 10, but the run has 10 steps"):
        Schedule.from_config(TrainConfig(warmup_steps=10), 10)
    with pytest.raises(UsageError, match="9 steps of warm-up and 2 of decay do not fit into 10"):
        Schedule.from_config(TrainConfig(warmup_steps=9, lr_scheduler="wsd"), 10)
