"""How much is computed: the same numbers as plainer strategies, without their copies (dossier, section 8: 12)."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from smore_cli.nn import AdapterContext
from tests.nn.trees import random_tree, rows, with_picks

if TYPE_CHECKING:
    from torch import Tensor

    from smore_cli.nn.tree import Tree
    from smore_cli.nn.tree_router import Picks

Strategy = Callable[["Tree", int, "Tensor", "Picks"], "Tensor"]
SHAPES: list[dict[str, Any]] = [
    {"rank": [3], "num_experts": [4], "fanout": [2]},
    {"rank": [2, 3], "num_experts": [4, 4], "fanout": [2, 2]},
    {"rank": [1, 2, 2], "num_experts": [3, 4, 3], "fanout": [2, 1, 2]},
]


# Three strategies for T_l[t, path, child] = e_n(x_t). Each returns (N, F, f, d).


def gather(tree: Tree, level: int, x: Tensor, picked: Picks) -> Tensor:
    """Copies the weights of the chosen experts for every node of every token."""
    A, a, B, b = (getattr(tree, name)[level][picked.ids] for name in "AaBb")
    latent = torch.einsum("nd,nfcrd->nfcr", x, A) + a
    return torch.einsum("nfcr,nfcor->nfco", latent, B) + b


def dense(tree: Tree, level: int, x: Tensor, picked: Picks) -> Tensor:
    """Evaluates every expert on every token and looks the chosen ones up."""
    latent = torch.einsum("nd,srd->nsr", x, tree.A[level]) + tree.a[level]
    outputs = torch.einsum("nsr,sor->nso", latent, tree.B[level]) + tree.b[level]
    return outputs[torch.arange(len(x))[:, None, None], picked.ids]


def scatter(tree: Tree, level: int, x: Tensor, picked: Picks) -> Tensor:
    """Goes expert by expert: collects its tokens, evaluates them, and puts the results where they belong."""
    out = x.new_zeros(*picked.ids.shape, tree.B[level].shape[1])
    for n in range(tree.num_experts[level]):
        places = (picked.ids == n).nonzero(as_tuple=True)
        own = x[places[0]] @ tree.A[level][n].T + tree.a[level][n]
        out = out.index_put(places, own @ tree.B[level][n].T + tree.b[level][n])
    return out


def propagate(tree: Tree, x: Tensor, picks: list[Picks], experts: Strategy) -> Tensor:
    """The bottom-up pass with tanh, position `all`, on top of one of the strategies."""
    state = None
    for level, picked in enumerate(picks):
        summand = experts(tree, level, x, picked)
        if state is not None:
            carried = state @ tree.W[level - 1].T + tree.w[level - 1]
            summand = summand + carried.view(summand.shape)
        state = (picked.weights[..., None] * torch.tanh(summand)).sum(2)  # (N, F, d)
    assert state is not None
    return state[:, 0] @ tree.P.T + tree.p


@pytest.mark.parametrize("strategy", [gather, dense, scatter])
@pytest.mark.parametrize("gate", ["dense", "switch", "noisy_topk"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_every_plainer_strategy_in_output_and_gradients(
    shape: dict[str, Any], gate: str, strategy: Strategy
) -> None:
    tree, x = random_tree(gate=gate, **shape), rows(9, 6)
    parameters = list(tree.parameters())
    results = []
    for run in (lambda x, _: with_picks(tree, x)[0], lambda x, picks: propagate(tree, x, picks, strategy)):
        x = x.detach().requires_grad_()
        out = run(x, with_picks(tree, x)[1])
        results.append((out, torch.autograd.grad(out.square().sum(), [x, *parameters], allow_unused=True)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-11, atol=1e-11)
    for ours, plain in zip(results[0][1], results[1][1], strict=True):
        if ours is None or plain is None:  # noise weights outside training
            assert ours is plain
        else:
            torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-10)


class Sizes(TorchDispatchMode):
    """Notes the shape of every tensor that any operation puts out."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor):
                self.shapes.add(tuple(value.shape))
        return out


N, D_IN, D_OUT = 211, 300, 420  # so many tokens that no weight is as large as the bound
WIDE: dict[str, Any] = {"router_dim": 8, "key_dim": 4}


def oversized(tree: Tree, run: Callable[[Tensor], Tensor], backward: bool) -> set[tuple[int, ...]]:
    """Shapes beyond the bound that are neither of x's nor of y's size."""
    x = rows(N, D_IN).requires_grad_()
    with Sizes() as sizes, AdapterContext() as context:
        out = run(x)
        if backward:
            (out.sum() + context.aux_loss()).backward()
    widths, levels = tree.widths[1:], range(len(tree.rank))
    children = [prod(tree.router.fanout[level:]) for level in levels]
    bound = N * max(max(s, f) * d for s, f, d in zip(tree.num_experts, children, widths, strict=True))
    latent = sum(s * r for s, r in zip(tree.num_experts, tree.rank, strict=True)) + tree.router.down.out_features
    assert bound >= latent * max(D_IN, D_OUT)
    return {shape for shape in sizes.shapes if prod(shape) > bound and prod(shape) not in (N * D_IN, N * D_OUT)}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("position", ["all", "child_v2", "child"])
@pytest.mark.parametrize("gate", ["dense", "switch", "noisy_topk"])
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_larger_than_the_states_or_expert_outputs_is_made(
    shape: dict[str, Any], gate: str, position: str, backward: bool
) -> None:
    tree = random_tree(D_IN, D_OUT, gate=gate, activation_position=position, **WIDE, **shape).train()
    y = rows(N, D_OUT, seed=3)
    assert oversized(tree, lambda x: tree(x, y), backward) == set()


def test_the_measurement_sees_the_copies_of_a_gathering_strategy() -> None:
    tree = random_tree(D_IN, D_OUT, **WIDE, **SHAPES[1])
    picks = with_picks(tree, rows(N, D_IN))[1]
    found = oversized(tree, lambda x: propagate(tree, x, picks, gather), backward=False)
    assert (N, 2, 2, 2, D_IN) in found  # N x F_1 x f_0 x r_0 x d_in: a copy of A for each node


def test_the_wide_dimensions_are_met_by_one_product_each() -> None:
    tree = random_tree(D_IN, D_OUT, **WIDE, **SHAPES[2])
    base = torch.nn.Linear(D_IN, D_OUT, dtype=torch.float64).requires_grad_(False)
    products: list[tuple[tuple[int, ...], ...]] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "baddbmm"):
                shapes = tuple(tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor))
                if any(D_IN in shape or D_OUT in shape for shape in shapes):
                    products.append(shapes)
            return func(*args, **(kwargs or {}))

    with Products():
        out = tree.adapted(rows(N, D_IN).requires_grad_(), base)
        assert len(products) == 3  # W x, V x, P x_L
        products.clear()
        out.sum().backward()
    assert len(products) == 5  # the gradients of x (through W and through V), of V, of x_L and of P
