"""The learning rate as a function of the step: a factor on the peak rate of every parameter group.

With t steps done of T, w of them warm-up, m = min_lr_ratio, and p the share done of what follows:

    t < w       t / w
    constant    1
    linear      m + (1 - m) (1 - p)                       p = (t - w) / (T - w)
    cosine      m + (1 - m) (1 + cos(pi p)) / 2           p = (t - w) / (T - w)
    wsd         1, then m + (1 - m) decay(p)              p = (t - (T - d)) / d over the last d steps
                decay(p) = 1 - p, (1 + cos(pi p)) / 2 or 1 - sqrt(p)        (Hägele et al. 2024)

The first step has factor 0 where there is warm-up, as in transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.optim.lr_scheduler import LambdaLR

from smore_cli.errors import UsageError

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from smore_cli.recipe.schema import TrainConfig

__all__ = ["Schedule", "build_scheduler"]


@dataclass(frozen=True)
class Schedule:
    """A schedule with its numbers of steps.

    Attributes:
        name: constant, linear, cosine or wsd.
        total: steps of the run.
        warmup: steps that warm up.
        decay: of wsd: steps that decay, at the end.
        decay_type: of wsd: linear, cosine or 1-sqrt.
        floor: where it ends, as a share of the peak.
    """

    name: str
    total: int
    warmup: int = 0
    decay: int = 0
    decay_type: str = "linear"
    floor: float = 0.0

    @classmethod
    def from_config(cls, train: TrainConfig, total_steps: int) -> Schedule:
        """Reads a recipe.

        Raises:
            UsageError: more steps warm up and decay than there are.
        """
        warmup = train.warmup_steps
        if warmup is None:
            warmup = math.ceil(train.warmup_ratio * total_steps)
        elif warmup >= total_steps:
            raise UsageError(
                f"train.warmup_steps is {warmup}, but the run has {total_steps} steps: its learning rate would never "
                "reach the peak",
                "lower it, or set train.warmup_ratio",
            )
        decay = math.ceil(train.decay_ratio * total_steps) if train.lr_scheduler == "wsd" else 0
        if decay and warmup + decay > total_steps:
            raise UsageError(
                f"{warmup} steps of warm-up and {decay} of decay do not fit into {total_steps} steps",
                "lower train.warmup_steps or train.decay_ratio",
            )
        return cls(train.lr_scheduler, total_steps, warmup, decay, train.decay_type, train.min_lr_ratio)

    def factor(self, step: int) -> float:
        """Returns the factor on the peak rate for the step after `step` steps."""
        if step < self.warmup:
            return step / self.warmup
        if self.name == "constant":
            return 1.0
        if self.name == "wsd":
            start = self.total - self.decay
            shape = 1.0 if step < start else _decay(self.decay_type, min(1.0, (step - start) / self.decay))
        else:
            left, length = max(0, self.total - step), max(1, self.total - self.warmup)
            shape = (
                left / length if self.name == "linear" else _decay("cosine", min(1.0, (step - self.warmup) / length))
            )
        return self.floor + (1.0 - self.floor) * shape


def _decay(kind: str, done: float) -> float:
    """Falls from 1 to 0 while `done` goes from 0 to 1."""
    if kind == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))
    return 1.0 - math.sqrt(done) if kind == "1-sqrt" else 1.0 - done


def build_scheduler(optimizer: Optimizer, train: TrainConfig, total_steps: int) -> LambdaLR:
    """Returns the recipe's schedule over all parameter groups of an optimiser."""
    return LambdaLR(optimizer, Schedule.from_config(train, total_steps).factor)
