"""What the kernels of `tree_triton.py` know of a tree when they are compiled."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from torch.nn import Linear

    from smore_cli.nn.tree import Tree
    from smore_cli.nn.tree_router import LevelRouter

__all__ = ["Level", "Shape", "shape_of"]

TOKENS = 16
"""Of a block: few enough for its matrices to lie in the registers of 256 threads."""
MOST_OF_TOKENS, MOST_OF_PARAMETERS = 4096, 8192
"""Most numbers of one matrix. Wider trees go by PyTorch."""
MOST_PLAIN = 2048
"""Up to here, products are plain float32. The operands of larger ones do not fit into the registers: tensor cores make
them in three parts, `tf32x3`, to 2^-21."""
LEAST = 8
"""The least size over which Triton sums a product."""


@dataclass(frozen=True)
class Level:
    """One level: s experts of rank r, f children of a parent, keys of width m, states of width d.

    Attributes:
        at: column of the latent where the pool's begin.
        columns: of W1.
        by_pool: a weight is the share of the whole pool, not of the picked.
        scale: of the experts' outputs.
        B, b, keys, W1, b1, W2, b2: where they begin in the row of all parameters.
        S, R, M, D: powers of two that s, r, m, d fit into.
    """

    s: int
    r: int
    f: int
    m: int
    d: int
    at: int
    columns: int
    by_pool: bool
    scale: float
    B: int
    b: int
    keys: int
    W1: int
    b1: int
    W2: int
    b2: int
    S: int
    R: int
    M: int
    D: int


@dataclass(frozen=True)
class Shape:
    """A tree of two levels, or of one: then it has no root level, its leaves are the root's children.

    Attributes:
        leaf, root: its levels.
        act, router_act: names of the activations.
        dense, shared: all experts are picked; both levels have one pool.
        latent, width: columns of the latent; of them, the last, those of the router.
        W, w, delta: where they begin in the row of all parameters, of length `size`.
        most: numbers a token that the largest tensor may have.
        X, SR, F: powers of two that `width`, the root's s r and its f fit into.
        T: tokens of a block.
        precision: of the products.
    """

    leaf: Level
    root: Level | None
    act: str
    router_act: str
    dense: bool
    shared: bool
    latent: int
    width: int
    W: int
    w: int
    delta: int
    size: int
    most: int
    X: int
    SR: int
    F: int
    T: int
    precision: str

    @property
    def levels(self) -> tuple[Level, ...]:
        """The leaves first."""
        return (self.leaf,) if self.root is None else (self.leaf, self.root)


def shape_of(tree: Tree) -> Shape | None:
    """Returns the shape of a tree of a form that tree.c has, or None: more than two levels, or too wide for a program.

    Args:
        tree: any of such a form.
    """
    router, depth = tree.router, len(tree.num_experts)
    if depth > 2:
        return None
    own = dict(tree.named_parameters())
    ends = itertools.accumulate((own[name].numel() for name in tree.core_names), initial=0)
    begins = dict(zip(tree.core_names, ends, strict=False))  # and the last is the end
    levels = [_level(tree, l, begins) for l in range(depth)]
    leaf, root = levels[0], levels[1] if depth > 1 else None
    X, SR, F = _power(router.down.out_features), 0, 1
    tiles = [leaf.D * leaf.R, *(level.M * max(level.M, X) for level in levels)]
    widest = max(X, leaf.D, leaf.M, leaf.S)  # columns of a row
    if root is not None:
        SR, F = _power(root.s * root.r), 1 << (root.f - 1).bit_length()
        tiles += [root.D * leaf.D, root.D * SR, leaf.M * root.M]
        widest = max(widest, root.D, root.M, root.S, SR)
    if F * TOKENS * widest > MOST_OF_TOKENS or max(tiles) > MOST_OF_PARAMETERS:
        return None
    plain = max(*tiles, F * TOKENS * widest) <= MOST_PLAIN
    nodes = [math.prod(router.fanout[l:]) for l in range(depth)]
    return Shape(
        leaf, root, tree.activation, router.activation, router.gate == "dense", tree.shared_pool,
        latent=sum(a.numel() for a in tree.a) + router.down.out_features,
        width=router.down.out_features,
        W=begins.get("W.0", 0),
        w=begins.get("w.0", 0),
        delta=begins["router.down.bias"],
        size=sum(own[name].numel() for name in tree.core_names),
        most=max(max(level.s, count) * level.d for level, count in zip(levels, nodes, strict=True)),
        X=X, SR=SR, F=F, T=TOKENS, precision="ieee" if plain else "tf32x3",
    )  # fmt: skip


def _level(tree: Tree, l: int, begins: dict[str, int]) -> Level:
    router, pool = tree.router, 0 if tree.shared_pool else l
    s, r, f, d = tree.num_experts[l], tree.rank[l], router.fanout[l], tree.widths[l + 1]
    level = cast("LevelRouter", router.levels[l])
    m, own = level.keys.shape[1], f"router.levels.{l}."
    single = router.gate_weights == "released" and f == 1  # has its raw probability
    return Level(
        s, r, f, m, d,
        at=sum(a.numel() for a in tree.a[:pool]),
        columns=cast("Linear", level.mlp[0]).in_features,
        by_pool=router.gate == "dense" or single or router.gate_weights == "pool",
        scale=tree.level_scale[l],
        B=begins[f"B.{pool}"], b=begins[f"b.{pool}"], keys=begins[own + "keys"],
        W1=begins[own + "mlp.0.weight"], b1=begins[own + "mlp.0.bias"],
        W2=begins[own + "mlp.2.weight"], b2=begins[own + "mlp.2.bias"],
        S=_power(s), R=_power(r), M=_power(m), D=_power(d),
    )  # fmt: skip


def _power(size: int) -> int:
    return max(LEAST, 1 << (size - 1).bit_length())
