"""The rank-space part of a tree as one node of the autograd graph that keeps nearly nothing.

Forward, the core runs without a graph. Kept are its input, the latents, and what was picked and drawn; all states,
scores and weights are made again in the backward pass, of one tree at a time. What the balance losses and the
statistics are computed from is an output like the state, made once, and its gradient comes back the same way.

Where a kernel is known for a tree (`smore_cli.kernels`), it makes both passes; what is kept is the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from smore_cli.nn.context import heard
from smore_cli.nn.threads import one_thread
from smore_cli.nn.tree_router import Choice, TreeRouter
from smore_cli.nn.wide import without_autocast

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from smore_cli.nn.tree import Tree
    from smore_cli.nn.tree_router import Picks

__all__ = ["Core", "Gradients", "Kernel", "find_kernel", "no_kernel", "recomputed"]

DIFFERENTIABLE = ("alpha", "logits", "probabilities", "smooth_load")


class Gradients(NamedTuple):
    """Gradients of what a core returns; what has none is missing.

    Attributes:
        state: (N, d_L).
        picks: of each level, by the name of the attribute of `Picks`.
    """

    state: Tensor | None
    picks: list[dict[str, Tensor]]


class Kernel(Protocol):
    """A compiled form of one tree's core."""

    def forward(
        self, latent: Tensor, parameters: Sequence[Tensor], *, heard: bool = True
    ) -> tuple[Tensor, list[Picks]]:
        """Returns the state (N, d_L) and the picks of a latent (N, R); no picks where nobody wants them."""
        ...

    def backward(
        self, latent: Tensor, parameters: Sequence[Tensor], chosen: Sequence[Tensor], gradients: Gradients
    ) -> list[Tensor]:
        """Returns the gradients of the latent and of the parameters, for what was picked."""
        ...


def no_kernel(tree: Tree, latent: Tensor, parameters: Sequence[Tensor]) -> Kernel | None:
    """Finds none."""
    return None


find_kernel: Callable[[Tree, Tensor, Sequence[Tensor]], Kernel | None] = no_kernel
"""Finds the kernel for a tree, a latent and its parameters; set by `smore_cli.kernels.use`."""


def recomputed(tree: Tree, latent: Tensor, names: Sequence[str]) -> tuple[Tensor, list[Picks]]:
    """Returns `tree.core(latent)`, all of it differentiable; without gradients there may be no picks if nobody listens.

    Args:
        tree: whose core it is.
        latent: (N, R).
        names: of the parameters that the core computes with.
    """
    if type(tree.router) is not TreeRouter:  # a mean merge puts a fixed tree there, which has no parameters
        return tree.core(latent)
    parameters = tree.core_parameters()
    kernel = find_kernel(tree, latent, parameters)
    if not torch.is_grad_enabled():
        return tree.core(latent) if kernel is None else kernel.forward(latent, parameters, heard=heard())
    picks: list[Picks] = []
    state, *values = _Recomputed.apply(tree, kernel, names, picks, latent, *parameters)
    remaining = iter(values)
    return state, [replace(picked, **{name: next(remaining) for name in _made(picked)}) for picked in picks]


def _made(picked: Picks) -> list[str]:
    return [name for name in DIFFERENTIABLE if getattr(picked, name) is not None]


def _outputs(state: Tensor, picks: Sequence[Picks]) -> tuple[Tensor, ...]:
    return (state, *(getattr(picked, name) for picked in picks for name in _made(picked)))


class Core(nn.Module):
    """A tree's core as a module's forward pass, which `functional_call` gives parameters to."""

    def __init__(self, tree: Tree) -> None:
        super().__init__()
        self.tree = tree

    def forward(self, latent: Tensor, again: Sequence[Choice] | None) -> tuple[Tensor, list[Picks]]:
        """Does what `Tree.core` does."""
        return self.tree.core(latent, again)


class _Recomputed(torch.autograd.Function):
    """`picks` is a list that the forward pass fills."""

    @staticmethod
    def forward(
        ctx: Any,
        tree: Tree,
        kernel: Kernel | None,
        names: Sequence[str],
        picks: list[Picks],
        latent: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        state, found = tree.core(latent) if kernel is None else kernel.forward(latent, parameters)
        picks.extend(found)
        ctx.set_materialize_grads(False)
        choices = [kept for picked in picks for kept in picked.choice]
        ctx.save_for_backward(latent, *parameters, *choices)
        ctx.tree, ctx.kernel, ctx.names = tree, kernel, names
        ctx.made = [_made(picked) for picked in picks]
        return _outputs(state, picks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        inputs, kept = saved[: 1 + len(ctx.names)], saved[1 + len(ctx.names) :]
        again = [Choice(*pair) for pair in zip(kept[::2], kept[1::2], strict=True)]
        needs = ctx.needs_input_grad[4:]
        if ctx.kernel is not None:
            known = iter(grads)
            state = next(known)
            given = [{name: grad for name in made if (grad := next(known)) is not None} for made in ctx.made]
            chosen = [choice.chosen for choice in again]
            found = ctx.kernel.backward(inputs[0], inputs[1:], chosen, Gradients(state, given))
            return None, None, None, None, *(grad if need else None for grad, need in zip(found, needs, strict=True))
        with without_autocast(inputs[0].device), one_thread(inputs[0]), torch.enable_grad():
            latent, *parameters = (each.detach().requires_grad_(n) for each, n in zip(inputs, needs, strict=True))
            # The values of then: whoever lends a module its parameters for a call has taken them back by now.
            lent = {f"tree.{name}": each for name, each in zip(ctx.names, parameters, strict=True)}
            outputs = _outputs(*functional_call(Core(ctx.tree), lent, (latent, again)))
            reached = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
            wanted = [tensor for tensor, need in zip((latent, *parameters), needs, strict=True) if need]
            outs, slopes = ([pair[i] for pair in reached] for i in (0, 1))
            remaining = iter(torch.autograd.grad(outs, wanted, slopes, allow_unused=True))
        return None, None, None, None, *(next(remaining) if need else None for need in needs)
