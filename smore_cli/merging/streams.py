"""A model run layer by layer over a whole text, so that a layer can change before the next one is reached.

    batch --embed--> hidden --layer 0--> hidden --layer 1--> ...        what a layer is given besides (masks, rotary
                                                                        angles, the adapter's context) is kept

What is kept of a text is its hidden states, tokens x width, and not the model's activations.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from smore_cli.errors import UsageError
from smore_cli.nn import AdapterContext
from smore_cli.nn.prior_hooks import active_prior

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from transformers import PreTrainedModel

    from smore_cli.data.batch import Batch

__all__ = ["Layers", "Stream", "context_of", "layers_of", "open_streams", "run_below_head"]

_STACK = re.compile(r"^(.*?)\.(\d+)\.")


@dataclass(frozen=True)
class Layers:
    """The stack of a model.

    Attributes:
        path: of the stack, as in `model.layers`.
        modules: its layers.
        tuples: whether a layer gives a tuple whose first entry is the hidden state.
    """

    path: str
    modules: list[nn.Module]
    tuples: bool


@dataclass
class Stream:
    """One batch on its way through the layers.

    Attributes:
        context: what the adapters are told of it.
        calls: positional arguments after the hidden state, and named ones, for each layer.
        hidden: (B, S, d) the state before the next layer.
        real: (B S,) bool, which tokens are text.
    """

    context: AdapterContext
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    hidden: Tensor
    real: Tensor

    def run(self, layers: Layers, number: int) -> Tensor:
        """Returns the state (B, S, d) after a layer; `hidden` stays."""
        args, named = self.calls[number]
        with self.context:
            out = layers.modules[number](self.hidden, *args, **named)
        return cast("Tensor", out[0] if layers.tuples else out)

    def beside(self) -> Stream:
        """Returns another stream of the same batch, from where this one is."""
        return replace(self)


def layers_of(model: PreTrainedModel, paths: Iterable[str]) -> Layers:
    """Returns the stack that the adapted modules are in.

    Args:
        model: with or without adapters.
        paths: of the adapted modules.

    Raises:
        UsageError: they are in no stack of layers, or in several.
    """
    found = {match[1] if (match := _STACK.match(path)) else path for path in paths}
    if len(found) != 1 or not isinstance(stack := model.get_submodule(next(iter(found))), nn.ModuleList):
        raise UsageError(
            f"the adapter is on modules outside of one stack of layers ({', '.join(sorted(found))}): these cannot be "
            "merged layer by layer"
        )
    modules = list(stack)
    kinds: list[bool] = []
    handle = modules[0].register_forward_hook(lambda _, __, out: kinds.append(isinstance(out, tuple)))
    try:
        one = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        run_below_head(model, one, AdapterContext(aux=False, prior=_no_prior(model)), mask=one + 1)
    finally:
        handle.remove()
    return Layers(next(iter(found)), modules, kinds[0])


def context_of(model: PreTrainedModel, batch: Batch) -> AdapterContext:
    """Returns what a batch's adapters are told, the prior of its prompts included.

    It is worked out here, by the model as it was trained: later its layers change.
    """
    prior = active_prior(model)
    scores = None
    if prior is not None and prior.fitted and batch.prompt_mask is not None:
        prompts = [ids[mask].tolist() for ids, mask in zip(batch.input_ids.cpu(), batch.prompt_mask.cpu(), strict=True)]
        scores = prior.scores(model, prompts).to(batch.input_ids.device)
    return AdapterContext.of(batch, aux=False, prior=scores)


@torch.no_grad()
def open_streams(model: PreTrainedModel, layers: Layers, batches: Sequence[Batch]) -> list[Stream]:
    """Returns one stream a batch, before the first layer.

    Args:
        model: with its adapter active.
        layers: of the model.
        batches: of single-branch rows, padded on the right.
    """
    streams = []
    for batch in batches:
        batch = batch.to(model.device)
        context = context_of(model, batch)
        hidden: list[Tensor] = []
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        with _passing_through(layers, hidden, calls):
            run_below_head(model, batch.input_ids, context, batch.position_ids, batch.attention_mask)
        streams.append(Stream(context, calls, hidden[0], batch.token_mask.reshape(-1)))
    return streams


@contextmanager
def _passing_through(layers: Layers, hidden: list[Tensor], calls: list[Any]) -> Iterator[None]:
    """Inside: the layers give back what they are given, and write down how they are called."""

    def listen(state: Tensor, *args: Any, **named: Any) -> Any:
        hidden.append(state)
        calls.append((args, named))
        return (state,) if layers.tuples else state

    for layer in layers.modules:
        layer.forward = listen
    try:
        yield
    finally:
        for layer in layers.modules:
            del layer.__dict__["forward"]


def run_below_head(
    model: PreTrainedModel,
    ids: Tensor,
    context: AdapterContext,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """Runs the model below its head."""
    with context, torch.no_grad():
        model.base_model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)


def _no_prior(model: PreTrainedModel) -> Tensor | None:
    prior = active_prior(model)
    return None if prior is None else torch.zeros(1, prior.num_experts)
