"""Compiled forms of what PyTorch alone does slowly: C on a CPU, Triton on a GPU.

`nn` has every equation in PyTorch and knows nothing of this package; `use` tells it what there is. SMORE_KERNELS=0 in
the environment switches all kernels off.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from smore_cli.nn import routed_block, tree_recompute

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["unused", "use"]


def use() -> None:
    """Makes every adapter of this process that has a kernel use it, where its device and form allow."""
    if os.environ.get("SMORE_KERNELS") == "0":
        return
    from smore_cli.kernels import block, tree

    tree_recompute.find_kernel, routed_block.find_kernel = tree.find, block.find


@contextmanager
def unused() -> Iterator[None]:
    """Inside, PyTorch does everything."""
    before = tree_recompute.find_kernel, routed_block.find_kernel
    tree_recompute.find_kernel, routed_block.find_kernel = tree_recompute.no_kernel, routed_block.no_kernel
    try:
        yield
    finally:
        tree_recompute.find_kernel, routed_block.find_kernel = before
