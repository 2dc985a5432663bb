"""What a router may do beside picking: soften its distribution, jitter its input, and keep experts from overflowing.

    logits z = R (x * noise) / temperature          noise ~ U(1 - jitter, 1 + jitter), while training

A capacity bounds how many tokens of one sequence an expert takes, in the order of their arrival (Switch Transformer,
section 2.2). A token that comes too late keeps its pick but gets the gate 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from smore_cli.nn.balance import masked_sum
from smore_cli.nn.context import current_context
from smore_cli.nn.router import Router, Routing
from smore_cli.nn.wide import without_autocast

if TYPE_CHECKING:
    from smore_cli.nn.context import AdapterContext
    from smore_cli.nn.router import RouterInit
    from smore_cli.nn.selection import Selector

__all__ = ["RouterZLoss", "SwitchRouter", "within_capacity"]


class SwitchRouter(Router):
    """A router that is noisy and bounded while training, and the plain one in evaluation.

    The capacity acts in training alone: cached decoding sees one token at a time and could not count those before it,
    so a model that drops tokens would answer otherwise with a cache than without.

    Attributes:
        temperature: divides the logits.
        jitter: relative size of the noise on the router's input; the experts see the input as it is.
        capacity: real tokens of one sequence (the last dimension but one of the features) an expert takes; None: all.
    """

    def __init__(
        self,
        features: int,
        num_experts: int,
        *,
        select: Selector | None = None,
        init: RouterInit = "kaiming",
        temperature: float = 1.0,
        jitter: float = 0.0,
        capacity: int | None = None,
    ) -> None:
        super().__init__(features, num_experts, select=select, init=init)
        self.temperature, self.jitter, self.capacity = temperature, jitter, capacity

    def forward(self, features: Tensor) -> Routing:
        """Routes (..., S, d) features; everything is computed in float32 or wider."""
        length = features.shape[-2] if features.dim() > 1 else 1
        with without_autocast(features.device):
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            if self.training and self.jitter > 0:
                features = features * torch.empty_like(features).uniform_(1 - self.jitter, 1 + self.jitter)
            logits = F.linear(features.flatten(0, -2), self.rows())
            return self._bounded(self.route(logits / self.temperature), length)

    def _bounded(self, routing: Routing, length: int) -> Routing:
        """Takes the tokens that come too late out of the gates; `length` is that of a row."""
        picked = routing.picked
        if not self.training or self.capacity is None or picked is None:
            return routing
        context = current_context()
        real = None if context is None else context.flat_mask(len(picked), picked.device)
        within = within_capacity(picked, real, length=length, capacity=self.capacity, context=context)
        return replace(routing, gates=routing.gates * within)


def within_capacity(
    picked: Tensor, real: Tensor | None, *, length: int, capacity: int, context: AdapterContext | None = None
) -> Tensor:
    """Returns which places in the queues of the experts are within the capacity, (N, G, s) bool.

    Args:
        picked: (N, G, s) bool, sequence by sequence.
        real: (N,) bool, the tokens that take a place; None: all.
        length: tokens of a row of the batch, padding included.
        capacity: how many places an expert has for each sequence.
        context: knows where documents share a row, each of which has queues of its own.
    """
    counted = picked if real is None else picked & real[:, None, None]
    place = counted.view(-1, length, *picked.shape[1:]).cumsum(1).view(picked.shape)  # own place included, from 1
    if context is not None and context.documents is not None and context.places is not None:
        start = context.places[:, 0].to(place.device)  # (D,)
        before = place[start] - counted[start].to(place.dtype)  # (D, G, s), taken by the documents before it in the row
        place = place - before[context.documents.reshape(-1).clamp_min(0).to(place.device)]
    return place <= capacity


@dataclass(frozen=True)
class RouterZLoss:
    """coefficient * mean of logsumexp(z)^2 over real tokens, which keeps logits small (the z-loss of ST-MoE).

    Sums: row 0 squared logsumexp, row 1 the number of decisions.
    """

    coefficient: float

    def sums(self, routing: Routing, context: AdapterContext) -> Tensor:
        """Returns (2, 1)."""
        squares = routing.logits.logsumexp(-1, keepdim=True).square()  # (N, G, 1)
        mask = context.flat_mask(len(squares), squares.device)
        return torch.stack([masked_sum(row, mask) for row in (squares, torch.ones_like(squares))])

    def __call__(self, sums: Tensor) -> Tensor:
        """Maps (..., 2, 1) to (...); 0 where no decision was counted."""
        return self.coefficient * sums[..., 0, 0] / sums[..., 1, 0].clamp_min(1)
