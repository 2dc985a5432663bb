"""Which draws of a stream a step sees: as `smore_cli.training.schedule`, for rows of which no one knows how many.

    one row a line        step n has the draws n G, ..., n G + G - 1 of G = global_batch_size
    several rows a line   draws are packed a window at a time; step n has the lines n G, ..., n G + G - 1 of all windows

There are no short steps: a step may begin in one epoch and end in the next.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Any

from smore_cli.data.packing import pack_rows

if TYPE_CHECKING:
    from smore_cli.data.stream import Reached, StreamRows
    from smore_cli.recipe.schema import Recipe

__all__ = ["StreamPlan"]

WINDOW = 1000
"""Rows that are packed together: packs are nearly as full as those of all rows, and the first are ready soon."""
BEHIND = 8
"""Steps that can be asked for again without reading anew, as the gradient census does."""


class StreamPlan:
    """The plan for a stream.

    Args:
        recipe: what to run; `train.max_steps` is set.
        rows: the stream.

    Attributes:
        rows: the stream.
        global_batch_size: lines a step.
        per_pass: lines a forward pass.
        total_steps: steps of the run.
        reached: how far the stream was after the last step that was handed out, and the number of the step after that.
    """

    def __init__(self, recipe: Recipe, rows: StreamRows) -> None:
        train, data = recipe.train, recipe.data
        self.rows = rows
        self.global_batch_size = train.global_batch_size or train.per_device_batch_size
        self.per_pass = min(train.per_device_batch_size, self.global_batch_size)
        self.total_steps = train.max_steps or 1
        self.reached: tuple[int, Reached] = (0, rows.reached(0))
        self._seed, self._packed, self._max_length = recipe.seed, data.packing, data.max_length
        self._buffer, self._sources = data.shuffle_buffer, len(data.train)
        self.restart()

    def restart(self) -> None:
        """Goes back to the first step, and the stream to its first draw."""
        self.rows.restart()
        self._ends: list[int] = []  # how many packs there are up to the end of each window
        self._packs: dict[int, list[list[int]]] = {}  # of the windows that are still of use

    def epoch_of(self, step: int) -> float:
        """Passes over all sources that were complete after `step` steps, whole ones; 0 where that is not known."""
        return float(self.reached[1].epochs) if self.reached[0] == step else 0.0

    def passes(self, step: int) -> list[list[list[int]]]:
        """Returns the forward passes of step 0, 1, ...: of each the packs, of each the numbers of its draws."""
        size = self.global_batch_size
        packs = self._window_packs(step) if self._packed else [[step * size + i] for i in range(size)]
        if not self._packed:
            self.rows.forget((step - BEHIND) * size)
        return [packs[i : i + self.per_pass] for i in range(0, len(packs), self.per_pass)]

    def after(self, steps: int) -> Reached:
        """Returns how far the stream is once so many steps have what they need."""
        if self.reached[0] != steps:
            self.reached = (steps, self.rows.reached(self._draws_of(steps)))
        return self.reached[1]

    def lines(self) -> list[str]:
        """Returns what is worth knowing before training."""
        unit = "packs" if self._packed else "rows"
        sources = "the stream" if self._sources == 1 else f"{self._sources} streams"
        return [
            f"steps     {self.total_steps} of {self.global_batch_size} {unit} from {sources}, "
            f"shuffled among {self._buffer:,} rows"
        ]

    def facts(self) -> dict[str, Any]:
        """Returns the same as plain values, for run.json."""
        return {"layout": "packs" if self._packed else "rows", "streaming": True, "shuffle_buffer": self._buffer}

    def _draws_of(self, steps: int) -> int:
        if not self._packed:
            return steps * self.global_batch_size
        return WINDOW * self._windows_for(steps * self.global_batch_size)

    def _windows_for(self, packs: int) -> int:
        """Returns how many windows hold so many packs, which are packed if they were not."""
        while packs and (not self._ends or self._ends[-1] < packs):
            window = len(self._ends)
            first = window * WINDOW
            self.rows.tokenise(range(first, first + WINDOW))
            lengths = [self.rows[first + i].length for i in range(WINDOW)]
            found = pack_rows(range(WINDOW), lengths, self._max_length, self._seed, window)
            self._packs[window] = [[first + row for row in pack] for pack in found]
            self._ends.append((self._ends[-1] if self._ends else 0) + len(found))
        return bisect_left(self._ends, packs) + 1 if packs else 0

    def _window_packs(self, step: int) -> list[list[int]]:
        start, stop = step * self.global_batch_size, (step + 1) * self.global_batch_size
        last = self._windows_for(stop)
        first = max(self._windows_for(start + 1) - 1, 0)
        if first not in self._packs:  # a step long gone
            self.restart()
            return self._window_packs(step)
        oldest = max(self._windows_for(max(start - BEHIND * self.global_batch_size, 0) + 1) - 1, 0)
        for window in [window for window in self._packs if window < oldest]:
            del self._packs[window]
        self.rows.forget(oldest * WINDOW)
        before = self._ends[first - 1] if first else 0
        packs = [pack for window in range(first, last) for pack in self._packs[window]]
        return packs[start - before : stop - before]
