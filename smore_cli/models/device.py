"""The device that is used where none is named, and the compute type that suits it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from smore_cli.recipe.schema import ModelConfig

__all__ = ["default_device", "resolve_dtype"]


def default_device() -> torch.device:
    """Returns the first CUDA device, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def resolve_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """Returns the compute type: `auto` is bfloat16 on a GPU that has it, else float32."""
    if config.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    # Emulated bfloat16 (older GPUs) and bfloat16 on a CPU without it are about 3x slower than float32.
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32
