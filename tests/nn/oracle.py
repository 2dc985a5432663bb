"""S'MoRE written straight from its equations: one token, one node, one expert at a time, in float64.

Slow and plain on purpose, and it shares no code with the package. It reads parameters by the package's names and
differentiates by autograd. Conventions: pool 0 holds the leaves; a node is the path of the experts chosen above it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from smore_cli.methods.smore import SMoREConfig

Path = tuple[int, ...]  # slots, not experts: (1, 0) is the first child of the root's second child


@dataclass
class Node:
    """One routing decision: the children of one parent, for one token."""

    ids: list[int]
    weights: list[Tensor]
    probabilities: Tensor  # (s,) softmax over the pool
    load: Tensor  # (s,) smooth count


@dataclass
class Oracle:
    """The forward pass of one adapter.

    Attributes:
        config: which variant.
        params: parameters by the package's names. With a shared pool, entries `A.1`, `A.2` ... untie the levels.
        noise: (token, level, path) -> (s,) standard normal draws; None: evaluation.
    """

    config: SMoREConfig
    params: Mapping[str, Tensor]
    noise: Callable[[int, int, Path], Tensor] | None = None
    nodes: dict[tuple[int, int, Path], Node] = field(default_factory=dict)

    @property
    def levels(self) -> int:
        return len(self.config.rank)

    def pool(self, name: str, level: int) -> Tensor:
        key = f"{name}.{level}"
        return self.params[key] if key in self.params else self.params[f"{name}.0"]

    def expert(self, level: int, n: int, x: Tensor) -> Tensor:
        """e_l^n(x) = c_l (B (A x + a) + b)."""
        A, a, B, b = (self.pool(name, level)[n] for name in "AaBb")
        scale = 1.0 if self.config.alpha is None else self.config.alpha[level] / self.config.rank[level]
        return scale * (B @ (A @ x + a) + b)

    def activate(self, kind: str, slope: str, x: Tensor) -> Tensor:
        if kind == "tanh":
            return torch.tanh(x)
        if kind == "relu":
            return torch.where(x > 0, x, torch.zeros_like(x))
        return torch.where(x > 0, x, self.params[slope] * x) if kind == "prelu" else x

    def sigma(self, level: int, x: Tensor) -> Tensor:
        return self.activate(self.config.activation, f"act.{level}.weight", x)

    def route(self, token: int, x: Tensor) -> None:
        """Walks from the root down and fills `nodes`."""
        c, p = self.config, self.params
        cosine = (c.score or ("cosine" if c.gate == "noisy_topk" else "dot")) == "cosine"
        x_down = p["router.down.weight"] @ x + p["router.down.bias"]
        frontier: list[tuple[Path, Tensor]] = [((), x_down)]
        for level in reversed(range(self.levels)):
            name = f"router.levels.{level}"
            keys = p[f"{name}.keys"]
            if cosine:
                keys = torch.stack([key / key.norm() for key in keys])
            below = []
            for path, u in frontier:
                hidden = p[f"{name}.mlp.0.weight"] @ u + p[f"{name}.mlp.0.bias"]
                hidden = self.activate(c.router_activation, f"{name}.mlp.1.weight", hidden)
                query = p[f"{name}.mlp.2.weight"] @ hidden + p[f"{name}.mlp.2.bias"]
                if cosine:
                    query = query / query.norm()
                clean = torch.stack([key @ query for key in keys])
                node = self.decide(token, level, path, u, clean)
                self.nodes[token, level, path] = node
                below += [((*path, slot), torch.cat([u, keys[n]])) for slot, n in enumerate(node.ids)]
            frontier = below

    def decide(self, token: int, level: int, path: Path, u: Tensor, clean: Tensor) -> Node:
        """Picks children and weighs them (dossier, table of section 1.2)."""
        c, s = self.config, self.config.num_experts[level]
        noisy, spread = clean, None
        if c.gate == "noisy_topk" and self.noise is not None:
            spread = torch.log1p(torch.exp(self.params[f"router.levels.{level}.noise"] @ u)) + 0.01
            noisy = clean + self.noise(token, level, path) * spread
        share = torch.exp(noisy) / torch.exp(noisy).sum()
        if c.gate == "dense":
            return Node(list(range(s)), list(share), share, torch.zeros(s, dtype=u.dtype))
        order = sorted(range(s), key=lambda n: -float(noisy[n].detach()))
        f = c.fanout[level]
        ids = order[:f]
        total = sum(torch.exp(noisy[n]) for n in ids)
        if c.gate_weights == "pool":
            weights = [share[n] for n in ids]
        elif c.gate_weights == "selected" or f > 1:
            weights = [torch.exp(noisy[n]) / total for n in ids]
        else:
            weights = [share[ids[0]] if c.gate == "switch" else noisy[ids[0]]]
        load = torch.zeros(s, dtype=u.dtype)
        if c.gate == "noisy_topk" and spread is None:
            for n, weight in zip(ids, weights, strict=True):
                load[n] = float(weight > 0)
        elif c.gate == "noisy_topk":
            out, last = noisy[order[f]], noisy[order[f - 1]]
            chance = [
                0.5 * (1 + torch.erf((clean[n] - (out if noisy[n] > out else last)) / spread[n] / math.sqrt(2)))
                for n in range(s)
            ]
            load = torch.stack(chance)
        return Node(ids, weights, share, load)

    def state(self, token: int, level: int, path: Path, x: Tensor) -> Tensor:
        """x_{level+1} of the node `path`, from its children in pool `level`."""
        node, position = self.nodes[token, level, path], self.config.activation_position
        parts = []
        for slot, (n, weight) in enumerate(zip(node.ids, node.weights, strict=True)):
            own = self.expert(level, n, x)
            if level == 0:
                parts.append(weight * (self.sigma(0, own) if position == "all" else own))
                continue
            child = self.state(token, level - 1, (*path, slot), x)
            W, w = self.params[f"W.{level - 1}"], self.params[f"w.{level - 1}"]
            if position == "all":
                parts.append(weight * self.sigma(level, own + W @ child + w))
            elif position == "child_v2":
                parts.append(weight * (own + W @ self.sigma(level, child) + w))
            else:
                parts.append(weight * own + W @ self.sigma(level, child) + w)
        return torch.stack(parts).sum(0)

    def __call__(self, x: Tensor) -> Tensor:
        """The adapter's update (N, d_out) of rows (N, d_in)."""
        rows = []
        for token, row in enumerate(x):
            self.route(token, row)
            rows.append(self.params["P"] @ self.state(token, self.levels - 1, (), row) + self.params["p"])
        return torch.stack(rows)

    def paths(self, level: int) -> list[Path]:
        """All parents of pool `level`, in the order of the package's node axis."""
        fanout = self.config.num_experts if self.config.gate == "dense" else self.config.fanout
        return list(itertools.product(*(range(fanout[above]) for above in reversed(range(level + 1, self.levels)))))

    def table(self, level: int, what: Callable[[Node], Tensor], tokens: int) -> Tensor:
        """Lays out what each node of a level holds as (N, F, ...)."""
        return torch.stack(
            [torch.stack([what(self.nodes[t, level, path]) for path in self.paths(level)]) for t in range(tokens)]
        )

    def aux(self, valid: list[bool]) -> Tensor:
        """The adapter's balance loss over the valid tokens: the sum over pools."""
        total = torch.zeros((), dtype=torch.float64)
        for level in range(self.levels):
            decisions = [self.nodes[t, level, p] for t, ok in enumerate(valid) if ok for p in self.paths(level)]
            if decisions and self.config.gate != "dense":
                total = total + self.config.aux_loss_coefficient * self.balance(level, decisions)
        return total

    def balance(self, level: int, decisions: list[Node]) -> Tensor:
        s = self.config.num_experts[level]
        if self.config.gate == "switch":
            loss = torch.zeros((), dtype=torch.float64)
            for n in range(s):
                picked = sum(node.ids.count(n) for node in decisions) / len(decisions)
                loss = loss + picked * sum(node.probabilities[n] for node in decisions) / len(decisions)
            return s * loss
        zero = torch.zeros((), dtype=torch.float64)
        importance = [zero] * s
        for node in decisions:
            for n, weight in zip(node.ids, node.weights, strict=True):
                importance[n] = importance[n] + weight
        load = torch.stack([node.load for node in decisions]).sum(0)
        return cv_squared(torch.stack(importance)) + cv_squared(load)


def cv_squared(values: Tensor) -> Tensor:
    """Unbiased variance over squared mean."""
    if len(values) == 1:
        return torch.zeros((), dtype=values.dtype)
    mean = values.sum() / len(values)
    return ((values - mean) ** 2).sum() / (len(values) - 1) / (mean**2 + 1e-10)
