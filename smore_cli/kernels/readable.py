"""Which tensors a kernel can read."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["plain", "together"]

PLAIN = frozenset({Tensor, nn.Parameter})
_device = attrgetter("device")


def plain(tensor: Tensor) -> bool:
    """Whether its numbers are all here: nothing sharded, traced or faked."""
    return type(tensor) in PLAIN


def together(tensors: Sequence[Tensor]) -> bool:
    """Whether all of them are plain, on one device."""
    return PLAIN.issuperset(map(type, tensors)) and len(set(map(_device, tensors))) == 1
