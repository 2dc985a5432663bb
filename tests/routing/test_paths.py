from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smore_cli.data.batch import Row
from smore_cli.nn.context import RoutingTrace
from smore_cli.routing import RoutingCollector, collect_routing
from tests.nn.models import add_random, llama, small_smore
from tests.routing.traces import owners, picks


def test_paths_are_counted_by_the_children_of_each_parent_and_padding_is_not() -> None:
    model, (tree,) = owners("tree")
    chosen = [[[[1, 0]], [[1, 2]], [[0, 1]]], [[[0, 1], [2, 2]], [[0, 1], [0, 1]], [[2, 2], [2, 2]]]]
    collector = RoutingCollector(model)
    for mask in ([1, 1, 0], [1, 0, 0]):
        with collector.watch(torch.tensor([mask])) as context:
            assert context.observe is not None
            for level, ids in zip((1, 0), chosen, strict=True):
                trace: RoutingTrace = picks(tree, ids, experts=3, level=level)
                context.observe(replace(trace, chosen=torch.tensor(ids)))
    root, leaves = collector.results()
    assert root.paths is None
    # twice the first token: 1-0, 1-1, 0-2, 0-2; once the second: 1-0, 1-1, 2-0, 2-1
    expected = {(0, 2): 4 / 12, (1, 0): 3 / 12, (1, 1): 3 / 12, (2, 0): 1 / 12, (2, 1): 1 / 12}
    assert leaves.paths == pytest.approx(expected)
    assert next(iter(leaves.paths)) == (0, 2)


def test_the_paths_of_a_model_agree_with_the_loads_of_its_levels(tiny_llama: Path) -> None:
    model = add_random(llama(tiny_llama), small_smore(num_experts=[4, 3], fanout=[2, 2]))
    rows = [Row([], [list(range(3, 3 + n))], [[True] * n]) for n in (5, 11)]
    found = collect_routing(model, rows, pad_token_id=0, batch_size=2, on_progress=lambda done, total: None).routers
    assert len(found) > 4
    for root, leaves in zip(found[::2], found[1::2], strict=True):
        assert leaves.paths is not None
        for level, statistics in enumerate((root, leaves)):
            shares = [
                sum(s for path, s in leaves.paths.items() if path[level] == e) for e in range(len(statistics.load))
            ]
            assert shares == pytest.approx(statistics.usage, abs=1e-12)
