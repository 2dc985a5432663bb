"""Quantised backbones through bitsandbytes: 4 bits (QLoRA), and 8 bits (LLM.int8).

    4 bits   y = x W^T with W dequantised to the compute type at every use: exact in W
    8 bits   the rows of x are rounded to 8 bits too, except the columns that hold a value above 6, which are multiplied
             in half precision; the gradient is that of the dequantised weight

Embeddings, norms and the output head stay in the compute type, the same in training, evaluation and after a reload.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig

    from smore_cli.recipe.schema import QuantizationConfig

__all__ = ["bitsandbytes_config", "describe_quantization", "make_trainable"]


def bitsandbytes_config(config: QuantizationConfig | None, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Returns what transformers' `from_pretrained` is given.

    Args:
        config: of the recipe; None: not quantised.
        dtype: the compute type.
    """
    if config is None:
        return None
    from transformers import BitsAndBytesConfig

    if config.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.type or "nf4",
        bnb_4bit_use_double_quant=config.double_quant is not False,
        bnb_4bit_compute_dtype=dtype,
    )


def describe_quantization(config: QuantizationConfig | None) -> str:
    """Returns how the weights of a backbone are kept, as in '4-bit (nf4)'."""
    if config is None:
        return "full-precision"
    return "8-bit" if config.bits == 8 else f"4-bit ({config.type or 'nf4'})"


def make_trainable(model: nn.Module) -> None:
    """Forbids bitsandbytes what would make training on a quantised model wrong or noisy.

    On CPUs with AVX512-BF16 it repacks 4-bit weights at the first forward pass in evaluation mode, for good: scales are
    rounded to bfloat16 and no gradient passes any more, so that training after an evaluation is wrong, and the same run
    gives other numbers elsewhere. And at every 8-bit product it warns that it casts its input.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    if getattr(model, "is_loaded_in_8bit", False):
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
