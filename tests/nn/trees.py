"""Small random trees for the tests: every parameter random, so that no term of an equation is silently zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from smore_cli.methods import Site
from smore_cli.methods.smore import SMoREConfig
from smore_cli.nn import AdapterContext

if TYPE_CHECKING:
    from torch import Tensor, nn

    from smore_cli.nn.tree import Tree
    from smore_cli.nn.tree_router import Picks

SMALL: dict[str, Any] = {"router_dim": 3, "key_dim": 4}


def random_tree(d_in: int = 6, d_out: int = 5, *, seed: int = 0, randomise: bool = True, **fields: Any) -> Tree:
    """Returns a float64 tree in evaluation mode; `fields` are those of `SMoREConfig`."""
    return build(SMoREConfig(**{**SMALL, **fields}), d_in, d_out, seed=seed, randomise=randomise)


def build(config: SMoREConfig, d_in: int = 6, d_out: int = 5, *, seed: int = 0, randomise: bool = True) -> Tree:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tree = config.build(Site("site", d_in, d_out)).double().eval()
        if randomise:
            randomise_(tree)
    return tree  # type: ignore[return-value]


def randomise_(module: nn.Module) -> None:
    """Gives every parameter random values of a size that keeps activations of order one."""
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter.shape[-1] if parameter.dim() > 1 else 4
            parameter.copy_(torch.randn(parameter.shape) * 1.5 / fan_in**0.5)


def rows(n: int, d: int, seed: int = 1) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_picks(tree: Tree, x: Tensor) -> tuple[Tensor, list[Picks]]:
    """Returns the tree's update of x (with y = 0) and what its router picked."""
    caught: list[list[Picks]] = []
    handle = tree.router.register_forward_hook(lambda _module, _inputs, output: caught.append(output))
    try:
        update = tree(x, x.new_zeros(*x.shape[:-1], tree.P.shape[0]))
    finally:
        handle.remove()
    return update, caught[0]


def update_of(tree: Tree, x: Tensor) -> Tensor:
    return with_picks(tree, x)[0]


def force_picks(tree: Tree, picks: list[Picks]) -> None:
    """Makes the tree use these picks whatever its router thinks."""
    tree.router.forward = lambda *_: picks  # type: ignore[method-assign]


@dataclass
class FixedNoise:
    """Noise that is a function of place, so that two implementations in different orders see the same draws."""

    tree: Tree
    seed: int = 0

    def __post_init__(self) -> None:
        self.order = list(reversed(range(len(self.tree.rank))))  # the router draws for the root's children first
        self.calls = 0
        self.drawn: dict[int, Tensor] = {}
        self.tree.router.draw_noise = self.draw  # type: ignore[method-assign]

    def draw(self, like: Tensor) -> Tensor:
        level = self.order[self.calls % len(self.order)]
        self.calls += 1
        generator = torch.Generator().manual_seed(1000 * self.seed + level)
        self.drawn[level] = torch.randn(like.shape, dtype=like.dtype, generator=generator)
        return self.drawn[level]


def aux_of(tree: Tree, x: Tensor, mask: Tensor | None = None) -> Tensor:
    with AdapterContext(token_mask=mask) as context:
        update_of(tree, x)
    return context.aux_loss()
