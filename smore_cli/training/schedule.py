"""Which rows a step sees, and the optimiser: all of it a pure function of the recipe, the data and the step number."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.optim import AdamW
from transformers import get_scheduler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

    from smore_cli.recipe.schema import TrainConfig

__all__ = ["StepPlan", "build_optimizer", "build_scheduler"]


@dataclass(frozen=True)
class StepPlan:
    """Which rows each step uses: every epoch is a fresh permutation, cut into steps; the last step of one may be short.

    Attributes:
        num_rows: rows of the training set.
        global_batch_size: rows a step.
        per_pass: rows a forward pass.
        total_steps: steps of the run.
        seed: of the permutations.
    """

    num_rows: int
    global_batch_size: int
    per_pass: int
    total_steps: int
    seed: int

    @classmethod
    def from_config(cls, train: TrainConfig, num_rows: int, seed: int) -> StepPlan:
        """Reads the batch sizes and the length of the run."""
        size = train.global_batch_size or train.per_device_batch_size
        per_epoch = math.ceil(num_rows / size)
        total = train.max_steps or max(1, math.ceil((train.epochs or 1.0) * per_epoch))
        return cls(num_rows, size, min(train.per_device_batch_size, size), total, seed)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in a full pass over the data."""
        return math.ceil(self.num_rows / self.global_batch_size)

    def epoch_of(self, step: int) -> float:
        """Passes over the data that are complete after `step` steps."""
        return step / self.steps_per_epoch

    def passes(self, step: int) -> list[list[int]]:
        """Returns the row numbers of each forward pass of step 0, 1, ..."""
        epoch, index = divmod(step, self.steps_per_epoch)
        start = index * self.global_batch_size
        rows = _permutation(self.num_rows, self.seed, epoch)[start : start + self.global_batch_size]
        return [rows[i : i + self.per_pass] for i in range(0, len(rows), self.per_pass)]

    def rows_used(self) -> list[int]:
        """Returns the numbers of all rows that the run's steps see, in order."""
        if self.total_steps >= self.steps_per_epoch:
            return list(range(self.num_rows))
        return sorted(row for step in range(self.total_steps) for rows in self.passes(step) for row in rows)


@functools.lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(size, generator=generator).tolist()
    return order


def build_optimizer(parameters: Sequence[tuple[str, nn.Parameter]], train: TrainConfig) -> AdamW:
    """Returns AdamW over the trainable parameters; weight decay acts on matrices, not on biases and slopes.

    Args:
        parameters: names and parameters, in a fixed order.
        train: learning rate, betas, epsilon, weight decay.
    """
    matrices = [p for _, p in parameters if p.dim() > 1]
    vectors = [p for _, p in parameters if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        fused=True,
    )


def build_scheduler(optimizer: Optimizer, train: TrainConfig, total_steps: int) -> LambdaLR:
    """Returns the learning-rate schedule with linear warm-up."""
    warmup = math.ceil(train.warmup_ratio * total_steps)
    name = "constant_with_warmup" if train.lr_scheduler == "constant" else train.lr_scheduler
    scheduler: LambdaLR = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)
    return scheduler
