"""What is the same for every token folded into the weights beside it, exact but for one rounding to W's own type.

LoRA: W + s B A.  DoRA: m (W + s B A) / ||W + s B A||, row by row.  A router with one expert: W + its matrix.  What was
trained whole replaces its module's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smore_cli.errors import UsageError
from smore_cli.merging.mean import linear_update
from smore_cli.nn import AdaptedModule, adapted_modules, detach
from smore_cli.nn.adapted import dense_weight
from smore_cli.nn.full_copy import FullCopy
from smore_cli.nn.low_rank import LowRank

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

__all__ = [
    "adapters_of",
    "add_update",
    "dequantise",
    "dequantised",
    "fold",
    "is_constant",
    "quantised_maps",
    "set_weight",
]


def adapters_of(model: nn.Module, name: str = "default") -> dict[str, AdaptedModule]:
    """Returns the modules with an adapter of that name, by path."""
    return {path: module for path, module in adapted_modules(model).items() if name in module.adapters}


def is_constant(model: nn.Module, name: str = "default") -> bool:
    """Whether an adapter is the same for every token, wherever it is."""
    adapters = (module.adapter(name) for module in adapters_of(model, name).values())
    return all(isinstance(adapter, FullCopy) or adapter.constant for adapter in adapters)


def fold(model: PreTrainedModel, name: str = "default") -> int:
    """Folds an adapter that is the same for every token into its backbone, in place, and takes it off.

    A weight is formed in float64 and rounded once, so what differs afterwards is the rounding of the weights alone.
    Routed adapters that are switched off, because their update is in the weights already, only go.

    Args:
        model: with the adapter attached; not quantised.
        name: the adapter's name.

    Returns:
        How many linear maps were changed.

    Raises:
        UsageError: the adapter depends on the token, or the weights are quantised.
    """
    active = {path: module for path, module in adapters_of(model, name).items() if module.active == name}
    for path, module in active.items():
        adapter = module.adapter(name)
        if not isinstance(adapter, FullCopy) and not adapter.constant:
            raise UsageError(f"{path}: its update depends on the token, so no single matrix equals it")
        if not next(module.base.parameters()).is_floating_point():
            raise UsageError(f"{path}: its weight is quantised, and an update added to it would be rounded away")
    linears = 0
    for module in active.values():
        _untie(model, module)
        if isinstance(adapter := module.adapter(name), FullCopy):
            module.base.load_state_dict(adapter.copy.state_dict())
            continue
        weight = dense_weight(module.base)
        if isinstance(adapter, LowRank):
            set_weight(module.base, adapter.merged_weight(weight))
        else:
            set_weight(module.base, weight.double() + linear_update(adapter).D)
        linears += 1
    detach(model, name)
    return linears


@torch.no_grad()
def add_update(base: Any, D: Tensor, bias: Tensor | None = None) -> None:
    """Adds an update (d_out, d_in), and one of the bias, to a linear map: formed in float64 and rounded once."""
    set_weight(base, dense_weight(base).double() + D)
    if bias is not None:
        base.bias.copy_((base.bias.double() + bias).to(base.bias.dtype))


@torch.no_grad()
def set_weight(base: Any, weight: Tensor) -> None:
    """Gives a linear map a weight (d_out, d_in); GPT-2's `Conv1D` holds it as (d_in, d_out).

    The old one is let go, not written over: it is a piece of the backbone's mapped file, whose changed pages would stay
    in memory as long as anything of that file is in use.
    """
    weight = weight.t() if type(base).__name__ == "Conv1D" else weight
    base.weight.data = weight.to(base.weight).contiguous()


def _untie(model: PreTrainedModel, module: AdaptedModule) -> None:
    """Gives what shares the embedding's weight (a tied output head) a weight of its own: only one of them changes."""
    embedding: Any = model.get_input_embeddings()
    base = module.base
    if base is not embedding and getattr(base, "weight", None) is embedding.weight:
        base.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def quantised_maps(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yields parent, attribute and module of every linear map that bitsandbytes holds in 4 or 8 bits."""
    for parent in list(model.modules()):
        for attribute, child in list(parent.named_children()):
            if type(child).__name__ in ("Linear4bit", "Linear8bitLt"):
                yield parent, attribute, child


@torch.no_grad()
def dequantised(quantised: Any, dtype: torch.dtype) -> nn.Linear:
    """Returns a quantised linear map as one with the weights it stands for."""
    weight, bias = dense_weight(quantised).to(dtype), quantised.bias
    with torch.device("meta"):
        plain = nn.Linear(quantised.in_features, quantised.out_features, bias=bias is not None)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return plain


@torch.no_grad()
def dequantise(model: PreTrainedModel) -> None:
    """Replaces every quantised linear map by one with the weights it stands for, in the model's compute type.

    These are the weights that the adapter was trained on. The model is then an ordinary one, also to its config.
    """
    for parent, attribute, quantised in quantised_maps(model):
        setattr(parent, attribute, dequantised(quantised, model.dtype))
    marks: Any = model
    for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized"):
        if name in marks.__dict__:
            delattr(marks, name)
    if hasattr(marks.config, "quantization_config"):
        del marks.config.quantization_config
