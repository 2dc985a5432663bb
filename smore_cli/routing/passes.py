"""The loss on held-out text, from any layer on: what comes before a layer that changes is computed once.

    batch --layers below, once--> state --layer n ... head, again for every change--> nats of each row

Where only layer n and what is above it differ from one measurement to the next, the state before it is exact.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from smore_cli.errors import UsageError
from smore_cli.merging.calibration import batches_of, gold_rows
from smore_cli.merging.streams import open_streams
from smore_cli.models.forward import target_logprobs
from smore_cli.models.logit_rule import logit_rule

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from smore_cli.data.batch import Row
    from smore_cli.merging.streams import Layers
    from smore_cli.nn.gate_edit import GateEdit

__all__ = ["Losses", "Passes", "evaluating"]


@dataclass(frozen=True)
class Losses:
    """What one model thinks of some rows.

    Attributes:
        nats: (R,) float64, the negative log-likelihood of each row's supervised tokens.
        tokens: (R,) float64, how many these are.
    """

    nats: Tensor
    tokens: Tensor

    @property
    def mean(self) -> float:
        """Nats per supervised token of all rows together."""
        return float(self.nats.sum() / self.tokens.sum())

    def above(self, other: Losses) -> tuple[float, float]:
        """Returns by how much the mean is above that of another model on the same rows, and its standard error.

        The error is that of a ratio of sums over rows, which were drawn one by one; the tokens of a row were not.
        """
        apart = self.nats - other.nats
        value = apart.sum() / self.tokens.sum()
        rest = apart - value * self.tokens
        return float(value), float(rest.square().sum().sqrt() / self.tokens.sum())


class Passes:
    """Held-out rows, standing before a layer of a model.

    Args:
        model: with its adapter active, in evaluation mode; as it is now, it works out the priors of the rows.
        layers: its stack.
        rows: of which the right branch is read.
        pad_token_id: fills shorter rows.

    Attributes:
        number: of the layer that comes next.
        tokens: of all rows.

    Raises:
        UsageError: nothing of the rows is supervised.
    """

    def __init__(self, model: PreTrainedModel, layers: Layers, rows: Sequence[Row], pad_token_id: int) -> None:
        batches = batches_of(gold_rows(rows), pad_token_id)
        if not any(len(batch.targets) for batch in batches):
            raise UsageError("no token of the held-out rows is learned or scored, so there is no loss to compare")
        self.model, self.layers, self.number = model, layers, 0
        logit_rule(model)  # is found out once, by passes of another length
        self.tokens = sum(int(batch.token_mask.sum()) for batch in batches)
        self._batches = [batch.to(model.device) for batch in batches]
        self._streams = open_streams(model, layers, self._batches)

    @torch.no_grad()
    def losses(self, edit: GateEdit | None = None) -> Losses:
        """Returns the losses of the model as it is now from the next layer on, there with gates edited."""
        nats, tokens = [], []
        for batch, stream in zip(self._batches, self._streams, strict=True):
            with _starting_at(self.layers, self.number, stream.hidden), replace(stream.context, edit=edit):
                logprobs = target_logprobs(self.model, batch).double()
            rows = batch.branch_row[batch.choice]  # (n,)
            zero = logprobs.new_zeros(len(batch.gold))
            nats.append(zero.index_add(0, rows, -logprobs).cpu())
            tokens.append(zero.index_add(0, rows, torch.ones_like(logprobs)).cpu())
        return Losses(torch.cat(nats), torch.cat(tokens))

    @torch.no_grad()
    def advance(self) -> None:
        """Takes the rows through the next layer, as it is now."""
        for stream in self._streams:
            stream.hidden = stream.run(self.layers, self.number)
        self.number += 1


@contextmanager
def _starting_at(layers: Layers, number: int, state: Tensor) -> Iterator[None]:
    """Inside: the layers below `number` pass on what they are given, and layer `number` is given a state (B, S, d)."""

    def passed_on(given: Tensor, *_: Any, **__: Any) -> Any:
        return (given,) if layers.tuples else given

    below = layers.modules[:number]
    before = [layer.__dict__.get("forward") for layer in below]  # accelerate puts one of its own there
    handle = layers.modules[number].register_forward_pre_hook(lambda _, args: (state, *args[1:]))
    for layer in below:
        layer.forward = passed_on
    try:
        yield
    finally:
        handle.remove()
        for layer, own in zip(below, before, strict=True):
            del layer.__dict__["forward"]
            if own is not None:
                layer.forward = own


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside: the model is in evaluation mode; afterwards each of its modules is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.train(False)
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
