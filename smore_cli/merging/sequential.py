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

__all__ = ["linear_maps", "merge_sequentially"]


@torch.no_grad()
def merge_sequentially(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    solver: Solver,
    work: Work,
    say: Callable[[str], None],
) -> dict[str, MapResult]:
    """Replaces the active adapter by updates of the weights it stands beside, in place, and switches it off.

    Args:
        model: with a routed adapter active, its weights not quantised.
        batches: the calibration text.
        solver: how.
        work: keeps the layers that are done, and gives back those that an earlier attempt did.
        say: takes a line of progress.

    Returns:
        What became of each linear map, by path.
    """
    adapted = {
        path: module
        for path, module in adapted_modules(model).items()
        if module.active is not None and not isinstance(module.adapter(module.active), FullCopy)
    }
    layers = layers_of(model, adapted)
    routed = open_streams(model, layers, batches)
    merged = [stream.beside() for stream in routed]
    results: dict[str, MapResult] = {}
    for number in range(len(layers.modules)):
        prefix = f"{layers.path}.{number}."
        here = {path: module for path, module in adapted.items() if path.startswith(prefix)}
        gates = MeanGates() if solver.prior == "mean" else None
        outputs = _run_routed(routed, layers, number, here, gates)
        priors = {} if gates is None else _priors(here, gates)
        for module in here.values():
            module.active = None
        maps = {path: base for path, module in here.items() for path, base in linear_maps(path, module.base)}
        done = work.read(number)
        if done is None and maps:
            found = solve_layer(merged, layers, number, maps, outputs, priors, solver)
            work.write(number, {path: kept_tensors(maps[path], result) for path, result in found.items()})
        results |= {path: restore(maps[path], tensors) for path, tensors in (work.read(number) or {}).items()}
        if number + 1 < len(layers.modules):
            for stream in merged:
                stream.hidden = stream.run(layers, number)
        if maps:
            missed = sum(results[path].missed for path in maps) / len(maps)
            again = " (from an earlier attempt)" if done is not None else ""
            say(f"layer {number + 1} of {len(layers.modules)}: {100 * missed:.2f} % of its update missed{again}")
    return results


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
