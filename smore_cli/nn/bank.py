"""The one equation of the flat methods: two matrix products, and a small core between them in rank space.

y = W x + b + scale * B core(A x, g)          g = router(x), or router(A x)

A (R_a, d_in): the down vectors of all experts, stacked.  B (d_out, R_b): their up vectors, stacked.

x --A--> latent (R_a) --core(., g)--> (R_b) --B--> + y      no loop over experts, no gather: top-k is a mask on g

A router on x has its rows in the same product as A: [h | z] = x [A; R]^T.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smore_cli.nn.context import current_context, heard
from smore_cli.nn.factored import Factored
from smore_cli.nn.grouped import add_grouped, grouping_pays
from smore_cli.nn.routed_block import routed_block
from smore_cli.nn.router import Router, Routing, report
from smore_cli.nn.selection import TopK
from smore_cli.nn.wide import Down

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from smore_cli.nn.router import RouterLoss

__all__ = ["BLOCK_EXPERTS", "Bank", "block", "fan"]

BLOCK_EXPERTS = {"A": (0, 0), "B": (0, 1)}
"""`expert_axes` of a bank whose experts have rows of A and columns of B to themselves."""


def block(latent: Tensor, gates: Tensor) -> Tensor:
    """Block core, z = [g_1 h_1; ...; g_s h_s]: every expert has its own rows of A and columns of B.

    Args:
        latent: (N, s r), expert by expert.
        gates: (N, 1, s).

    Returns:
        (N, s r).
    """
    s = gates.shape[-1]
    return (latent.view(len(latent), s, -1) * gates.transpose(1, 2)).flatten(1)  # (N, s, r) * (N, s, 1)


def fan(latent: Tensor, gates: Tensor) -> Tensor:
    """Fan core, z = [g_1 h; ...; g_s h]: all experts share A, each has its own columns of B.

    Args:
        latent: (N, r).
        gates: (N, 1, s).

    Returns:
        (N, s r).
    """
    return (gates.transpose(1, 2) * latent[:, None]).flatten(1)  # (N, s, 1) * (N, 1, r)


class Bank(Factored):
    """Stacked low-rank experts under one router; zero at initialisation because B = 0.

    Attributes:
        A: (R_a, d_in).
        B: (d_out, R_b).
        router: makes the gates; None: the core is given none.
        core: maps the latent (N, R_a) and the gates (N, G, s) to (N, R_b); a module where it has parameters.
        dropout: on the input of A, while training; a router on x sees x without it.
        losses: auxiliary losses of the router.
        sparse: whether a token's experts are so few that computing them by themselves pays on a CPU.
    """

    up_projections = frozenset({"B"})

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        down: int,
        up: int,
        router: Router,
        core: Callable[[Tensor, Tensor], Tensor] = block,
        scale: float = 1.0,
        dropout: float = 0.0,
        losses: Sequence[RouterLoss] = (),
        router_input: Literal["input", "latent"] = "input",
        expert_axes: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(down, d_in))
        self.B = nn.Parameter(torch.empty(d_out, up))
        self.router, self.core = router, core
        self.scale, self.dropout, self.losses = scale, dropout, tuple(losses)
        self.router_input = router_input
        self.expert_axes = expert_axes or {}
        self.sparse = self._picks_pay()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A as `nn.Linear` initialises, B = 0 (LoRA, section 4.1)."""
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def _picks_pay(self) -> bool:
        """Whether a token's experts are so few of so many ranks that they are better computed by themselves."""
        s, select = self.router.num_experts, self.router.select
        alone = type(self) is Bank and self.core is block and self.router_input == "input" and self.router.groups == 1
        return alone and isinstance(select, TopK) and grouping_pays(s, len(self.A) // s, select.k)

    @property
    def grouped(self) -> bool:
        """Whether picked experts are computed by themselves here (`grouped.py`): on a CPU, where it pays."""
        return self.sparse and self.A.device.type == "cpu"

    def down(self) -> Down:
        """A, and the router's rows where it reads x; these alone where picked experts are computed by themselves."""
        exact = (self.router.rows(),) if self.router_input == "input" else ()
        if self.grouped:
            return Down((), exact)
        return Down((self.A,), exact, dropout=self.dropout if self.training else 0.0)

    def middle(self, latent: Tensor) -> Tensor:
        """Maps A x (N, R_a), with the router's logits beside it where it reads x, to core(A x, gates) (N, R_b)."""
        if self._one_node():
            rows = self.A.shape[0]
            mixed, p, gates, picked = routed_block(latent, rows, self.router.select, fan=self.core is fan)
            if heard():  # one group
                picked = None if picked is None else picked[:, None]
                self._reported(Routing(latent[:, None, rows:], p[:, None], gates[:, None], picked, latent[:, :rows]))
            return mixed
        if self.router_input == "input":
            latent, logits = latent.split([self.A.shape[0], latent.shape[1] - self.A.shape[0]], 1)
            routing = self.router.route(logits)
        else:
            routing = self.router(latent)
        self._reported(routing, latent=latent)
        return self.mix(latent, routing)

    def _one_node(self) -> bool:
        """Whether everything between the wide products is what `routed_block` does."""
        router, context = self.router, current_context()
        plain = type(router) is Router and router.groups == 1 and self.router_input == "input"
        edited = context is not None and context.edit is not None
        return plain and self.core in (block, fan) and type(self).mix is Bank.mix and not edited

    def added(self, x: Tensor, y: Tensor, latent: Tensor) -> Tensor:
        """See `Factored.added`; of picked experts that are computed by themselves `latent` is the router's logits."""
        if not self.grouped:
            return super().added(x, y, latent)
        routing = self.router.route(latent)
        self._reported(routing)
        gates, ids = routing.gates[:, 0].topk(cast("TopK", self.router.select).k, dim=1)
        rows = F.dropout(x.reshape(-1, x.shape[-1]), self.dropout, self.training)
        return add_grouped(y, rows, self.A, self.B, gates, ids, num_experts=self.router.num_experts, scale=self.scale)

    def _reported(self, routing: Routing, **known: Tensor) -> None:
        """Tells the current context what was routed, and by whom; `known` are more attributes of the routing."""
        if heard():
            report(replace(routing, owner=self, **known), self, self.losses)

    def up(self) -> tuple[Tensor, Tensor | None]:
        """B."""
        return self.B, None

    def mix(self, latent: Tensor, routing: Routing) -> Tensor:
        """Returns core(latent, gates), (N, R_b)."""
        return self.core(latent, routing.gates)

    @property
    def constant(self) -> bool:
        """With one expert, whose gate is 1 whatever the router says."""
        return type(self.router) is Router and self.router.num_experts == 1 and self.core is block

    def silent_at_start(self) -> frozenset[str]:
        """While B = 0 only B has a gradient, and the router where a loss of its own reaches it."""
        reached = {"B"} | {name for name, _ in self.named_parameters() if self.losses and name.startswith("router.")}
        return frozenset(name for name, _ in self.named_parameters() if name not in reached) | self.without_choice()

    def without_choice(self) -> frozenset[str]:
        """The weight of a router with one expert."""
        return frozenset({"router.weight"} if self.router.num_experts == 1 else ())
