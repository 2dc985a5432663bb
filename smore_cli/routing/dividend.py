"""What routing itself earned: the loss that the best update without any routing leaves, less that of the routed one.

    dividend = loss(W x + D x + b) - loss(W x + f(x))          share = dividend / (loss(W x) - loss(W x + f(x)))

D and b are those of least squares on other text, layer by layer (`merging.sequential`), b also where the map has no
bias: a constant is no routing. Everything is measured on the same held-out rows. A dividend of zero says that a merged
model would do as well; one below zero that the routing fits what it was trained on better than anything else.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from smore_cli.merging.calibration import Calibration, batches_of, gold_rows
from smore_cli.merging.dense import dequantised, is_constant, quantised_maps
from smore_cli.merging.fitting import Solver
from smore_cli.merging.sequential import maps_of, merge_layer, merge_sequentially, routed_modules
from smore_cli.merging.streams import layers_of, open_streams
from smore_cli.nn import adapted_modules
from smore_cli.routing.passes import Passes, evaluating

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedModel

    from smore_cli.data.batch import Batch, Row
    from smore_cli.merging.streams import Layers
    from smore_cli.nn import AdaptedModule
    from smore_cli.routing.passes import Losses

__all__ = ["Dividend", "LayerDividend", "measure_dividend"]


@dataclass(frozen=True)
class LayerDividend:
    """One layer made static, all others routed.

    Attributes:
        layer: its number.
        static: mean loss in nats per supervised token.
        value: by how much that is above the routed loss.
        stderr: standard error of `value` over the held-out rows.
    """

    layer: int
    static: float
    value: float
    stderr: float


@dataclass(frozen=True)
class Dividend:
    """Three losses on the same rows, in nats per supervised token.

    Attributes:
        base: of the backbone alone.
        static: with the best static update in place of the routed one.
        routed: with the adapter.
        stderr: standard error of `value` over the rows.
        supervised: tokens that the losses are means over.
        fitted: tokens that the static update was fitted to; 0 for an adapter that is static itself.
        layers: those that have adapters, one by one, where that was asked for.
    """

    base: float
    static: float
    routed: float
    stderr: float
    supervised: int
    fitted: int
    layers: tuple[LayerDividend, ...] = ()

    @property
    def value(self) -> float:
        """What routing itself earned, in nats per supervised token."""
        return self.static - self.routed

    @property
    def share(self) -> float | None:
        """The part of the adapter's gain that is due to routing; None where the adapter gained nothing."""
        gain = self.base - self.routed
        return self.value / gain if gain > 0 else None

    def document(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        return {
            "loss": {"base": self.base, "static": self.static, "routed": self.routed},
            "dividend": self.value,
            "stderr": self.stderr,
            "share": self.share,
            "supervised_tokens": self.supervised,
            "fitted_tokens": self.fitted,
            "layers": [vars(layer) for layer in self.layers],
        }


def measure_dividend(
    model: PreTrainedModel,
    fit_rows: Sequence[Row],
    held_out_rows: Sequence[Row],
    *,
    pad_token_id: int,
    ridge: float = Calibration.ridge,
    per_layer: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Dividend:
    """Measures what the routing of a model's active adapter earns; the model is left as it was.

    Of rows with several branches the right one is read. The weights of a quantised backbone are dequantised meanwhile,
    for all three losses.

    Args:
        model: with its adapter active.
        fit_rows: what the static update is fitted to, none of it held out; 8,000 tokens or more.
        held_out_rows: what the losses are measured on.
        pad_token_id: fills shorter rows.
        ridge: of the least squares, see `regression.fit`.
        per_layer: also make one layer at a time static: as much work again, and half a pass a layer.
        on_progress: called with the steps done and their total; a step is a pass, or the fit of a layer.

    Raises:
        UsageError: the adapter is not on one stack of layers, or nothing of the rows is supervised.
    """
    adapted = routed_modules(model)
    constant = not adapted or is_constant(model, next(m.active for m in adapted.values() if m.active))
    with evaluating(model), _dequantised(model), torch.no_grad():
        layers = layers_of(model, adapted)
        numbers = [n for n in range(len(layers.modules)) if maps_of(layers, n, adapted)]
        steps = _Steps(on_progress, 3 + (0 if constant else len(numbers) * (1 + per_layer)))
        passes = Passes(model, layers, held_out_rows, pad_token_id)
        routed = passes.losses()
        steps.step()
        with _left_as_it_was(model, {}):
            for module in adapted_modules(model).values():
                module.active = None
            base = passes.losses()
        steps.step()
        static, fitted = routed, 0
        single: tuple[LayerDividend, ...] = ()
        if not constant:
            batches = batches_of(gold_rows(fit_rows), pad_token_id)
            fitted = sum(row.length for row in gold_rows(fit_rows))
            with _left_as_it_was(model, {k: v for n in numbers for k, v in maps_of(layers, n, adapted).items()}):
                merge_sequentially(model, batches, Solver(ridge), None, lambda _: steps.step())
                static = passes.losses()
            if per_layer:
                single = tuple(_one_by_one(model, layers, adapted, batches, Solver(ridge), passes, routed, steps))
        steps.step()
    _, stderr = static.above(routed)
    return Dividend(base.mean, static.mean, routed.mean, stderr, int(routed.tokens.sum()), fitted, single)


def _one_by_one(
    model: PreTrainedModel,
    layers: Layers,
    adapted: dict[str, AdaptedModule],
    batches: Sequence[Batch],
    solver: Solver,
    passes: Passes,
    routed: Losses,
    steps: _Steps,
) -> Iterator[LayerDividend]:
    """Yields what each layer is worth, made static while all others are routed."""
    streams = open_streams(model, layers, batches)
    for number in range(len(layers.modules)):
        if maps := maps_of(layers, number, adapted):
            with _left_as_it_was(model, maps):
                merge_layer(layers, number, adapted, (streams, [s.beside() for s in streams]), solver)
                found = passes.losses()
            steps.step()
            yield LayerDividend(number, found.mean, *found.above(routed))
        else:
            for stream in streams:
                stream.hidden = stream.run(layers, number)
        if number + 1 < len(layers.modules):
            passes.advance()


@contextmanager
def _left_as_it_was(model: nn.Module, maps: dict[str, nn.Module]) -> Iterator[None]:
    """Inside: adapters may be switched off and the maps' weights changed, and every map has a bias."""
    active = {module: module.active for module in adapted_modules(model).values()}
    linears: list[Any] = list(maps.values())
    weights = [linear.weight.to("cpu", copy=True) for linear in linears]
    biases = [linear.bias for linear in linears]
    for linear, bias, weight in zip(linears, biases, weights, strict=True):
        zeros = linear.weight.new_zeros(len(weight)) if bias is None else bias.detach().clone()
        linear.bias = nn.Parameter(zeros, requires_grad=False)
    try:
        yield
    finally:
        for linear, bias, weight in zip(linears, biases, weights, strict=True):
            linear.weight.copy_(weight)
            linear.bias = bias
        for module, name in active.items():
            module.active = name


@contextmanager
def _dequantised(model: PreTrainedModel) -> Iterator[None]:
    """Inside: quantised maps are replaced by what they stand for, in the model's compute type."""
    found = list(quantised_maps(model))
    for parent, attribute, quantised in found:
        setattr(parent, attribute, dequantised(quantised, model.dtype))
    try:
        yield
    finally:
        for parent, attribute, quantised in found:
            setattr(parent, attribute, quantised)


class _Steps:
    """Counts what is done."""

    def __init__(self, tell: Callable[[int, int], None], total: int) -> None:
        self.tell, self.done, self.total = tell, 0, total

    def step(self) -> None:
        """Counts one more."""
        self.done += 1
        self.tell(self.done, self.total)
