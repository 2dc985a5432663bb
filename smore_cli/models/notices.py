"""What a user should know of a backbone and an adapter before they train: what is left out, and what stands apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smore_cli.nn import adapted_modules
from smore_cli.nn.full_copy import FullCopy, shares_weight
from smore_cli.nn.targets import fused_experts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = ["backbone_notices"]


def backbone_notices(model: nn.Module) -> Iterator[str]:
    """Yields a line for each peculiarity of a model with its adapter."""
    if experts := fused_experts(model):
        in_bits = ""
        if getattr(model, "is_quantized", False):
            in_bits = ", nor are they quantised"
        yield (
            f"this model keeps its own experts in 3-D tensors ({len(experts)} layers, as {experts[0]}): they are not "
            f"adapted{in_bits}"
        )
    for path, module in adapted_modules(model).items():
        whole = any(isinstance(adapter, FullCopy) for adapter in module.adapters.values())
        if whole and (others := shares_weight(model, path)):
            yield (
                f"{path} is trained whole, apart from {', '.join(others)}, which had the same weight: a merged model "
                "has both"
            )
