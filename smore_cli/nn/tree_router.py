"""The top-down router of a tree (S'MoRE sections 3.2, B.1): who are the children of whom, and with which weights.

For a parent reached by the path (n_{L-1}, ..., n_{l+1}) and an expert n of pool l:

    u   = [D x + delta; key(n_{L-1}); ...; key(n_{l+1})]        the token, then its chosen ancestors
    z_n = <key_n, MLP_l(u)>                                     children: the f_l largest z

The first layer of MLP_l is linear in u, so it is never given the concatenation: the part of D x is one small product,
and what each possible ancestor contributes is a table of s rows, added by a one-hot product (a gather whose backward
pass is deterministic on every device).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smore_cli.nn.balance import ImportanceLoadLoss, SwitchBalanceLoss
from smore_cli.nn.router import Routing, report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smore_cli.nn.router import RouterLoss

__all__ = ["Activation", "Gate", "GateWeights", "Picks", "TreeRouter", "activation_module"]

Gate = Literal["dense", "switch", "noisy_topk"]
GateWeights = Literal["released", "selected", "pool"]
Score = Literal["dot", "cosine"]
Activation = Literal["tanh", "relu", "identity", "prelu"]

NOISE_FLOOR = 0.01  # keeps the noise of a noisy gate from vanishing


class PReLU(nn.PReLU):
    """One learnable slope, cast to its input's dtype as every adapter parameter is (torch's refuses mixed dtypes)."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps any shape to itself."""
        return F.prelu(x, self.weight.to(x.dtype))


def activation_module(name: Activation) -> nn.Module:
    """Returns a fresh activation; `prelu` has one learnable slope."""
    modules: dict[str, type[nn.Module]] = {
        "tanh": nn.Tanh,
        "relu": nn.ReLU,
        "identity": nn.Identity,
        "prelu": PReLU,
    }
    return modules[name]()


@dataclass(frozen=True)
class Picks:
    """The children of every parent of one level; F = F_{l+1} parents, f children each, s experts.

    Attributes:
        one_hot: (N, F, f, s) which expert each child is; None for a dense gate, whose children are all experts in
        order. weights: (N, F, f) alpha, the weight of each child.
    """

    one_hot: Tensor | None
    weights: Tensor

    @property
    def gates(self) -> Tensor:
        """(N, F, s) the weights laid out by expert, 0 where one was not picked."""
        if self.one_hot is None:
            return self.weights
        return (self.weights.unsqueeze(-2) @ self.one_hot).squeeze(-2)

    @property
    def ids(self) -> Tensor:
        """(N, F, f) int64, which expert each child is."""
        if self.one_hot is None:
            return torch.arange(self.weights.shape[-1], device=self.weights.device).expand(self.weights.shape)
        return self.one_hot.argmax(-1)

    def gather(self, per_expert: Tensor) -> Tensor:
        """Picks rows (N, F, f, c) for the children out of one row an expert, (N, s, c) or a table (s, c)."""
        n, parents, children = self.weights.shape
        if self.one_hot is None:
            rows = per_expert if per_expert.dim() == 2 else per_expert[:, None]
            return rows.expand(n, parents, children, per_expert.shape[-1])
        if per_expert.dim() == 2:
            return self.one_hot @ per_expert
        flat = self.one_hot.flatten(1, 2).to(per_expert.dtype)  # (N, F f, s)
        return (flat @ per_expert).view(n, parents, children, per_expert.shape[-1])


class LevelRouter(nn.Module):
    """Keys and MLP of one pool.

    Attributes:
        mlp: Linear(in_l, m) - activation - Linear(m, m).
        keys: (s, m) one row an expert.
        noise: (s, in_l) noise weights N_l, only for a noisy gate.
    """

    def __init__(self, in_features: int, num_experts: int, key_dim: int, activation: Activation, noisy: bool) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_features, key_dim), activation_module(activation), nn.Linear(key_dim, key_dim)
        )
        self.keys = nn.Parameter(torch.rand(num_experts, key_dim))
        self.noise = nn.Parameter(torch.zeros(num_experts, in_features)) if noisy else None

    def input_weight(self) -> Tensor:
        """Returns (m + s or m, in_l): every row that is applied to u, the MLP's first layer and the noise weights."""
        weight = cast("Tensor", self.mlp[0].weight)
        return weight if self.noise is None else torch.cat([weight, self.noise])

    def queries(self, pre: Tensor) -> tuple[Tensor, Tensor | None]:
        """Splits u's products (..., m + s or m) into the query (..., m) and the noise scale (..., s) or None."""
        m = self.keys.shape[1]
        query = self.mlp[2](self.mlp[1](pre[..., :m] + cast("Tensor", self.mlp[0].bias)))
        return query, None if self.noise is None else F.softplus(pre[..., m:]) + NOISE_FLOOR


class TreeRouter(nn.Module):
    """Routes every token from the root down to the leaves.

    Attributes:
        down: D and delta, the token's own part of the router input.
        levels: one `LevelRouter` a pool, index 0 = leaves.
    """

    def __init__(
        self,
        d_in: int,
        *,
        num_experts: Sequence[int],
        fanout: Sequence[int],
        down_dim: int,
        key_dim: Sequence[int],
        gate: Gate,
        score: Score,
        gate_weights: GateWeights,
        activation: Activation,
        aux_coefficient: float,
    ) -> None:
        super().__init__()
        self.num_experts, self.fanout, self.gate, self.score = list(num_experts), list(fanout), gate, score
        self.gate_weights = gate_weights
        self.aux_coefficient = aux_coefficient
        self.down = nn.Linear(d_in, down_dim)
        self.levels = nn.ModuleList(
            LevelRouter(down_dim + sum(key_dim[level + 1 :]), s, key_dim[level], activation, gate == "noisy_topk")
            for level, s in enumerate(num_experts)
        )

    def forward(self, x_down: Tensor, owner: nn.Module) -> list[Picks]:
        """Returns the picks of every level, index 0 = leaves.

        Args:
            x_down: (N, d_down) the token's part of the router input, D x + delta; at least float32.
            owner: the adapter, named in the routing records.
        """
        width = x_down.shape[1]
        # What is known of u's products so far, for each level not routed yet: (N, F, m + s or m).
        pre = [F.linear(x_down, level.input_weight()[:, :width])[:, None] for level in self._levels()]
        picks: list[Picks] = []
        column = width  # where in u the key of the level being routed will stand
        for l in reversed(range(len(self.levels))):
            level = self._levels()[l]
            keys = F.normalize(level.keys, dim=-1) if self.score == "cosine" else level.keys
            query, noise_scale = level.queries(pre[l])
            if self.score == "cosine":
                query = F.normalize(query, dim=-1)
            logits = query @ keys.t()  # (N, F, s)
            picked = self._pick(l, logits, noise_scale, owner)
            picks.insert(0, picked)
            for below in range(l):
                table = keys @ self._levels()[below].input_weight()[:, column : column + keys.shape[1]].t()  # (s, ...)
                pre[below] = (pre[below][:, :, None] + picked.gather(table)).flatten(1, 2)
            column += keys.shape[1]
        return picks

    def reached_by_loss(self) -> frozenset[str]:
        """Names of the parameters that the balance loss moves; it is constant where all experts are picked."""
        if self.gate == "dense" or self.aux_coefficient == 0:
            return frozenset()
        lossy = {l for l, (f, s) in enumerate(zip(self.fanout, self.num_experts, strict=True)) if f < s}
        found = set()
        for name, _ in self.named_parameters():
            part, _, rest = name.partition(".")
            if part == "down":
                reached = bool(lossy)
            else:  # the keys of a level are also inputs of the levels below
                level, _, inner = rest.partition(".")
                reached = int(level) in lossy or (inner == "keys" and any(l < int(level) for l in lossy))
            found |= {name} if reached else set()
        return frozenset(found)

    def draw_noise(self, like: Tensor) -> Tensor:
        """Standard normal noise for a noisy gate's logits."""
        return torch.randn_like(like)

    def _levels(self) -> list[LevelRouter]:
        return cast("list[LevelRouter]", list(self.levels))

    def _pick(self, l: int, logits: Tensor, noise_scale: Tensor | None, owner: nn.Module) -> Picks:
        """Turns the logits (N, F, s) of level l into picks, and records what the balance loss needs."""
        f = self.fanout[l]
        noisy = logits
        if noise_scale is not None and self.training:
            noisy = logits + self.draw_noise(logits) * noise_scale
        if self.gate == "dense":
            picked = Picks(None, torch.softmax(logits, -1))
            report(Routing(logits, picked.weights, picked.weights), owner, level=l, pooled=True)
            return picked
        values, ids = noisy.topk(f, dim=-1)
        one_hot = F.one_hot(ids, logits.shape[-1]).to(logits.dtype)
        probabilities = torch.softmax(noisy, -1)
        picked = Picks(one_hot, self._weights(values, probabilities, ids))
        routing = Routing(noisy, probabilities, picked.gates, one_hot.sum(2))
        loss: RouterLoss = SwitchBalanceLoss(self.aux_coefficient)
        if noise_scale is not None:
            loss = ImportanceLoadLoss(self.aux_coefficient)
            if self.training:
                routing = replace(routing, smooth_load=_smooth_load(logits, noisy, noise_scale, f))
        report(routing, owner, [loss], level=l, pooled=True)
        return picked

    def _weights(self, values: Tensor, probabilities: Tensor, ids: Tensor) -> Tensor:
        """The weights (N, F, f) of the picked children, by the rule `gate_weights`."""
        if self.gate_weights == "pool":
            return probabilities.gather(-1, ids)
        if self.gate_weights == "selected" or values.shape[-1] > 1:
            return torch.softmax(values, -1)
        # A single child, as released: the probability itself for switch, the raw noisy score for noisy_topk.
        return probabilities.gather(-1, ids) if self.gate == "switch" else values


def _smooth_load(clean: Tensor, noisy: Tensor, scale: Tensor, f: int) -> Tensor:
    """P(expert is picked) under fresh noise for it alone, (N, F, s) (Shazeer et al. 2017, eq. 9)."""
    top = noisy.topk(f + 1, dim=-1).values
    last_in, first_out = top[..., f - 1 : f], top[..., f:]
    threshold = torch.where(noisy > first_out, first_out, last_in)
    return 0.5 * (1 + torch.erf((clean - threshold) / (scale * math.sqrt(2))))
