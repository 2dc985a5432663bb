"""FSDP2: every process holds a part of the backbone and of the adapter, and gathers a layer when it needs it.

    accelerate launch --use_fsdp --fsdp_version 2 ...

One group a decoder layer, and one for what is left (embeddings, final norm, head). Gradients are summed as they are
scattered, never averaged, so that the step is the one of `training.step`. What is written is whole: an adapter file and
a checkpoint look the same whether the model was sharded or not, and one can be resumed as the other.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from smore_cli.errors import UsageError
from smore_cli.nn import adapted_modules

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch.optim import Optimizer

    from smore_cli.recipe.schema import Recipe
    from smore_cli.training.parallel import Processes

__all__ = [
    "WholeOptimizer",
    "clip",
    "layer_classes",
    "require_shardable",
    "shard",
    "sharding_wanted",
    "whole_adapter",
    "whole_numel",
]

PLAIN = "start it with --num-processes, torchrun, or accelerate launch without --use_fsdp"


def sharding_wanted() -> bool:
    """Whether accelerate's configuration asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def require_shardable(recipe: Recipe, processes: Processes) -> None:
    """Refuses what cannot be sharded, before anything is loaded.

    Raises:
        UsageError: FSDP 1, one process, or a recipe whose parts are no plain tensors.
    """
    from torch.distributed.fsdp import FSDPModule

    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UsageError("FSDP 1 cannot hold frozen and trained tensors in one layer", "use --fsdp_version 2")
    if processes.count == 1:
        raise UsageError("FSDP2 has nothing to share out among: there is one process", "use --num_processes 2 or more")
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise UsageError(f"FSDP2 needs torch 2.13 or newer, this is {torch.__version__}", "update torch")
    if recipe.quantization is not None:
        raise UsageError("FSDP2 does not shard a quantised backbone, whose weights are packed", PLAIN)
    if recipe.adapter.method == "trex":
        raise UsageError("FSDP2 does not shard method trex, whose prior calls parts of the backbone", PLAIN)
    if recipe.train.optim != "adamw_torch_fused":
        raise UsageError(f"train.optim {recipe.train.optim} does not work on sharded tensors", "use adamw_torch_fused")


def shard(model: Any, device: torch.device) -> None:
    """Shards a model over all processes, in place, as accelerate's configuration says; it moves to `device`.

    Args:
        model: the backbone with its adapter, whole and equal in every process.
        device: of this process.

    Raises:
        UsageError: the model does not say what its layers are.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    plugin = FullyShardedDataParallelPlugin()  # reads what `accelerate launch` has put into the environment
    classes = layer_classes(model, plugin.transformer_cls_names_to_wrap)
    layers = [module for module in model.modules() if type(module) in classes]
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    options: dict[str, Any] = {"mesh": mesh}
    if plugin.cpu_offload:
        options["offload_policy"] = plugin.cpu_offload
    for layer in layers:
        fully_shard(layer, reshard_after_forward=plugin.reshard_after_forward is not False, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo can multiply nothing while it sums
    # An expert that no token of one process went to has a gradient in another.
    cast("FSDPModule", model).set_reduce_scatter_unused_params(True)


def layer_classes(model: Any, names: Iterable[str] | None) -> list[type[nn.Module]]:
    """Returns the classes of a model's decoder layers, which are gathered as a whole.

    Args:
        model: the backbone.
        names: of the classes; none: those that the model itself says.

    Raises:
        UsageError: the model has no layer of them.
    """
    wanted = set(names or model._no_split_modules or ())
    found = {type(module): None for module in model.modules() if type(module).__name__ in wanted}
    if not found:
        raise UsageError(
            f"{type(model).__name__} has no layers of class {', '.join(sorted(wanted)) or '(none named)'}",
            "with FSDP2 name its decoder layer: --fsdp_transformer_layer_cls_to_wrap",
        )
    return list(found)


def whole_numel(parameter: Tensor) -> int:
    """Returns how many numbers a parameter has in all processes together; ZeRO 3 leaves an empty one here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


@contextmanager
def whole_adapter(model: nn.Module, *, changes: bool = False) -> Iterator[None]:
    """Puts whole tensors in the place of a sharded adapter's, to be saved, or with `changes` to be filled.

    All processes enter it together. A model that is not sharded is left as it is.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if any(hasattr(parameter, "ds_id") for parameter in trained):
        from smore_cli.training.zero import gathered_parameters

        with gathered_parameters(trained, changes=changes):
            yield
        return
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    for adapted in adapted_modules(model).values():
        for module in adapted.adapters.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(parameter.data, DTensor):
                    replaced.append((module, name, parameter))
                    module._parameters[name] = nn.Parameter(parameter.data.full_tensor(), parameter.requires_grad)
    try:
        yield
        if changes:
            with torch.no_grad():
                for module, name, parameter in replaced:
                    parameter.copy_(_like(cast("Tensor", module._parameters[name]).detach(), parameter.data))
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter


class WholeOptimizer:
    """An optimiser over sharded parameters, whose state is saved and loaded whole."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._gathered: dict[str, Any] = {}

    @classmethod
    def gathered(cls, optimizer: Optimizer) -> WholeOptimizer:
        """Makes every tensor of the state whole, for `state_dict`; all processes call it together."""
        found, whole = optimizer.state_dict(), cls(optimizer)
        state = {key: {name: _full(value) for name, value in each.items()} for key, each in found["state"].items()}
        whole._gathered = found | {"state": state}
        return whole

    def state_dict(self) -> dict[str, Any]:
        """Returns what was gathered."""
        return self._gathered

    def load_state_dict(self, found: dict[str, Any]) -> None:
        """Takes a whole state; all processes call it together, each with the same."""
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        state = {
            key: {
                name: _like(value, parameters[key].data) if _moments(value, parameters[key]) else value
                for name, value in each.items()
            }
            for key, each in found["state"].items()
        }
        self._optimizer.load_state_dict(found | {"state": state})


def clip(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scales gradients down to a norm of `limit`, and returns what it was, a scalar; the same for sharded ones."""
    norm: Tensor = _full(nn.utils.clip_grad_norm_(parameters, limit))
    return norm


def _full(value: Any) -> Any:
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value  # whole states are for the disk


def _moments(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and isinstance(parameter.data, DTensor) and value.shape == parameter.shape


def _like(whole: Tensor, sharded: Tensor) -> Tensor:
    """Returns a whole tensor, which every process has, cut as `sharded` is."""
    if not isinstance(sharded, DTensor):
        return whole
    return distribute_tensor(whole.to(sharded.device), sharded.device_mesh, sharded.placements)
