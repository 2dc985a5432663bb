"""Putting adapters onto a model, switching them, and taking them off again.

A module's path is always that of the bare backbone, whatever stands there now: `model.layers.0.mlp.up_proj` is also
the name of a linear map that an adapter wraps, or that lies inside a gated MLP that another adapter wraps.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from smore_cli.errors import AdapterError
from smore_cli.methods import MethodConfig, Site
from smore_cli.nn.adapted import AdaptedModule
from smore_cli.nn.prior_hooks import install_prior, remove_prior, select_prior

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from smore_cli.methods import SiteKind

__all__ = ["adapted_modules", "attach", "detach", "find_targets", "is_gated_mlp", "is_linear", "set_active", "sites_of"]

_LAYER = re.compile(r"^(.*?\.)(\d+)(?:\.|$)")


def attach(model: nn.Module, config: MethodConfig, *, name: str = "default", seed: int = 0) -> list[str]:
    """Adds an adapter to every target of `config` and makes it the active one; the backbone is frozen.

    Args:
        model: a transformers model, already on its device.
        config: the method and where it goes.
        name: the adapter's name; a model can hold several.
        seed: of the initialisation, which does not touch the global random state.

    Returns:
        The paths of the adapted modules.

    Raises:
        AdapterError: the targets match nothing, or only some layers, or the name is taken or unusable.
    """
    if not name or "." in name:
        raise AdapterError(f"'{name}' cannot be an adapter's name", "use a name without dots")
    targets = find_targets(model, config.target_modules, config.sites)
    if any(name in module.adapters for module in targets.values() if isinstance(module, AdaptedModule)):
        raise AdapterError(f"the model already has an adapter named '{name}'", "detach it first, or use another name")
    sites = sites_of(model, targets)
    prior = config.build_prior(model)
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would reseed every GPU as well
        adapters = {path: config.build(site) for path, site in sites.items()}
    places = {place.path: place for place in _walk(model)}
    for path, adapter in adapters.items():
        adapted = _adapted(places[path])
        adapted.adapters[name] = adapter.to(next(adapted.base.parameters()).device)
        adapted.adapters[name].train(adapted.training)
    if prior is not None:
        install_prior(model, name, prior)
    set_active(model, name)
    return list(targets)


def detach(model: nn.Module, name: str = "default") -> None:
    """Removes an adapter; modules left without any become the plain modules they were.

    Raises:
        AdapterError: no module has an adapter of that name.
    """
    _require_adapter(model, name)
    remove_prior(model, name)
    for place in reversed(list(_walk(model))):  # what lies inside another adapted module comes first
        adapted = place.module
        if not isinstance(adapted, AdaptedModule):
            continue
        if name in adapted.adapters:
            del adapted.adapters[name]
        if adapted.active == name:
            adapted.active = None
        if not adapted.adapters:
            setattr(place.parent, place.attribute, adapted.base)


def set_active(model: nn.Module, name: str | None) -> None:
    """Uses the adapter `name` wherever it exists; None: the bare backbone. Only the active adapter trains.

    Raises:
        AdapterError: no module has an adapter of that name.
    """
    if name is not None:
        _require_adapter(model, name)
    select_prior(model, name)
    for module in adapted_modules(model).values():
        module.active = name if name is not None and name in module.adapters else None
        for key, adapter in module.adapters.items():
            adapter.requires_grad_(key == name)


def adapted_modules(model: nn.Module) -> dict[str, AdaptedModule]:
    """Returns the adapted modules by path, in the model's order."""
    return {place.path: place.module for place in _walk(model) if isinstance(place.module, AdaptedModule)}


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map that can be adapted (transformers' Conv1D stores its weight transposed)."""
    module = module.base if isinstance(module, AdaptedModule) else module
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether a module computes down_proj(act_fn(gate_proj(x)) * up_proj(x)), as Llama's and its kin's MLP does."""
    module = module.base if isinstance(module, AdaptedModule) else module
    maps = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    return all(map is not None and is_linear(map) for map in maps) and hasattr(module, "act_fn")


def sites_of(model: nn.Module, targets: dict[str, nn.Module]) -> dict[str, Site]:
    """Returns where adapters of the targets, named by path, would sit."""
    sites = {}
    for path, target in targets.items():
        base = target.base if isinstance(target, AdaptedModule) else target
        layer, num_layers = 0, 1
        if match := _LAYER.match(path):
            layer, num_layers = int(match[2]), len(list(model.get_submodule(match[1].rstrip(".")).children()))
        if is_linear(base):
            sites[path] = Site(path, *_widths(base), layer=layer, num_layers=num_layers, base=base)
            continue
        d, hidden = _widths(cast("nn.Module", base.gate_proj))
        sites[path] = Site(path, d, d, "gated_mlp", hidden=hidden, layer=layer, num_layers=num_layers, base=base)
    return sites


def _widths(linear: nn.Module) -> tuple[int, int]:
    """Returns the width of a linear map's input and output."""
    linear = linear.base if isinstance(linear, AdaptedModule) else linear
    if isinstance(linear, nn.Linear):  # a 4-bit weight is stored packed, so its shape tells nothing
        return linear.in_features, linear.out_features
    d_in, d_out = cast("Tensor", linear.weight).shape
    return d_in, d_out


def find_targets(
    model: nn.Module, target_modules: list[str] | str, sites: Iterable[SiteKind] = ("linear",)
) -> dict[str, nn.Module]:
    """Returns the modules that `target_modules` names, by path.

    A name matches a path's end, as in PEFT: `q_proj` matches `model.layers.0.self_attn.q_proj`. `all-linear` is every
    linear map but the output embedding; for a method that adapts whole gated MLPs, these in place of their maps.

    Args:
        model: with or without adapters.
        target_modules: names, or 'all-linear'.
        sites: what the method can adapt.

    Raises:
        AdapterError: a name matches nothing, nothing of these kinds, or not in every layer where its siblings stand.
    """
    head = cast("Any", model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    modules = {place.path: place.module for place in _walk(model) if place.module is not head}
    linears = {path: module for path, module in modules.items() if is_linear(module)}
    mlps = {path: module for path, module in modules.items() if is_gated_mlp(module)} if "gated_mlp" in sites else {}
    if "gated_mlp" in sites and not mlps:
        raise AdapterError("the method adapts gated MLPs, and this model has none", "use a method on linear maps")
    candidates = {path: module for path, module in modules.items() if path in linears or path in mlps}
    if target_modules == "all-linear":
        return {path: m for path, m in candidates.items() if not any(path.startswith(f"{mlp}.") for mlp in mlps)}
    names = [target_modules] if isinstance(target_modules, str) else target_modules
    available = ", ".join(sorted({path.rsplit(".", 1)[-1] for path in candidates}))
    found: set[str] = set()
    for target in names:
        matches = [path for path in candidates if path == target or path.endswith(f".{target}")]
        if not matches:
            kind = "linear map or gated MLP" if mlps else "linear map"
            raise AdapterError(f"target_modules: '{target}' matches no {kind}", f"this model has: {available}")
        _require_every_layer(model, target, matches)
        found.update(matches)
    if mlps and not found & mlps.keys():
        raise AdapterError(
            "target_modules: names no gated MLP, so there is nothing to mix", "add mlp, or use method lora"
        )
    inside = sorted(path for path in found if any(path.startswith(f"{mlp}.") for mlp in found & mlps.keys()))
    if inside:
        raise AdapterError(f"target_modules: {inside[0]} is part of a gated MLP that is adapted as a whole", "drop one")
    return {path: module for path, module in candidates.items() if path in found}


def _require_every_layer(model: nn.Module, target: str, matches: Iterable[str]) -> None:
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
                f"target_modules: '{target}' is missing in {len(missing)} of {total} layers of {stack.rstrip('.')}",
                f"first layer without it: {missing[0]}; name full paths to adapt only some layers",
            )


def _require_adapter(model: nn.Module, name: str) -> None:
    known = sorted({key for module in adapted_modules(model).values() for key in module.adapters})
    if name not in known:
        raise AdapterError(f"the model has no adapter named '{name}'", f"it has: {', '.join(known) or 'none'}")


@dataclass(frozen=True)
class _Place:
    """Where a module stands: its path in the bare backbone, and the attribute that holds it."""

    path: str
    module: nn.Module
    parent: nn.Module
    attribute: str


def _walk(model: nn.Module) -> Iterator[_Place]:
    """Yields every module inside a model once, adapters and their inner parts left out."""
    seen: set[int] = set()

    def visit(parent: nn.Module, prefix: str) -> Iterator[_Place]:
        for attribute, module in parent.named_children():
            if id(module) in seen:
                continue
            seen.add(id(module))
            path = f"{prefix}{attribute}"
            yield _Place(path, module, parent, attribute)
            yield from visit(module.base if isinstance(module, AdaptedModule) else module, f"{path}.")

    yield from visit(model, "")


def _adapted(place: _Place) -> AdaptedModule:
    """Returns the adapted module at a place, made there if it is still the plain one."""
    if isinstance(place.module, AdaptedModule):
        return place.module
    adapted = AdaptedModule(place.module)
    adapted.train(place.module.training)
    setattr(place.parent, place.attribute, adapted)
    return adapted
