"""How many parameters there are: of what is trained, by part, how much a token uses, and what the optimiser keeps."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smore_cli.nn.adapted import AdaptedModule
from smore_cli.nn.full_copy import FullCopy
from smore_cli.training.optim import ROUTERS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from smore_cli.methods import MethodConfig
    from smore_cli.nn import Adapter
    from smore_cli.planning.skeleton import Skeleton
    from smore_cli.recipe.schema import TrainConfig

__all__ = ["ParameterCounts", "adapter_bytes", "count_parameters", "optimizer_bytes"]


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers that train.

    Attributes:
        trainable: all of them.
        active: of these, what one token's updates are made of, at most.
        parts: by what they do.
        sites: adapted modules.
    """

    trainable: int
    active: int
    parts: dict[str, int]
    sites: int


def count_parameters(skeleton: Skeleton, config: MethodConfig) -> ParameterCounts:
    """Counts over the whole depth of the model."""
    parts: Counter[str] = Counter()
    for part, parameter, times in _trainable(skeleton):
        parts[part] += parameter.numel() * times
    active = sum(config.num_active_parameters(site) for site in skeleton.sites.values())
    return ParameterCounts(
        parts.total(), active + parts["modules to save"], dict(sorted(parts.items())), len(skeleton.sites)
    )


def adapter_bytes(skeleton: Skeleton) -> dict[str, int]:
    """Returns the bytes of what trains, and of what adapters keep without training it."""
    trainable = sum(p.numel() * p.element_size() * times for _, p, times in _trainable(skeleton))
    frozen = 0
    for adapter, times in _adapters(skeleton):
        frozen += sum(buffer.numel() * buffer.element_size() for buffer in adapter.buffers()) * times
    return {"trainable": trainable, "frozen": frozen}


def optimizer_bytes(skeleton: Skeleton, train: TrainConfig) -> int:
    """Returns the bytes of the optimiser's state."""
    return sum(_state(p, train.optim) * times for _, p, times in _trainable(skeleton))


def _state(parameter: Tensor, optim: str) -> int:
    """Returns the bytes of one tensor's state: two moments in float32, or in 8 bits with scales, or factored."""
    size = parameter.numel()
    if optim == "adafactor":
        return 4 * (size // parameter.shape[-1] + size // parameter.shape[-2] if parameter.dim() > 1 else size)
    if optim.endswith("8bit") and size >= 4096:  # bitsandbytes leaves small tensors in 32 bits
        return 2 * (size + 4 * -(-size // 256)) + 2 * 256 * 4
    return 8 * size


def _adapters(skeleton: Skeleton) -> Iterator[tuple[Adapter, int]]:
    """Yields the adapters, and for how many each stands."""
    layer_of = {module: i for i, layer in enumerate(skeleton.stack) for module in layer.modules()}
    stands_for = Counter(skeleton.layers)
    for module in skeleton.model.modules():
        if isinstance(module, AdaptedModule) and module.active is not None:
            yield module.adapter(module.active), stands_for[layer_of[module]] if module in layer_of else 1


def _trainable(skeleton: Skeleton) -> Iterator[tuple[str, nn.Parameter, int]]:
    """Yields the part, the tensor, and how many alike it stands for."""
    for adapter, times in _adapters(skeleton):
        routers = {p for module in adapter.modules() if isinstance(module, ROUTERS) for p in module.parameters()}
        levels = {level for level, _ in adapter.expert_axes.values()}
        for name, parameter in adapter.named_parameters():
            if not parameter.requires_grad:
                continue
            if isinstance(adapter, FullCopy):
                part = "modules to save"
            elif parameter in routers:
                part = "routers"
            elif name.partition(".")[0] in adapter.up_projections:
                part = "up"
            elif len(levels) > 1 and name in adapter.expert_axes:
                part = f"tree level {adapter.expert_axes[name][0]}"
            else:
                part = "down" if parameter.dim() > 1 else "other"
            yield part, parameter, times
