"""log p(target) at a model's head, a few rows at a time: tokens x vocabulary is never there.

    z_i = rule(H h_i + c)                            rule: what the model does to its logits (`logit_rule`)
    l_i = z_i[t_i] - log sum_v exp z_iv
    dl_i/dh_i = ((e_{t_i} - softmax(z_i)) * rule') H     (d)

l_i depends on its own row alone. So dl_i/dh_i is worked out while the logits of the row's chunk are there, and the
backward pass only multiplies row i by the gradient that comes from above: no logits are kept, and none are made twice.
That holds for a frozen linear head. One that is trained or adapted needs its chunks once more in the backward pass:
they are recomputed through the module (`torch.utils.checkpoint`).

Logits are made in the head's dtype, as the model makes them, and everything after the rule is float32 (float64 where
they are).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from smore_cli.models.logit_rule import LogitRule

__all__ = ["Scores", "chunk_rows", "head_scores", "scores_of"]

ROWS = {"cpu": 128}
"""Rows a chunk. Fewer cannot fill the matrix product: on two cores, at 576 x 49152, the loss and its gradient took 1.9
of the unchunked time with 16 rows, 1.14 with 32, 0.80 with 64, 0.71 with 128, and no less with 256 or 512."""
ROWS_ELSEWHERE = 1024
"""A GPU reads the whole weight for every chunk, which takes as long as the arithmetic of some 200 to 300 rows."""


class Scores(NamedTuple):
    """What is known of n targets.

    Attributes:
        logprobs: (n,) log p(target), at least float32; differentiable.
        best: (n,) bool, whether the target is the most probable token; None where nobody asked.
    """

    logprobs: Tensor
    best: Tensor | None


def chunk_rows(device: torch.device) -> int:
    """Returns how many rows the head is given at a time."""
    return ROWS.get(device.type, ROWS_ELSEWHERE)


def scores_of(logits: Tensor, targets: Tensor, *, best: bool = False) -> Scores:
    """Returns the scores of targets (n,) under logits (n, vocabulary) that are there already."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logprobs = -F.cross_entropy(wide, targets, reduction="none")
    return Scores(logprobs, wide.argmax(-1) == targets if best else None)


def head_scores(head: nn.Module, rows: Tensor, targets: Tensor, rule: LogitRule, *, best: bool = False) -> Scores:
    """Returns the scores of targets under a head's logits.

    Args:
        head: the output embedding; its hooks are not run.
        rows: (n, d) hidden states, on the head's device.
        targets: (n,) int64, there too.
        rule: of the model.
        best: whether to look for the most probable tokens too.
    """
    size = chunk_rows(rows.device)
    if _is_frozen_linear(head, rows):
        weight, bias = cast("Tensor", head.weight), cast("Tensor | None", head.bias)
        if torch.is_grad_enabled() and rows.requires_grad:
            logprobs, hits = _FrozenHead.apply(rows, targets, weight, bias, rule, size, best)
            return Scores(logprobs, hits)
        logprobs, hits, _ = _run(rows, targets, weight, bias, rule, size, best=best, gradient=False)
        return Scores(logprobs, hits)

    def of_chunk(rows: Tensor, targets: Tensor) -> Scores:
        return scores_of(rule(head.forward(rows)), targets, best=best)

    found = []
    for some, those in zip(rows.split(size), targets.split(size), strict=True):
        if torch.is_grad_enabled():
            found.append(Scores(*checkpoint(of_chunk, some, those, use_reentrant=False)))
        else:
            found.append(of_chunk(some, those))
    hits = torch.cat([cast("Tensor", each.best) for each in found]) if best else None
    return Scores(torch.cat([each.logprobs for each in found]), hits)


def _is_frozen_linear(head: nn.Module, rows: Tensor) -> bool:
    """Whether a head is nothing but a matrix (and a bias) that no gradient is wanted of."""
    return (
        type(head) is nn.Linear
        and head.weight.dtype == rows.dtype
        and not any(parameter.requires_grad for parameter in head.parameters())
        and not torch.is_autocast_enabled(rows.device.type)
    )


def _run(
    rows: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rule: LogitRule,
    size: int,
    *,
    best: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns l (n,), where the target is the best token (n,), and dl/dh (n, d)."""
    n, wide = len(rows), torch.promote_types(rows.dtype, torch.float32)
    logprobs = rows.new_empty(n, dtype=wide)
    hits = rows.new_empty(n, dtype=torch.bool) if best else None
    slopes = torch.empty_like(rows) if gradient else None
    room = rows.new_empty(min(size, n), len(weight))  # one block for all chunks: making one anew costs page faults
    for start in range(0, n, size):
        here = slice(start, min(start + size, n))
        chosen = targets[here, None]  # (c, 1)
        logits = room[: here.stop - start]
        if bias is None:
            torch.mm(rows[here], weight.t(), out=logits)
        else:
            torch.addmm(bias, rows[here], weight.t(), out=logits)
        z = rule(logits).to(wide)  # (c, V), `room` itself where nothing is done to it
        top = z.amax(1, keepdim=True)
        at_target = z.gather(1, chosen)
        if hits is not None:
            hits[here] = (z.argmax(1, keepdim=True) == chosen)[:, 0]
        steepness = rule.slope(z) if gradient else None
        mass = z.sub_(top).exp_().sum(1, keepdim=True)
        logprobs[here] = (at_target - top - mass.log())[:, 0]
        if slopes is None:
            continue
        z.scatter_add_(1, chosen, -mass)  # (softmax - e_t) * mass
        if steepness is not None:
            z.mul_(steepness)
        torch.mm(z.div_(-mass).to(weight.dtype), weight, out=slopes[here])
    return logprobs, hits, slopes


class _FrozenHead(torch.autograd.Function):
    """Keeps (n, d) for the backward pass, in place of the hidden states that a linear map would keep."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rule: LogitRule,
        size: int,
        best: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns l (n,) and, where asked, whether the target is the best token (n,)."""
        logprobs, hits, slopes = _run(rows, targets, weight, bias, rule, size, best=best, gradient=True)
        ctx.save_for_backward(slopes)
        if hits is not None:
            ctx.mark_non_differentiable(hits)
        return logprobs, hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        """Returns upstream_i * dl_i/dh_i."""
        (slopes,) = ctx.saved_tensors
        return (slopes * upstream.to(slopes.dtype)[:, None], None, None, None, None, None, None)
