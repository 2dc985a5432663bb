"""The rank-space part of a tree as one node of the autograd graph that keeps nearly nothing.

Forward, the core runs without a graph. Kept are its input, the latents, and what was picked and drawn; all states,
scores and weights are made again in the backward pass, of one tree at a time. What the balance losses and the
statistics are computed from is an output like the state, made once, and its gradient comes back the same way.
"""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from smore_cli.nn.threads import one_thread
from smore_cli.nn.tree_router import Choice
from smore_cli.nn.wide import without_autocast

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from smore_cli.nn.tree import Tree
    from smore_cli.nn.tree_router import Picks

__all__ = ["recomputed"]

DIFFERENTIABLE = ("alpha", "logits", "probabilities", "smooth_load")


def recomputed(tree: Tree, latent: Tensor, names: Sequence[str]) -> tuple[Tensor, list[Picks]]:
    """Returns `tree.core(latent)`, all of it differentiable.

    Args:
        tree: whose core it is.
        latent: (N, R).
        names: of the parameters that the core computes with.
    """
    if not torch.is_grad_enabled():
        return tree.core(latent)
    picks: list[Picks] = []
    parameters = [attrgetter(name)(tree) for name in names]  # plain tensors, where a call was lent some
    state, *values = _Recomputed.apply(tree, names, picks, latent, *parameters)
    remaining = iter(values)
    return state, [replace(picked, **{name: next(remaining) for name in _made(picked)}) for picked in picks]


def _made(picked: Picks) -> list[str]:
    return [name for name in DIFFERENTIABLE if getattr(picked, name) is not None]


def _outputs(state: Tensor, picks: Sequence[Picks]) -> tuple[Tensor, ...]:
    return (state, *(getattr(picked, name) for picked in picks for name in _made(picked)))


class _Core(nn.Module):
    """A tree's core as a module's forward pass, which `functional_call` gives parameters to."""

    def __init__(self, tree: Tree) -> None:
        super().__init__()
        self.tree = tree

    def forward(self, latent: Tensor, again: Sequence[Choice]) -> tuple[Tensor, list[Picks]]:
        return self.tree.core(latent, again)


class _Recomputed(torch.autograd.Function):
    """`picks` is a list that the forward pass fills."""

    @staticmethod
    def forward(
        ctx: Any, tree: Tree, names: Sequence[str], picks: list[Picks], latent: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        state, found = tree.core(latent)
        picks.extend(found)
        ctx.set_materialize_grads(False)
        choices = [kept for picked in picks for kept in picked.choice]
        ctx.save_for_backward(latent, *parameters, *choices)
        ctx.tree, ctx.names = tree, names
        return _outputs(state, picks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        inputs, kept = saved[: 1 + len(ctx.names)], saved[1 + len(ctx.names) :]
        again = [Choice(*pair) for pair in zip(kept[::2], kept[1::2], strict=True)]
        needs = ctx.needs_input_grad[3:]
        with without_autocast(inputs[0].device), one_thread(inputs[0]), torch.enable_grad():
            latent, *parameters = (each.detach().requires_grad_(n) for each, n in zip(inputs, needs, strict=True))
            # The values of then: whoever lends a module its parameters for a call has taken them back by now.
            lent = {f"tree.{name}": each for name, each in zip(ctx.names, parameters, strict=True)}
            outputs = _outputs(*functional_call(_Core(ctx.tree), lent, (latent, again)))
            reached = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
            wanted = [tensor for tensor, need in zip((latent, *parameters), needs, strict=True) if need]
            outs, slopes = ([pair[i] for pair in reached] for i in (0, 1))
            found = iter(torch.autograd.grad(outs, wanted, slopes, allow_unused=True))
        return None, None, None, *(next(found) if need else None for need in needs)
