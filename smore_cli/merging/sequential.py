"""Least squares layer by layer: each layer of the merged model is fitted to what the routed one gives there.

    routed   h --layer with its adapters--> h'       y: what each adapted map gives
    merged   k --layer, merged so far-----> x        inputs of the next maps, errors of all before included
    fit      D x ~ y - W x,  W <- W + D              then the next maps of the layer, then the next layer

Fitted on the merged model's own inputs, a map also corrects what the maps before it got wrong, so errors do not pile
up. Maps that read the same x (q, k, v; gate, up) share one C. Alive at a time: the model, one layer's outputs, and the
moments of maps that share an input.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from smore_cli.merging.fitting import MapResult, Solver, kept_tensors, restore, solve_layer
from smore_cli.merging.mean import MeanGates, mean_update
from smore_cli.merging.streams import Layers, Stream, layers_of, open_streams
from smore_cli.nn import AdaptedModule, adapted_modules
from smore_cli.nn.full_copy import FullCopy, bare
from smore_cli.nn.targets import is_linear

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedModel

    from smore_cli.data.batch import Batch
    from smore_cli.merging.work import Work

__all__ = ["linear_maps", "maps_of", "merge_layer", "merge_sequentially", "routed_modules"]


@torch.no_grad()
def merge_sequentially(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    solver: Solver,
    work: Work | None,
    say: Callable[[str], None],
) -> dict[str, MapResult]:
    """Replaces the active adapter by updates of the weights it stands beside, in place, and switches it off.

    Args:
        model: with a routed adapter active, its weights not quantised.
        batches: the calibration text.
        solver: how.
        work: keeps the layers that are done, and gives back those that an earlier attempt did; None: nothing is kept.
        say: takes a line of progress.

    Returns:
        What became of each linear map, by path.
    """
    adapted = routed_modules(model)
    layers = layers_of(model, adapted)
    routed = open_streams(model, layers, batches)
    merged = [stream.beside() for stream in routed]
    results: dict[str, MapResult] = {}
    for number in range(len(layers.modules)):
        done = None if work is None else work.read(number)
        found = merge_layer(layers, number, adapted, (routed, merged), solver, done)
        if work is not None and done is None and found:
            maps = maps_of(layers, number, adapted)
            work.write(number, {path: kept_tensors(maps[path], result) for path, result in found.items()})
            found = {path: restore(maps[path], tensors) for path, tensors in (work.read(number) or {}).items()}
        results |= found
        if number + 1 < len(layers.modules):
            for stream in merged:
                stream.hidden = stream.run(layers, number)
        if found:
            missed = sum(result.missed for result in found.values()) / len(found)
            again = " (from an earlier attempt)" if done is not None else ""
            say(f"layer {number + 1} of {len(layers.modules)}: {100 * missed:.2f} % of its update missed{again}")
    return results


@torch.no_grad()
def merge_layer(
    layers: Layers,
    number: int,
    adapted: dict[str, AdaptedModule],
    streams: tuple[Sequence[Stream], Sequence[Stream]],
    solver: Solver,
    done: dict[str, dict[str, Tensor]] | None = None,
) -> dict[str, MapResult]:
    """Replaces the adapters of one layer by updates of its weights, in place, and switches them off.

    Args:
        layers: the stack.
        number: of the layer.
        adapted: all modules with a routed adapter, by path.
        streams: the routed model's, which this takes through the layer, and the merged one's, which stay before it.
        solver: how.
        done: what was solved before, to be done again.

    Returns:
        What became of each of its linear maps, by path.
    """
    here = _within(layers, number, adapted)
    gates = MeanGates() if solver.prior == "mean" else None
    outputs = _run_routed(streams[0], layers, number, here, gates)
    priors = {} if gates is None else _priors(here, gates)
    for module in here.values():
        module.active = None
    maps = maps_of(layers, number, adapted)
    if done is not None:
        return {path: restore(maps[path], tensors) for path, tensors in done.items()}
    return solve_layer(streams[1], layers, number, maps, outputs, priors, solver) if maps else {}


def routed_modules(model: nn.Module) -> dict[str, AdaptedModule]:
    """Returns the modules whose active adapter is more than a copy of them, by path."""
    return {
        path: module
        for path, module in adapted_modules(model).items()
        if module.active is not None and not isinstance(module.adapter(module.active), FullCopy)
    }


def maps_of(layers: Layers, number: int, adapted: dict[str, AdaptedModule]) -> dict[str, nn.Module]:
    """Returns the linear maps that a static update of a layer changes, by path."""
    here = _within(layers, number, adapted)
    return {path: base for at, module in here.items() for path, base in linear_maps(at, module.base)}


def _within(layers: Layers, number: int, adapted: dict[str, AdaptedModule]) -> dict[str, AdaptedModule]:
    return {path: module for path, module in adapted.items() if path.startswith(f"{layers.path}.{number}.")}


def _run_routed(
    streams: Sequence[Stream],
    layers: Layers,
    number: int,
    adapted: dict[str, AdaptedModule],
    gates: MeanGates | None,
) -> dict[str, list[Tensor]]:
    """Takes the routed streams through a layer; returns what its maps gave, by batch; `gates` gets its routing."""
    outputs: dict[str, list[Tensor]] = {}

    def listen(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            wrapped = cast("AdaptedModule", module)
            adapter = wrapped.adapter(cast("str", wrapped.active))
            given = {"": out} | adapter.inner_outputs(inputs[0], wrapped.base)
            for name, value in given.items():
                outputs.setdefault(f"{path}{name and '.'}{name}", []).append(value.flatten(0, -2))

        return hook

    handles = [module.register_forward_hook(listen(path)) for path, module in adapted.items()]
    try:
        for stream in streams:
            if gates is not None:
                stream.context.observe = partial(gates.add, real=stream.real)
            stream.hidden = stream.run(layers, number)
            stream.context.observe = None
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _priors(adapted: dict[str, AdaptedModule], gates: MeanGates) -> dict[str, Tensor]:
    """Returns the mean-routing updates (d_out, d_in); a gated MLP as a whole has none."""
    linear = {path: module for path, module in adapted.items() if is_linear(module.base)}
    return {path: mean_update(m.adapter(cast("str", m.active)), gates).D for path, m in linear.items()}


def linear_maps(path: str, base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the linear maps of an adapted module by path: itself, or those within."""
    if is_linear(base):
        yield path, base
        return
    for name, child in base.named_children():
        if is_linear(child):
            yield f"{path}.{name}", bare(child)
