"""A frozen linear map with adapters beside it: y = W x + b + update(x)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["AdaptedLinear", "Adapter", "add_projection"]


class Adapter(nn.Module, ABC):
    """The trainable update of one linear map; its float32 parameters are cast down to the input's dtype, never up."""

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns y + update(x).

        Args:
            x: (..., d_in) input of the linear map.
            y: (..., d_out) its output, in the same dtype.
        """


class AdaptedLinear(nn.Module):
    """Stands in a model where a linear map stood, and holds that map unchanged as `base`.

    Attributes:
        base: the frozen linear map (`nn.Linear`, bitsandbytes' 4-bit linear, transformers' `Conv1D`).
        adapters: adapters by name.
        active: name of the adapter in use; None: the layer computes exactly what `base` computes.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: str | None = None

    @property
    def weight(self) -> Tensor:
        """The base's weight: some models look at its dtype or device."""
        return cast("Tensor", self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return cast("Tensor | None", self.base.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., d_in) to (..., d_out)."""
        y: Tensor = self.base(x)
        return y if self.active is None else cast("Tensor", self.adapters[self.active](x, y))

    def adapter_parameters(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the names and parameters of one adapter."""
        return self.adapters[name].named_parameters()


def add_projection(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns y + z weight^T + bias with one matrix product and no temporary of y's size for it.

    Args:
        y: (..., d_out).
        z: (N, R) with N the number of rows of y.
        weight: (d_out, R).
        bias: (d_out,).
    """
    rows = y.flatten(0, -2) if y.dim() > 1 else y[None]
    out = torch.addmm(rows, z, weight.to(z.dtype).t())
    if bias is not None:
        out = out + bias.to(z.dtype)
    return out.view(y.shape)
