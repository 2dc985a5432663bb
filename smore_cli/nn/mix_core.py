"""A core of small square matrices, mixed anew for every token.

    z = (sum_e g_e M_e)^T h                         M_e: (r, r)

The mixed matrix of a token is never formed: (sum_e g_e M_e)^T h = sum_e g_e (M_e^T h), one product with all M_e.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["MixCore"]


class MixCore(nn.Module):
    """Maps latents (N, r) and gates (N, 1, s) to (N, r).

    Attributes:
        M: (s, r, r) one matrix an expert.
    """

    def __init__(self, num_experts: int, rank: int) -> None:
        super().__init__()
        self.M = nn.Parameter(torch.empty(num_experts, rank, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every M_e by itself as `nn.Linear` initialises, uniform within 1/sqrt(r)."""
        for matrix in self.M:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))

    def forward(self, latent: Tensor, gates: Tensor) -> Tensor:
        """Returns (sum_e g_e M_e)^T h for every token."""
        s, r, _ = self.M.shape
        side_by_side = self.M.to(latent.dtype).permute(1, 0, 2).reshape(r, s * r)  # [M_1 ... M_s]
        each = (latent @ side_by_side).view(-1, s, r)  # row e: M_e^T h
        return (gates @ each).squeeze(1)  # (N, 1, s) @ (N, s, r)
