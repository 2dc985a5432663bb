"""Which modules of a model an adapter goes to, by the names a recipe gives.

A module's path is always that of the bare backbone, whatever stands there now: `model.layers.0.mlp.up_proj` is also
the name of a linear map that an adapter wraps, or that lies inside a gated MLP that another adapter wraps.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from smore_cli.errors import AdapterError
from smore_cli.methods import Site
from smore_cli.nn.full_copy import bare, require_copyable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor

    from smore_cli.methods import SiteKind

__all__ = [
    "Place",
    "find_saved",
    "find_targets",
    "fused_experts",
    "is_gated_mlp",
    "is_linear",
    "output_head",
    "sites_of",
    "walk",
    "widths",
]

_LAYER = re.compile(r"^(.*?\.)(\d+)(?:\.|$)")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map that can be adapted (transformers' Conv1D stores its weight transposed)."""
    module = bare(module)
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether a module computes down_proj(act_fn(gate_proj(x)) * up_proj(x)), as Llama's and its kin's MLP does."""
    module = bare(module)
    maps = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    return all(map is not None and is_linear(map) for map in maps) and hasattr(module, "act_fn")


def output_head(model: nn.Module) -> nn.Module | None:
    """Returns the bare output embedding of a language model; None where there is none."""
    head = cast("Any", model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return None if head is None else bare(head)


def sites_of(model: nn.Module, targets: dict[str, nn.Module]) -> dict[str, Site]:
    """Returns where adapters of the targets, named by path, would sit."""
    sites = {}
    for path, target in targets.items():
        base = bare(target)
        layer, num_layers = 0, 1
        if match := _LAYER.match(path):
            layer, num_layers = int(match[2]), len(list(model.get_submodule(match[1].rstrip(".")).children()))
        if is_linear(base):
            sites[path] = Site(path, *widths(base), layer=layer, num_layers=num_layers, base=base)
            continue
        d, hidden = widths(cast("nn.Module", base.gate_proj))
        sites[path] = Site(path, d, d, "gated_mlp", hidden=hidden, layer=layer, num_layers=num_layers, base=base)
    return sites


def widths(linear: nn.Module) -> tuple[int, int]:
    """Returns the width of a linear map's input and output."""
    linear = bare(linear)
    if isinstance(linear, nn.Linear):  # a 4-bit weight is stored packed, so its shape tells nothing
        return linear.in_features, linear.out_features
    d_in, d_out = cast("Tensor", linear.weight).shape
    return d_in, d_out


def find_targets(
    model: nn.Module, target_modules: list[str] | str, sites: Iterable[SiteKind] = ("linear",)
) -> dict[str, nn.Module]:
    """Returns the modules that `target_modules` names, by path.

    A name matches a path's end, as in PEFT: `q_proj` matches `model.layers.0.self_attn.q_proj`. `all-linear` is every
    linear map but the output embedding, which must be named; for a method that adapts whole gated MLPs, these in place
    of their maps.

    Args:
        model: with or without adapters.
        target_modules: names, or 'all-linear'.
        sites: what the method can adapt.

    Raises:
        AdapterError: a name matches nothing, nothing of these kinds, or not in every layer where its siblings stand.
    """
    modules = {place.path: place.module for place in walk(model)}
    linears = {path: module for path, module in modules.items() if is_linear(module)}
    mlps = {path: module for path, module in modules.items() if is_gated_mlp(module)} if "gated_mlp" in sites else {}
    if "gated_mlp" in sites and not mlps:
        raise AdapterError("the method adapts gated MLPs, and this model has none", "use a method on linear maps")
    candidates = {path: module for path, module in modules.items() if path in linears or path in mlps}
    if target_modules == "all-linear":
        head, inside = output_head(model), tuple(f"{mlp}." for mlp in mlps)
        return {
            path: module
            for path, module in candidates.items()
            if bare(module) is not head and not path.startswith(inside)
        }
    names = [target_modules] if isinstance(target_modules, str) else target_modules
    available = ", ".join(sorted({path.rsplit(".", 1)[-1] for path in candidates}))
    found: set[str] = set()
    for target in names:
        matches = _named(candidates, target)
        if not matches:
            kind = "linear map or gated MLP" if mlps else "linear map"
            hint = _why_no_target(modules, target) or f"this model has: {available}"
            raise AdapterError(f"target_modules: '{target}' matches no {kind}", hint)
        _require_every_layer(model, target, matches, "target_modules")
        found.update(matches)
    if mlps and not found & mlps.keys():
        raise AdapterError(
            "target_modules: names no gated MLP, so there is nothing to mix", "add mlp, or use method lora"
        )
    parts = sorted(path for path in found if any(path.startswith(f"{mlp}.") for mlp in found & mlps.keys()))
    if parts:
        raise AdapterError(f"target_modules: {parts[0]} is part of a gated MLP that is adapted as a whole", "drop one")
    return {path: module for path, module in candidates.items() if path in found}


def find_saved(model: nn.Module, names: Iterable[str], targets: Mapping[str, object]) -> dict[str, nn.Module]:
    """Returns the bare modules that `modules_to_save` names, by path; names match as those of targets do.

    Args:
        model: with or without adapters.
        names: names or paths.
        targets: what the adapter itself adapts, by path.

    Raises:
        AdapterError: a name matches nothing, not in every layer, or something that cannot be trained as a whole.
    """
    modules = {place.path: place.module for place in walk(model)}
    found: dict[str, nn.Module] = {}
    for name in names:
        matches = _named(modules, name)
        if not matches:
            leaves = sorted({path.rsplit(".", 1)[-1] for path, module in modules.items() if _is_leaf(module)})
            raise AdapterError(f"modules_to_save: '{name}' matches no module", f"this model has: {', '.join(leaves)}")
        _require_every_layer(model, name, matches, "modules_to_save")
        for path in matches:
            found[path] = bare(modules[path])
            require_copyable(path, found[path], targets)
    return {path: found[path] for path in modules if path in found}


def fused_experts(model: nn.Module) -> list[str]:
    """Returns the paths of a native mixture's expert layers: all experts' weights in one 3-D tensor, no linear map."""
    return [place.path for place in walk(model) if _three_dimensional(bare(place.module))]


def _three_dimensional(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3]


def _named(paths: Iterable[str], name: str) -> list[str]:
    return [path for path in paths if path == name or path.endswith(f".{name}")]


def _is_leaf(module: nn.Module) -> bool:
    own = bare(module)
    return next(own.parameters(recurse=False), None) is not None and next(own.children(), None) is None


def _why_no_target(modules: Mapping[str, nn.Module], name: str) -> str:
    """Returns what to do instead, where a name is that of something which cannot be adapted."""
    found = [bare(modules[path]) for path in _named(modules, name)]
    if any(isinstance(module, nn.Embedding) for module in found):
        return "it is an embedding: name it in adapter.modules_to_save, which trains all of it"
    tensors = [f"{path}.{key}" for path in modules for key in _three_dimensional(bare(modules[path]))]
    if _named(tensors, name) or any(_three_dimensional(module) for module in found):
        return (
            "this model keeps all experts of a layer in one 3-D tensor, which no method here adapts: name its linear "
            "maps, or all-linear"
        )
    return ""


def _require_every_layer(model: nn.Module, target: str, matches: Iterable[str], field: str) -> None:
    """Refuses a target that stands in some layers of a stack only: a silent gap is nearly always a mistake."""
    hit: dict[str, set[int]] = {}
    for path in matches:
        if match := _LAYER.match(path):
            hit.setdefault(match[1], set()).add(int(match[2]))
    for stack, layers in hit.items():
        total = len(list(model.get_submodule(stack.rstrip(".")).children()))
        explicit = _LAYER.match(target) is not None
        if len(layers) < total and not explicit:
            missing = sorted(set(range(total)) - layers)
            raise AdapterError(
                f"{field}: '{target}' is missing in {len(missing)} of {total} layers of {stack.rstrip('.')}",
                f"first layer without it: {missing[0]}; name full paths to take only some layers",
            )


@dataclass(frozen=True)
class Place:
    """Where a module stands: its path in the bare backbone, and the attribute that holds it."""

    path: str
    module: nn.Module
    parent: nn.Module
    attribute: str


def walk(model: nn.Module) -> Iterator[Place]:
    """Yields every module inside a model once, adapters and their inner parts left out."""
    seen: set[int] = set()

    def visit(parent: nn.Module, prefix: str) -> Iterator[Place]:
        for attribute, module in parent.named_children():
            if id(module) in seen:
                continue
            seen.add(id(module))
            path = f"{prefix}{attribute}"
            yield Place(path, module, parent, attribute)
            yield from visit(bare(module), f"{path}.")

    yield from visit(model, "")
