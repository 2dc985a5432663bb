"""The top-down router of a tree (S'MoRE sections 3.2, B.1): who are the children of whom, and with which weights.

For a parent reached by the path (n_{L-1}, ..., n_{l+1}) and an expert n of pool l:

    u   = [D x + delta; key(n_{L-1}); ...; key(n_{l+1})]        the token, then its chosen ancestors
    z_n = <key_n, MLP_l(u)>                                     children: the f_l largest z

The first layer of MLP_l is linear in u, so it is never given the concatenation: the part of D x is one product for all
levels together, and what each possible ancestor contributes is a table of s rows. The second layer and the keys are one
product too, z = (K W_2) act(.) + K b_2, unless both are normalised in between (`cosine`).

Everything of a level is laid out (experts or children, f_{l+1}, ..., f_{L-1}, N): tokens innermost, the path of the
parent before them. A softmax over experts is then a sum of contiguous rows, and what belongs to the token alone is
broadcast over its nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smore_cli.nn.balance import ImportanceLoadLoss, SwitchBalanceLoss
from smore_cli.nn.context import current_context, heard
from smore_cli.nn.router import Routing, report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smore_cli.nn.context import AdapterContext
    from smore_cli.nn.router import RouterLoss

__all__ = ["Activation", "Choice", "Gate", "GateWeights", "Picks", "TreeRouter", "activation_module", "one_hot_rows"]

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


class Choice(NamedTuple):
    """What a level's router decided: all that must be known to compute its weights again.

    Attributes:
        chosen: (f, f_{l+1}, ..., f_{L-1}, N) int64 which expert each child is.
        noise: (s, f_{l+1}, ..., f_{L-1}, N) the draws of a noisy gate in training.
    """

    chosen: Tensor
    noise: Tensor | None = None


@dataclass(frozen=True)
class Picks:
    """The children of every parent of one level; F = F_{l+1} parents, f children each, s experts.

    Attributes:
        choice: which they are.
        alpha: (f, f_{l+1}, ..., f_{L-1}, N) the weight of each.
        logits, probabilities: (s, f_{l+1}, ..., f_{L-1}, N) scores (noise included) and their softmax.
        smooth_load: same shape, how likely each expert was to be picked, of a noisy gate in training.
    """

    choice: Choice
    alpha: Tensor
    logits: Tensor
    probabilities: Tensor
    smooth_load: Tensor | None = None

    @property
    def chosen(self) -> Tensor:
        """(f, f_{l+1}, ..., f_{L-1}, N) int64 which expert each child is."""
        return self.choice.chosen

    @property
    def ids(self) -> Tensor:
        """(N, F, f) int64, which expert each child is; the parents in order of their path, the root's child first."""
        return _by_token(self.chosen)

    @property
    def weights(self) -> Tensor:
        """(N, F, f) alpha, the weight of each child."""
        return _by_token(self.alpha)

    @property
    def gates(self) -> Tensor:
        """(N, F, s) the weights laid out by expert, 0 where one was not picked."""
        return _by_token(self.spread(self.alpha))

    def spread(self, values: Tensor) -> Tensor:
        """Lays one value a child out by expert, (s, f_{l+1}, ..., f_{L-1}, N), 0 where one was not picked."""
        return torch.zeros_like(self.logits, dtype=values.dtype).scatter(0, self.chosen, values)

    def routing(self, owner: nn.Module, *, dense: bool) -> Routing:
        """Returns what is reported of this level."""
        picked = None
        if not dense:
            picked = _by_token(torch.zeros_like(self.logits, dtype=torch.bool).scatter_(0, self.chosen, True))
        smooth = None if self.smooth_load is None else _by_token(self.smooth_load)
        return Routing(
            _by_token(self.logits), _by_token(self.probabilities), self.gates, picked, owner=owner, smooth_load=smooth
        )


def one_hot_rows(ids: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    """Returns (ids.numel(), num_experts): a product with it is a gather whose gradient is a product as well."""
    return torch.eye(num_experts, dtype=dtype, device=ids.device).index_select(0, ids.flatten())


def _by_token(values: Tensor) -> Tensor:
    """Lays (c, f_{l+1}, ..., f_{L-1}, N) out as (N, F, c)."""
    turned = values.permute(*reversed(range(values.dim())))
    return turned.reshape(len(turned), -1, turned.shape[-1])


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

    def input_bias(self) -> Tensor:
        """Returns (m + s or m,), what is added to these products; noise has none."""
        bias = cast("Tensor", self.mlp[0].bias)
        return bias if self.noise is None else F.pad(bias, (0, len(self.noise)))

    def scores(self, pre: Tensor, unit_keys: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Turns u's products into the scores of all experts.

        Args:
            pre: (..., N, m + s or m).
            unit_keys: (s, m) keys of length one, to compare with queries of length one; None: a plain product.

        Returns:
            (s, ..., N) scores, and as many noise scales or None.
        """
        m = self.keys.shape[1]
        hidden = self.mlp[1](pre[..., :m]).flatten(0, -2)
        last = cast("nn.Linear", self.mlp[2])
        if unit_keys is None:
            logits = torch.addmm((self.keys @ last.bias)[:, None], self.keys @ last.weight, hidden.t())
        else:
            logits = unit_keys @ F.normalize(last(hidden), dim=-1).t()
        scale = None if self.noise is None else F.softplus(pre[..., m:].movedim(-1, 0)) + NOISE_FLOOR
        return logits.view(-1, *pre.shape[:-1]), scale


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
        self.gate_weights, self.activation = gate_weights, activation
        self.aux_coefficient = aux_coefficient
        self.down = nn.Linear(d_in, down_dim)
        self.levels = nn.ModuleList(
            LevelRouter(down_dim + sum(key_dim[level + 1 :]), s, key_dim[level], activation, gate == "noisy_topk")
            for level, s in enumerate(num_experts)
        )

    def forward(self, x_down: Tensor, again: Sequence[Choice] | None = None) -> list[Picks]:
        """Walks down the tree and returns the picks of every level, index 0 = leaves.

        Args:
            x_down: (N, d_down) the token's part of the router input, D x + delta; at least float32.
            again: what was picked before for the same tokens: nothing is picked or drawn anew, only weighted.
        """
        levels, width, context = cast("list[LevelRouter]", list(self.levels)), x_down.shape[1], current_context()
        edit = None if context is None else context.edit
        # Columns of a level's first products: of the token, then of the key of each ancestor, the root's child first.
        columns = [width, *(level.keys.shape[1] for level in reversed(levels))]
        weights = [level.input_weight().split(columns[: len(levels) - l], dim=1) for l, level in enumerate(levels)]
        # What is known of u's products so far, for each level not routed yet: (f_{l+1}, .., N, m + s or m).
        own = F.linear(x_down, torch.cat([w[0] for w in weights]), torch.cat([level.input_bias() for level in levels]))
        pre = list(own.split([len(w[0]) for w in weights], dim=1))
        picks: list[Picks] = []
        for depth, l in enumerate(reversed(range(len(levels))), start=1):
            unit_keys = F.normalize(levels[l].keys, dim=-1) if self.score == "cosine" else None
            logits, noise_scale = levels[l].scores(pre[l], unit_keys)
            picked = self._pick(l, logits, noise_scale, None if again is None else again[l])
            if edit is not None:
                picked = edit.picks(self, l, picked)
            picks.insert(0, picked)
            for below in range(l):
                table = (levels[l].keys if unit_keys is None else unit_keys) @ weights[below][depth].t()  # (s, ..)
                known = one_hot_rows(picked.chosen, len(table), table.dtype) @ table
                pre[below] = pre[below] + known.view(*picked.chosen.shape, -1)
        return picks

    def report(self, picks: Sequence[Picks], owner: nn.Module) -> None:
        """Tells the current context of every level, the root's children first; `owner` is the adapter."""
        if not heard():
            return
        context = cast("AdapterContext", current_context())
        losses: list[RouterLoss] = []
        if self.gate != "dense":
            kind = ImportanceLoadLoss if self.gate == "noisy_topk" else SwitchBalanceLoss
            losses = [kind(self.aux_coefficient)]
        # What is only observed saves no tensor: a checkpoint's recomputation, which nobody observes, saves none either.
        with torch.set_grad_enabled(context.aux and torch.is_grad_enabled()):
            for level in reversed(range(len(picks))):
                routing = picks[level].routing(owner, dense=self.gate == "dense")
                chosen = None if context.observe is None else picks[level].ids
                report(routing, owner, losses, level=level, pooled=True, chosen=chosen)

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
        """Standard normal noise for a noisy gate's scores (N, F, s)."""
        return torch.randn_like(like)

    def _pick(self, l: int, logits: Tensor, noise_scale: Tensor | None, again: Choice | None) -> Picks:
        """Turns the scores (s, .., N) of level l into picks; where they are known, into their weights."""
        f, noise, smooth_load = self.fanout[l], None, None
        if self.gate == "dense":
            probabilities = torch.softmax(logits, 0)
            everyone = torch.arange(len(logits), device=logits.device)
            chosen = everyone.view(-1, *(1 for _ in logits.shape[1:])).expand_as(logits)
            return Picks(Choice(chosen), probabilities.clone(), logits, probabilities)
        noisy = logits
        if noise_scale is not None and self.training:
            noise = self._noise(logits) if again is None else cast("Tensor", again.noise)
            noisy = logits + noise * noise_scale
            smooth_load = _smooth_load(logits, noisy, noise_scale, f)
        chosen = noisy.detach().topk(f, dim=0).indices if again is None else again.chosen
        probabilities = torch.softmax(noisy, 0)
        alpha = self._weights(noisy, probabilities, chosen)
        return Picks(Choice(chosen, noise), alpha, noisy, probabilities, smooth_load)

    def _noise(self, logits: Tensor) -> Tensor:
        """Draws for the scores (s, f_{l+1}, .., f_{L-1}, N), laid out as they are."""
        turned = logits.detach().permute(*reversed(range(logits.dim())))  # (N, f_{L-1}, .., s)
        drawn = self.draw_noise(turned.reshape(len(turned), -1, len(logits)))
        return drawn.view(turned.shape).permute(*reversed(range(logits.dim())))

    def _weights(self, noisy: Tensor, probabilities: Tensor, chosen: Tensor) -> Tensor:
        """The weights (f, .., N) of the picked children, by the rule `gate_weights`."""
        if self.gate_weights == "pool":
            return probabilities.gather(0, chosen)
        if self.gate_weights == "selected" or len(chosen) > 1:
            return torch.softmax(noisy.gather(0, chosen), 0)
        # A single child, as released: the probability itself for switch, the raw noisy score for noisy_topk.
        return (probabilities if self.gate == "switch" else noisy).gather(0, chosen)


def _smooth_load(clean: Tensor, noisy: Tensor, scale: Tensor, f: int) -> Tensor:
    """P(expert is picked) under fresh noise for it alone, (s, .., N) (Shazeer et al. 2017, eq. 9)."""
    top = noisy.topk(f + 1, dim=0).values
    last_in, first_out = top[f - 1 : f], top[f:]
    threshold = torch.where(noisy > first_out, first_out, last_in)
    return 0.5 * (1 + torch.erf((clean - threshold) / (scale * math.sqrt(2))))
