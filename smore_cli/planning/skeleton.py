"""A model of a few layers that stands for all of them: shapes without weights, adapters included.

Layers that look alike cost alike. Of a deep model only the first layer is kept (whose input needs no gradient) and one
of each kind among the others; what they cost is added up over the depth (`smore_cli.planning.passes`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from smore_cli.models.load import load_skeleton
from smore_cli.nn import Adapter, attach
from smore_cli.nn.prior_hooks import active_prior, remove_prior
from smore_cli.nn.targets import find_targets, sites_of

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from smore_cli.methods import MethodConfig, Site
    from smore_cli.recipe.schema import QuantizationConfig, Recipe

__all__ = ["Skeleton", "build_skeleton"]


@dataclass(frozen=True)
class Skeleton:
    """What is needed to run a pass on shapes.

    Attributes:
        model: the backbone with its adapters, of only the layers in `kept`, in training mode.
        fake: the mode its tensors belong to.
        sites: every site of the whole model, by path.
        layers: for each layer of the whole model, which of the model's layers stands for it.
        stack: the model's layers.
        weights: bytes of the backbone, by part.
        files: bytes of its files that lie in a CPU's memory besides: `loading`, and as long as it is there (`kept`).
        numel: numbers of the backbone.
        prior_width: numbers a prior has for each sequence; 0: the method has none.
        dtype: compute dtype.
    """

    model: nn.Module
    fake: FakeTensorMode
    sites: dict[str, Site]
    layers: list[int]
    stack: nn.ModuleList
    weights: dict[str, int]
    files: dict[str, int]
    numel: int
    prior_width: int
    dtype: torch.dtype


class _Chosen:
    """A method's config that builds adapters in some layers only, so that a deep model is ready at once."""

    def __init__(self, config: MethodConfig, layers: frozenset[int] | None) -> None:
        self.config, self.layers = config, layers

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)

    def build(self, site: Site) -> Adapter:
        return self.config.build(site) if self.layers is None or site.layer in self.layers else _Nothing()


class _Nothing(Adapter):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y


class QuantisedLinear(nn.Linear):
    """A linear map that holds its weight quantised: every use makes the dense weight anew, and none is kept.

    Its weight has another dtype than the model computes in, so that whoever takes it to that dtype makes a copy too.
    """

    keeps_input = False

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., d_in) to (..., d_out)."""
        return cast("Tensor", _Dequantised.apply(x, self.weight, self.bias, self.keeps_input))


class Linear4bit(QuantisedLinear):
    """Named as bitsandbytes' own, by which adapters know what they can be fused with."""


class Linear8bitLt(QuantisedLinear):
    """bitsandbytes' 8-bit map keeps its input for the backward pass, though nobody asks for the weight's gradient."""

    keeps_input = True


class _Dequantised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, keeps_input: bool) -> Tensor:
        ctx.save_for_backward(weight, x if keeps_input else None)
        return nn.functional.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, _ = ctx.saved_tensors
        return grad @ weight.to(grad.dtype), None, None, None


def build_skeleton(recipe: Recipe, dtype: torch.dtype) -> Skeleton:
    """Returns the recipe's model with a few layers.

    Raises:
        ModelError: the backbone's config cannot be read.
        AdapterError: the adapter does not fit it.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    model: Any = load_skeleton(recipe.model)
    stored = next(model.parameters()).dtype
    model.to(dtype)
    if recipe.model.attn_implementation == "eager":
        model.set_attn_implementation("eager")
    if recipe.quantization is not None:
        quantise(model, recipe.quantization, dtype)
    weights = weight_bytes(model, recipe.quantization)
    files = file_bytes(model, stored, dtype)
    numel = sum(parameter.numel() for parameter in model.parameters())
    sites = sites_of(model, find_targets(model, recipe.adapter.target_modules, recipe.adapter.sites))
    stack_path, depth = _find_stack(model)
    kinds = _kinds(model, recipe.adapter, sites, depth)
    chosen = sorted({kinds.index(kind) for kind in kinds})
    whole = not stack_path
    with torch.device("meta"):
        config = cast("MethodConfig", _Chosen(recipe.adapter, None if whole else frozenset(chosen)))
        attach(model, config)
    prior = active_prior(model)
    if prior is not None:
        remove_prior(model, "default")  # scoring needs real tokens; a pass on shapes is handed its numbers
    if whole:
        layers, stack = [], nn.ModuleList()
    else:
        layers = [chosen.index(kinds.index(kind)) for kind in kinds]
        stack = _keep(model, stack_path, chosen)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        model.to_empty(device="cpu")
    model.train()
    prior_width = 0 if prior is None else prior.num_experts
    return Skeleton(model, fake, sites, layers, stack, weights, files, numel, prior_width, dtype)


def quantise(model: Any, quantization: QuantizationConfig, dtype: torch.dtype) -> list[str]:
    """Makes linear maps quantised ones, those that transformers quantises, and returns their paths."""
    from transformers.quantizers.base import get_keys_to_not_convert

    left_alone = tuple(get_keys_to_not_convert(model))
    kind = Linear4bit if quantization.bits == 4 else Linear8bitLt
    other = torch.float16 if dtype != torch.float16 else torch.bfloat16
    found = []
    for path, module in model.named_modules():
        if type(module) is nn.Linear and not any(path == name or path.endswith(f".{name}") for name in left_alone):
            module.__class__ = kind
            module.weight = nn.Parameter(module.weight.data.to(other), requires_grad=False)
            found.append(path)
    return found


def file_bytes(model: Any, stored: torch.dtype, dtype: torch.dtype) -> dict[str, int]:
    """Returns what of the weights' files is in a CPU's memory besides the weights.

    Files are mapped. A weight of the dtype it is stored in is that piece of the file; of one that is converted both are
    there while the model is loaded, and then as long as something else still is a piece of the same file.
    """
    quantised = sum(module.weight.numel() for module in model.modules() if isinstance(module, QuantisedLinear))
    if stored == dtype:
        return {"loading": quantised * stored.itemsize, "kept": quantised * stored.itemsize}
    return {"loading": sum(p.numel() for p in model.parameters()) * stored.itemsize, "kept": 0}


def weight_bytes(model: Any, quantization: QuantizationConfig | None) -> dict[str, int]:
    """Returns the bytes of a backbone: weights, and of quantised ones their constants."""
    quantised = {
        module.weight for module in model.modules() if isinstance(module, QuantisedLinear) and quantization is not None
    }
    found = {"weights": sum(p.numel() * p.element_size() for p in model.parameters() if p not in quantised)}
    found["weights"] += sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if quantization is None:
        return found
    found["quantised weights"] = sum(weight.numel() * quantization.bits // 8 for weight in quantised)
    found["quantisation constants"] = sum(_constants(weight, quantization) for weight in quantised)
    return found


def _constants(weight: Tensor, quantization: QuantizationConfig) -> int:
    """Returns the bytes of what belongs to a quantised weight: in 8 bits a scale a row, in 4 bits one for each 64."""
    if quantization.bits == 8:
        return 4 * weight.shape[0]
    blocks = -(-weight.numel() // 64)
    table = 16 * 4
    if quantization.double_quant is False:
        return 4 * blocks + table
    return blocks + 4 * -(-blocks // 256) + 256 * 4 + 4 + table  # absmax in 8 bits, its own scales, codes and offset


def _find_stack(model: Any) -> tuple[str, int]:
    """Returns the path and the length of the list of layers; an empty path where there is none of that length."""
    depth = int(model.config.get_text_config().num_hidden_layers)
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return path, depth
    return "", depth


def _kinds(model: Any, config: MethodConfig, sites: dict[str, Site], depth: int) -> list[tuple[Any, ...]]:
    """Returns for each layer what its cost depends on; the first is a kind of its own."""
    attention = getattr(model.config.get_text_config(), "layer_types", None) or [""] * depth
    adapted: list[Counter[tuple[Any, ...]]] = [Counter() for _ in range(depth)]
    for path, site in sites.items():
        if site.layer < depth:
            name = path.rsplit(".", 1)[-1]
            adapted[site.layer][name, config.num_parameters(site), config.num_active_parameters(site)] += 1
    return [(i == 0, attention[i], frozenset(adapted[i].items())) for i in range(depth)]


def _keep(model: Any, stack_path: str, chosen: list[int]) -> nn.ModuleList:
    """Leaves only some layers in the model, and tells its config."""
    parent, _, attribute = stack_path.rpartition(".")
    layers = model.get_submodule(stack_path)
    stack = nn.ModuleList([layers[i] for i in chosen])
    setattr(model.get_submodule(parent), attribute, stack)
    config = model.config.get_text_config()
    kept: dict[str, Any] = {"num_hidden_layers": len(chosen)}
    if getattr(config, "layer_types", None):
        kept["layer_types"] = [config.layer_types[i] for i in chosen]
    for name, value in kept.items():
        object.__setattr__(config, name, value)
    return stack
