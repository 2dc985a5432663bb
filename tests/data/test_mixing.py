"""Sources are mixed by size or by weight: how often each is drawn, and that nothing but seed and epoch decides."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from smore_cli.data.batch import Row
from smore_cli.data.mixing import Mixture, rows_left
from smore_cli.data.rows import RowView
from smore_cli.errors import DataError

SIZES = (6, 3, 11)


def per_source(rows: list[int]) -> list[int]:
    edges = np.cumsum(SIZES)
    return np.bincount(np.searchsorted(edges, rows, side="right"), minlength=len(SIZES)).tolist()


def test_without_weights_an_epoch_is_the_permutation_that_it_always_was() -> None:
    mixture = Mixture(SIZES, seed=3)
    for epoch in range(3):
        before = torch.randperm(20, generator=torch.Generator().manual_seed(3 * 1_000_003 + epoch)).tolist()
        assert mixture.epoch(epoch) == before
    assert mixture.quotas == SIZES and mixture.lines() == []


def test_weights_say_how_many_rows_of_an_epoch_come_from_each_source() -> None:
    mixture = Mixture(SIZES, seed=0, weights=(2.0, 5.0, 3.0), names=("a", "b", "c"))
    assert mixture.quotas == (4, 10, 6) and mixture.epoch_size == 20
    epochs = [mixture.epoch(number) for number in range(30)]
    assert all(per_source(epoch) == [4, 10, 6] for epoch in epochs)
    assert mixture.epoch(7) == epochs[7] != epochs[8]
    assert Mixture(SIZES, seed=1, weights=(2.0, 5.0, 3.0)).epoch(7) != epochs[7]
    assert any(per_source(epoch[:4]) != per_source(epochs[0][:4]) for epoch in epochs)  # sources take no turns
    assert mixture.lines()[1] == "b: 50.0 % of the rows, 10 an epoch of 3 (3.33 times each)"
    assert mixture.facts()[2] == {"source": "c", "rows": 11, "draws_per_epoch": 6}


@pytest.mark.parametrize("weights", [(2.0, 5.0, 3.0), (1.0, 1.0, 1.0), (0.1, 9.0, 3.5)])
def test_no_row_comes_again_before_all_of_its_source_came(weights: tuple[float, ...]) -> None:
    mixture = Mixture(SIZES, seed=0, weights=weights)
    seen: Counter[int] = Counter()
    first = [sum(SIZES[:source]) for source in range(len(SIZES) + 1)]
    for number in range(40):
        seen.update(mixture.epoch(number))
        for start, end in pairwise(first):
            counts = [seen[row] for row in range(start, end)]
            assert max(counts) - min(counts) <= 1
    assert min(seen[row] for row in range(20)) > 0


def test_a_tiny_weight_still_gives_a_row_an_epoch() -> None:
    assert Mixture((100, 100), seed=0, weights=(1.0, 1e-6)).quotas == (200, 1)


def test_held_out_rows_leave_the_source_that_they_are_of() -> None:
    rows = [Row([], [[1]], [[True]]) for _ in range(20)]
    kept = RowView(rows, np.array([0, 5, 6, 9, 19]))
    assert rows_left(kept, SIZES) == (2, 1, 2)
    assert rows_left(rows, SIZES) == SIZES
    with pytest.raises(DataError, match="b has a weight and no training row"):
        Mixture((2, 0), seed=0, weights=(1.0, 1.0), names=("a", "b")).check()
