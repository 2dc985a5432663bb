"""A whole module of the backbone, trained beside an adapter (PEFT's `modules_to_save`).

    y = M'(x)       M' starts as a copy of the frozen module M, and stands in for it while the adapter is active

It hangs where adapters hang, so that it is switched, taken off, counted, trained, saved and restored with them.
"""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, NoReturn, cast

import torch
from torch import nn
from torch.func import functional_call

from smore_cli.errors import AdapterError
from smore_cli.nn.adapted import AdaptedModule, Adapter

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["FullCopy", "bare", "require_copyable", "shares_weight"]


class FullCopy(Adapter):
    """A trainable copy of a module, kept in float32 as adapters are: in bfloat16 small steps would be rounded away.

    Attributes:
        copy: the module that is trained.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.copy = copy.deepcopy(base)
        for name, parameter in list(self.copy.named_parameters(recurse=False)):
            wide = torch.promote_types(parameter.dtype, torch.float32)
            setattr(self.copy, name, nn.Parameter(parameter.detach().to(wide)))

    def forward(self, x: Tensor, y: Tensor) -> NoReturn:
        """A copy adds nothing to what the base gives: `adapted` is the way in.

        Raises:
            TypeError: always.
        """
        raise TypeError("a full copy stands in for its module: call adapted(x, base)")

    def adapted(self, x: Tensor, base: nn.Module) -> Tensor:
        """Returns what the copy gives for x, computed in the base's dtype."""
        cast_down = {
            name: parameter.to(frozen.dtype)
            for (name, parameter), frozen in zip(self.copy.named_parameters(), base.parameters(), strict=True)
            if parameter.dtype != frozen.dtype
        }
        # Without a cast the plain call, which hooks and sharded parameters see as any other.
        return cast("Tensor", functional_call(self.copy, cast_down, (x,)) if cast_down else self.copy(x))

    def saved_state(self) -> dict[str, Tensor]:
        """Returns the copy's tensors by their names in the module."""
        return self.copy.state_dict(keep_vars=True)


def require_copyable(path: str, module: nn.Module, targets: Mapping[str, object]) -> None:
    """Refuses what cannot be trained as a whole.

    Args:
        path: of the module.
        module: as it is in the bare backbone.
        targets: paths that the adapter itself adapts.

    Raises:
        AdapterError: it has parts, no weights, quantised ones, several inputs, or is adapted already.
    """
    where = f"modules_to_save: {path}"
    if path in targets:
        raise AdapterError(f"{where} is also one of target_modules", "adapt it, or train all of it: drop one")
    parts = sorted({name.rsplit(".", 1)[-1] for name, part in module.named_modules() if name and _has_weights(part)})
    if parts:
        raise AdapterError(f"{where} is made of other modules", f"name those to train: {', '.join(parts)}")
    if not _has_weights(module):
        raise AdapterError(f"{where} has no weights to train", "drop it")
    if not all(parameter.is_floating_point() for parameter in module.parameters()):
        raise AdapterError(
            f"{where} is quantised, and whole numbers cannot be trained",
            "adapt it through target_modules, or load the backbone without `quantization:`",
        )
    inputs = inspect.signature(module.forward).parameters.values()
    needed = [each.name for each in inputs if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]
    if len(needed) != 1:
        raise AdapterError(f"{where} takes {len(needed)} inputs ({', '.join(needed)}), not one", "drop it")


def shares_weight(model: nn.Module, path: str) -> list[str]:
    """Returns the paths of the other modules that hold the same weight, as a tied output head does."""
    own = bare(model.get_submodule(path))
    weight = getattr(own, "weight", None)
    return [
        name.replace(".base", "")
        for name, module in model.named_modules()
        if weight is not None
        and module is not own
        and not isinstance(module, AdaptedModule)
        and getattr(module, "weight", None) is weight
    ]


def bare(module: nn.Module) -> nn.Module:
    """Returns the module of the backbone that stands here, with or without adapters."""
    return module.base if isinstance(module, AdaptedModule) else module


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None
