"""The maps of one layer fitted, those that read the same x together, in the order in which they are called.

run the layer as far as the group --> x, W x        f = y - W x, y what the routed model gives there
moments over all batches --> D    --> W + D         and only then the group that comes after it
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from smore_cli.merging.dense import add_update, set_weight
from smore_cli.merging.regression import Moments, best_of_rank, fit, squared_error
from smore_cli.nn.adapted import dense_weight

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from smore_cli.merging.streams import Layers, Stream

__all__ = ["MapResult", "Solver", "kept_tensors", "restore", "solve_layer"]


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


def solve_layer(
    streams: Sequence[Stream],
    layers: Layers,
    number: int,
    maps: dict[str, nn.Module],
    outputs: dict[str, list[Tensor]],
    priors: dict[str, Tensor],
    solver: Solver,
) -> dict[str, MapResult]:
    """Fits the maps of a layer, in place.

    Args:
        streams: the merged model's, before this layer; its maps are not adapted any more.
        layers: the stack.
        number: of the layer.
        maps: its linear maps by path.
        outputs: what the routed model gives at each, batch by batch; emptied on the way.
        priors: what directions without data fall back to, for some of the maps.
        solver: how.
    """
    results: dict[str, MapResult] = {}
    for group in _groups(streams[0], layers, number, maps):
        moments = _moments(streams, layers, number, {path: maps[path] for path in group}, outputs)
        for path in group:
            outputs.pop(path, None)  # as large as the moments
        for path in group:
            base = maps[path]
            intercept = solver.rank is None and getattr(base, "bias", None) is not None
            found = fit(moments, path, ridge=solver.ridge, prior=priors.get(path), intercept=intercept)
            factors = None if solver.rank is None else best_of_rank(found.D, found.C, solver.rank)
            D = found.D if factors is None else factors[0] @ factors[1]
            missed = found.missed if factors is None else squared_error(moments, path, *factors)
            kept = None if factors is None else tuple(each.float().cpu() for each in factors)
            add_update(base, D, found.bias)
            share = max(missed, 0.0) / max(moments.square[path], 1e-30)  # float32 sums may come out below zero
            results[path] = MapResult(share, cast("tuple[Tensor, Tensor] | None", kept))
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


def kept_tensors(base: Any, result: MapResult) -> dict[str, Tensor]:
    """Returns all that is needed to do a map again."""
    tensors = {"missed": torch.tensor(result.missed), "weight": dense_weight(base).contiguous().cpu()}
    if base.bias is not None:
        tensors["bias"] = base.bias.cpu()
    if result.factors is not None:
        tensors |= {"B": result.factors[0].contiguous(), "A": result.factors[1].contiguous()}
    return tensors


def restore(base: Any, tensors: dict[str, Tensor]) -> MapResult:
    """Does a map again from what was kept of it.

    On a CPU the weight is then a piece of the file, which the system may drop from memory and read again: of a merged
    backbone no more has to be in memory at a time than the layer that runs.
    """
    if base.weight.device.type == "cpu" and type(base).__name__ != "Conv1D":
        base.weight.data = tensors["weight"]
    else:
        set_weight(base, tensors["weight"].to(base.weight.device))
    if "bias" in tensors:
        base.bias.copy_(tensors["bias"])
    factors = (tensors["B"], tensors["A"]) if "B" in tensors else None
    return MapResult(float(tensors["missed"]), factors)
