"""Routings of given logits, and the sums and values of losses on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from smore_cli.nn import AdapterContext
from smore_cli.nn.router import Routing

if TYPE_CHECKING:
    from torch import Tensor

    from smore_cli.nn.router import RouterLoss
    from smore_cli.nn.selection import Selector


def routing_of(logits: Tensor, select: Selector) -> Routing:
    """Routes N tokens with logits (N, s)."""
    probabilities = torch.softmax(logits[:, None], -1)
    gates, picked = select(probabilities)
    return Routing(logits[:, None], probabilities, gates, picked)


def sums_of(loss: RouterLoss, logits: Tensor, select: Selector, mask: Tensor | None = None) -> Tensor:
    with AdapterContext(token_mask=mask) as context:
        return loss.sums(routing_of(logits, select), context)


def value_of(loss: RouterLoss, logits: Tensor, select: Selector, mask: Tensor | None = None) -> Tensor:
    """The loss of one router."""
    return loss(sums_of(loss, logits, select, mask)[None]).sum()


def random_logits(n: int, s: int, seed: int = 0, scale: float = 1.5) -> Tensor:
    return scale * torch.randn(n, s, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
