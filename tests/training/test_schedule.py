"""Every row once an epoch, the same order for the same seed, and a learning rate that does what its name says."""

from __future__ import annotations

import torch
from torch import nn

from smore_cli.recipe.schema import TrainConfig
from smore_cli.training.schedule import StepPlan, build_optimizer, build_scheduler


def test_an_epoch_sees_every_row_once() -> None:
    plan = StepPlan.from_config(TrainConfig(per_device_batch_size=3, global_batch_size=6, epochs=2.0), 20, seed=1)
    assert plan.total_steps == 8
    for epoch in range(2):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        rows = [row for step in steps for rows in plan.passes(step) for row in rows]
        assert sorted(rows) == list(range(20))


def test_epochs_differ_and_seeds_differ_but_the_same_step_is_always_the_same() -> None:
    plan = StepPlan(num_rows=50, global_batch_size=10, per_pass=5, total_steps=10, seed=0)
    assert plan.passes(0) == plan.passes(0)
    assert plan.passes(0) != plan.passes(5)
    assert plan.passes(0) != StepPlan(50, 10, 5, 10, seed=1).passes(0)


def test_passes_hold_at_most_the_device_batch() -> None:
    plan = StepPlan(num_rows=23, global_batch_size=8, per_pass=3, total_steps=3, seed=0)
    assert [[len(rows) for rows in plan.passes(step)] for step in range(3)] == [[3, 3, 2], [3, 3, 2], [3, 3, 1]]


def test_half_an_epoch_is_half_the_steps() -> None:
    assert StepPlan.from_config(TrainConfig(per_device_batch_size=4, epochs=0.5), 40, seed=0).total_steps == 5


def test_weight_decay_spares_biases() -> None:
    layer = nn.Linear(3, 2)
    optimizer = build_optimizer(list(layer.named_parameters()), TrainConfig(weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {id(layer.weight): 0.1, id(layer.bias): 0.0}


def test_schedules_warm_up_and_end_where_they_should() -> None:
    rates = {}
    for name in ("constant", "linear", "cosine"):
        train = TrainConfig(learning_rate=1.0, lr_scheduler=name, warmup_ratio=0.2)  # type: ignore[arg-type]
        optimizer = build_optimizer([("w", nn.Parameter(torch.zeros(1, 1)))], train)
        scheduler = build_scheduler(optimizer, train, 10)
        rates[name] = []
        for _ in range(11):
            rates[name].append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
    for values in rates.values():
        assert values[:3] == [0.0, 0.5, 1.0]
    assert rates["constant"][10] == 1.0
    assert rates["linear"][6] == 0.5
    assert abs(rates["cosine"][6] - 0.5) < 1e-9
    assert rates["linear"][10] == 0.0
    assert abs(rates["cosine"][10]) < 1e-9
