"""LoRA, one low-rank update.

    y = W x + b + scale * B A x            A: (r, d_in)   B: (d_out, r)

The scale multiplies the r numbers of the latent, never the wide output.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smore_cli.nn.adapted import Adapter, add_projection

__all__ = ["LowRank"]


class LowRank(Adapter):
    """B A x scaled, zero at initialisation.

    Attributes:
        lora_A: (r, d_in) down-projection.
        lora_B: (d_out, r) up-projection.
        scale: factor on the r numbers of the latent, never on the wide output.
        dropout: probability of dropping an element of x before A, while training.
    """

    def __init__(self, d_in: int, d_out: int, *, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(rank, d_in))
        self.lora_B = nn.Parameter(torch.empty(d_out, rank))
        self.scale = scale
        self.dropout = dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A as `nn.Linear` initialises, B = 0 (LoRA, section 4.1)."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def silent_at_start(self) -> frozenset[str]:
        """While B = 0, A has no gradient."""
        return frozenset({"lora_A"})

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns y + scale * B A x; see `Adapter.forward`."""
        rows = x.reshape(-1, x.shape[-1])  # (N, d_in)
        if self.dropout > 0:
            rows = F.dropout(rows, self.dropout, self.training)
        latent = F.linear(rows, self.lora_A.to(x.dtype)) * self.scale  # (N, r)
        return add_projection(y, latent, self.lora_B)
