"""Which tensors a kernel can read, and where they are."""

from __future__ import annotations

import ctypes
from operator import attrgetter
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["plain", "pointer", "readable"]

PLAIN = frozenset({Tensor, nn.Parameter})
_is_cpu = attrgetter("is_cpu")


def plain(tensor: Tensor) -> bool:
    """Whether its numbers are all here: nothing sharded, traced or faked."""
    return type(tensor) in PLAIN


def readable(tensors: Sequence[Tensor]) -> bool:
    """Whether their numbers lie in the memory of the CPU."""
    return PLAIN.issuperset(map(type, tensors)) and all(map(_is_cpu, tensors))


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """Returns the address of its first number."""
    return ctypes.c_void_p(tensor.data_ptr())
