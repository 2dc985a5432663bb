"""Several routers that decide together, weighted by a router of their own (Mixture of Routers).

p(x) = sum_k w_k(x) softmax(G_k x)              w = softmax(G_0 x)

       +--G_1--> softmax --+
    x -+  ...              +--( weighted by w )--> p --select--> gates
       +--G_K--> softmax --+
       +--G_0--> softmax --> w
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from smore_cli.nn.router import Router, Routing, softmax

if TYPE_CHECKING:
    from torch import Tensor

    from smore_cli.nn.selection import Selector

__all__ = ["MixtureRouter"]


class MixtureRouter(Router):
    """A router whose distribution is a mixture of those of K sub-routers; everything in float32 or wider.

    Attributes:
        weight: (K s, d) the sub-routers, one after the other.
        main: weighs them; None where there is only one.
    """

    def __init__(self, features: int, num_experts: int, *, num_routers: int, select: Selector | None = None) -> None:
        super().__init__(features, num_experts, groups=num_routers, select=select)
        self.main = Router(features, num_routers) if num_routers > 1 else None

    def rows(self) -> Tensor:
        """The sub-routers' rows, then those of the main router."""
        return self.weight if self.main is None else torch.cat([self.weight, self.main.weight])

    def decide(self, logits: Tensor) -> Routing:
        """Routes by the logits of all routers, (N, K s + K), or (N, s) where there is one."""
        votes = softmax(logits[:, : len(self.weight)].unflatten(1, (self.groups, self.num_experts)))  # (N, K, s)
        if self.main is None:
            probabilities = votes
        else:
            probabilities = self.main.route(logits[:, len(self.weight) :]).probabilities @ votes  # (N, 1, s)
        gates, picked = self.select(probabilities)
        logits = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
        return Routing(logits, probabilities, gates, picked)
