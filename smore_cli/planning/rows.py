"""Which forward pass of a run costs most, found without running any."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from smore_cli.data.batch import Row
from smore_cli.data.rows import row_lengths

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from smore_cli.data.batch import Batch
    from smore_cli.recipe.schema import Recipe
    from smore_cli.training.batches import Batches

__all__ = ["PassShape", "assumed_rows", "heaviest", "heaviest_held_out", "shape_of"]

LOOKED_AT = 20_000
"""Passes that are looked at: more would take longer than a second."""


@dataclass(frozen=True)
class PassShape:
    """What a pass's memory depends on.

    Attributes:
        step: number of the step it belongs to; None: it is of held-out rows.
        lines: rows of the batch.
        width: tokens of a line, padding included.
        supervised: positions where the head runs.
        rows: numbers of the rows, from 0.
    """

    step: int | None
    lines: int
    width: int
    supervised: int
    rows: tuple[int, ...]

    @property
    def places(self) -> int:
        """Tokens, padding included."""
        return self.lines * self.width


def supervised(row: Row) -> int:
    """Returns at how many positions of a row the head runs."""
    return sum(sum(branch) for branch in row.supervised)


def heaviest(batches: Batches, cost: Callable[[PassShape], float]) -> PassShape:
    """Returns the pass of the run that costs most."""
    return max(islice(_passes(batches), LOOKED_AT), key=cost)


def _passes(batches: Batches) -> Iterator[PassShape]:
    lengths = row_lengths(batches.rows).tolist()  # type: ignore[arg-type]
    counts: dict[int, int] = {}
    for step in range(batches.plan.total_steps):
        for packs in batches.plan.passes(step):
            rows = tuple(row for pack in packs for row in pack)
            for row in rows:
                if row not in counts:
                    counts[row] = supervised(batches.rows[row])
            widths = [sum(lengths[row] for row in pack) for pack in packs]
            lines, width = (1, sum(widths)) if batches.flat else (len(packs), max(widths))
            yield PassShape(step, lines, width, sum(counts[row] for row in rows), rows)


def heaviest_held_out(rows: Sequence[Row], size: int, cost: Callable[[PassShape], float]) -> PassShape | None:
    """Returns the pass of the evaluation that costs most; None where nothing is held out."""
    order = sorted(range(len(rows)), key=lambda i: rows[i].length)
    found = []
    for start in range(0, len(order), size):
        some = tuple(order[start : start + size])
        count = sum(supervised(rows[i]) for i in some)
        found.append(PassShape(None, len(some), max(rows[i].length for i in some), count, some))
    return max(found, key=cost, default=None)


def shape_of(batch: Batch) -> PassShape:
    """Returns the shape of a pass that is there."""
    lines, width = batch.input_ids.shape
    return PassShape(None, lines, width, len(batch.sources), ())


def assumed_rows(recipe: Recipe) -> list[Row]:
    """Returns the rows that a plan without data assumes: all as long as they may be, every token learned."""
    length, count = recipe.data.max_length, recipe.train.per_device_batch_size
    group = 0 if recipe.adapter.row_groups is not None else None
    return [Row([], [[0] * length], [[True] * length], group=group) for _ in range(count)]
