"""What routing itself earned: the loss that the best update without any routing leaves, less that of the routed one.

    dividend = loss(W x + D x + b) - loss(W x + f(x))          share = dividend / (loss(W x) - loss(W x + f(x)))

D and b are those of least squares on other text, layer by layer (`merging.sequential`), b also where the map has no
bias: a constant is no routing. Everything is measured on the same held-out rows. A dividend of zero says that a merged
model would do as well; one below zero that the routing fits what it was trained on better than anything else.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from smore_cli.errors import UsageError
from smore_cli.merging.calibration import Calibration, batches_of, gold_rows
from smore_cli.merging.dense import dequantised, is_constant, quantised_maps
from smore_cli.merging.fitting import Solver
from smore_cli.merging.sequential import maps_of, merge_layer, merge_sequentially, routed_modules
from smore_cli.merging.streams import layers_of, open_streams
from smore_cli.nn import adapted_modules
from smore_cli.routing.passes import Passes, evaluating

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from transformers import PreTrainedModel

    from smore_cli.data.batch import Batch, Row
    from smore_cli.merging.streams import Layers
    from smore_cli.nn import AdaptedModule
    from smore_cli.routing.passes import Losses

__all__ = ["Dividend", "LayerDividend", "measure_dividend"]

FIT_PASSES = 7
"""How many times as long as a forward pass a fit takes: measured, SmolLM2-135M on a CPU."""


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
    layers: Collection[int] = (),
    say: Callable[[str], None] = lambda line: None,
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
        layers: of the stack, to be made static by themselves as well, one at a time.
        say: takes a line on how long it will take, after the first pass.
        on_progress: called with the steps done and their total; a step is a pass, or the fit of a layer.

    Raises:
        UsageError: the adapter is not on one stack of layers, there is nothing to fit to, or nothing of the held-out
            rows is supervised.
    """
    adapted = routed_modules(model)
    static_itself = is_constant(model, next((module.active or "" for module in adapted.values()), ""))
    fit_rows = [] if static_itself else gold_rows(fit_rows)
    if not fit_rows and not static_itself:
        raise UsageError("there is no text to fit a static update to")
    with evaluating(model), _dequantised(model), torch.no_grad():
        stack = layers_of(model, adapted)
        passes = Passes(model, stack, held_out_rows, pad_token_id)
        subject = _Subject(model, stack, adapted, passes, batches_of(fit_rows, pad_token_id), Solver(ridge))
        numbers = [number for number in range(len(stack.modules)) if subject.maps(number)] if fit_rows else []
        alone = [number for number in numbers if number in layers]
        step = _counter(on_progress, 2 + (1 + len(numbers) if numbers else 0) + len(alone))
        started = time.perf_counter()
        routed = passes.losses()
        step()
        fitted = sum(row.length for row in fit_rows)
        if numbers:
            rate = (time.perf_counter() - started) / passes.tokens  # seconds a token
            work = passes.tokens * (2 + len(alone) / 2) + FIT_PASSES * fitted * (1 + len(alone) / len(numbers))
            say(f"{len(numbers) + len(alone)} fits of a layer: about {rate * work:,.0f} s")
        base = subject.without_adapter()
        step()
        static = subject.static(step) if numbers else routed
        single = tuple(subject.one_by_one(alone, routed, step)) if alone else ()
    _, stderr = static.above(routed)
    return Dividend(base.mean, static.mean, routed.mean, stderr, int(routed.tokens.sum()), fitted, single)


@dataclass(frozen=True)
class _Subject:
    """A model with a routed adapter, its stack, the held-out rows before it, and what a static update is fitted to."""

    model: PreTrainedModel
    stack: Layers
    adapted: dict[str, AdaptedModule]
    passes: Passes
    batches: Sequence[Batch]
    solver: Solver

    def maps(self, number: int) -> dict[str, nn.Module]:
        """Returns the linear maps of a layer that a static update changes."""
        return maps_of(self.stack, number, self.adapted)

    def without_adapter(self) -> Losses:
        """Returns the losses of the backbone."""
        with _left_as_it_was(self.model, {}):
            for module in adapted_modules(self.model).values():
                module.active = None
            return self.passes.losses()

    def static(self, step: Callable[[], None]) -> Losses:
        """Returns the losses with every layer static."""
        everything = {path: m for number in range(len(self.stack.modules)) for path, m in self.maps(number).items()}
        with _left_as_it_was(self.model, everything):
            merge_sequentially(self.model, self.batches, self.solver, None, lambda _: step())
            found = self.passes.losses()
        step()
        return found

    def one_by_one(self, numbers: Sequence[int], routed: Losses, step: Callable[[], None]) -> Iterator[LayerDividend]:
        """Yields what layers earn, each made static while all others are routed."""
        streams = open_streams(self.model, self.stack, self.batches)
        for number in range(numbers[-1] + 1):
            if number in numbers:
                with _left_as_it_was(self.model, self.maps(number)):
                    start = [stream.beside() for stream in streams]
                    merge_layer(self.stack, number, self.adapted, (streams, start), self.solver)
                    found = self.passes.losses()
                step()
                yield LayerDividend(number, found.mean, *found.above(routed))
            else:
                for stream in streams:
                    stream.hidden = stream.run(self.stack, number)
            if number < numbers[-1]:
                self.passes.advance()


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


def _counter(tell: Callable[[int, int], None], total: int) -> Callable[[], None]:
    """Returns what to call after each step."""
    done = count(1)
    return lambda: tell(next(done), total)
