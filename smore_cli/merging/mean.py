"""Every token given the same gates: the mean of what the routers decided, or its weight spread evenly over all experts.

    D = d/dx update(x; g)  at x = 0                 g = E_t[gates_t], or E_t[sum_e gates_te] / s for every expert

The oldest way to make a routed adapter dense, and the one that loses most: that a gate was high says nothing of the
inputs for which it was. It is here to be compared with, and as what a regression falls back to without data.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from smore_cli.errors import UsageError
from smore_cli.nn.router import Router, Routing
from smore_cli.nn.tree_router import Choice, Picks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smore_cli.nn import Adapter
    from smore_cli.nn.context import RoutingTrace

__all__ = ["STEP", "MeanGates", "Update", "linear_update", "mean_update", "with_gates"]

STEP = 1e-3
"""Inputs of the probe: small, so that a tree's activation is at its slope in 0; in float64 that costs no digits."""
PROBES = 256


class Update(NamedTuple):
    """y = W x becomes (W + D) x + bias; both float64."""

    D: Tensor
    bias: Tensor


@dataclass
class MeanGates:
    """Sums of the gates of every router that was observed.

    Attributes:
        sums: by adapter and level, (F, s) sums over real tokens.
        tokens: how many each has seen.
    """

    sums: dict[tuple[nn.Module, int], Tensor] = field(default_factory=dict)
    tokens: dict[tuple[nn.Module, int], int] = field(default_factory=dict)

    def add(self, trace: RoutingTrace, real: Tensor) -> None:
        """Adds a trace of N tokens, of which `real` (N,) are text."""
        key = trace.owner, trace.level
        gates = trace.gates[real.to(trace.gates.device)].double().sum(0)
        self.sums[key] = self.sums.get(key, torch.zeros((), device=gates.device)) + gates
        self.tokens[key] = self.tokens.get(key, 0) + int(real.sum())

    def of(self, adapter: nn.Module, *, uniform: bool = False) -> list[Tensor]:
        """Returns the mean gates (F, s) of an adapter's levels, leaves first."""
        levels = sorted(level for owner, level in self.sums if owner is adapter)
        means = [self.sums[adapter, level] / self.tokens[adapter, level] for level in levels]
        return [mean.mean(-1, keepdim=True).expand_as(mean) for mean in means] if uniform else means


@torch.no_grad()
def mean_update(adapter: Adapter, gates: MeanGates, *, uniform: bool = False) -> Update:
    """Returns what an adapter of a linear map adds when every token has the mean gates.

    Args:
        adapter: with a router.
        gates: of text that it has seen.
        uniform: spread the weight evenly instead.

    Raises:
        UsageError: it stays no linear map even so.
    """
    return linear_update(with_gates(adapter, gates.of(adapter, uniform=uniform)))


@torch.no_grad()
def linear_update(adapter: Any) -> Update:
    """Returns an update that does not depend on the token as a matrix.

    Args:
        adapter: of a linear map.

    Raises:
        UsageError: it is no linear map.
    """
    fixed = copy.deepcopy(adapter).double().eval()
    d_in, d_out = _widths(fixed)
    device = next(fixed.parameters()).device
    zero = torch.zeros(1, d_in, dtype=torch.float64, device=device)

    def update(x: Tensor) -> Tensor:
        return fixed(x, x.new_zeros(len(x), d_out))  # type: ignore[no-any-return]

    bias = update(zero)[0]
    probes = (STEP * torch.eye(d_in, dtype=torch.float64, device=device)).split(PROBES)
    D = torch.cat([(update(each) - bias) / STEP for each in probes]).t()
    x = torch.randn(8, d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    given, expected = update(STEP * x / d_in) - bias, STEP * x @ D.t() / d_in
    if (given - expected).norm() > 1e-2 * expected.norm():
        raise UsageError(
            "the mean of this method's routing is no linear map: its experts' outputs depend on one another",
            "use --method least-squares",
        )
    return Update(D, bias)


def with_gates(adapter: Any, gates: Sequence[Tensor]) -> Any:
    """Returns a copy in float64 whose router gives every token the gates (F, s) of each level."""
    fixed = copy.deepcopy(adapter)
    if isinstance(fixed.router, Router):
        fixed.router = _FixedRouter(fixed.router, gates[0])
    elif hasattr(fixed.router, "levels"):
        fixed.router = _FixedTree(fixed.router, [level.mean(0) for level in gates])
    return fixed


def _widths(adapter: Any) -> tuple[int, int]:
    down = adapter.down()
    return down.tensors[0].shape[1], adapter.up()[0].shape[0]


class _FixedRouter(Router):
    """Gives every token the same gates (G, s), whatever it is."""

    gates: Tensor

    def __init__(self, router: Router, gates: Tensor) -> None:
        super().__init__(router.weight.shape[1], router.num_experts, groups=len(gates))
        self.double()
        self.register_buffer("gates", gates.double())
        self.to(router.weight.device)

    def decide(self, logits: Tensor) -> Routing:
        """Returns the gates for N tokens."""
        gates = self.gates.expand(len(logits), *self.gates.shape)
        return Routing(gates, gates, gates)


class _FixedTree(nn.Module):
    """Gives every parent all experts of its pool as children, with the same weights."""

    def __init__(self, router: Any, gates: Sequence[Tensor]) -> None:
        super().__init__()
        self.down, self.gates = router.down, [level.double() for level in gates]

    def forward(self, x_down: Tensor, again: object = None) -> list[Picks]:
        """Returns the picks of every level, leaves first, for N tokens."""
        picks = []
        sizes = [len(level) for level in self.gates]
        for l, weights in enumerate(self.gates):
            shape = (*sizes[l:], len(x_down))
            along = (-1, *(1 for _ in shape[1:]))
            chosen = torch.arange(sizes[l], device=x_down.device).view(along).expand(shape)
            alpha = weights.to(x_down.device).view(along).expand(shape)
            picks.append(Picks(Choice(chosen), alpha, alpha, alpha))
        return picks

    def report(self, picks: object, owner: object) -> None:
        """Tells nobody: nothing was decided."""
