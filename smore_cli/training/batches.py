"""The forward passes of each step, on this process."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch

from smore_cli.data.batch import collate, collate_packs
from smore_cli.data.stream import StreamRows
from smore_cli.training.stream_plan import StreamPlan
from smore_cli.training.workers import Made, made_ahead

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from smore_cli.data.batch import Batch, Row
    from smore_cli.training.schedule import Plan

__all__ = ["Batches"]


@dataclass(frozen=True)
class Batches:
    """Makes the tensors of each step: a pure function of the plan, the rows and the step number.

    Attributes:
        rows: tokenised training rows, or a stream of them.
        plan: which rows each step sees.
        pad_token_id: id written where there is no token.
        mask_dtype: the backbone's compute dtype.
        process: number of this process.
        processes: how many processes share a step; process r has the passes r, r + processes, ...
        packed: several rows share a line.
        flat: and all lines of a pass are one.
        num_workers: processes that make batches ahead of their steps.
        pin_memory: put batches where a GPU can fetch them by itself.
    """

    rows: Sequence[Row] | StreamRows
    plan: Plan
    pad_token_id: int
    mask_dtype: torch.dtype
    process: int = 0
    processes: int = 1
    packed: bool = False
    flat: bool = False
    num_workers: int = 0
    pin_memory: bool = False

    def from_step(self, start: int) -> Iterator[list[Batch]]:
        """Yields the forward passes of step `start`, of the step after it, and so on to the end of the run.

        Raises:
            DataError: a row of a stream cannot be used; the message names it.
            SmoreError: a worker died.
        """
        steps = range(start, self.plan.total_steps)
        ahead = made_ahead(self, start, self.num_workers) if self.num_workers else map(self.made, steps)
        for step, made in zip(steps, ahead, strict=True):
            if isinstance(self.plan, StreamPlan) and made.reached is not None:
                self.plan.reached = (step + 1, made.reached)
            yield [_pinned(batch) for batch in made.batches] if self.pin_memory else made.batches

    def made(self, step: int) -> Made:
        """Returns what a step needs."""
        batches = self.step(step)
        return Made(batches, self.plan.after(step + 1) if isinstance(self.plan, StreamPlan) else None)

    def restart(self) -> None:
        """Lets a process that inherits this object read a stream for itself."""
        if isinstance(self.plan, StreamPlan):
            self.plan.restart()

    def step(self, step: int) -> list[Batch]:
        """Returns the forward passes that this process runs in step 0, 1, ..., on the CPU."""
        mine = self.plan.passes(step)[self.process :: self.processes]
        if isinstance(self.rows, StreamRows):
            self.rows.tokenise(row for packs in mine for pack in packs for row in pack)
        return [self.collate_packs([[self.rows[i] for i in pack] for pack in packs]) for packs in mine]

    def collate_packs(self, packs: Sequence[Sequence[Row]]) -> Batch:
        """Returns packs of rows as one forward pass's tensors."""
        return collate_packs(
            packs, pad_token_id=self.pad_token_id, mask_dtype=self.mask_dtype, packed=self.packed, flat=self.flat
        )

    def collate(self, rows: Sequence[Row]) -> Batch:
        """Returns rows, each in a line of its own, as one forward pass's tensors."""
        return collate(rows, pad_token_id=self.pad_token_id, mask_dtype=self.mask_dtype)


def _pinned(batch: Batch) -> Batch:
    tensors = {f.name: tensor for f in fields(batch) if (tensor := getattr(batch, f.name)) is not None}
    return replace(batch, **{name: tensor.pin_memory() for name, tensor in tensors.items()})
