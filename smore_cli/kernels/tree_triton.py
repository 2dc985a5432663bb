"""The core of an S'MoRE tree of one or two levels as one launch a direction on a GPU: the equations of `tree.c`.

With the root's children c (level 1) and the leaves n (level 0):

    hidden  = act_r( W1 [x_down; key of c] + b1 ),  logits = (keys W2) hidden + keys b2,  prob = softmax(logits)
    x_1[c]  = sum_n gate[c, n] act( scale (B_n h_n + b_n) )                     each leaf activated once
    x_2     = sum_c alpha[c] act( scale (B_c h_c + b_c) + W x_1[c] + w )

A program takes T tokens through all of it. What belongs to a child of the root has a row for each child and token,
(F T), tokens innermost; what is looked up of the expert that a child is, is a product with one-hot rows, `place`.
Weights stand by expert, 0 where one was not picked; its rank, how many go before it, says which child an expert is.

Backward, a program makes everything again for who was picked, and adds up the parameters' gradients of its tokens in a
row of its own; the rows are summed afterwards, in fixed order. Sizes in capitals are powers of two, filled with zeros.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch.func import functional_call

from smore_cli.kernels.block_triton import on
from smore_cli.kernels.tree import unwritten_picks
from smore_cli.kernels.tree_triton_steps import (
    add_matrix,
    add_row,
    dot,
    first,
    first_back,
    gather,
    leaves,
    leaves_back,
    load,
    nodes,
    nodes_back,
    one_hot,
    own_columns,
    rank_experts,
    recall,
    route_back,
    score,
    spread,
    store_picks,
    table,
    tokens,
    weigh,
)
from smore_cli.nn.tree_recompute import Core, Gradients

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from smore_cli.kernels.tree_shape import Shape
    from smore_cli.nn.tree import Tree
    from smore_cli.nn.tree_router import Picks

__all__ = ["TritonTree"]

ROOM = 2**20
"""Numbers that the rows of gradients may take however few tokens there are; else no more than the largest tensor."""
OPTIONS = {"num_warps": 8, "num_stages": 1}


@triton.jit
def _forward(
    flat, latent, stride, n, state,
    chosen0, alpha0, logits0, prob0, chosen1, alpha1, logits1, prob1, q: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, q.F * q.T).to(tl.int64)
    t = tl.program_id(0) * q.T + tl.arange(0, q.T).to(tl.int64)
    child, owner = row // q.T, tl.program_id(0) * q.T + row % q.T
    x = tokens(latent + q.latent - q.width, stride, t, n, q.width, q.X)
    x += load(flat + q.delta, 1, q.width, 0, 1, q.X)
    pre = first(x, flat, q.leaf, q)
    if q.root is not None:
        _, z, p = score(first(x, flat, q.root, q), flat, q.root, q)
        rank = rank_experts(z, q.root, q.dense)
        g = weigh(p, rank, q.root)
        store_picks(z, p, g, rank, chosen1, alpha1, logits1, prob1, t, n, t < n, q.root)
        place = one_hot(rank, q)
        alpha = tl.sum(place * spread(g, q.F), 1)
        pre = spread(pre, q.F) + dot(place, table(flat, q), q)
    _, z, p = score(pre, flat, q.leaf, q)
    rank = rank_experts(z, q.leaf, q.dense)
    g = weigh(p, rank, q.leaf)
    parents: tl.constexpr = 1 if q.root is None else q.root.f
    at, here = child * n + owner, (owner < n) & (child < parents)
    store_picks(z, p, g, rank, chosen0, alpha0, logits0, prob0, at, parents * n, here, q.leaf)
    x_out = leaves(latent, stride, t, n, g, flat, q.leaf, q)
    width: tl.constexpr = q.leaf.d if q.root is None else q.root.d
    if q.root is not None:
        rows = tokens(latent + q.root.at, stride, owner, n, q.root.s * q.root.r, q.SR) * own_columns(place, q)
        x_out = gather(alpha[:, None] * nodes(rows, place, x_out, flat, q), q.F)
    j = tl.arange(0, x_out.shape[1])[None]
    tl.store(state + t[:, None] * width + j, x_out, mask=(t[:, None] < n) & (j < width))


@triton.jit
def _backward(
    flat, latent, stride, n, d_state,
    chosen0, d_alpha0, d_logits0, d_prob0, chosen1, d_alpha1, d_logits1, d_prob1,
    d_latent, sums, q: tl.constexpr,
):  # fmt: skip
    own = sums + tl.program_id(0).to(tl.int64) * q.size
    row = tl.arange(0, q.F * q.T).to(tl.int64)
    child = row // q.T
    parents: tl.constexpr = 1 if q.root is None else q.root.f
    top: tl.constexpr = q.leaf if q.root is None else q.root
    for block in range(tl.program_id(0), tl.cdiv(n, q.T), tl.num_programs(0)):
        again = block != tl.program_id(0)
        t, owner = block * q.T + tl.arange(0, q.T).to(tl.int64), block * q.T + row % q.T
        at, here = child * n + owner, (owner < n) & (child < parents)
        # Who was picked, and all states, as in the forward pass.
        x = tokens(latent + q.latent - q.width, stride, t, n, q.width, q.X)
        x += load(flat + q.delta, 1, q.width, 0, 1, q.X)
        pre = first(x, flat, q.leaf, q)
        if q.root is not None:
            hidden1, _, p1 = score(first(x, flat, q.root, q), flat, q.root, q)
            rank1 = recall(chosen1, t, n, t < n, q.root)
            g1 = weigh(p1, rank1, q.root)
            place = one_hot(rank1, q)
            pre = spread(pre, q.F) + dot(place, table(flat, q), q)
        hidden, _, p = score(pre, flat, q.leaf, q)
        rank = recall(chosen0, at, parents * n, here, q.leaf)
        g = weigh(p, rank, q.leaf)
        # Root to leaves: the states.
        d_x = tl.zeros((q.T, top.D), tl.float32)
        if d_state is not None:
            d_x = tokens(d_state, top.d, t, n, top.d, top.D)
        if q.root is not None:
            x1 = leaves(latent, stride, t, n, g, flat, q.leaf, q)
            owned = own_columns(place, q)
            rows = tokens(latent + q.root.at, stride, owner, n, q.root.s * q.root.r, q.SR) * owned
            out = nodes(rows, place, x1, flat, q)
            alpha = tl.sum(place * spread(g1, q.F), 1)
            d_x = spread(d_x, q.F)
            d_g1 = gather(place * tl.sum(d_x * out, 1)[:, None], q.F)
            d_x = nodes_back(d_x, alpha, out, rows, owned, place, x1, d_latent, t, n, flat, own, again, q)
            if q.shared:
                tl.debug_barrier()  # what was written to the pool's gradients is read again by other threads
        d_g = leaves_back(d_x, g, latent, d_latent, stride, t, n, flat, own, again | q.shared, q.leaf, q)
        # Leaves to root: the router.
        d_pre, d_keys = route_back(
            hidden, p, g, rank, d_g, d_alpha0, d_logits0, d_prob0, at, parents * n, here, flat, own, again,
            q.leaf, q,
        )  # fmt: skip
        add_matrix(own + q.leaf.keys, d_keys, q.leaf.s, q.leaf.m, q.leaf.m, again)
        if q.root is None:
            d_token = first_back(d_pre, x, flat, own, again, q.leaf, q)
        else:
            d_token = first_back(gather(d_pre, q.F), x, flat, own, again, q.leaf, q)
            d_table = dot(tl.trans(place), d_pre, q)  # (S, M)
            keys = load(flat + q.root.keys, q.root.s, q.root.m, q.root.m, q.root.S, q.root.M)
            W1 = load(flat + q.leaf.W1 + q.width, q.leaf.m, q.root.m, q.leaf.columns, q.leaf.M, q.root.M)
            d_W1 = dot(tl.trans(d_table), keys, q)
            add_matrix(own + q.leaf.W1 + q.width, d_W1, q.leaf.m, q.root.m, q.leaf.columns, again)
            d_pre, d_keys = route_back(
                hidden1, p1, g1, rank1, d_g1, d_alpha1, d_logits1, d_prob1, t, n, t < n, flat, own, again,
                q.root, q,
            )  # fmt: skip
            add_matrix(own + q.root.keys, d_keys + dot(d_table, W1, q), q.root.s, q.root.m, q.root.m, again)
            d_token += first_back(d_pre, x, flat, own, again, q.root, q)
        add_row(own + q.delta, tl.sum(d_token, 0), q.width, again)
        j = tl.arange(0, q.X)[None]
        where = d_latent + t[:, None] * q.latent + q.latent - q.width + j
        tl.store(where, d_token, mask=(t[:, None] < n) & (j < q.width))
        tl.debug_barrier()  # the next block adds to what other threads wrote


class TritonTree:
    """The core of one form of tree, in float32; N tokens.

    Attributes:
        shape: of the tree.
        programs: most of the backward pass; None: as many as run at a time.
    """

    def __init__(self, shape: Shape, programs: int | None = None) -> None:
        self.shape, self.programs = shape, programs

    def forward(
        self, latent: Tensor, parameters: Sequence[Tensor], *, heard: bool = True
    ) -> tuple[Tensor, list[Picks]]:
        """Returns x_L, (N, d_L), and the picks, as `Tree.core` does, from latents (N, R).

        Args:
            latent: (N, R).
            parameters: of the names `Tree.core_names`.
            heard: whether anybody wants the picks; they are made in any case, as the kernel walks up by them.
        """
        latent = latent if latent.stride(1) == 1 else latent.contiguous()
        n, q = len(latent), self.shape
        state = latent.new_empty(n, q.levels[-1].d)
        picks = unwritten_picks(latent, [level.f for level in q.levels], [level.s for level in q.levels])
        found = [each for made in picks for each in (made.chosen, made.alpha, made.logits, made.probabilities)]
        with on(latent.device):
            _forward[(triton.cdiv(n, q.T),)](
                _flat(parameters), latent, latent.stride(0), n, state, *_two_levels(found), q=q, **OPTIONS
            )
        return state, picks

    def backward(
        self, latent: Tensor, parameters: Sequence[Tensor], chosen: Sequence[Tensor], gradients: Gradients
    ) -> list[Tensor]:
        """Returns the gradients of the latent and of the parameters.

        Args:
            latent: (N, R) as in the forward pass.
            parameters: as in the forward pass.
            chosen: what was picked, of every level.
            gradients: of what `forward` returned.
        """
        latent = latent if latent.stride(1) == 1 else latent.contiguous()
        n, q = len(latent), self.shape
        slopes: list[Tensor | None] = []
        for ids, given in zip(chosen, gradients.picks, strict=True):
            slopes += [ids, *(given.get(name) for name in ("alpha", "logits", "probabilities"))]
        slopes = [None if each is None else each.contiguous() for each in (gradients.state, *slopes)]
        programs = self.programs or _processors(latent.device)
        programs = max(1, min(programs, triton.cdiv(n, q.T), max(n * q.most, ROOM) // q.size))
        d_latent, sums = latent.new_empty(n, q.latent), latent.new_empty(programs, q.size)
        with on(latent.device):
            _backward[(programs,)](
                _flat(parameters), latent, latent.stride(0), n, slopes[0], *_two_levels(slopes[1:]), d_latent, sums,
                q=q, **OPTIONS,
            )  # fmt: skip
        each = sums.sum(0).split([parameter.numel() for parameter in parameters])
        return [d_latent, *(grad.view(p.shape).to(p.dtype) for grad, p in zip(each, parameters, strict=True))]

    def works(self, tree: Tree, device: torch.device) -> bool:
        """Whether this Triton and this device give what PyTorch gives: to be tried once, on few numbers.

        In a thread of its own: the caller's may be in inference mode, under autocast or inside a checkpoint.

        Args:
            tree: of this shape.
            device: where to try it.
        """
        with ThreadPoolExecutor(1) as alone:  # one program, so that it adds to what it has
            return alone.submit(_agrees, TritonTree(self.shape, programs=1), tree, device).result()


def _agrees(kernel: TritonTree, tree: Tree, device: torch.device) -> bool:
    n, q, generator = 2 * kernel.shape.T + 1, kernel.shape, torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        drawn: Tensor = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        return drawn.to(device)

    own = dict(tree.named_parameters())
    parameters = [draw(*own[name].shape) for name in tree.core_names]
    latent, d_state = draw(n, q.latent), draw(n, q.levels[-1].d)
    try:
        state, picks = kernel.forward(latent, parameters)
        given = [{"probabilities": draw(*made.probabilities.shape)} for made in picks]
        chosen = [made.chosen for made in picks]
        found = [state, *kernel.backward(latent, parameters, chosen, Gradients(d_state, given))]
    except Exception:  # whatever a compiler may raise
        return False
    inputs = [each.double().requires_grad_() for each in (latent, *parameters)]  # PyTorch's float32 may be TF32
    lent = {f"tree.{name}": each for name, each in zip(tree.core_names, inputs[1:], strict=True)}
    exact, exact_picks = functional_call(Core(tree), lent, (inputs[0], None))
    outputs = [exact, *(made.probabilities for made in exact_picks)]
    slopes = [each.double() for each in (d_state, *(each["probabilities"] for each in given))]
    expected = [exact, *torch.autograd.grad(outputs, inputs, slopes)]
    same = all(torch.equal(a, made.chosen) for a, made in zip(chosen, exact_picks, strict=True))
    close = (torch.allclose(a.double(), b, rtol=1e-4, atol=1e-5) for a, b in zip(found, expected, strict=True))
    return same and all(close)


def _processors(device: torch.device) -> int:
    """Returns how many programs run at a time: one a processor, for their registers; one in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _flat(parameters: Sequence[Tensor]) -> Tensor:
    """Returns all parameters in one row."""
    return torch.cat([parameter.detach().flatten().float() for parameter in parameters])


def _two_levels(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Four tensors a level, of the leaves and of the root, which a tree of one level has not."""
    return [*tensors, *[None] * (8 - len(tensors))]
