"""Putting adapters onto a model, switching them, and taking them off again."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from smore_cli.errors import AdapterError
from smore_cli.methods import MethodConfig, Site
from smore_cli.nn.adapted import AdaptedLinear

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

__all__ = ["adapted_modules", "attach", "detach", "find_targets", "is_linear", "set_active", "site_of"]


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
        AdapterError: the targets match nothing, or only some layers, or the name is taken.
    """
    targets = find_targets(model, config.target_modules)
    if any(name in module.adapters for module in targets.values() if isinstance(module, AdaptedLinear)):
        raise AdapterError(f"the model already has an adapter named '{name}'", "detach it first, or use another name")
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would reseed every GPU as well
        for path, module in targets.items():
            adapted = module if isinstance(module, AdaptedLinear) else _wrap(model, path, module)
            adapter = config.build(site_of(path, adapted.base))
            adapted.adapters[name] = adapter.to(adapted.weight.device)
            adapted.adapters[name].train(adapted.training)
    set_active(model, name)
    return list(targets)


def detach(model: nn.Module, name: str = "default") -> None:
    """Removes an adapter; modules left without any become the plain linear maps they were.

    Raises:
        AdapterError: no module has an adapter of that name.
    """
    _require_adapter(model, name)
    for path, adapted in adapted_modules(model).items():
        if name in adapted.adapters:
            del adapted.adapters[name]
        if adapted.active == name:
            adapted.active = None
        if not adapted.adapters:
            _set_module(model, path, adapted.base)


def set_active(model: nn.Module, name: str | None) -> None:
    """Uses the adapter `name` wherever it exists; None: the bare backbone. Only the active adapter trains.

    Raises:
        AdapterError: no module has an adapter of that name.
    """
    if name is not None:
        _require_adapter(model, name)
    for module in adapted_modules(model).values():
        module.active = name if name is not None and name in module.adapters else None
        for key, adapter in module.adapters.items():
            adapter.requires_grad_(key == name)


def adapted_modules(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Returns the adapted modules by path, in the model's order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map that can be adapted (transformers' Conv1D stores its weight transposed)."""
    return isinstance(module, nn.Linear | AdaptedLinear) or type(module).__name__ == "Conv1D"


def site_of(path: str, base: nn.Module) -> Site:
    """Returns where an adapter of the linear map `base` sits."""
    if isinstance(base, nn.Linear):  # a 4-bit weight is stored packed, so its shape tells nothing
        return Site(path, base.in_features, base.out_features)
    d_in, d_out = cast("Tensor", base.weight).shape
    return Site(path, d_in, d_out)


def find_targets(model: nn.Module, target_modules: list[str] | str) -> dict[str, nn.Module]:
    """Returns the linear maps that `target_modules` names, by path.

    A name matches a path's end, as in PEFT: `q_proj` matches `model.layers.0.self_attn.q_proj`. `all-linear` is every
    linear map but the output embedding.

    Raises:
        AdapterError: a name matches nothing, no linear map, or not in every layer where its siblings stand.
    """
    head = cast("Any", model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    inside = {f"{path}.base" for path in adapted_modules(model)}
    linears = {
        path: module
        for path, module in model.named_modules()
        if is_linear(module)
        and module is not head
        and path not in inside
        and not any(path.startswith(f"{outer.removesuffix('base')}adapters.") for outer in inside)
    }
    if target_modules == "all-linear":
        return linears
    names = [target_modules] if isinstance(target_modules, str) else target_modules
    available = ", ".join(sorted({path.rsplit(".", 1)[-1] for path in linears}))
    found: dict[str, nn.Module] = {}
    for target in names:
        matches = [path for path in linears if path == target or path.endswith(f".{target}")]
        if not matches:
            raise AdapterError(f"target_modules: '{target}' matches no linear map", f"this model has: {available}")
        _require_every_layer(model, target, matches)
        found.update({path: linears[path] for path in matches})
    return {path: linears[path] for path in linears if path in found}


def _require_every_layer(model: nn.Module, target: str, matches: Iterable[str]) -> None:
    """Refuses a target that stands in some layers of a stack only: a silent gap is nearly always a mistake."""
    layer = re.compile(r"^(.*?\.)(\d+)\.")
    hit: dict[str, set[int]] = {}
    for path in matches:
        if match := layer.match(path):
            hit.setdefault(match[1], set()).add(int(match[2]))
    for stack, layers in hit.items():
        total = len(list(model.get_submodule(stack.rstrip(".")).children()))
        explicit = layer.match(f"{target}.") is not None
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


def _wrap(model: nn.Module, path: str, base: nn.Module) -> AdaptedLinear:
    adapted = AdaptedLinear(base)
    adapted.train(base.training)
    _set_module(model, path, adapted)
    return adapted


def _set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
