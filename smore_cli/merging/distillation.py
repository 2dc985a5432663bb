"""The last touch of a merge: a few steps in which the merged model learns to say what the routed one says.

    student  W + s B A      B A the rank-r LoRA that is exported, or one beside the merged W, at first 0, and folded in
    loss     KL(routed || student), mean over the real tokens of the calibration text

Of the routed model, which is gone by then, the states in front of the head are held (tokens x width, not x vocabulary);
the head is the same in both. It runs in chunks of tokens, forward and backward, so that no more logits exist at a time.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch

from smore_cli.errors import UsageError
from smore_cli.merging.calibration import batches_of
from smore_cli.merging.dense import adapters_of
from smore_cli.merging.streams import context_of
from smore_cli.models.forward import target_states
from smore_cli.models.logit_rule import logit_rule
from smore_cli.nn.low_rank import LowRank

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from smore_cli.data.batch import Batch, Row

__all__ = ["Lesson", "distil", "lessons_of"]

TOKENS = 512
"""Tokens of a step, padding included."""
CHUNK = 256
"""Tokens whose logits exist at a time."""
RATE = 2e-3
"""A step's learning rate, relative to the size (root mean square) of the factors it moves."""


@dataclass(frozen=True)
class Lesson:
    """What the routed model says of a batch.

    Attributes:
        batch: its sources are all real tokens.
        states: (n, d) in front of the routed model's head, at the sources.
    """

    batch: Batch
    states: Tensor


@torch.no_grad()
def lessons_of(model: PreTrainedModel, rows: Sequence[Row], pad_token_id: int) -> list[Lesson]:
    """Returns what a model says of a text, to be taught to another with the same head.

    Args:
        model: the routed model, its adapter active.
        rows: of one branch each.
        pad_token_id: fills shorter rows.

    Raises:
        UsageError: the model does more with its head's logits than is known here.
    """
    if logit_rule(model) is None:
        raise UsageError(
            f"--distill: {type(model).__name__} changes its head's logits in an unknown way", "leave it out"
        )
    lessons = []
    for batch in batches_of(rows, pad_token_id, tokens=TOKENS):
        everywhere = replace(batch, sources=batch.token_mask.flatten().nonzero().flatten()).to(model.device)
        with context_of(model, everywhere):
            lessons.append(Lesson(everywhere, target_states(model, everywhere)))
    return lessons


def distil(model: PreTrainedModel, lessons: Sequence[Lesson], steps: int, say: Callable[[str], None]) -> None:
    """Trains the LoRA of a model on the lessons, one a step, in a seeded order.

    Args:
        model: the student, its LoRA active; in evaluation mode afterwards.
        lessons: at least one.
        steps: how many.
        say: takes lines of progress.
    """
    factors = [
        [a.lora_A, a.lora_B] for m in adapters_of(model).values() if isinstance(a := m.adapter("default"), LowRank)
    ]
    groups = [{"params": pair, "lr": RATE * _size(pair)} for pair in factors]
    parameters = [parameter for pair in factors for parameter in pair]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    order, shuffled = list[Lesson](), random.Random(0)
    model.train(False)
    for step in range(steps):
        if not order:
            order = shuffled.sample(list(lessons), len(lessons))
        kl = _teach(model, order.pop())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        if step == 0 or (step + 1) % max(1, steps // 10) == 0:
            say(f"distilled {step + 1} of {steps} steps: KL {kl:.2e} nats on their text")


def _size(tensors: Sequence[Tensor]) -> float:
    return float(torch.cat([tensor.detach().flatten() for tensor in tensors]).square().mean().sqrt())


def _teach(model: PreTrainedModel, lesson: Lesson) -> float:
    """Adds the gradient of one lesson's mean KL; returns it."""
    rule, head = logit_rule(model), cast("nn.Module", model.get_output_embeddings())
    assert rule is not None  # lessons_of refuses

    def log_probabilities(states: Tensor) -> Tensor:
        return rule(head(states)).float().log_softmax(-1)

    with context_of(model, lesson.batch):
        states = target_states(model, lesson.batch)  # (n, d)
    gradient, total = torch.empty_like(states), 0.0
    for start in range(0, len(states), CHUNK):
        chunk = slice(start, start + CHUNK)
        ours = states[chunk].detach().requires_grad_()
        with torch.no_grad():
            theirs = log_probabilities(lesson.states[chunk])
        kl = torch.nn.functional.kl_div(log_probabilities(ours), theirs, reduction="sum", log_target=True) / len(states)
        (gradient[chunk],) = torch.autograd.grad(kl, ours)
        total += float(kl.detach())
    states.backward(gradient)
    return total
