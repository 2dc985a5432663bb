"""The gradient of one optimiser step, which does not depend on how the step is split into forward passes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from smore_cli.models.forward import target_logits
from smore_cli.nn import AdapterContext
from smore_cli.training.objective import Counts, Objective

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from smore_cli.data.batch import Batch
    from smore_cli.nn.context import ExpertLoad

__all__ = ["StepResult", "accumulate_gradients"]


@dataclass(frozen=True)
class StepResult:
    """What a step found, all on the device (nothing waits for it).

    Attributes:
        loss: scalar, the step's objective without auxiliary losses.
        nll: scalar, sum of -log p over supervised tokens.
        correct: scalar, questions ranked right.
        aux: scalar, the step's auxiliary loss.
        counts: supervised tokens and questions.
        tokens: real tokens that went through the backbone.
        loads: how busy the experts were, pass by pass.
    """

    loss: Tensor
    nll: Tensor
    correct: Tensor
    aux: Tensor
    counts: Counts
    tokens: int
    loads: list[ExpertLoad]


def accumulate_gradients(
    model: nn.Module,
    batches: Sequence[Batch],
    objective: Objective,
    *,
    device: torch.device,
    backward: Callable[[Tensor], None],
    aux_over_step: bool = True,
) -> StepResult:
    """Adds the gradient of one step's loss, auxiliary losses included, to the parameters.

    Args:
        model: in training mode, with adapters.
        batches: the step's forward passes, on the CPU.
        objective: what is minimised.
        device: where the model is.
        backward: runs the backward pass of a scalar.
        aux_over_step: evaluate balance losses on the statistics of the whole step; with several passes that takes one
            more forward pass each, because the gradient of the first needs the sums of the last. False: each pass by
            itself, averaged, as is usual elsewhere.
    """
    counts = Counts.of(batches)
    several = len(batches) > 1
    totals = _statistics(model, batches, device) if several and aux_over_step else None
    zero = torch.zeros((), device=device)
    loss, nll, correct, aux = zero, zero, zero, zero
    loads: list[ExpertLoad] = []
    for batch in batches:
        batch = batch.to(device)
        with AdapterContext(token_mask=batch.token_mask, groups=batch.groups, prompt_mask=batch.prompt_mask) as context:
            share = objective(model, batch, counts)
        pass_aux = context.aux_loss(totals).to(share.loss)
        if several and not aux_over_step:
            pass_aux = pass_aux / len(batches)
        backward(share.loss + pass_aux)
        loss, nll, correct = loss + share.loss.detach(), nll + share.nll, correct + share.correct
        # With totals every pass reports the loss of the whole step; otherwise passes add up.
        aux = pass_aux.detach() if totals is not None else aux + pass_aux.detach()
        loads += context.loads
    tokens = sum(int(batch.token_mask.sum()) for batch in batches)
    return StepResult(loss, nll, correct, aux, counts, tokens, loads)


@torch.no_grad()
def _statistics(model: nn.Module, batches: Sequence[Batch], device: torch.device) -> list[Tensor] | None:
    """Returns the routing sums over all passes, or None where no router keeps any; draws no random number for good."""
    devices = [device] if device.type == "cuda" else []
    totals: list[Tensor] | None = None
    with torch.random.fork_rng(devices=devices):
        for batch in batches:
            batch = batch.to(device)
            nowhere = batch.sources.new_empty(0)
            with AdapterContext(
                token_mask=batch.token_mask, groups=batch.groups, prompt_mask=batch.prompt_mask
            ) as context:
                target_logits(model, replace(batch, sources=nowhere, targets=nowhere))
            sums = context.statistics()
            if not sums:
                return None
            totals = sums if totals is None else [a + b for a, b in zip(totals, sums, strict=True)]
    return totals
