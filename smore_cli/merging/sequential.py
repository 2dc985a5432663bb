"""Least squares layer by layer: each layer of the merged model is fitted to what the routed one gives there.

    routed   h --layer with its adapters--> h'       y: what each adapted map gives
    merged   k --layer, merged so far-----> x        inputs of the next maps, errors of all before included
    fit      D x ~ y - W x,  W <- W + D              then the next maps of the layer, then the next layer

Fitted on the merged model's own inputs, a map also corrects what the maps before it got wrong, so errors do not pile
up. Maps that read the same x (q, k, v; gate, up) share one C. Alive at a time: the model, one layer's outputs, and the
moments of maps that share an input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from smore_cli.merging.dense import add_update, set_weight
from smore_cli.merging.mean import MeanGates, mean_update
from smore_cli.merging.regression import Moments, best_of_rank, fit, squared_error
from smore_cli.merging.streams import Layers, Stream, layers_of, open_streams
from smore_cli.nn import AdaptedModule, adapted_modules
from smore_cli.nn.adapted import dense_weight
from smore_cli.nn.full_copy import FullCopy, bare
from smore_cli.nn.targets import is_linear

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedModel

    from smore_cli.data.batch import Batch
    from smore_cli.merging.work import Work

__all__ = ["MapResult", "Solver", "merge_sequentially"]


@dataclass(frozen=True)
class Solver:
    """How each map is fitted.

    Attributes:
        ridge: see `regression.fit`.
        prior: what directions without data fall back to: no update, or the mean-routing merge.
        rank: None: any matrix; else the best of this rank, without a bias.
    """

    ridge: float
    prior: Literal["none", "mean"] = "none"
    rank: int | None = None


@dataclass(frozen=True)
class MapResult:
    """What became of one linear map.

    Attributes:
        missed: share of the target's square that the update does not give, on the calibration text.
        factors: B (d_out, r) and A (r, d_in) of a rank-r update, float32 on the CPU.
    """

    missed: float
    factors: tuple[Tensor, Tensor] | None = None


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
        outputs, gates = _run_routed(routed, layers, number, here)
        priors = _priors(here, gates) if solver.prior == "mean" else {}
        for module in here.values():
            module.active = None
        maps = {path: base for path, module in here.items() for path, base in _linear_maps(path, module.base)}
        if (done := work.read(number)) is not None:
            results |= {path: _restore(maps[path], tensors) for path, tensors in done.items()}
        elif maps:
            found = _solve_layer(merged, layers, number, maps, outputs, priors, solver)
            work.write(number, {path: _kept(maps[path], result) for path, result in found.items()})
            results |= found
        for stream in merged:
            stream.hidden = stream.run(layers, number)
        if maps:
            missed = sum(results[path].missed for path in maps) / len(maps)
            again = " (from an earlier attempt)" if done is not None else ""
            say(f"layer {number + 1} of {len(layers.modules)}: {100 * missed:.2f} % of its update missed{again}")
    return results


def _run_routed(
    streams: Sequence[Stream], layers: Layers, number: int, adapted: dict[str, AdaptedModule]
) -> tuple[dict[str, list[Tensor]], MeanGates]:
    """Takes the routed streams through a layer; returns what its maps gave, batch by batch, and how it routed."""
    outputs: dict[str, list[Tensor]] = {}
    gates = MeanGates()

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
            stream.context.observe = lambda trace, real=stream.real: gates.add(trace, real)
            state = stream.run(layers, number)
            stream.context.observe, stream.hidden = None, state
    finally:
        for handle in handles:
            handle.remove()
    return outputs, gates


def _priors(adapted: dict[str, AdaptedModule], gates: MeanGates) -> dict[str, Tensor]:
    """Returns the mean-routing updates (d_out, d_in); a gated MLP as a whole has none."""
    linear = {path: module for path, module in adapted.items() if is_linear(module.base)}
    return {path: mean_update(m.adapter(cast("str", m.active)), gates).D for path, m in linear.items()}


def _linear_maps(path: str, base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the linear maps of an adapted module by path: itself, or those within."""
    if is_linear(base):
        yield path, base
        return
    for name, child in base.named_children():
        if is_linear(child):
            yield f"{path}.{name}", bare(child)


def _solve_layer(
    streams: Sequence[Stream],
    layers: Layers,
    number: int,
    maps: dict[str, nn.Module],
    outputs: dict[str, list[Tensor]],
    priors: dict[str, Tensor],
    solver: Solver,
) -> dict[str, MapResult]:
    """Fits the maps of a layer, those that read the same x together, in the order in which they are called."""
    results: dict[str, MapResult] = {}
    for group in _groups(streams[0], layers, number, maps):
        moments = _moments(streams, layers, number, {path: maps[path] for path in group}, outputs)
        for path in group:
            base = maps[path]
            intercept = solver.rank is None and getattr(base, "bias", None) is not None
            found = fit(moments, path, ridge=solver.ridge, prior=priors.get(path), intercept=intercept)
            factors = None if solver.rank is None else best_of_rank(found.D, found.C, solver.rank)
            D = found.D if factors is None else factors[0] @ factors[1]
            missed = squared_error(moments, path, D, found.bias) / max(moments.square[path], 1e-30)
            kept = None if factors is None else tuple(each.float().cpu() for each in factors)
            add_update(base, D, found.bias)
            results[path] = MapResult(missed, cast("tuple[Tensor, Tensor] | None", kept))
    return results


class _Enough(Exception):
    """The rest of a layer need not be computed."""


def _groups(stream: Stream, layers: Layers, number: int, maps: dict[str, nn.Module]) -> list[list[str]]:
    """Returns the maps of a layer in the order of their calls, those with the very same input together."""
    groups: list[tuple[Tensor, list[str]]] = []

    def listen(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if groups and groups[-1][0] is inputs[0]:
                groups[-1][1].append(path)
            else:
                groups.append((inputs[0], [path]))

        return hook

    handles = [base.register_forward_pre_hook(listen(path)) for path, base in maps.items()]
    try:
        stream.run(layers, number)
    finally:
        for handle in handles:
            handle.remove()
    return [group for _, group in groups]


def _moments(
    streams: Sequence[Stream],
    layers: Layers,
    number: int,
    group: dict[str, nn.Module],
    outputs: dict[str, list[Tensor]],
) -> Moments:
    """Returns the moments of maps that share their input, on the merged streams."""
    moments = Moments()
    last = list(group)[-1]
    for index, stream in enumerate(streams):

        def listen(path: str, index: int = index, real: Tensor = stream.real) -> Callable[..., None]:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
                x = inputs[0].flatten(0, -2)[real]
                if path == next(iter(group)):
                    moments.add_inputs(x)
                target = outputs[_target(path, outputs)][index]
                moments.add_targets(path, x, (target - out.flatten(0, -2))[real])
                if path == last:
                    raise _Enough

            return hook

        handles = [base.register_forward_hook(listen(path)) for path, base in group.items()]
        try:
            stream.run(layers, number)
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
    return moments


def _target(path: str, outputs: dict[str, Any]) -> str:
    """Returns where a map's target is: its own output, or that of the module whose last map it is."""
    return path if path in outputs else path.rpartition(".")[0]


def _kept(base: Any, result: MapResult) -> dict[str, Tensor]:
    """Returns all that is needed to do a map again."""
    tensors = {"missed": torch.tensor(result.missed), "weight": dense_weight(base).contiguous().cpu()}
    if base.bias is not None:
        tensors["bias"] = base.bias.cpu()
    if result.factors is not None:
        tensors |= {"B": result.factors[0].contiguous(), "A": result.factors[1].contiguous()}
    return tensors


def _restore(base: Any, tensors: dict[str, Tensor]) -> MapResult:
    set_weight(base, tensors["weight"].to(base.weight.device))
    if "bias" in tensors:
        base.bias.copy_(tensors["bias"])
    factors = (tensors["B"], tensors["A"]) if "B" in tensors else None
    return MapResult(float(tensors["missed"]), factors)
