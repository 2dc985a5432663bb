"""Which rows an epoch draws from several sources: a pure function of (seed, epoch).

    without weights   every row once: an epoch is a fresh permutation of all rows, a source's share is its size
    with weights      of the N rows there are, source i is given q_i = round(N w_i / sum w) draws an epoch (at least 1),
                      which go on along an endless row of permutations of the source; then the epoch is shuffled

    source of 3 rows, 2 draws an epoch     b c | a a | c b | ...     each permutation is used up before the next begins

A source with more draws than rows repeats within an epoch, one with fewer goes on where the epoch before ended: no row
is seen a second time before all of its source were seen.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from smore_cli.data.rows import RowView
from smore_cli.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smore_cli.data.batch import Row

__all__ = ["Mixture", "permutation", "rows_left"]


@dataclass(frozen=True)
class Mixture:
    """Rows of several sources, numbered through in the order of the sources.

    Attributes:
        sizes: rows of each source.
        seed: of the permutations.
        weights: of the sources; None: by size.
        names: of the sources.
    """

    sizes: tuple[int, ...]
    seed: int
    weights: tuple[float, ...] | None = None
    names: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuses a source that has a weight and no rows.

        Raises:
            DataError: with its name.
        """
        for name, size in zip(self.names, self.sizes, strict=False):
            if self.weights is not None and size == 0:
                problem = f"{name} has a weight and no training row"
                raise DataError(problem, "remove the source, or lower data.eval_fraction")

    @property
    def num_rows(self) -> int:
        """N, rows of all sources together."""
        return sum(self.sizes)

    @functools.cached_property
    def quotas(self) -> tuple[int, ...]:
        """Draws of each source in an epoch; together N, up to rounding."""
        if self.weights is None:
            return self.sizes
        total = sum(self.weights)
        return tuple(max(1, round(self.num_rows * weight / total)) for weight in self.weights)

    @property
    def epoch_size(self) -> int:
        """Draws of an epoch."""
        return sum(self.quotas)

    def epoch(self, number: int) -> list[int]:
        """Returns the rows of epoch 0, 1, ... in the order they are seen."""
        if self.weights is None:
            return permutation(self.num_rows, self.seed, number)
        drawn: list[int] = []
        first = 0
        for source, (size, quota) in enumerate(zip(self.sizes, self.quotas, strict=True)):
            drawn += [first + row for row in self._draws(source, number * quota, quota)]
            first += size
        return [drawn[i] for i in permutation(len(drawn), self.seed, number)]

    def lines(self) -> list[str]:
        """Returns what each source is given, one line a source; none where rows are drawn by size."""
        if self.weights is None:
            return []
        return [
            f"{name}: {100 * quota / self.epoch_size:.1f} % of the rows, {quota:,} an epoch of {size:,} "
            f"({quota / size:.2f} times each)"
            for name, size, quota in zip(self.names, self.sizes, self.quotas, strict=True)
        ]

    def facts(self) -> list[dict[str, Any]]:
        """Returns the same as plain values, for run.json."""
        parts = zip(self.names, self.sizes, self.quotas, strict=True)
        return [{"source": name, "rows": size, "draws_per_epoch": quota} for name, size, quota in parts]

    def _draws(self, source: int, start: int, count: int) -> list[int]:
        """Returns so many rows of a source (numbered within it) from a place in its endless row of permutations."""
        size = self.sizes[source]
        first, last = start // size, (start + count - 1) // size
        rows = [row for i in range(first, last + 1) for row in permutation(size, _seed(self.seed, source), i)]
        return rows[start - first * size :][:count]


def rows_left(rows: Sequence[Row], sizes: Sequence[int]) -> tuple[int, ...]:
    """Returns how many training rows each source has, of `sizes` before some were held out."""
    if not isinstance(rows, RowView):
        return tuple(sizes)
    source = np.searchsorted(np.cumsum(sizes), rows.indices, side="right")
    return tuple(np.bincount(source, minlength=len(sizes)).tolist())


@functools.lru_cache(maxsize=4)
def permutation(size: int, seed: int, number: int) -> list[int]:
    """Returns a permutation of range(size), another for another number; callers must not change it."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    order: list[int] = torch.randperm(size, generator=generator).tolist()
    return order


def _seed(seed: int, source: int) -> int:
    """Returns the seed of a source's own permutations."""
    return int.from_bytes(hashlib.sha256(f"source {source} {seed}".encode()).digest()[:5], "big")
