"""Every row once an epoch, the same order for the same seed, however rows share passes and lines."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch

from smore_cli.data.mixing import Mixture
from smore_cli.recipe.schema import TrainConfig
from smore_cli.training.schedule import StepPlan


def test_an_epoch_sees_every_row_once() -> None:
    plan = StepPlan.from_config(TrainConfig(per_device_batch_size=3, global_batch_size=6, epochs=2.0), 20, seed=1)
    assert plan.total_steps == 8
    for epoch in range(2):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        rows = [row for step in steps for packs in plan.passes(step) for (row,) in packs]
        assert sorted(rows) == list(range(20))


def test_epochs_differ_and_seeds_differ_but_the_same_step_is_always_the_same() -> None:
    plan = StepPlan(num_rows=50, global_batch_size=10, per_pass=5, total_steps=10, seed=0)
    assert plan.passes(0) == plan.passes(0)
    assert plan.passes(0) != plan.passes(5)
    assert plan.passes(0) != StepPlan(50, 10, 5, 10, seed=1).passes(0)


def test_passes_hold_at_most_the_device_batch() -> None:
    plan = StepPlan(num_rows=23, global_batch_size=8, per_pass=3, total_steps=3, seed=0)
    assert [[len(rows) for rows in plan.passes(step)] for step in range(3)] == [[3, 3, 2], [3, 3, 2], [3, 3, 1]]


def test_the_order_of_the_rows_is_what_it_always_was() -> None:
    plan = StepPlan(num_rows=10, global_batch_size=4, per_pass=2, total_steps=6, seed=7)
    order = [torch.randperm(10, generator=torch.Generator().manual_seed(7 * 1_000_003 + e)).tolist() for e in (0, 1)]
    rows = [[row for packs in plan.passes(step) for (row,) in packs] for step in range(6)]
    assert rows == [each[i : i + 4] for each in order for i in (0, 4, 8)]


LENGTHS = [3 + 7 * (number % 5) for number in range(40)]
LAYOUTS = ["rows", "groups", "packs"]
WEIGHTS = [None, (3.0, 1.0)]


def planned(layout: str, weights: tuple[float, ...] | None, **train: Any) -> StepPlan:
    mixture = Mixture((30, 10), 0, weights, ("a", "b"))
    config = TrainConfig(per_device_batch_size=2, global_batch_size=4, **train)
    extra = {"mixture": mixture, "layout": layout, "lengths": LENGTHS, "max_length": 64}
    return StepPlan.from_config(config, 40, seed=0, **extra)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_follows_from_its_number_alone_in_every_layout(layout: str, weights: tuple[float, ...] | None) -> None:
    plan = planned(layout, weights, epochs=3.0)
    steps = [plan.passes(step) for step in range(plan.total_steps)]
    fresh = planned(layout, weights, epochs=3.0)
    assert [fresh.passes(step) for step in reversed(range(plan.total_steps))] == steps[::-1]
    draws = Counter(row for passes in steps for packs in passes for pack in packs for row in pack)
    assert plan.epoch_of(plan.total_steps) == 3
    assert sum(draws.values()) == 120
    assert weights is not None or set(draws.values()) == {3}
    assert plan.rows_used() == sorted(draws)
    assert all(len(passes) <= 2 and all(len(packs) <= 2 for packs in passes) for passes in steps)
    if layout == "packs":
        assert all(sum(LENGTHS[row] for row in pack) <= 64 for passes in steps for packs in passes for pack in packs)
        assert plan.total_steps < planned("rows", weights, epochs=3.0).total_steps
    epochs = [plan.epoch_of(step) for step in range(plan.total_steps + 1)]
    assert epochs == sorted(set(epochs)) and epochs[0] == 0


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_part_of_an_epoch_of_packs_is_that_part_of_its_steps(weights: tuple[float, ...] | None) -> None:
    one, more = planned("packs", weights, epochs=1.0), planned("packs", weights, epochs=1.5)
    assert one.total_steps == one.steps_per_epoch
    assert one.total_steps < more.total_steps < 2 * one.total_steps + 1
    assert more.epoch_of(more.total_steps) == pytest.approx(1.5, abs=0.2)
    assert set(more.rows_used()) <= set(range(40))


def test_a_plan_says_before_training_what_is_padding_and_what_could_be_done() -> None:
    lines = planned("rows", None).lines()
    assert lines[0] == "steps     10 of 4 rows, 1.00 epochs"
    assert re.fullmatch(
        r"padding   \d+ % of passes of 2 x \d+; \d+ % with train.group_by_length, \d+ % with data.packing", lines[1]
    )
    plan = planned("packs", (3.0, 1.0))
    assert "packs" in plan.lines()[0] and "mixture   b: 25.0 % of the rows, 10 an epoch of 10" in plan.lines()[2]
    facts = plan.facts()
    assert facts["layout"] == "packs" and len(facts["mixture"]) == 2
    shares = {layout: padding["share"] for layout, padding in facts["padding"].items()}
    assert shares["packs"] < 0.1 < shares["rows"] and shares["groups"] < shares["rows"]
    assert StepPlan(50, 10, 5, 10, seed=0).lines() == ["steps     10 of 10 rows, 2.00 epochs"]


def test_half_an_epoch_is_half_the_steps() -> None:
    assert StepPlan.from_config(TrainConfig(per_device_batch_size=4, epochs=0.5), 40, seed=0).total_steps == 5
