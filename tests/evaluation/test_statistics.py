from __future__ import annotations

import numpy as np
import pytest

from smore_cli.evaluation.statistics import paired_difference, standard_error, wilson_interval


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_gives_the_published_numbers(successes: int, n: int, low: float, high: float) -> None:
    # Newcombe (1998), table I, method 3
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_of_all_right_ends_at_one() -> None:
    low, high = wilson_interval(20, 20)
    assert high == 1.0
    assert low == pytest.approx(1 - 0.1611, abs=5e-5)


def test_standard_error_is_the_one_lm_eval_reports() -> None:
    from lm_eval.api.metrics import mean_stderr

    values = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    assert standard_error(values) == pytest.approx(mean_stderr(values))


def test_a_single_value_has_no_standard_error() -> None:
    assert standard_error([1.0]) is None


def test_paired_difference_is_the_difference_of_the_accuracies_and_antisymmetric() -> None:
    ours = [True] * 12 + [False] * 8
    theirs = [True] * 7 + [False] * 13
    one, other = paired_difference(ours, theirs), paired_difference(theirs, ours)
    assert one.value == pytest.approx(0.25)
    assert (other.low, other.high) == pytest.approx((-one.high, -one.low))
    assert one.low < one.value < one.high


def test_paired_difference_is_uncertain_even_where_two_models_never_disagree() -> None:
    same = paired_difference([True] * 10, [True] * 10)
    assert same.value == 0
    assert same.low < -0.05 < 0.05 < same.high


def test_paired_interval_holds_the_true_difference_in_95_percent_of_experiments() -> None:
    random = np.random.default_rng(0)
    probabilities = [0.15, 0.05, 0.5, 0.3]  # only ours right, only theirs, both, none: a true difference of 0.1
    hits = 0
    for _ in range(2000):
        kinds = random.choice(4, size=60, p=probabilities)
        found = paired_difference([k in (0, 2) for k in kinds], [k in (1, 2) for k in kinds])
        hits += found.low <= 0.1 <= found.high
    assert 0.935 <= hits / 2000 <= 0.975
