"""Putting adapters onto a model, switching them, and taking them off again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from smore_cli.errors import AdapterError
from smore_cli.nn.adapted import AdaptedModule, Adapter
from smore_cli.nn.full_copy import FullCopy, bare
from smore_cli.nn.prior_hooks import install_prior, remove_prior, select_prior
from smore_cli.nn.siblings import group_siblings
from smore_cli.nn.targets import find_saved, find_targets, is_gated_mlp, is_linear, output_head, sites_of, walk

if TYPE_CHECKING:
    from torch import Tensor

    from smore_cli.methods import MethodConfig
    from smore_cli.nn.targets import Place

__all__ = ["adapted_modules", "attach", "detach", "find_targets", "is_gated_mlp", "is_linear", "set_active", "sites_of"]


def attach(model: nn.Module, config: MethodConfig, *, name: str = "default", seed: int = 0) -> list[str]:
    """Adds an adapter to every target of `config` and makes it the active one; the backbone is frozen.

    What `modules_to_save` names is copied whole, and the copy trains beside the adapter.

    Args:
        model: a transformers model, already on its device.
        config: the method and where it goes.
        name: the adapter's name; a model can hold several.
        seed: of the initialisation, which does not touch the global random state.

    Returns:
        The paths of the adapted modules.

    Raises:
        AdapterError: the targets match nothing, or only some layers, or the name is taken or unusable, or a module to
            save cannot be trained as a whole.
    """
    if not name or "." in name:
        raise AdapterError(f"'{name}' cannot be an adapter's name", "use a name without dots")
    targets = find_targets(model, config.target_modules, config.sites)
    saved = find_saved(model, config.modules_to_save, targets)
    if config.routed:
        _refuse_head(model, targets)
    if any(name in module.adapters for module in adapted_modules(model).values()):
        raise AdapterError(f"the model already has an adapter named '{name}'", "detach it first, or use another name")
    sites = sites_of(model, targets)
    prior = config.build_prior(model)
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would reseed every GPU as well
        adapters: dict[str, Adapter] = {path: config.build(site) for path, site in sites.items()}
    adapters |= {path: FullCopy(module) for path, module in saved.items()}
    places = {place.path: place for place in walk(model)}
    for path, adapter in adapters.items():
        adapted = _adapted(places[path])
        adapted.adapters[name] = adapter.to(next(adapted.base.parameters()).device)  # layers may be on several GPUs
        adapted.adapters[name].train(adapted.training)
    group_siblings(model)
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
    for place in reversed(list(walk(model))):  # what lies inside another adapted module comes first
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
    return {place.path: place.module for place in walk(model) if isinstance(place.module, AdaptedModule)}


def _require_adapter(model: nn.Module, name: str) -> None:
    known = sorted({key for module in adapted_modules(model).values() for key in module.adapters})
    if name not in known:
        raise AdapterError(f"the model has no adapter named '{name}'", f"it has: {', '.join(known) or 'none'}")


def _refuse_head(model: nn.Module, targets: dict[str, nn.Module]) -> None:
    """Refuses a router at the output embedding, which sees only the tokens that are learned, not those of a batch."""
    head = output_head(model)
    if paths := [path for path, module in targets.items() if bare(module) is head]:
        raise AdapterError(
            f"target_modules: {paths[0]} is the output embedding, which no routed method adapts",
            "name it in adapter.modules_to_save, or use method lora",
        )


def _adapted(place: Place) -> AdaptedModule:
    """Returns the adapted module at a place, made there if it is still the plain one."""
    if isinstance(place.module, AdaptedModule):
        return place.module
    adapted = AdaptedModule(place.module)
    adapted.train(place.module.training)
    if hasattr(place.module, "_hf_hook"):  # of a model on several devices: accelerate moves the input, but inside
        adapted.register_forward_pre_hook(_input_to_base)
    setattr(place.parent, place.attribute, adapted)
    return adapted


def _input_to_base(adapted: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Moves the input of an adapted module to the device of its base, where its adapters are too."""
    device = next(bare(adapted).parameters()).device
    return tuple(each.to(device) for each in inputs)
