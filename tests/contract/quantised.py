"""A tiny Llama in 4 and in 8 bits, and for each the float32 model that computes the same."""

from __future__ import annotations

import copy
import functools
import tempfile
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from smore_cli.models.quantised import bitsandbytes_config, make_trainable
from smore_cli.models.quiet import quiet
from smore_cli.nn.adapted import dense_weight
from smore_cli.recipe.schema import QuantizationConfig
from tests.contract.models import backbone

if TYPE_CHECKING:
    from torch import Tensor

SETTINGS = {"nf4": QuantizationConfig(), "int8": QuantizationConfig(bits=8)}
OUTLIER = 6.0
"""LLM.int8's threshold, as transformers sets it."""


class RoundedInput(nn.Linear):
    """What an 8-bit map computes, by the paper: rows of x rounded to 8 bits, columns with an outlier left as they are.

    The gradient passes as if nothing were rounded.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            rows = x.flatten(0, -2)
            half = rows.half().float()
            outliers = half.abs() >= OUTLIER
            largest = half.masked_fill(outliers, 0).abs().amax(1, keepdim=True).clamp_min(1e-12)
            rounded = (half * (127 / largest)).round() * largest / 127
            rounded = torch.where(outliers.any(0), rows, rounded).view(x.shape)
        return F.linear(x + (rounded - x).detach(), self.weight, self.bias)


@functools.cache
def quantised(kind: str) -> nn.Module:
    """Returns the Llama of the contract tests, its linear maps quantised; nobody changes it."""
    with tempfile.TemporaryDirectory() as folder, quiet(progress=False):
        cast("Any", backbone("llama")).save_pretrained(folder)
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            device_map={"": torch.device("cpu")},
            quantization_config=bitsandbytes_config(SETTINGS[kind], torch.float32),
        )
    make_trainable(model)
    return model.requires_grad_(False).eval()


@functools.cache
def dequantised(kind: str) -> nn.Module:
    """Returns the float32 model with the quantised model's weights; nobody changes it."""
    source, model = quantised(kind), copy.deepcopy(backbone("llama"))
    for path, module in source.named_modules():
        if type(module).__name__ not in ("Linear4bit", "Linear8bitLt"):
            continue
        weight = dense_weight(module).float()
        make = nn.Linear if kind == "nf4" else RoundedInput
        plain = make(weight.shape[1], weight.shape[0], bias=False)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        model.set_submodule(path, plain)
    return model.eval()
