"""How often each path through a tree is taken: root's child, that one's child, ..., leaf.

    node(l) = node(l + 1) * s_l + child(l)        one number a path, as the digits of a number

A token with fanout [f_0, f_1] takes f_1 f_0 paths. A dense gate takes all of them always, which is a share each too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from smore_cli.nn.context import RoutingTrace

__all__ = ["MANY_PATHS", "PathCounter"]

MANY_PATHS = 65_536
"""Trees with more paths than this are not counted: a number each, for every adapted map, is too many."""


class PathCounter:
    """Counts paths over forward passes, as the traces come: each tree's levels one after the other, the root first."""

    def __init__(self) -> None:
        self._above: dict[str, tuple[Tensor, list[int]]] = {}
        self._counts: dict[str, tuple[Tensor, list[int]]] = {}

    def add(self, module: str, trace: RoutingTrace, real: Tensor) -> None:
        """Adds one level of a tree; what is none is passed over.

        Args:
            module: path of the adapted linear map.
            trace: of one level.
            real: (N,) bool, which tokens count.
        """
        if trace.chosen is None:
            return
        above, sizes = self._above.pop(module, (trace.chosen.new_zeros(len(trace.chosen), 1), []))
        sizes = [*sizes, trace.gates.shape[-1]]
        nodes = (above[:, :, None] * sizes[-1] + trace.chosen).flatten(1)  # (N, F f)
        if trace.level:
            self._above[module] = nodes, sizes
            return
        total = int(torch.tensor(sizes).prod())
        if len(sizes) == 1 or total > MANY_PATHS:
            return
        counts = torch.bincount(nodes[real].flatten(), minlength=total).cpu()
        before = self._counts[module][0] if module in self._counts else 0
        self._counts[module] = counts + before, sizes

    def shares(self, module: str, level: int) -> dict[tuple[int, ...], float] | None:
        """Returns the share of all paths taken that each has, the most frequent first; None but for a tree's leaves."""
        if level or module not in self._counts:
            return None
        counts, sizes = self._counts[module]
        order = counts.argsort(descending=True, stable=True).tolist()
        total = int(counts.sum())
        return {_digits(node, sizes): int(counts[node]) / total for node in order if counts[node]}


def _digits(node: int, sizes: list[int]) -> tuple[int, ...]:
    digits: list[int] = []
    for size in reversed(sizes):
        digits.insert(0, node % size)
        node //= size
    return tuple(digits)
