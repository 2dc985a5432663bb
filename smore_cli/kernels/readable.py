"""Which tensors a kernel can read, and where they are."""

from __future__ import annotations

import ctypes

from torch import Tensor, nn

__all__ = ["plain", "pointer"]


def plain(tensor: Tensor) -> bool:
    """Whether its numbers are all here: nothing sharded, traced or faked."""
    return type(tensor) in (Tensor, nn.Parameter)


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """Returns the address of its first number."""
    return ctypes.c_void_p(tensor.data_ptr())
