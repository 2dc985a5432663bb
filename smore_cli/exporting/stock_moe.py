"""MixLoRA as an ordinary mixture of experts: the same function, in an architecture that transformers serves unchanged.

    expert i:  W_i = W + scale B_i A_i      for gate, up and down         router: R / temperature
    y = sum_k w_k E_k(x),  w = softmax over the top k of R x, divided by their sum

LoRA elsewhere (q, k, v, o) is merged into the weights. A layer without experts gets copies of its own network: whatever
a router says, weights that sum to one mix copies to the same. The feed-forward networks grow by the number of experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from smore_cli.errors import UsageError
from smore_cli.exporting.shards import write_shards
from smore_cli.exporting.stock_twins import Twin, twin_config, twin_of
from smore_cli.merging.dense import set_weight
from smore_cli.methods.mixlora import MixLoRAConfig
from smore_cli.models.quiet import quiet
from smore_cli.nn import adapted_modules, detach
from smore_cli.nn.adapted import dense_weight
from smore_cli.nn.full_copy import FullCopy, bare
from smore_cli.nn.gated_mlp import GatedExperts
from smore_cli.nn.low_rank import LowRank

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from smore_cli.methods import MethodConfig

__all__ = ["require_stock_moe", "stock_moe_bytes", "write_stock_moe"]

_MAPS = ("gate", "up", "down")


def require_stock_moe(config: MethodConfig) -> MixLoRAConfig:
    """Returns the settings, if a stock mixture computes the same.

    Raises:
        UsageError: with the reason why none does.
    """
    hint = "--to hf-code keeps any adapter exactly"
    if not isinstance(config, MixLoRAConfig):
        why = "its experts do not stand around a whole feed-forward network with one router"
        raise UsageError(f"a {config.method} adapter is no stock mixture of experts: {why}", hint)
    if config.router != "top_k":
        does = {"top_p": "gives tokens different numbers of experts", "switch": "adds a part of one expert's change"}
        problem = f"router {config.router} {does[config.router]}, stock mixtures weight a fixed number, summing to one"
        raise UsageError(problem, hint)
    if not config.renormalised and config.num_experts > 1:
        raise UsageError("without renormalise the weights do not sum to one, as those of stock mixtures do", hint)
    return config


def write_stock_moe(model: PreTrainedModel, config: MixLoRAConfig, folder: Path) -> None:
    """Writes config.json, generation_config.json and the weights; the model's own are merged on the way.

    Args:
        model: with the adapter attached, which is taken off.
        config: the adapter's settings.
        folder: is there.

    Raises:
        UsageError: the backbone has no stock twin.
    """
    twin = twin_of(model.config)
    experts = _merged_but_experts(model)
    top_k = min(config.top_k, config.num_experts)
    with quiet():
        settings = twin_config(twin, model.config, config.num_experts, top_k)
        settings.dtype = model.dtype
        settings.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
    write_shards(_tensors(model, twin, experts, config), folder)


def stock_moe_bytes(model: PreTrainedModel, num_experts: int) -> int:
    """Returns about what the weights of the mixture will take."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if ".adapters." not in name}
    mlps = sum(size for name, size in sizes.items() if _in_mlp(name))
    return (sum(sizes.values()) + mlps * (num_experts - 1)) * model.dtype.itemsize


def _in_mlp(name: str) -> bool:
    return ".mlp." in name


@torch.no_grad()
def _merged_but_experts(model: PreTrainedModel) -> dict[int, GatedExperts]:
    """Merges all that is no mixture into the weights, takes the adapter off and returns the mixtures by layer."""
    experts: dict[int, GatedExperts] = {}
    for path, module in adapted_modules(model).items():
        adapter = module.adapters["default"]
        if isinstance(adapter, GatedExperts):
            experts[int(path.split(".")[2])] = adapter
        elif isinstance(adapter, FullCopy):
            _untie(model, module.base)
            module.base.load_state_dict(adapter.copy.state_dict())
        else:
            _untie(model, module.base)
            set_weight(module.base, cast("LowRank", adapter).merged_weight(dense_weight(module.base)))
    detach(model)
    return experts


def _untie(model: PreTrainedModel, base: Any) -> None:
    """Gives an output head or an embedding that alone changes a weight of its own, where the two share one."""
    pair: list[Any] = [bare(cast("Any", get())) for get in (model.get_output_embeddings, model.get_input_embeddings)]
    if base in pair and pair[0].weight is pair[1].weight:
        base.weight = torch.nn.Parameter(base.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def _tensors(
    model: PreTrainedModel, twin: Twin, experts: dict[int, GatedExperts], config: MixLoRAConfig
) -> Iterator[tuple[str, Tensor]]:
    """Yields the mixture's tensors by name, each made when it is asked for."""
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if not _in_mlp(name) and not (tied and name == "lm_head.weight"):
            yield name, tensor.to(model.dtype)
    for number, layer in enumerate(cast("Any", model).model.layers):
        yield from _mixture(twin, number, layer.mlp, experts.get(number), config)


def _mixture(
    twin: Twin, number: int, mlp: nn.Module, adapter: GatedExperts | None, config: MixLoRAConfig
) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of one layer's mixture."""
    weights = [cast("Tensor", mlp.get_submodule(f"{map}_proj").weight) for map in _MAPS]  # (H, d), (H, d), (d, H)
    d, dtype = weights[0].shape[1], weights[0].dtype
    router = torch.zeros(config.num_experts, d, dtype=torch.float64)
    if adapter is not None:
        router = adapter.router.weight.detach().double() / config.temperature
    moe = twin.moe.format(number)
    yield f"{moe}.gate.weight", router.to(dtype)
    for expert in range(config.num_experts):
        for name, map, weight in zip(twin.expert(number, expert), _MAPS, weights, strict=True):
            yield name, _expert_weight(weight, adapter, map, expert)
    if twin.shared:
        zero = torch.zeros(1, d, dtype=dtype)
        yield f"{moe}.shared_expert.gate_proj.weight", zero
        yield f"{moe}.shared_expert.up_proj.weight", zero.clone()
        yield f"{moe}.shared_expert.down_proj.weight", zero.t().clone()
        yield f"{moe}.shared_expert_gate.weight", zero.clone()


@torch.no_grad()
def _expert_weight(weight: Tensor, adapter: GatedExperts | None, map: str, expert: int) -> Tensor:
    """Returns W + scale B_i A_i, formed in float64 and rounded once."""
    if adapter is None:
        return weight.clone()
    ranks = slice(expert * adapter.rank, (expert + 1) * adapter.rank)
    A, B = adapter.get_parameter(f"{map}_A")[ranks], adapter.get_parameter(f"{map}_B")[:, ranks]
    return (weight.double() + adapter.scale * (B.double() @ A.double())).to(weight.dtype)
