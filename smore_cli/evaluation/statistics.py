"""Errors and intervals of accuracies, in closed form: no resampling, the same numbers every time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "PairedDifference",
    "mean",
    "normal_interval",
    "paired_difference",
    "paired_mean_difference",
    "standard_error",
    "wilson_interval",
]

Z95 = 1.959963984540054
"""Half the width of a two-sided 95 % interval of the normal distribution."""


def mean(values: Sequence[float]) -> float:
    """Returns the arithmetic mean of at least one value."""
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float | None:
    """Returns the standard error of the mean (with n - 1, as lm-eval does); None for a single value."""
    if len(values) < 2:
        return None
    center = mean(values)
    variance = math.fsum((value - center) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Returns Wilson's 95 % score interval of a proportion.

    It stays inside [0, 1] and is sound for small n and for 0 or n successes, where mean +- 2 s.e. is not.

    Source: Wilson (1927), https://doi.org/10.1080/01621459.1927.10502953
    """
    share, z2 = successes / n, Z95**2
    center = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    # At 0 and at n successes the bound is 0 or 1 exactly; rounding must not leave it 1e-17 beside.
    return (0.0 if successes == 0 else center - half), (1.0 if successes == n else center + half)


def normal_interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean's 95 % interval by the normal distribution, for values other than 0 and 1; no width for one."""
    center, half = mean(values), Z95 * (standard_error(values) or 0.0)
    return center - half, center + half


@dataclass(frozen=True)
class PairedDifference:
    """A difference of two accuracies on the same questions.

    Attributes:
        value: mean of the per-question differences.
        low: lower end of its 95 % interval.
        high: upper end.
    """

    value: float
    low: float
    high: float


def paired_difference(ours: Sequence[bool], theirs: Sequence[bool]) -> PairedDifference:
    """Returns mean(ours - theirs) and the Bonett-Price 95 % interval of the paired difference.

    Pairing matters: two models agree on most questions, so their difference is known better than either accuracy. The
    interval is the normal one after adding one question to each kind of disagreement; without that it would have
    no width where the models never disagree.

    Source: Bonett and Price (2012), https://doi.org/10.3102/1076998611411915

    Args:
        ours: which questions one model answers right; at least one.
        theirs: the same for the other model, in the same order.
    """
    pairs = list(zip(ours, theirs, strict=True))
    gained = sum(a and not b for a, b in pairs)
    lost = sum(b and not a for a, b in pairs)
    n = len(pairs) + 2
    gain, loss = (gained + 1) / n, (lost + 1) / n
    half = Z95 * math.sqrt((gain + loss - (gain - loss) ** 2) / n)
    center = gain - loss
    return PairedDifference((gained - lost) / len(pairs), max(-1.0, center - half), min(1.0, center + half))


def paired_mean_difference(ours: Sequence[float], theirs: Sequence[float]) -> PairedDifference:
    """Returns mean(ours - theirs) with the normal 95 % interval of the paired difference, for values of any kind.

    Args:
        ours: one model's value of each question; at least one.
        theirs: the same for the other model, in the same order.
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    return PairedDifference(mean(differences), *normal_interval(differences))
