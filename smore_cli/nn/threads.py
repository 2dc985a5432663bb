"""Small operations on one thread.

Between the two wide products of an adapter there are dozens of operations on a few numbers a token. Threads cannot
help them, and to wake a sleeping one takes longer than most of them; threads that spin in place of sleeping take
longer still beside one busy process. The same holds for an optimiser that goes from one small tensor to the next
(`benchmarks/optimiser.py`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

__all__ = ["all_threads", "one_thread"]

SMALL = 2**17
"""Numbers below which a tensor's operations are no faster on two threads than on one."""

_BEFORE: ContextVar[int | None] = ContextVar("smore_threads_before", default=None)


def one_thread(*about: Tensor) -> AbstractContextManager[None]:
    """Inside, operations on a CPU run on one thread, if the tensors they are about are small on average."""
    threads = torch.get_num_threads()
    if threads == 1 or not all(each.is_cpu for each in about) or _mean_size(about) >= SMALL:
        return nullcontext()
    return _one_of(threads)


@contextmanager
def _one_of(threads: int) -> Iterator[None]:
    torch.set_num_threads(1)
    token = _BEFORE.set(threads)
    try:
        yield
    finally:
        _BEFORE.reset(token)
        torch.set_num_threads(threads)


def _mean_size(tensors: Sequence[Tensor]) -> float:
    return sum(tensor.numel() for tensor in tensors) / max(len(tensors), 1)


def all_threads() -> int:
    """Returns how many threads a large operation may use, within `one_thread` as outside."""
    return _BEFORE.get() or torch.get_num_threads()
