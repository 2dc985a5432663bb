"""Small operations on one thread.

Between the two wide products of an adapter there are dozens of operations on a few numbers a token. Threads cannot
help them, and to wake a sleeping one takes longer than most of them: at 1024 tokens, on two cores, the core of an
S'MoRE tree took 10.0 ms forward and backward with two threads that sleep between operations and 7.5 ms with one.
Threads that spin instead took 6.0 ms on an idle machine and 316 ms beside one busy process. The same holds for an
optimiser that goes from one small tensor to the next: AdamW on the 5040 tensors (22 M numbers) of an S'MoRE adapter
took 369 ms with two threads and 56 with one, on the 420 of a LoRA of that size 35 and 16.
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
