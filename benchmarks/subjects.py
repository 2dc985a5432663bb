"""What is measured: every method with settings of like size, and PEFT's LoRA with as many trainable numbers.

All adapters of a model share its frozen weights: a copy for every variant would not fit a small machine.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smore_cli.data.batch import Row
from smore_cli.kernels import use as use_kernels
from smore_cli.methods import MethodConfig, Site, load_method
from smore_cli.models.load import load_backbone
from smore_cli.models.quiet import quiet
from smore_cli.nn import AdapterContext, attach
from smore_cli.nn.adapted import AdaptedModule
from smore_cli.nn.prior_hooks import active_prior
from smore_cli.recipe.schema import ModelConfig, QuantizationConfig

with quiet():  # peft loads bitsandbytes, which says what it does not find
    from peft import LoraConfig, inject_adapter_in_model

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SETTINGS: dict[str, dict[str, Any]] = {
    "comol": {"num_experts": 8, "rank": 16},
    "dynmole": {"num_experts": 8, "rank": 4, "alpha": 8.0},
    "goat": {"num_experts": 8, "rank": 32},  # the rank is that of all experts together
    "hydralora": {"num_experts": 8, "rank": 4},
    "lora": {"rank": 32},
    "loramoe": {"num_experts": 8, "rank": 4},
    "mixlora": {"num_experts": 8, "rank": 4, "alpha": 8.0},
    "mode": {"num_experts": 8, "rank": 4},
    "moelora": {"num_experts": 8, "rank": 4},
    "mola": {"num_experts": 8, "rank": 4},
    "mor": {"num_experts": 8, "rank": 4},
    "omoe": {"num_experts": 2, "rank": 16},
    "smore": {"num_experts": [4, 4], "rank": [8, 8], "fanout": [2, 2], "router_dim": 8, "key_dim": 8},
    "trex": {"num_down": 4, "num_up": 8},
}
"""Settings of like size: a total rank of 32 (64 in the tree), and no dropout, which would hide everything else."""


def method_config(method: str, target_modules: Sequence[str] | str = "all-linear", **changes: Any) -> MethodConfig:
    """Returns a method's settings for the benchmarks."""
    kind = load_method(method)
    values = {"method": method, **SETTINGS.get(method, {}), "target_modules": target_modules}
    if "dropout" in kind.model_fields:
        values["dropout"] = 0.0
    return kind.model_validate({**values, **changes})


def equal_rank(numbers: int, sites: Sequence[tuple[int, int]]) -> int:
    """Returns the rank at which LoRA on all `sites` (d_in, d_out) has nearest to `numbers` trainable numbers."""
    return max(1, round(numbers / sum(d_in + d_out for d_in, d_out in sites)))


def rival(rank: int, known: Iterable[int]) -> int:
    """Returns the rank of the PEFT variant that stands for `rank`: one already there, if it is nearly the same."""
    return next((other for other in known if abs(other - rank) <= 0.03 * rank), rank)


def linear_sites(model: nn.Module, names: Sequence[str] | str = "all-linear") -> list[tuple[int, int]]:
    """Returns (d_in, d_out) of the named linear maps of a bare model."""
    wanted = linear_names(model) if names == "all-linear" else names
    maps = [m for path, m in model.named_modules() if path.rpartition(".")[2] in wanted and isinstance(m, nn.Linear)]
    return [(m.in_features, m.out_features) for m in maps]


def count(module: nn.Module) -> int:
    """Returns how many numbers train."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def adapted_linear(base: nn.Module, config: MethodConfig, shape: tuple[int, int]) -> AdaptedModule:
    """Returns a frozen linear map (d_in, d_out) with a fresh adapter; nothing in it is zero any more."""
    use_kernels()
    adapter = config.build(Site("linear", *shape, base=base))
    module = AdaptedModule(base)
    module.adapters["default"] = adapter.to(next(base.parameters()).device)
    module.active = "default"
    return wake(module)


def peft_linear(base: nn.Module, rank: int) -> nn.Module:
    """Returns the same map with PEFT's LoRA."""
    holder = nn.Module()
    holder.linear = base
    holder.is_loaded_in_4bit = type(base).__name__ == "Linear4bit"
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=["linear"]), holder)
    return wake(holder.get_submodule("linear"))


def with_method(model: nn.Module, config: MethodConfig) -> nn.Module:
    """Returns a model with a method's adapters, which shares the frozen weights of `model`."""
    use_kernels()
    model = sharing(model)
    attach(model, config)
    if (prior := active_prior(model)) is not None:  # training would have found centroids; any do for time and memory
        width = prior.embedder(model, [[3]]).shape[1]
        prior.centroids = F.normalize(torch.randn(prior.num_experts, width), dim=1)
    return wake(model)


def with_peft(model: nn.Module, rank: int, target_modules: Sequence[str] | str = "all-linear") -> nn.Module:
    """Returns a model with PEFT's LoRA, which shares the frozen weights of `model`."""
    model = sharing(model)
    names = linear_names(model) if target_modules == "all-linear" else list(target_modules)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), model)
    return wake(model)


def linear_names(model: nn.Module) -> list[str]:
    """Returns the last names of all linear maps but the output head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    return sorted(found)


def sharing(model: nn.Module) -> nn.Module:
    """Returns a copy of a model with the very same weights and buffers."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def wake(module: nn.Module) -> Any:
    """Gives trainable matrices that start at zero small numbers, so that no gradient is zero; returns the module."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad and parameter.dim() > 1 and not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return module.train()


def load_model(name: str, *, device: str, dtype: str, nf4: bool) -> Any:
    """Returns a frozen backbone: a bundled model, a folder or a hub name."""
    config = ModelConfig(name_or_path=name, dtype=dtype)  # type: ignore[arg-type]
    return load_backbone(config, QuantizationConfig() if nf4 else None, torch.device(device)).model


def random_rows(rows: int, tokens: int, vocabulary: int, *, supervised: float = 1.0) -> list[Row]:
    """Returns rows of random tokens in two groups, of whose last part every token is learned."""
    ids = torch.randint(3, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    prompt = min(tokens - 1, max(1, round(tokens * (1 - supervised))))
    return [Row(row[:prompt], [row[prompt:]], [[True] * (tokens - prompt)], group=i % 2) for i, row in enumerate(ids)]


def context_for(config: MethodConfig | None, rows: int, tokens: int, device: str) -> AdapterContext:
    """Returns what an adapter is told of a batch of `rows` x `tokens` real tokens: groups and a prior where it asks."""
    groups = prior = None
    if config is not None and config.row_groups is not None:
        groups = torch.arange(rows, device=device) % config.row_groups
    if config is not None and config.method == "trex":
        prior = torch.rand(rows, config.num_experts, device=device)  # type: ignore[attr-defined]
    return AdapterContext(token_mask=torch.ones(rows, tokens, device=device), groups=groups, prior=prior)


def frozen_linear(d_in: int, d_out: int, *, dtype: torch.dtype, device: str, nf4: bool) -> nn.Module:
    """Returns a random frozen linear map without bias, in 4 bits where asked."""
    linear = nn.Linear(d_in, d_out, bias=False).requires_grad_(False)
    return four_bit(linear, dtype, device) if nf4 else linear.to(device, dtype)


def four_bit(linear: nn.Linear, dtype: torch.dtype, device: str) -> nn.Module:
    """Returns a frozen linear map without bias in nf4."""
    import bitsandbytes as bnb

    quantised = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    weight = linear.weight.data.to("cpu", torch.float32)  # is quantised on its way to the device
    quantised.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=quantised)
    return quantised.to(device)


def quantise_(model: Any, dtype: torch.dtype, device: str) -> Any:
    """Puts the linear maps of a frozen model into nf4, all but its head, one after the other; returns it."""
    names = linear_names(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in names:
            model.set_submodule(path, four_bit(module, dtype, device))
    model.is_loaded_in_4bit = True  # what PEFT asks
    return model


def frozen_parts(module: nn.Module) -> list[Tensor]:
    """Returns what is there whatever runs: weights and buffers, a 4-bit weight's tables among them."""
    found = [*module.parameters(), *module.buffers()]
    for parameter in module.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            found += [value for value in vars(state).values() if isinstance(value, Tensor)]
    return found
