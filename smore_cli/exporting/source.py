"""The model to export: backbone and adapter as they were trained, a quantised backbone as the numbers it stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from smore_cli.nn.adapted import AdaptedModule, dense_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from smore_cli.models.runs import Run

__all__ = ["load_dense"]


def load_dense(run: Run, device: torch.device | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a run; weights of 4 or 8 bits become what the adapter saw of them, in the compute type.

    Args:
        run: any.
        device: default: the first CUDA device, else the CPU.
    """
    model, tokenizer = run.load(device)
    if run.quantization is not None:
        _dequantise(model)
    return model, tokenizer


@torch.no_grad()
def _dequantise(model: Any) -> None:
    """Replaces quantised linear maps by plain ones, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            weight = getattr(child, "weight", None)
            if isinstance(child, AdaptedModule) or weight is None or weight.is_floating_point():
                continue
            dense = dense_weight(child).to(model.dtype)
            plain = nn.Linear(dense.shape[1], dense.shape[0], bias=child.bias is not None, device="meta")
            plain.weight = nn.Parameter(dense, requires_grad=False)
            if child.bias is not None:
                plain.bias = nn.Parameter(child.bias.detach().to(model.dtype), requires_grad=False)
            setattr(parent, name, plain)
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for attribute in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized"):
        setattr(model, attribute, False)
