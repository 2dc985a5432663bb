"""What a step minimises.

    completion      L = 1/T sum over supervised tokens of -log p(token)
    choice_ranking  L = 1/Q sum over questions of -log softmax_c( mean log p(choice c) )[gold]
                        + weight * completion(gold)

T and Q count over the whole step, however it is split into forward passes: each pass returns its share of the step's
loss, and the shares (and so their gradients) add up to the same numbers for every split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from smore_cli.models.forward import target_logprobs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

    from smore_cli.data.batch import Batch
    from smore_cli.recipe.schema import DataConfig

__all__ = ["Counts", "Objective", "Share"]


@dataclass(frozen=True)
class Counts:
    """What the losses of a step are divided by.

    Attributes:
        tokens: supervised tokens (of the right branch, where there are several).
        questions: rows.
    """

    tokens: int
    questions: int

    @classmethod
    def of(cls, batches: Iterable[Batch]) -> Counts:
        """Counts over all forward passes of a step, which are on the CPU."""
        tokens = questions = 0
        for batch in batches:
            tokens += int(torch.isin(batch.choice, batch.gold).sum())
            questions += len(batch.gold)
        return cls(tokens, questions)


@dataclass(frozen=True)
class Share:
    """One forward pass's part of a step.

    Attributes:
        loss: scalar, differentiable; sums to the step's loss over its passes.
        nll: scalar, detached: sum of -log p over supervised tokens of the right branches.
        correct: scalar, detached: questions whose best-scored branch is the right one (0 where rows have one branch).
    """

    loss: Tensor
    nll: Tensor
    correct: Tensor


@dataclass(frozen=True)
class Objective:
    """The objective of a recipe.

    Attributes:
        ranking: choice_ranking rather than completion.
        completion_weight: weight of the completion loss beside the ranking loss.
    """

    ranking: bool
    completion_weight: float

    @classmethod
    def from_config(cls, data: DataConfig) -> Objective:
        """Reads `data.objective` and its weight."""
        return cls(data.objective == "choice_ranking", data.ranking_completion_weight)

    def __call__(self, model: nn.Module, batch: Batch, counts: Counts) -> Share:
        """Runs one forward pass.

        Args:
            model: the causal language model.
            batch: on its device.
            counts: of the whole step.
        """
        logprobs = target_logprobs(model, batch)  # (n,)
        nll = -torch.where(_is_gold(batch), logprobs, 0.0).sum()
        completion = nll / max(counts.tokens, 1)
        if not self.ranking:
            return Share(completion, nll.detach(), torch.zeros_like(nll))
        means = _branch_means(logprobs, batch)  # (branches,)
        questions = len(batch.gold)
        # A column for every branch, -inf in another question's: how many the longest question has, only the device
        # knows, and to ask would mean to wait for it.
        rows = torch.arange(questions, device=means.device)[:, None]
        scores = torch.where(batch.branch_row == rows, means, -torch.inf)  # (questions, branches)
        ranking = F.cross_entropy(scores, batch.gold, reduction="sum") / max(counts.questions, 1)
        correct = (scores.argmax(1) == batch.gold).sum().to(nll.dtype)
        return Share(ranking + self.completion_weight * completion, nll.detach(), correct)


def _is_gold(batch: Batch) -> Tensor:
    """(n,) bool: targets that belong to the right branch of their row."""
    right = torch.zeros(len(batch.branch_row), dtype=torch.bool, device=batch.gold.device)
    return right.index_fill(0, batch.gold, True)[batch.choice]


def _branch_means(logprobs: Tensor, batch: Batch) -> Tensor:
    """Mean log-probability of each branch, (branches,); 0 of one without targets."""
    none = logprobs.new_zeros(len(batch.branch_row))
    total = none.index_add(0, batch.choice, logprobs)
    length = none.index_add(0, batch.choice, torch.ones_like(logprobs))
    return total / length.clamp_min(1)
