"""Which rows a step sees: a pure function of the recipe, the data and the step number.

    epoch   draws of rows (`smore_cli.data.mixing`)         step   so many packs of an epoch; its last may be short
    pack    the rows of one line: one, unless packed        pass   the packs of one forward pass of a step

What a step is does not depend on how many processes deal out its passes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any, Literal, Protocol

from smore_cli.data.mixing import Mixture, rows_left
from smore_cli.data.packing import Padding, group_rows, pack_rows, padding_of
from smore_cli.data.rows import row_lengths

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smore_cli.data.batch import Row
    from smore_cli.data.report import SourceReport
    from smore_cli.recipe.schema import Recipe, TrainConfig

__all__ = ["Plan", "StepPlan", "lies_flat", "make_plan"]

SAMPLE = 20_000
"""Rows whose padding is counted: an estimate to a per cent, in a fraction of a second."""


class Plan(Protocol):
    """What a run asks of a plan."""

    @property
    def total_steps(self) -> int:
        """Steps of the run."""
        ...

    def epoch_of(self, step: int) -> float:
        """Passes over the data that are complete after `step` steps."""
        ...

    def passes(self, step: int) -> list[list[list[int]]]:
        """Returns the forward passes of step 0, 1, ...: of each the packs, of each the row numbers."""
        ...

    def lines(self) -> list[str]:
        """Returns what is worth knowing before training."""
        ...

    def facts(self) -> dict[str, Any]:
        """Returns the same as plain values, for run.json."""
        ...


@dataclass(frozen=True)
class StepPlan:
    """The plan for rows that are all there.

    Attributes:
        num_rows: rows of the training set.
        global_batch_size: packs a step.
        per_pass: packs a forward pass.
        total_steps: steps of the run.
        seed: of the permutations.
        mixture: what an epoch draws; None: every row once.
        layout: a row is a pack; rows of similar length share a pass; or several rows share a pack.
        lengths: tokens of each row; empty: not known, and layout is `rows`.
        max_length: tokens of a pack.
        flat: the packs of a pass are laid in one line (see `smore_cli.data.batch.collate_packs`).
    """

    num_rows: int
    global_batch_size: int
    per_pass: int
    total_steps: int
    seed: int
    mixture: Mixture | None = None
    layout: Literal["rows", "groups", "packs"] = "rows"
    lengths: Sequence[int] = ()
    max_length: int = 0
    flat: bool = False

    @classmethod
    def from_config(cls, train: TrainConfig, num_rows: int, seed: int, **fields: Any) -> StepPlan:
        """Reads the batch sizes and the length of the run; `fields` are the attributes with a default."""
        size = train.global_batch_size or train.per_device_batch_size
        plan = cls(num_rows, size, min(train.per_device_batch_size, size), train.max_steps or 0, seed, **fields)
        return plan if train.max_steps else replace(plan, total_steps=plan._steps_of(train.epochs or 1.0))

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in the first pass over the data; others differ a little where packs and weights meet."""
        return self._steps_in(0)

    def epoch_of(self, step: int) -> float:
        """Passes over the data that are complete after `step` steps."""
        epoch, index = self._locate(step)
        return (epoch * self._steps_in(epoch) + index) / self._steps_in(epoch)

    def passes(self, step: int) -> list[list[list[int]]]:
        """Returns the forward passes of step 0, 1, ...: of each the packs, of each the row numbers."""
        epoch, index = self._locate(step)
        start = index * self.global_batch_size
        packs = self._packs(epoch, start, start + self.global_batch_size)
        return [packs[i : i + self.per_pass] for i in range(0, len(packs), self.per_pass)]

    def rows_used(self) -> list[int]:
        """Returns the numbers of all rows that the run's steps see, in order."""
        found: set[int] = set()
        for epoch in count():
            packs = self._packs(epoch, 0, self._steps_before_end(epoch) * self.global_batch_size)
            found.update(row for pack in packs for row in pack)
            if not packs or len(found) == self.num_rows:
                return sorted(found)
        raise AssertionError("an endless count ended")

    @functools.cached_property
    def mix(self) -> Mixture:
        """What an epoch draws."""
        return self.mixture or Mixture((self.num_rows,), self.seed)

    @functools.cached_property
    def padding(self) -> dict[str, Padding]:
        """Padding of the first epoch (of its first rows, if they are many), by layout."""
        rows, found = self.mix.epoch(0)[:SAMPLE], {}
        packs = {
            "rows": [[row] for row in rows],
            "groups": [[row] for row in group_rows(rows, self.lengths, self.per_pass, self.seed, 0)],
            "packs": pack_rows(rows, self.lengths, self.max_length, self.seed, 0),
        }
        for layout, found_packs in packs.items():
            passes = (found_packs[i : i + self.per_pass] for i in range(0, len(found_packs), self.per_pass))
            found[layout] = padding_of(passes, self.lengths, flat=self.flat and layout == "packs")
        return found

    def lines(self) -> list[str]:
        """Returns what is worth knowing before training: steps, the share of each source, padding."""
        unit = "packs" if self.layout == "packs" else "rows"
        epochs = self.epoch_of(self.total_steps)
        found = [f"steps     {self.total_steps} of {self.global_batch_size} {unit}, {epochs:.2f} epochs"]
        found += [f"mixture   {line}" for line in self.mix.lines()]
        if self.lengths:
            words = {"rows": "without either", "groups": "with train.group_by_length", "packs": "with data.packing"}
            others = [
                f"{100 * padding.share:.0f} % {words[layout]}"
                for layout, padding in self.padding.items()
                if layout != self.layout
            ]
            found.append(f"padding   {self.padding[self.layout].line()}; {', '.join(others)}")
        return found

    def facts(self) -> dict[str, Any]:
        """Returns the same as plain values, for run.json."""
        found: dict[str, Any] = {"layout": self.layout}
        if self.mix.weights is not None:
            found["mixture"] = self.mix.facts()
        if self.lengths:
            found["padding"] = {layout: padding.as_dict() for layout, padding in self.padding.items()}
        return found

    def _packs(self, epoch: int, start: int, stop: int) -> list[list[int]]:
        """Returns some packs of an epoch."""
        if self.layout == "packs":
            return self._epoch_packs(epoch)[start:stop]
        return [[row] for row in self._epoch_rows(epoch)[start:stop]]

    def _epoch_rows(self, epoch: int) -> list[int]:
        kept: dict[int, list[int]] = self._kept
        if epoch not in kept:
            rows = self.mix.epoch(epoch)
            if self.layout == "groups":
                rows = group_rows(rows, self.lengths, self.per_pass, self.seed, epoch)
            _keep(kept, epoch, rows)
        return kept[epoch]

    def _epoch_packs(self, epoch: int) -> list[list[int]]:
        kept: dict[int, list[list[int]]] = self._kept
        if epoch not in kept:
            rows = self.mix.epoch(epoch)
            _keep(kept, epoch, pack_rows(rows, self.lengths, self.max_length, self.seed, epoch))
        return kept[epoch]

    @functools.cached_property
    def _kept(self) -> dict[int, Any]:
        """The newest epochs, by number: steps come one after another."""
        return {}

    @functools.cached_property
    def _counts(self) -> list[int]:
        """How many packs the first epochs have, as far as they have been asked for."""
        return []

    def _steps_in(self, epoch: int) -> int:
        """Optimiser steps of an epoch: of the same rows best fit makes the same number of packs in any order."""
        if self.layout != "packs":
            return math.ceil(self.mix.epoch_size / self.global_batch_size)
        wanted = 0 if self.mix.weights is None else epoch
        while len(self._counts) <= wanted:
            self._counts.append(len(self._epoch_packs(len(self._counts))))
        return math.ceil(self._counts[wanted] / self.global_batch_size)

    def _steps_of(self, epochs: float) -> int:
        if self.layout != "packs" or self.mix.weights is None:
            return max(1, math.ceil(epochs * self._steps_in(0)))
        whole = int(epochs)
        part = (epochs - whole) * self._steps_in(whole) if epochs > whole else 0
        return max(1, sum(self._steps_in(epoch) for epoch in range(whole)) + math.ceil(part))

    def _locate(self, step: int) -> tuple[int, int]:
        """Returns the epoch of a step, and its number within that epoch."""
        if self.layout != "packs" or self.mix.weights is None:
            return divmod(step, self._steps_in(0))
        for epoch in count():
            steps = self._steps_in(epoch)
            if step < steps:
                return epoch, step
            step -= steps
        raise AssertionError("an endless count ended")

    def _steps_before_end(self, epoch: int) -> int:
        """Returns how many steps of an epoch belong to the run."""
        last, steps = self._locate(self.total_steps)
        return self._steps_in(epoch) if epoch < last else steps if epoch == last else 0


def make_plan(recipe: Recipe, rows: Sequence[Row], sources: Sequence[SourceReport]) -> StepPlan:
    """Returns a recipe's plan.

    Args:
        recipe: what to run.
        rows: the training rows, source by source.
        sources: the sources in `data.train`, with the rows each had before any were held out.

    Raises:
        DataError: a source with a weight has no rows.
    """
    data, train = recipe.data, recipe.train
    mixture = Mixture(
        sizes=rows_left(rows, [source.rows for source in sources]),
        seed=recipe.seed,
        weights=tuple(source.weight for source in data.train if source.weight is not None) or None,
        names=tuple(source.origin for source in sources),
    )
    mixture.check()
    return StepPlan.from_config(
        train,
        len(rows),
        recipe.seed,
        mixture=mixture,
        layout="packs" if data.packing else "groups" if train.group_by_length else "rows",
        lengths=row_lengths(rows).tolist(),
        max_length=data.max_length,
        flat=lies_flat(recipe),
    )


def lies_flat(recipe: Recipe) -> bool:
    """Returns whether the packs of a pass are laid in one line.

    transformers takes the documents apart for flash-attn where they are all in one line, and nowhere else.
    """
    return recipe.data.packing and recipe.model.attn_implementation == "flash_attention_2"


def _keep(kept: dict[int, Any], epoch: int, value: Any) -> None:
    while len(kept) > 1:
        del kept[min(kept)]
    kept[epoch] = value
