"""Auxiliary losses that keep a router from sending everything to few experts.

Each is a function of sums over real tokens, so that it can be evaluated on a whole step however the step was split
(see `context.py`). All take sums (..., k, s) and give (...).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ImportanceLoadLoss", "SwitchBalanceLoss", "masked_sum"]


@dataclass(frozen=True)
class SwitchBalanceLoss:
    """coefficient * s * sum_n fraction_n * probability_n (Switch Transformer eq. 4-6, for any number of picks).

    fraction_n is how often expert n was picked, probability_n its mean probability, both per routing decision.
    Fractions sum to f, so a uniform router gives coefficient * f.

    Sums: row 0 picks, row 1 probabilities, row 2 the number of decisions in every column.
    """

    coefficient: float

    def __call__(self, sums: Tensor) -> Tensor:
        """Maps (..., 3, s) to (...); 0 where no decision was counted."""
        picks, probabilities, decisions = sums.unbind(-2)
        decisions = decisions.clamp_min(1)
        balance = (picks / decisions * (probabilities / decisions)).sum(-1)
        return self.coefficient * sums.shape[-1] * balance


@dataclass(frozen=True)
class ImportanceLoadLoss:
    """coefficient * (cv^2(importance) + cv^2(load)) (Shazeer et al. 2017, eq. 6-11).

    Sums: row 0 importance (gate mass of each expert), row 1 load (smooth count of picks).
    """

    coefficient: float

    def __call__(self, sums: Tensor) -> Tensor:
        """Maps (..., 2, s) to (...); 0 for a single expert."""
        if sums.shape[-1] == 1:
            return torch.zeros_like(sums[..., 0, 0])
        cv_squared = sums.var(-1) / (sums.mean(-1).square() + 1e-10)  # (..., 2)
        return self.coefficient * cv_squared.sum(-1)


def masked_sum(values: Tensor, mask: Tensor | None) -> Tensor:
    """Sums (N, F, s) over real tokens and parents to (s,).

    Args:
        values: one row for every routing decision.
        mask: (N,) bool, None: every token counts.
    """
    per_token = values.sum(1)  # (N, s)
    return per_token.sum(0) if mask is None else mask.to(values.dtype) @ per_token
