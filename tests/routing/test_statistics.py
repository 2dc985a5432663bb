from __future__ import annotations

import math

import pytest

from smore_cli.routing.statistics import DEAD_BELOW, RouterStatistics, summarise
from tests.routing.traces import router


@pytest.mark.parametrize(
    ("load", "picked", "effective", "balance"),
    [
        ([0.5, 0.5, 0.5, 0.5], 2, 4, 1),  # even
        ([1, 1, 0, 0], 2, 2, 0),  # always the same two
        ([0, 1, 0, 0], 1, 1, 0),
        ([1, 0.5, 0.5, 0], 2, math.exp(1.5 * math.log(2)), (2**1.5 - 2) / 2),
    ],
)
def test_effective_experts_run_from_those_picked_to_all(
    load: list[float], picked: int, effective: float, balance: float
) -> None:
    found = router(load, picked=picked)
    assert found.effective_experts == pytest.approx(effective, abs=1e-12)
    assert found.balance == pytest.approx(balance, abs=1e-12)


def test_a_dense_gate_can_collapse_onto_one_expert() -> None:
    found = RouterStatistics("q", 0, 10, 2, load=[1, 1], share=[1, 0], entropy=0)
    assert (found.effective_experts, found.balance, found.dead) == (1, 0, [1])


def test_an_expert_is_dead_below_a_hundredth_of_an_even_share() -> None:
    even = 2 / 4
    above, below = DEAD_BELOW * even * 1.001, DEAD_BELOW * even * 0.999
    assert router([1, 1 - above, above, 0]).dead == [3]
    assert router([1, 1 - below, below, 0]).dead == [2, 3]


def test_a_summary_is_of_one_level_and_names_the_extremes() -> None:
    even, collapsed, between = [0.5] * 4, [1.0, 1, 0, 0], [1.0, 0.5, 0.5, 0]
    routers = [
        router(even, module="a"),
        router(collapsed, module="b"),
        router(between, module="c"),
        router(even, module="a", level=1),
    ]
    root, leaves = summarise(routers)
    assert (root.level, root.routers, root.experts, root.dead) == (1, 1, 4, {})
    assert (leaves.level, leaves.routers, leaves.experts) == (0, 3, 12)
    assert leaves.dead == {"b": [2, 3], "c": [3]}
    assert (leaves.least_balanced.module, leaves.most_balanced.module) == ("b", "a")
    assert leaves.effective_experts == pytest.approx((4 + 2 + 2**1.5) / 3, abs=1e-12)
    assert leaves.document()["least_balanced"] == "b"
