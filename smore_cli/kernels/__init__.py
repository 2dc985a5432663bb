"""Compiled forms of what PyTorch alone does slowly: C on a CPU, Triton on a GPU.

`nn` has every equation in PyTorch and knows nothing of this package; `use` tells it what there is. SMORE_KERNELS=0 in
the environment switches all kernels off.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from smore_cli.nn import routed_block, routed_grid, tree_recompute

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["unused", "use"]


_HOOKS = (tree_recompute, routed_block, routed_grid)
"""Each has a `find_kernel`."""


def use() -> None:
    """Makes every adapter of this process that has a kernel use it, where its device and form allow."""
    if os.environ.get("SMORE_KERNELS") == "0":
        return
    from smore_cli.kernels import block, grid, tree

    tree_recompute.find_kernel, routed_block.find_kernel, routed_grid.find_kernel = tree.find, block.find, grid.find


@contextmanager
def unused() -> Iterator[None]:
    """Inside, PyTorch does everything."""
    before = [each.find_kernel for each in _HOOKS]
    for each in _HOOKS:
        each.find_kernel = each.no_kernel  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for each, found in zip(_HOOKS, before, strict=True):
            each.find_kernel = found  # type: ignore[attr-defined]
