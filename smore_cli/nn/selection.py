"""From probabilities to gates: which experts are picked, and what weight each has.

A selector maps probabilities (..., s) to gates (..., s), 0 where an expert is not picked, and to the mask of the picked
ones (None: all). Picking is not differentiated; gradients flow through the probabilities of what was picked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["All", "Selector", "TopK", "TopP", "gated"]


class Selector(Protocol):
    """Maps probabilities (..., s) to gates (..., s) and the mask of the picked experts, None for all."""

    def __call__(self, probabilities: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns gates and mask."""
        ...


def gated(probabilities: Tensor, picked: Tensor, renormalise: bool) -> Tensor:
    """Returns the probabilities of the picked experts, 0 elsewhere, divided by their sum where asked."""
    gates = probabilities * picked
    return gates / gates.sum(-1, keepdim=True) if renormalise else gates


@dataclass(frozen=True)
class All:
    """Every expert, weighted by its probability."""

    def __call__(self, probabilities: Tensor) -> tuple[Tensor, None]:
        """Returns the probabilities as they are."""
        return probabilities, None


@dataclass(frozen=True)
class TopK:
    """The k most probable experts; renormalised, their weights are a softmax over their logits alone."""

    k: int
    renormalise: bool = True

    def __call__(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Returns gates and mask."""
        best = probabilities.topk(self.k, dim=-1).indices
        picked = torch.zeros_like(probabilities, dtype=torch.bool).scatter_(-1, best, True)
        return gated(probabilities, picked, self.renormalise), picked


@dataclass(frozen=True)
class TopP:
    """The shortest list of most probable experts that reaches the mass p, at least `min_k` of them.

    Attributes:
        p: the mass, 0..1.
        min_k: how many are picked at least.
        crossing: whether the expert whose probability crosses p is picked (as in nucleus sampling) or not.
        renormalise: whether the gates are divided by their sum.
    """

    p: float
    min_k: int = 1
    crossing: bool = True
    renormalise: bool = False

    def __call__(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Returns gates and mask."""
        picked = self.mask(probabilities)
        return gated(probabilities, picked, self.renormalise), picked

    def mask(self, probabilities: Tensor) -> Tensor:
        """Returns which experts are picked, (..., s) bool."""
        ordered, order = probabilities.detach().sort(dim=-1, descending=True)
        reached = ordered.cumsum(-1)
        keep = (reached - ordered) < self.p if self.crossing else reached <= self.p
        keep[..., : self.min_k] = True
        return torch.zeros_like(keep).scatter_(-1, order, keep)
