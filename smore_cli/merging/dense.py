"""LoRA folded into the weights it stands beside, exact but for one rounding to W's own type.

LoRA: W + s B A.  DoRA: m (W + s B A) / ||W + s B A||, row by row.  What was trained whole replaces its module's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from smore_cli.errors import UsageError
from smore_cli.nn import AdaptedModule, adapted_modules, detach
from smore_cli.nn.adapted import dense_weight
from smore_cli.nn.full_copy import FullCopy
from smore_cli.nn.low_rank import LowRank

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["merge_lora"]


def merge_lora(model: PreTrainedModel, name: str = "default") -> int:
    """Folds a LoRA or DoRA adapter into the dense weights of its backbone, in place, and takes it off.

    The weight is formed in float64 and rounded once, so what differs afterwards is the rounding of the weights alone.

    Args:
        model: with the adapter attached; not quantised.
        name: the adapter's name.

    Returns:
        How many linear maps were changed.

    Raises:
        UsageError: the adapter is no LoRA, or the weights are quantised.
    """
    adapted = {path: module for path, module in adapted_modules(model).items() if name in module.adapters}
    for path, module in adapted.items():
        if not isinstance(module.adapters[name], LowRank | FullCopy):
            raise UsageError(f"{path}: only a LoRA adapter is a matrix that can be added to the weight")
        if not module.weight.is_floating_point():
            raise UsageError(f"{path}: its weight is quantised, and an update added to it would be rounded away")
    linears = 0
    for module in adapted.values():
        _untie(model, module)
        if isinstance(adapter := module.adapters[name], FullCopy):
            module.base.load_state_dict(adapter.copy.state_dict())
        else:
            _merge(module, cast("LowRank", adapter))
            linears += 1
    detach(model, name)
    return linears


@torch.no_grad()
def _merge(module: AdaptedModule, adapter: LowRank) -> None:
    merged = adapter.merged_weight(dense_weight(module.base))  # (d_out, d_in), float64
    if type(module.base).__name__ == "Conv1D":  # GPT-2's linear map holds its weight as (d_in, d_out)
        merged = merged.t()
    module.weight.copy_(merged.to(module.weight.dtype))


def _untie(model: PreTrainedModel, module: AdaptedModule) -> None:
    """Gives what shares the embedding's weight (a tied output head) a weight of its own: only one of them changes."""
    embedding: Any = model.get_input_embeddings()
    base = module.base
    if base is not embedding and module.weight is embedding.weight:
        base.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
