"""The model to export: backbone and adapter as they were trained, a quantised backbone as the numbers it stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smore_cli.merging.dense import dequantise

if TYPE_CHECKING:
    import torch
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
        dequantise(model)
    return model, tokenizer
