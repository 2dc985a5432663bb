"""The paired bootstrap against numbers worked out by hand, a planted difference, and none at all."""

from __future__ import annotations

import numpy as np
import pytest

from smore_cli.comparing.bootstrap import paired_bootstrap


def test_one_seed_and_two_questions_by_hand() -> None:
    # d = (0, 1), drawn twice: the mean is 0 with probability 1/4, 1/2 with 1/2, 1 with 1/4.
    found = paired_bootstrap([np.array([[0.0, 1.0]])])
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)
    assert not found.sure


def test_the_interval_is_that_of_the_normal_where_there_are_many_questions() -> None:
    rng = np.random.default_rng(1)
    d = rng.normal(0.1, 1.0, size=(1, 4000))
    found = paired_bootstrap([d])
    half = 1.96 * d.std() / np.sqrt(4000)
    assert found.value == pytest.approx(d.mean())
    assert (found.low, found.high) == pytest.approx((d.mean() - half, d.mean() + half), abs=0.004)


def test_a_planted_difference_is_found_and_none_is_not() -> None:
    rng = np.random.default_rng(2)
    base = rng.random((3, 300)) < 0.5
    better = base | (rng.random((3, 300)) < 0.2)  # a tenth of all questions gained
    noise = rng.permuted(base.astype(float), axis=1) - base
    planted = paired_bootstrap([better.astype(float) - base])
    assert planted.sure and 0.05 < planted.value < 0.15
    assert not paired_bootstrap([noise - noise.mean()]).sure


def test_a_difference_that_only_one_seed_has_is_not_sure() -> None:
    one = np.zeros((3, 200))
    one[0] = 0.3
    found = paired_bootstrap([one])
    assert found.value == pytest.approx(0.1) and found.low == 0.0


def test_tasks_count_the_same_however_many_questions_they_have_and_the_same_numbers_come_every_time() -> None:
    few, many = np.full((2, 5), 1.0), np.zeros((2, 500))
    assert paired_bootstrap([few, many]).value == 0.5
    assert paired_bootstrap([few, many]) == paired_bootstrap([few, many])
