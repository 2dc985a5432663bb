"""Collapse is seen router by router, over a whole stretch of training, and can end a run without losing it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from smore_cli.errors import SmoreError
from smore_cli.methods.hydralora import HydraLoRAConfig
from smore_cli.nn import AdapterContext, adapted_modules
from smore_cli.nn.context import ExpertLoad
from smore_cli.nn.router import Router
from smore_cli.recipe import load_recipe
from smore_cli.training.loop import train
from smore_cli.training.routing_health import RouterHealth, RoutingWatch, collapse_line, routing_summary
from tests.nn.models import add_random, llama, small_smore, token_ids

if TYPE_CHECKING:
    from torch import Tensor, nn

    from smore_cli.nn.router import Routing

MakeRecipe = Callable[..., Path]


def router(share: list[float], picked: float, dense: bool = False, module: str = "q") -> RouterHealth:
    return RouterHealth(module, 0, [part / sum(share) for part in share], picked, dense)


@pytest.mark.parametrize(
    ("share", "picked", "dense", "effective", "collapsed"),
    [
        ([1, 1, 1, 1], 1, False, 4, False),
        ([1, 0, 0, 0], 1, False, 1, True),
        ([1, 0, 0, 1], 2, False, 2, True),  # always the same two
        ([9, 9, 1, 1], 2, False, None, False),
        ([1, 1, 0.03, 0.03], 2, False, None, False),  # 2.26 of 4, above 2 + 0.1 (4 - 2)
        ([1, 1, 0.015, 0.015], 2, False, None, True),
        ([1, 1, 1, 1], 4, False, 4, False),  # takes all: nothing to choose
        ([1], 1, False, 1, False),
        ([1, 0.5, 0, 0], 1.5, False, None, True),  # one or two experts a token, always of the same two
        ([1, 1, 1, 1], 3.5, False, 4, False),
        ([1, 1, 0, 0], 4, True, 2, False),  # mixes two of four
        ([1, 0.01, 0, 0], 4, True, None, True),
        ([1], 1, True, 1, False),
        ([1, 0, 0], 0.4, False, 1, True),  # room for few tokens: not every one gets an expert
    ],
)
def test_a_router_has_collapsed_when_the_same_experts_do_nearly_everything(
    share: list[float], picked: float, dense: bool, effective: float | None, collapsed: bool
) -> None:
    found = router(share, picked, dense)
    assert found.collapsed is collapsed
    assert 1 - 1e-12 <= found.effective_experts <= len(share) + 1e-12
    if effective is not None:
        assert found.effective_experts == pytest.approx(effective, abs=1e-12)


def test_the_threshold_lies_a_tenth_of_the_way_from_the_picks_to_all() -> None:
    def with_effective(target: float) -> RouterHealth:
        low, high = 0.0, 1.0  # the share of the other two experts, by bisection
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (
                (middle, high) if router([1, 1, middle, middle], 2).effective_experts < target else (low, middle)
            )
        return router([1, 1, low, low], 2)

    assert with_effective(2 + 0.1 * 2 - 1e-6).collapsed and not with_effective(2 + 0.1 * 2 + 1e-6).collapsed


def test_the_summary_names_the_worst_router_and_counts_the_collapsed() -> None:
    routers = [router([1, 1, 1, 1], 1, module="a"), router([1, 0, 0], 1, module="b"), router([3, 1], 1, module="c")]
    summary = routing_summary(routers)["0"]
    assert summary["worst"] == {"effective_experts": 1.0, "module": "b"}
    assert summary["collapsed"] == 1
    assert summary["effective_experts"] == pytest.approx((4 + 1 + routers[2].effective_experts) / 3, abs=1e-3)
    assert summary["load"] == pytest.approx([(0.25 + 1 + 0.75) / 3, (0.25 + 0.25) / 3, 0.25 / 3, 0.25 / 3], abs=1e-4)
    assert collapse_line(routers).startswith("1 of 3 routers send nearly everything to the same experts: b (1.00 of 3")


def watched(model: nn.Module, batches: int = 2) -> list[RouterHealth]:
    watch = RoutingWatch(model)
    for seed in range(batches):
        with torch.no_grad(), AdapterContext() as context:
            model(input_ids=token_ids(4, 16, seed=seed))
        watch.add(context.loads)
    return watch.routers()


def collapsed(routers: list[RouterHealth]) -> set[tuple[str, int]]:
    return {(each.module, each.level) for each in routers if each.collapsed}


def test_a_router_forced_to_one_answer_is_found(tiny_llama: Path) -> None:
    model = add_random(llama(tiny_llama), small_smore())
    before = watched(model)
    # So narrow and random a model has routers that are collapsed already; the last of the others is taken.
    path = next(each.module for each in reversed(before) if each.level == 1 and not each.collapsed)
    top: Any = adapted_modules(model)[path].adapters["default"].router.levels[1]  # type: ignore[union-attr]
    with torch.no_grad():  # the query no longer depends on the token
        top.mlp[2].weight.zero_()
    after = collapsed(watched(model))
    assert (path, 1) in after - collapsed(before)


def test_a_dense_router_is_judged_by_its_gate_mass(tiny_llama: Path) -> None:
    model, path = add_random(llama(tiny_llama), HydraLoRAConfig()), "model.layers.1.mlp.up_proj"
    assert collapsed(watched(model)) == set()
    router_: Any = adapted_modules(model)[path].adapters["default"].router  # type: ignore[union-attr]
    router_.__class__ = _AlwaysTheFirst
    assert collapsed(watched(model)) == {(path, 0)}


class _AlwaysTheFirst(Router):
    def decide(self, logits: Tensor) -> Routing:
        routing = super().decide(logits)
        gates = torch.softmax(routing.logits + torch.tensor([50.0, 0, 0, 0]), -1)
        return replace(routing, probabilities=gates, gates=gates)


def test_two_collapsed_routers_with_experts_of_their_own_are_seen_though_pooled_they_look_balanced(
    shared_golden: Path,
) -> None:
    golden = np.load(shared_golden / "dynmole.npz")
    logits = torch.from_numpy(golden["pool_z"])  # (2 routers, 16 tokens, 4 experts)
    owners = {torch.nn.Linear(1, 1): f"layer {i}" for i in range(2)}
    watch = RoutingWatch(torch.nn.Module())
    watch._paths = dict(owners)
    picks = torch.zeros_like(logits).scatter_(-1, logits.topk(2).indices, 1).sum(1)  # (2, 4)
    for owner, load in zip(owners, picks, strict=True):
        watch.add([ExpertLoad(owner, 0, load, torch.tensor(16), dense=False)])
    pooled = RouterHealth("pooled", 0, (picks.sum(0) / picks.sum()).tolist(), 2, dense=False)
    assert pooled.effective_experts == pytest.approx(4, abs=0.1) and not pooled.collapsed
    found = watch.routers()
    assert [each.collapsed for each in found] == [True, True]
    assert routing_summary(found)["0"]["collapsed"] == 2


def test_groups_of_experts_are_routers_of_their_own() -> None:
    owner, watch = torch.nn.Linear(1, 1), RoutingWatch(torch.nn.Module())
    watch._paths = {owner: "q"}
    watch.add([ExpertLoad(owner, 0, torch.tensor([[8.0, 0], [0, 8.0]]), torch.tensor(8), dense=False)])
    found = watch.routers()
    assert [(each.module, each.collapsed) for each in found] == [("q group 0", True), ("q group 1", True)]


def test_loads_are_added_up_between_two_lines_and_then_forgotten() -> None:
    owner, watch = torch.nn.Linear(1, 1), RoutingWatch(torch.nn.Module())
    watch._paths = {owner: "q"}
    for load in ([8.0, 0], [0, 8.0]):  # each batch of one kind, and both together balanced
        watch.add([ExpertLoad(owner, 0, torch.tensor(load), torch.tensor(8), dense=False)])
    (found,) = watch.routers()
    assert found.share == [0.5, 0.5] and found.picked == 1 and not found.collapsed
    assert watch.routers() == []
    assert watch.news([]) is None


def test_the_news_come_once_and_again_when_it_spreads() -> None:
    watch, bad = RoutingWatch(torch.nn.Module()), [router([1, 0], 1, module=name) for name in "ab"]
    assert watch.news([]) is None
    assert watch.news(bad[:1]) is not None and watch.news(bad[:1]) is None
    assert watch.news(bad) is not None and watch.news([]) is None and watch.news(bad[:1]) is not None


def test_how_routers_start_is_no_news_and_neither_is_that_they_spread() -> None:
    def told(*collapsed: int) -> list[bool]:
        watch = RoutingWatch(torch.nn.Module())
        return [
            watch.news([router([1, 0] if i < n else [0.5, 0.5], 1, module=str(i)) for i in range(20)]) is not None
            for n in collapsed
        ]

    assert told(9, 4, 3, 0) == [False] * 4
    assert told(9, 9, 9) == [False, True, False]
    assert told(0, 1) == [False, True]


def test_a_collapse_lasts_where_it_is_of_many_routers_and_does_not_shrink() -> None:
    def lasting(*collapsed: int) -> list[bool]:
        watch, found = RoutingWatch(torch.nn.Module()), []
        for number in collapsed:
            watch.news([router([1, 0] if i < number else [0.5, 0.5], 1, module=str(i)) for i in range(20)])
            found.append(watch.lasting)
        return found

    assert lasting(9, 4, 3, 0) == [False] * 4  # the balance loss does its work
    assert lasting(9, 9, 8, 8) == [False, True, False, True]
    assert lasting(0, 5, 7) == [False, False, True]
    assert lasting(2, 2, 2) == [False] * 3  # a tenth
    assert lasting(3, 3) == [False, True]


# In a run.

COLLAPSING = {  # nothing keeps the router from it, and a giant step makes it
    "method": "smore",
    "target_modules": ["q_proj", "up_proj"],
    "rank": [2],
    "num_experts": [4],
    "fanout": [1],
    "router_dim": 4,
    "key_dim": 4,
    "aux_loss_coefficient": 0.0,
}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_reports_mean_and_worst_router_and_warns(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_recipe(adapter=COLLAPSING, train={"learning_rate": 3.0, "max_steps": 6, "logging_steps": 2})
    train(load_recipe(path), path.read_text())
    lines = metrics(tmp_path / "run")
    for line in lines:
        (level,) = line["routing"].values()
        assert 1 <= level["worst"]["effective_experts"] <= level["effective_experts"] <= 4
        assert level["worst"]["module"].endswith(("q_proj", "up_proj"))
        assert math.isclose(sum(level["load"]), 1, abs_tol=1e-3)
    assert lines[-1]["routing"]["0"]["collapsed"] > 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert 1 <= len(warnings) <= 3 and "of 4 routers send nearly everything to the same experts" in warnings[-1]


def test_a_run_that_stops_for_collapse_keeps_its_checkpoint_and_can_go_on(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    settings = {"learning_rate": 3.0, "max_steps": 8, "logging_steps": 1, "lr_scheduler": "constant"}
    path = make_recipe(adapter=COLLAPSING, train={**settings, "on_collapse": "stop"})
    with pytest.raises(SmoreError, match=r"routers send nearly everything .*saved .*checkpoint-[2-7]") as caught:
        train(load_recipe(path), path.read_text())
    assert caught.value.exit_code == 1
    stopped = metrics(tmp_path / "run")
    assert (tmp_path / "run" / f"checkpoint-{stopped[-1]['step']}" / "complete.json").exists()
    path = make_recipe(adapter=COLLAPSING, train={**settings, "on_collapse": "warn"})
    train(load_recipe(path), path.read_text(), resume=True)
    other = make_recipe("other.yaml", adapter=COLLAPSING, train=settings, output_dir=str(tmp_path / "whole"))
    train(load_recipe(other), other.read_text())
    weights = "adapter_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
