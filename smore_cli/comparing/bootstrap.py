"""The paired bootstrap: how sure a difference between two methods is, over seeds and questions.

    d[s, q] = value of question q in the method's run of seed s, less that of the baseline's run of the same seed
    one replicate: seeds and questions drawn anew with replacement, the mean of d over them, averaged over the tasks
    interval: the 2.5 % and 97.5 % quantiles of the replicates

Runs of one seed share data, order and questions, so only what differs between methods is left in d. Drawing both seeds
and questions is cautious where single answers are mostly noise (Owen 2007, https://doi.org/10.1214/07-AOAS122); three
seeds say little of the spread between seeds all the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["Interval", "paired_bootstrap"]

REPLICATES = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean difference and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def sure(self) -> bool:
        """Whether zero is outside."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(differences: Sequence[NDArray[np.float64]], *, replicates: int = REPLICATES) -> Interval:
    """Returns the mean of the tasks' mean differences with its interval; the same numbers every time.

    Args:
        differences: (seeds, questions) for each task; the seeds are the same in all.
        replicates: how often is drawn.
    """
    rng = np.random.default_rng(0)
    seeds = len(differences[0])
    drawn = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=replicates) / seeds  # (R, S) weights
    means = np.zeros(replicates)
    for difference in differences:
        questions = difference.shape[1]
        weights = rng.multinomial(questions, np.full(questions, 1 / questions), size=replicates) / questions  # (R, Q)
        means += np.einsum("rq,rq->r", drawn @ difference, weights) / len(differences)
    low, high = np.quantile(means, [0.025, 0.975])
    value = float(np.mean([difference.mean() for difference in differences]))
    return Interval(value, float(low), float(high))
