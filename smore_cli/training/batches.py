"""The forward passes of each step, on this process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from smore_cli.data.batch import collate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smore_cli.data.batch import Batch, Row
    from smore_cli.training.schedule import StepPlan

__all__ = ["Batches"]


@dataclass(frozen=True)
class Batches:
    """Makes the tensors of each step: a pure function of the plan, the rows and the step number.

    Attributes:
        rows: tokenised training rows.
        plan: which rows each step sees.
        pad_token_id: id written where there is no token.
        mask_dtype: the backbone's compute dtype.
        process: number of this process.
        processes: how many processes share a step; process r has the passes r, r + processes, ...
    """

    rows: Sequence[Row]
    plan: StepPlan
    pad_token_id: int
    mask_dtype: torch.dtype
    process: int = 0
    processes: int = 1

    def step(self, step: int) -> list[Batch]:
        """Returns the forward passes that this process runs in step 0, 1, ..., on the CPU."""
        mine = self.plan.passes(step)[self.process :: self.processes]
        return [self.collate([self.rows[i] for i in rows]) for rows in mine]

    def collate(self, rows: Sequence[Row]) -> Batch:
        """Returns rows as one forward pass's tensors."""
        return collate(rows, pad_token_id=self.pad_token_id, mask_dtype=self.mask_dtype)
