"""The mean-routing merge of a whole model: the baseline that `least-squares` is measured against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from smore_cli.errors import UsageError
from smore_cli.merging.dense import adapters_of, add_update
from smore_cli.merging.mean import MeanGates, mean_update
from smore_cli.merging.streams import context_of, run_below_head
from smore_cli.nn.full_copy import FullCopy
from smore_cli.nn.targets import is_linear

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from smore_cli.data.batch import Batch

__all__ = ["merge_mean"]


@torch.no_grad()
def merge_mean(model: PreTrainedModel, batches: Sequence[Batch], *, uniform: bool) -> list[str]:
    """Adds the update with mean gates to every weight, in place, and switches the adapter off.

    What the update adds whatever x is goes to the bias where there is one, and is lost elsewhere.

    Args:
        model: with a routed adapter active, its weights not quantised.
        batches: text on which the gates are averaged.
        uniform: spread each router's total weight evenly over its experts.

    Returns:
        The paths of the linear maps that were changed.

    Raises:
        UsageError: the adapter has no linear update even with fixed gates.
    """
    found = adapters_of(model)
    routed = {path: module for path, module in found.items() if not isinstance(module.adapter("default"), FullCopy)}
    for path, module in routed.items():
        if not is_linear(module.base):
            raise UsageError(f"{path}: experts inside a gated MLP have no mean matrix", "use --method least-squares")
    gates = MeanGates()
    for batch in batches:
        batch = batch.to(model.device)
        context, real = context_of(model, batch), batch.token_mask.reshape(-1)
        context.observe = lambda trace, real=real: gates.add(trace, real)
        run_below_head(model, batch.input_ids, context, batch.position_ids, batch.attention_mask)
    for module in routed.values():
        update = mean_update(module.adapter("default"), gates, uniform=uniform)
        biased = getattr(module.base, "bias", None) is not None
        add_update(module.base, update.D, update.bias if biased else None)
        module.active = None
    return list(routed)
