"""LoRAMoE's localised balance loss: experts and samples belong to groups, and each group has its own share of work.

Q[n, m] = sum over the real tokens of sample m of the weight of expert n
I[n, m] = 1 + delta where expert and sample are of one group, else 1 - delta
Z = I * Q          loss = coefficient * var(Z) / mean(Z), over all experts n and samples m
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from smore_cli.nn.context import AdapterContext
    from smore_cli.nn.router import Routing

__all__ = ["LocalisedBalanceLoss"]


@dataclass(frozen=True)
class LocalisedBalanceLoss:
    """coefficient * var(Z) / mean(Z) (Dou et al. 2023), by sums over samples: exact however a step is split.

    A sample is a row of the batch, or a document where these are packed. Experts are dealt to the groups in order: of 6
    experts and 2 groups, the first three belong to group 0. Z grows with the number of tokens of a sample, and the
    paper's form of the loss with it.

    Sums, by expert: row 0 the sum of Z, row 1 that of Z squared, row 2 the number of samples.

    Attributes:
        coefficient: weight of the loss.
        delta: how much the groups differ, 0..1; 0: all experts get the same work from every sample, groups are ignored.
        num_groups: how many groups there are; the number of experts is a multiple of it.
        form: paper: var / mean; released: unbiased variance / (mean^2 + 1e-10), which does not grow with the tokens.
    """

    coefficient: float
    delta: float
    num_groups: int = 2
    form: Literal["paper", "released"] = "paper"

    def sums(self, routing: Routing, context: AdapterContext) -> Tensor:
        """Returns (3, s).

        Raises:
            ValueError: delta is not zero and the context has no groups.
        """
        gates = routing.gates.sum(1)  # (N, s)
        mask = context.flat_mask(len(gates), gates.device)
        real = gates.new_ones(len(gates), 1) if mask is None else mask.to(gates.dtype)[:, None]
        importance = context.by_sequence(gates * real).sum(1)  # (B, s)
        sampled = context.by_sequence(real).amax(1)  # (B, 1), 0 for a sequence without a real token
        z = importance * self._indicator(importance, context)
        return torch.stack([z.sum(0), z.square().sum(0), sampled.expand_as(z).sum(0)])

    def __call__(self, sums: Tensor) -> Tensor:
        """Maps (..., 3, s) to (...); 0 where no sample was counted."""
        total, squares, count = sums.sum(-1).unbind(-1)
        count = count.clamp_min(1)
        mean = total / count
        deviations = (squares - total * mean).clamp_min(0)  # sum of (Z - mean)^2; rounding may leave it below 0
        if self.form == "released":
            return self.coefficient * deviations / (count - 1).clamp_min(1) / (mean.square() + 1e-10)
        return self.coefficient * deviations / count / torch.where(mean > 0, mean, 1)

    def _indicator(self, importance: Tensor, context: AdapterContext) -> Tensor:
        """Returns I, (B, s)."""
        if self.delta == 0:
            return torch.ones_like(importance)
        if context.groups is None:
            raise ValueError("the localised balance loss needs the group of every row: AdapterContext(groups=...)")
        s = importance.shape[1]
        of_expert = torch.arange(s, device=importance.device) // (s // self.num_groups)  # (s,)
        same = context.groups.to(importance.device)[:, None] == of_expert
        return 1 + self.delta * (2 * same.to(importance.dtype) - 1)
