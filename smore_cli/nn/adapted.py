"""A frozen module of the backbone with adapters beside it.

Nearly always that is a linear map, and an adapter adds to what it gives: y = W x + b + update(x). An adapter that must
do more than add (rescale the weight, wrap a whole feed-forward network) overrides `adapted`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from smore_cli.nn.factored import Factored
    from smore_cli.nn.siblings import Siblings

__all__ = ["AdaptedModule", "Adapter", "add_projection", "dense_weight"]


class Adapter(nn.Module, ABC):
    """The trainable part of one adapted module; its float32 parameters are cast down to the input's dtype, never up.

    Attributes:
        expert_axes: for parameters that hold one block an expert: the tree level and the dimension along which the
            experts lie, in order. The gradient census looks at each expert by itself through it.
        up_projections: first names of the parameters that map from rank space to a width of the backbone, LoRA's B:
            LoRA+ lets them learn faster.
        stacked_biases: first names of the parameters that are biases though they have two dimensions, one row an
            expert: weight decay spares them.
    """

    expert_axes: Mapping[str, tuple[int, int]] = MappingProxyType({})
    up_projections: frozenset[str] = frozenset()
    stacked_biases: frozenset[str] = frozenset()

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns y + update(x).

        Args:
            x: (..., d_in) input of the linear map.
            y: (..., d_out) its output, in the same dtype.
        """

    def adapted(self, x: Tensor, base: nn.Module) -> Tensor:
        """Returns what the adapted module gives for x: the base's own output and the update.

        Args:
            x: (..., d_in) input of the base.
            base: the frozen module.
        """
        return cast("Tensor", self(x, base(x)))

    def inner_outputs(self, x: Tensor, base: nn.Module) -> dict[str, Tensor]:
        """Returns what the maps within the adapted module should give for x were they plain linear maps, by name.

        All but the last, whose output is the module's own: a merge fits each map to it. An adapter of a linear map has
        none.

        Args:
            x: (..., d_in) input of the base.
            base: the frozen module.
        """
        return {}

    @property
    def constant(self) -> bool:
        """Whether the update is the same matrix for every token, so that it can be added to the weight."""
        return False

    def silent_at_start(self) -> frozenset[str]:
        """Names of the parameters whose very first gradient is exactly zero, as A's is while B = 0."""
        return frozenset()

    def without_choice(self) -> frozenset[str]:
        """Names of the parameters that never have a gradient: of a router with one expert, whose gate is always 1."""
        return frozenset()


class AdaptedModule(nn.Module):
    """Stands in a model where a linear map (or a gated MLP) stood, and holds it unchanged as `base`.

    Attributes:
        base: the frozen module (`nn.Linear`, bitsandbytes' 4-bit linear, transformers' `Conv1D`, a gated MLP).
        adapters: adapters by name.
        active: name of the adapter in use; None: the layer computes exactly what `base` computes.
        siblings: the maps that read the same input, if there are any; set by `group_siblings`.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self.siblings: Siblings | None = None

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
        if self.active is None:
            return cast("Tensor", self.base(x))
        adapter = cast("Adapter", self.adapters[self.active])
        if self.siblings is not None and (found := self.siblings.products(self, x)) is not None:
            return cast("Factored", adapter).finish(x, *found)
        return adapter.adapted(x, self.base)

    def adapter(self, name: str) -> Adapter:
        """Returns one adapter."""
        return cast("Adapter", self.adapters[name])

    def adapter_state(self, name: str) -> dict[str, Tensor]:
        """Returns the tensors of one adapter that are saved with it: its parameters and persistent buffers."""
        return self.adapters[name].state_dict(keep_vars=True)


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


def dense_weight(base: nn.Module) -> Tensor:
    """Returns a linear map's weight as (d_out, d_in), a 4- or 8-bit one dequantised, GPT-2's `Conv1D` transposed."""
    weight = cast("Tensor", base.weight)
    if weight.dtype == torch.int8:  # LLM.int8: the rows' largest values move from the weight to the state at first use
        scales = cast("Tensor | None", getattr(weight, "SCB", None))
        scales = cast("Tensor", cast("Any", base).state.SCB) if scales is None else scales
        return weight.data.float() * (scales.float()[:, None] / 127)
    if (state := getattr(weight, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, state)
    return weight.t() if type(base).__name__ == "Conv1D" else weight
