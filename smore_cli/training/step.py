"""The gradient of one optimiser step, which does not depend on how the step is split into passes and processes.

Every process runs as many passes as any has, because where the model is sharded a pass needs all of them: one that has
fewer in a short step repeats a pass with weight 0, in the time it would otherwise wait.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from smore_cli.models.forward import target_logits
from smore_cli.models.placement import gpus_of
from smore_cli.nn import AdapterContext
from smore_cli.training.objective import Counts, Objective
from smore_cli.training.parallel import ALONE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from smore_cli.data.batch import Batch
    from smore_cli.nn.context import ExpertLoad
    from smore_cli.training.parallel import Processes

__all__ = ["StepResult", "accumulate_gradients"]


@dataclass(frozen=True)
class StepResult:
    """What a step found in all processes, on the device (nothing waits for it).

    Attributes:
        loss: scalar, the step's objective without auxiliary losses.
        nll: scalar, sum of -log p over supervised tokens.
        correct: scalar, questions ranked right.
        aux: scalar, the step's auxiliary loss.
        counts: supervised tokens and questions.
        tokens: real tokens that went through the backbone.
        loads: how busy the experts were, pass by pass, in this process.
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
    processes: Processes = ALONE,
    reduce: bool = True,
) -> StepResult:
    """Adds the gradient of one step's loss, auxiliary losses included, to the parameters.

    Args:
        model: in training mode, with adapters.
        batches: the step's forward passes in this process, on the CPU.
        objective: what is minimised.
        device: where the model is.
        backward: runs the backward pass of a scalar.
        aux_over_step: evaluate balance losses on the statistics of the whole step; with several passes that takes one
            more forward pass each, because the gradient of the first needs the sums of the last. False: each pass by
            itself, averaged, as is usual elsewhere.
        processes: those that share the step.
        reduce: sum the gradients over the processes; false where the backward pass of a sharded model does so.
    """
    batches, own, passes = _level(batches, processes)
    counts, tokens = _totals(batches[:own], processes)
    several = passes > 1
    totals = _statistics(model, batches, own, device, processes) if several and aux_over_step else None
    zero = torch.zeros((), device=device)
    loss, nll, correct, aux = zero, zero, zero, zero
    loads: list[ExpertLoad] = []
    for number, batch in enumerate(batches):
        batch = batch.to(device)
        with AdapterContext.of(batch) as context:
            share = objective(model, batch, counts)
        pass_aux = context.aux_loss(totals).to(share.loss)
        if several and not aux_over_step:
            pass_aux = pass_aux / passes
        if number >= own:
            backward((share.loss + pass_aux) * 0)
            # Without totals this pass is none of the step's, and its auxiliary loss none of the step's either.
            aux = pass_aux.detach() if totals is not None else aux
            loads += [replace(load, load=load.load * 0, decisions=load.decisions * 0) for load in context.loads]
            continue
        backward(share.loss + pass_aux)
        loss, nll, correct = loss + share.loss.detach(), nll + share.nll, correct + share.correct
        # With totals every pass reports the loss of the whole step; otherwise passes add up.
        aux = pass_aux.detach() if totals is not None else aux + pass_aux.detach()
        loads += context.loads
    if reduce:
        processes.sum_gradients(model.parameters())
    loss, nll, correct, summed_aux = processes.sum_tensors([loss, nll, correct, aux])
    return StepResult(loss, nll, correct, aux if totals is not None else summed_aux, counts, tokens, loads)


def _level(batches: Sequence[Batch], processes: Processes) -> tuple[Sequence[Batch], int, int]:
    """Returns as many passes as any process has, how many of them belong to the step, and all processes' passes."""
    if processes.count == 1:
        return batches, len(batches), len(batches)
    found = [int(each[0]) for each in processes.gather([len(batches)])]
    spare = batches[-1] if batches else None
    if min(found) == 0:  # the main process always has one
        sent = processes.from_main(spare)
        spare = spare or sent
    fill = [spare] * (max(found) - len(batches)) if spare is not None else []
    return [*batches, *fill], len(batches), sum(found)


def _totals(batches: Sequence[Batch], processes: Processes) -> tuple[Counts, int]:
    """Returns what the step's losses are divided by, and its real tokens, over all processes."""
    counts = Counts.of(batches)
    tokens = sum(int(batch.token_mask.sum()) for batch in batches)
    supervised, questions, tokens = (int(n) for n in processes.sums([counts.tokens, counts.questions, tokens]))
    return replace(counts, tokens=supervised, questions=questions), tokens


@torch.no_grad()
def _statistics(
    model: nn.Module, batches: Sequence[Batch], own: int, device: torch.device, processes: Processes
) -> list[Tensor] | None:
    """Returns the routing sums over all passes of all processes, or None where no router keeps any.

    Only the first `own` batches count. Draws no random number for good.
    """
    totals: list[Tensor] | None = None
    with torch.random.fork_rng(devices=gpus_of(model, device)):
        for number, batch in enumerate(batches):
            batch = batch.to(device)
            nowhere = batch.sources.new_empty(0)
            with AdapterContext.of(batch) as context:
                target_logits(model, replace(batch, sources=nowhere, targets=nowhere))
            sums = context.statistics()
            if not sums:
                return None
            if number >= own:
                sums = [torch.zeros_like(each) for each in sums]
            totals = sums if totals is None else [a + b for a, b in zip(totals, sums, strict=True)]
    return processes.sum_tensors(totals or [])
