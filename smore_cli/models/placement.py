"""Where the layers of a backbone go: all on one device, or spread over the GPUs of one process (`model.device_map`).

Spread out, accelerate moves the hidden states from layer to layer, and each adapter lies where its layer does. One GPU
works at a time: this is for models that do not fit, not for speed.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from smore_cli.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from smore_cli.recipe.schema import ModelConfig

__all__ = ["device_map_of", "gpus_of", "require_no_offload"]


def device_map_of(config: ModelConfig, device: torch.device) -> str | dict[str, torch.device]:
    """Returns what transformers' `from_pretrained` is given.

    Args:
        config: `device_map`, or all on one device.
        device: that one.

    Raises:
        ModelError: the map is asked for where it cannot help: without a GPU, or in one of several processes.
    """
    if config.device_map is None:
        return {"": device}
    if device.type != "cuda":
        problem = "model.device_map: auto spreads a model over several GPUs, and this machine has none"
        raise ModelError(problem, "remove model.device_map")
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        problem = f"model.device_map: auto gives all GPUs to one process, and there are {processes}"
        raise ModelError(problem, "start one process, or remove model.device_map and shard with FSDP")
    return config.device_map


def gpus_of(model: nn.Module, device: torch.device) -> list[int]:
    """Returns the GPUs whose random generators a pass may draw from.

    Args:
        model: spread over several, or all on one device.
        device: where its passes begin.
    """
    places = {device, *(parameter.device for parameter in model.parameters())}
    current = torch.cuda.current_device() if torch.device("cuda") in places else 0
    return sorted({current if place.index is None else place.index for place in places if place.type == "cuda"})


def require_no_offload(name: str, device_map: Mapping[str, object] | None) -> None:
    """Refuses a model of which a part was left in main memory or on disk: offloaded weights pass no gradient.

    Args:
        name: of the model.
        device_map: where transformers put its parts; None: it was not asked to.

    Raises:
        ModelError: it did not fit on the GPUs.
    """
    places = {part: str(place) for part, place in (device_map or {}).items()}
    if not any(place.startswith("cuda") or place.isdigit() for place in places.values()):
        return
    if left := [part for part, place in places.items() if place in ("cpu", "disk", "meta")]:
        raise ModelError(
            f"model {name} does not fit on the GPUs: {len(left)} of its parts, as {left[0]}, would stay in main memory "
            "or on disk, where they cannot be trained through",
            "use `quantization:`, more GPUs, or a smaller model",
        )
