"""From probabilities to gates: which experts are picked, and what weight each has.

A selector maps probabilities (..., s) to gates (..., s), 0 where an expert is not picked, and to the mask of the picked
ones (None: all). Picking is not differentiated; gradients flow through the probabilities of what was picked. Of experts
with equal probability the first goes first, on every device, so that a token's picks never depend on its batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["All", "Selector", "TopK", "TopP", "gated"]


class Selector(ABC):
    """Maps probabilities (..., s) to gates (..., s) and the mask of the picked experts, None for all.

    Attributes:
        renormalise: whether the gates of the picked experts are divided by their sum.
    """

    renormalise: bool

    @abstractmethod
    def mask(self, probabilities: Tensor) -> Tensor | None:
        """Returns which experts are picked, (..., s) bool; None: every one."""

    def __call__(self, probabilities: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns gates and mask."""
        picked = self.mask(probabilities)
        return (probabilities if picked is None else gated(probabilities, picked, self.renormalise)), picked


def gated(probabilities: Tensor, picked: Tensor, renormalise: bool) -> Tensor:
    """Returns the probabilities of the picked experts, 0 elsewhere, divided by their sum where asked."""
    gates = probabilities * picked
    return gates / gates.sum(-1, keepdim=True) if renormalise else gates


@dataclass(frozen=True)
class All(Selector):
    """Every expert, weighted by its probability."""

    renormalise = False

    def mask(self, probabilities: Tensor) -> None:
        """Nobody is left out."""


@dataclass(frozen=True)
class TopK(Selector):
    """The k most probable experts; renormalised, their weights are a softmax over their logits alone."""

    k: int
    renormalise: bool = True

    def mask(self, probabilities: Tensor) -> Tensor:
        """Returns which experts are picked, (..., s) bool."""
        best = probabilities.detach().sort(dim=-1, descending=True, stable=True).indices[..., : self.k]
        return torch.zeros_like(probabilities, dtype=torch.bool).scatter_(-1, best, True)


@dataclass(frozen=True)
class TopP(Selector):
    """The shortest list of most probable experts whose mass exceeds p, at least `min_k` of them.

    Attributes:
        p: the mass, 0..1.
        min_k: how many are picked at least.
        crossing: whether the expert with which the mass exceeds p is picked (as in nucleus sampling) or left out.
        renormalise: whether the gates are divided by their sum.
    """

    p: float
    min_k: int = 1
    crossing: bool = True
    renormalise: bool = False

    def mask(self, probabilities: Tensor) -> Tensor:
        """Returns which experts are picked, (..., s) bool."""
        ordered, order = probabilities.detach().sort(dim=-1, descending=True, stable=True)
        reached = ordered.cumsum(-1)
        below = reached <= self.p
        if self.crossing:  # one more than what stays below: the first always, and each after one that is kept
            below = torch.cat([torch.ones_like(below[..., :1]), below[..., :-1]], -1)
        keep = below | (self.p >= 1)  # the whole mass leaves nobody out, but rounding may put its sum above 1
        keep[..., : self.min_k] = True
        return torch.zeros_like(keep).scatter_(-1, order, keep)
