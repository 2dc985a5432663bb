"""How the released code of three papers computes an adapted linear map, from the description of what it does.

    MoLA      the experts in turn: the tokens that picked one are looked up, sent through it and added to the output
    LoRAMoE   the experts in turn, every token through each, each output weighted and added
    S'MoRE    "subgraph": each expert of a pool times each token, as a product of one small matrix and one vector each;
              the outputs are looked up for every child of every parent, then activated and weighted there

They take the parameters of our adapters, so that the outputs must agree. What they report to auxiliary losses is left
out, which favours them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from smore_cli.nn.adapted import AdaptedModule
    from smore_cli.nn.bank import Bank
    from smore_cli.nn.tree import Tree


class Released(nn.Module):
    """A frozen linear map and its adapter, computed as the released code does; shares all parameters."""

    def __init__(self, adapted: AdaptedModule) -> None:
        super().__init__()
        self.base, self.adapter = adapted.base, adapted.adapter("default")

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., d_in) to (..., d_out)."""
        y = self.base(x)
        return (y.flatten(0, -2) + self.update(x.flatten(0, -2), y.shape[-1])).view_as(y)

    def update(self, x: Tensor, d_out: int) -> Tensor:
        """Returns what is added, (N, d_out)."""
        raise NotImplementedError


class MoLALoop(Released):
    """Tokens are gathered expert by expert."""

    adapter: Bank

    def update(self, x: Tensor, d_out: int) -> Tensor:
        """Top-k of a softmax, renormalised; then the loop."""
        bank: Any = self.adapter
        s = bank.router.num_experts
        probabilities = torch.softmax(F.linear(x.float(), bank.router.weight), -1)
        weights, picked = probabilities.topk(bank.router.select.k, -1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        out = x.new_zeros(len(x), d_out)
        for A, B, e in zip(bank.A.chunk(s), bank.B.chunk(s, 1), range(s), strict=True):
            tokens, place = torch.where(picked == e)
            own = F.linear(F.linear(x[tokens], A.to(x.dtype)), B.to(x.dtype)) * bank.scale
            out = out.index_add(0, tokens, own * weights[tokens, place, None])
        return out


class LoRAMoELoop(Released):
    """Every token goes through every expert."""

    adapter: Bank

    def update(self, x: Tensor, d_out: int) -> Tensor:
        """A softmax over all experts; then the loop."""
        bank: Any = self.adapter
        s = bank.router.num_experts
        weights = torch.softmax(F.linear(x.float(), bank.router.weight), -1).to(x.dtype)
        out = x.new_zeros(len(x), d_out)
        for A, B, e in zip(bank.A.chunk(s), bank.B.chunk(s, 1), range(s), strict=True):
            own = F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)) * bank.scale
            out = out + own * weights[:, e, None]
        return out


class SubgraphTree(Released):
    """S'MoRE's default mode; for the switch gate and activation position `all`."""

    adapter: Tree

    def update(self, x: Tensor, d_out: int) -> Tensor:
        """Routes from the root down, then propagates from the leaves up."""
        tree: Any = self.adapter
        picks = self._route(tree, x)
        state: Tensor | None = None
        for l, (ids, weights) in enumerate(picks):  # ids (N, F, f)
            experts = self._experts(tree, l, x)  # (N, s, d)
            chosen = ids.flatten(1)[..., None].expand(-1, -1, experts.shape[-1])
            children = experts.gather(1, chosen).view(*ids.shape, -1)  # (N, F, f, d)
            if state is not None:
                carried = F.linear(state, tree.W[l - 1].to(x.dtype), tree.w[l - 1].to(x.dtype))
                children = children + carried.view_as(children)
            state = (tree.act[l](children) * weights[..., None].to(x.dtype)).sum(2)  # (N, F, d)
        assert state is not None
        return F.linear(state[:, 0], tree.P.to(x.dtype), tree.p.to(x.dtype))

    @staticmethod
    def _experts(tree: Any, l: int, x: Tensor) -> Tensor:
        """One matrix times one vector for each expert and token: (1, s, r, d) @ (N, 1, d, 1), copies and all."""
        A, a, B, b = (getattr(tree, name)[l].to(x.dtype) for name in "AaBb")
        latent = torch.matmul(A[None], x[:, None, :, None]) + a[None, ..., None]  # (N, s, r, 1)
        return ((torch.matmul(B[None], latent) + b[None, ..., None]) * tree.level_scale[l]).squeeze(-1)

    @staticmethod
    def _route(tree: Any, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Returns the children of every parent and their weights, level by level, leaves first."""
        router = tree.router
        u = router.down(x.float())[:, None]  # (N, F, in)
        picks: list[tuple[Tensor, Tensor]] = []
        for l in reversed(range(len(router.levels))):
            level, f = router.levels[l], router.fanout[l]
            probabilities = torch.softmax(level.mlp(u) @ level.keys.t(), -1)
            weights, ids = probabilities.topk(f, -1)
            picks.insert(0, (ids, weights / weights.sum(-1, keepdim=True)))
            parents = u.unsqueeze(2).expand(-1, -1, f, -1)
            u = torch.cat([parents, level.keys[ids]], -1).flatten(1, 2)  # the parent's input, and the child's key
        return picks


RELEASED = {"mola": MoLALoop, "loramoe": LoRAMoELoop, "smore": SubgraphTree}
