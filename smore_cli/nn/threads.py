"""Small operations on one thread.

Between the two wide products of an adapter there are dozens of operations on a few numbers a token. Threads cannot
help them, and to wake a sleeping one takes longer than most of them: at 1024 tokens, on two cores, the core of an
S'MoRE tree took 10.0 ms forward and backward with two threads that sleep between operations and 7.5 ms with one.
Threads that spin instead took 6.0 ms on an idle machine and 316 ms beside one busy process.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["one_thread"]

SMALL = 2**17
"""Numbers below which a tensor's operations are no faster on two threads than on one."""


@contextmanager
def one_thread(like: Tensor) -> Iterator[None]:
    """Inside, operations on a CPU run on one thread, if the tensor they are about is small."""
    threads = torch.get_num_threads()
    if threads == 1 or like.device.type != "cpu" or like.numel() >= SMALL:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
