"""Auxiliary losses that keep a router from sending everything to few experts.

Each is a function of sums over real tokens, so that it can be evaluated on a whole step however the step was split
(see `context.py`). All take sums (..., k, s) and give (...), or one number where they look at all routers together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from smore_cli.nn.selection import TopK

if TYPE_CHECKING:
    from torch import Tensor

    from smore_cli.nn.context import AdapterContext
    from smore_cli.nn.router import RouterLoss, Routing

__all__ = ["AcrossRouters", "ImportanceLoadLoss", "SwitchBalanceLoss", "masked_sum"]


@dataclass(frozen=True)
class SwitchBalanceLoss:
    """coefficient * s * sum_n fraction_n * probability_n (Switch Transformer eq. 4-6, for any number of picks).

    fraction_n is how often expert n was picked, probability_n its mean probability, both per routing decision.

    Sums: row 0 picks, row 1 probabilities, row 2 the number of decisions in every column.

    Attributes:
        coefficient: weight of the loss.
        fractions: per_decision: they sum to the number f of picks, so a uniform router gives coefficient * f;
            per_pick: they sum to 1, so it gives coefficient; gate_mass: the mean gate, differentiable, in place of hard
            counts (DynMoLE).
        top_k: the hard counts are of so many most probable experts, whatever was picked; None: of what was picked.
    """

    coefficient: float
    fractions: Literal["per_decision", "per_pick", "gate_mass"] = "per_decision"
    top_k: int | None = None

    def sums(self, routing: Routing, context: AdapterContext) -> Tensor:
        """Returns (3, s)."""
        probabilities = routing.probabilities
        weights, tokens = context.weights(probabilities)
        decisions = (tokens * probabilities.shape[1]).expand(probabilities.shape[-1])
        picked = routing.picked if self.top_k is None else TopK(self.top_k).mask(probabilities)
        if self.fractions == "gate_mass":
            picks = masked_sum(routing.gates, weights)
        else:
            picks = decisions if picked is None else masked_sum(picked.to(weights.dtype), weights)
        return torch.stack([picks, masked_sum(probabilities, weights), decisions])

    def __call__(self, sums: Tensor) -> Tensor:
        """Maps (..., 3, s) to (...); 0 where no decision was counted."""
        picks, probabilities, decisions = sums.unbind(-2)
        decisions = decisions.clamp_min(1)
        per = picks.sum(-1, keepdim=True).clamp_min(1) if self.fractions == "per_pick" else decisions
        balance = (picks / per * (probabilities / decisions)).sum(-1)
        return self.coefficient * sums.shape[-1] * balance


@dataclass(frozen=True)
class AcrossRouters:
    """Puts all routers of a loss together; without it, the losses of single routers are added up.

    Routers with different numbers of experts are kept apart: their sums do not fit together.

    Attributes:
        loss: the loss of one router.
        reduction: mean: of the routers' losses; pooled: one loss of the sums over all routers, as if they were one.
            A pooled balance hides collapse: two routers that each use one expert, not the same, look balanced.
    """

    loss: RouterLoss
    reduction: Literal["mean", "pooled"] = "mean"

    def sums(self, routing: Routing, context: AdapterContext) -> Tensor:
        """Returns the sums of the loss of one router."""
        return self.loss.sums(routing, context)

    def __call__(self, sums: Tensor) -> Tensor:
        """Maps (R, k, c), the sums of R routers, to one number."""
        return self.loss(sums).mean() if self.reduction == "mean" else self.loss(sums.sum(0))


@dataclass(frozen=True)
class ImportanceLoadLoss:
    """coefficient * (cv^2(importance) + cv^2(load)) (Shazeer et al. 2017, eq. 6-11).

    Sums: row 0 importance (gate mass of each expert), row 1 load (smooth count of picks).
    """

    coefficient: float

    def sums(self, routing: Routing, context: AdapterContext) -> Tensor:
        """Returns (2, s)."""
        weights, _ = context.weights(routing.gates)
        load = routing.gates > 0 if routing.smooth_load is None else routing.smooth_load
        return torch.stack([masked_sum(row, weights) for row in (routing.gates, load.to(weights.dtype))])

    def __call__(self, sums: Tensor) -> Tensor:
        """Maps (..., 2, s) to (...); 0 for a single expert."""
        if sums.shape[-1] == 1:
            return torch.zeros_like(sums[..., 0, 0])
        cv_squared = sums.var(-1) / (sums.mean(-1).square() + 1e-10)  # (..., 2)
        return self.coefficient * cv_squared.sum(-1)


def masked_sum(values: Tensor, weights: Tensor | None) -> Tensor:
    """Sums (N, F, s) over real tokens and parents to (s,).

    Args:
        values: one row for every routing decision.
        weights: (N,) 1 on real tokens (bool or a number), None: every token counts.
    """
    n, parents, s = values.shape
    if weights is None:
        return values.sum((0, 1))
    total = weights.to(values.dtype) @ values.reshape(n, parents * s)  # one product, no copy of (N, s)
    return total if parents == 1 else total.view(parents, s).sum(0)
