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
from torch.nn import functional as F

from smore_cli.nn.router import Router, Routing

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

    def forward(self, features: Tensor) -> Routing:
        """Routes (N, d) features."""
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            votes = F.linear(features, self.weight).view(-1, self.groups, self.num_experts).softmax(-1)  # (N, K, s)
            probabilities = votes if self.main is None else self.main(features).probabilities @ votes  # (N, 1, s)
            gates, picked = self.select(probabilities)
            logits = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
        return Routing(logits, probabilities, gates, picked)
