"""What the equations imply (dossier, section 8: 3, 4, 5, 6, 9, 10, 14), without an oracle."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from smore_cli.methods.smore import SMoREConfig, count_trees
from smore_cli.nn import AdapterContext
from smore_cli.nn.low_rank import LowRank
from smore_cli.nn.tree_router import Choice, Picks
from tests.nn.oracle import Oracle
from tests.nn.trees import SMALL, FixedNoise, aux_of, build, force_picks, random_tree, rows, update_of, with_picks

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from smore_cli.nn.tree import Tree

EXACT: dict[str, float] = {"rtol": 1e-12, "atol": 1e-12}
TWO: dict[str, Any] = {"rank": [2, 3], "num_experts": [4, 4], "fanout": [2, 2]}
GATES = ["dense", "switch", "noisy_topk"]


def selector_tree(seed: int = 0, **fields: Any) -> Tree:
    """Identity activation, B and W as `eq_1_layer` sets them, zero inner biases, everything else random."""
    tree = random_tree(seed=seed, activation="identity", **fields)
    with torch.no_grad():
        tree._select_blocks()
        for bias in (*tree.a, *tree.b, *tree.w, tree.p):
            bias.zero_()
    return tree


# 3. One layer.


@pytest.mark.parametrize("gate", GATES)
def test_one_layer_of_selectors_is_a_mixture_of_lora_experts(gate: str) -> None:
    tree, x = selector_tree(rank=[3], num_experts=[4], fanout=[2], gate=gate), rows(7, 6)
    update, picks = with_picks(tree, x)
    expected = torch.zeros_like(update)
    for n in range(4):
        block = tree.P[:, 3 * n : 3 * n + 3]
        expected += picks[0].gates[:, 0, n, None] * (x @ tree.A[0][n].T @ block.T)
    torch.testing.assert_close(update, expected, **EXACT)


def test_a_dense_gate_with_equal_keys_is_one_lora_of_the_whole_rank_over_the_number_of_experts() -> None:
    tree, x = selector_tree(rank=[3], num_experts=[4], fanout=[2], gate="dense"), rows(7, 6)
    lora = LowRank(6, 5, rank=12, scale=1 / 4).double()
    with torch.no_grad():
        tree.router.levels[0].keys.copy_(tree.router.levels[0].keys[:1].expand(4, -1))
        lora.lora_A.copy_(tree.A[0].flatten(0, 1))
        lora.lora_B.copy_(tree.P)
    torch.testing.assert_close(update_of(tree, x), lora(x, torch.zeros(7, 5, dtype=torch.float64)), **EXACT)


# 4. More layers, linear.


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shape", [TWO, {"rank": [1, 2, 3], "num_experts": [3, 4, 3], "fanout": [2, 1, 2]}])
def test_a_linear_tree_of_selectors_is_a_weighted_sum_of_lora_experts_with_the_top_pool_first(
    shape: dict[str, Any], gate: str
) -> None:
    tree, x = selector_tree(gate=gate, **shape), rows(7, 6)
    update, picks = with_picks(tree, x)
    expected, column, path_weight = torch.zeros_like(update), 0, torch.ones(7, 1, dtype=torch.float64)
    for level in reversed(range(len(shape["rank"]))):
        r = shape["rank"][level]
        mass = (path_weight[..., None] * picks[level].gates).sum(1)  # (N, s): over all paths that end in an expert
        for n in range(shape["num_experts"][level]):
            expected += mass[:, n, None] * (x @ tree.A[level][n].T @ tree.P[:, column : column + r].T)
            column += r
        path_weight = (path_weight[..., None] * picks[level].weights).flatten(1)
    assert column == tree.P.shape[1]
    torch.testing.assert_close(update, expected, **EXACT)


# 5. Weights.


@pytest.mark.parametrize(("gate", "fanout"), [("dense", 1), ("switch", 2), ("switch", 3), ("noisy_topk", 2)])
@pytest.mark.parametrize("training", [False, True])
def test_weights_of_siblings_sum_to_one(gate: str, fanout: int, training: bool) -> None:
    tree = random_tree(gate=gate, **TWO | {"fanout": [fanout, fanout]}).train(training)
    for picked in with_picks(tree, rows(9, 6))[1]:
        torch.testing.assert_close(picked.weights.sum(-1), torch.ones(picked.weights.shape[:-1]).double(), **EXACT)
        assert picked.weights.min() > 0


def test_a_single_switch_child_weighs_its_raw_probability() -> None:
    tree = random_tree(gate="switch", **TWO | {"fanout": [1, 1]})
    for picked in with_picks(tree, rows(50, 6))[1]:
        assert picked.weights.min() >= 1 / 4 and picked.weights.max() < 1


def test_a_single_noisy_child_weighs_its_cosine() -> None:
    tree = random_tree(gate="noisy_topk", rank=[2], num_experts=[4], fanout=[1])
    x = rows(20, 6)
    picked = with_picks(tree, x)[1][0]
    query = tree.router.levels[0].mlp(tree.router.down(x))
    cosine = torch.cosine_similarity(query[:, None], tree.router.levels[0].keys[None], dim=-1)
    torch.testing.assert_close(picked.weights[:, 0], cosine.max(-1, keepdim=True).values, **EXACT)


@pytest.mark.parametrize("gate", ["switch", "noisy_topk"])
def test_children_of_one_parent_are_different_experts_in_falling_order_of_weight(gate: str) -> None:
    for picked in with_picks(random_tree(gate=gate, **TWO | {"fanout": [3, 2]}), rows(30, 6))[1]:
        assert (picked.ids.sort(-1).values.diff(dim=-1) > 0).all()
        assert (picked.weights.diff(dim=-1) <= 0).all()


# 6. Names and order of experts do not matter.


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("gate", GATES)
def test_relabelling_the_experts_of_a_pool_changes_nothing(gate: str, level: int) -> None:
    tree, x, order = random_tree(gate=gate, **TWO), rows(11, 6), torch.tensor([2, 0, 3, 1])
    before, aux = update_of(tree, x), aux_of(tree, x)
    with torch.no_grad():
        of_pool = [tree.A[level], tree.a[level], tree.B[level], tree.b[level], tree.router.levels[level].keys]
        if gate == "noisy_topk":
            of_pool.append(tree.router.levels[level].noise)
        for parameter in of_pool:
            parameter.copy_(parameter[order])
    torch.testing.assert_close(update_of(tree, x), before, **EXACT)
    torch.testing.assert_close(aux_of(tree, x), aux, **EXACT)


def reordered(picks: Picks, order: Callable[[Tensor], Tensor]) -> Picks:
    """Applies an order to what lies (children, parents of them, ..., N)."""
    return replace(picks, choice=Choice(order(picks.chosen)), alpha=order(picks.alpha))


@pytest.mark.parametrize("position", ["all", "child_v2", "child"])
def test_the_order_of_siblings_changes_nothing(position: str) -> None:
    tree, x = random_tree(activation_position=position, **TWO | {"fanout": [2, 3]}), rows(11, 6)
    before, (leaves, top) = with_picks(tree, x)
    order = torch.tensor([1, 2, 0])
    subtrees = reordered(leaves, lambda each: each[:, order].flip(0))  # they move with their parents
    force_picks(tree, [subtrees, reordered(top, lambda each: each[order])])
    torch.testing.assert_close(update_of(tree, x), before, **EXACT)


# 9. Balance losses.


@pytest.mark.parametrize(("levels", "fanout"), [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3)])
def test_a_uniform_switch_router_has_a_balance_loss_of_coefficient_times_fanout_per_pool(
    levels: int, fanout: int
) -> None:
    shape = {"rank": [2] * levels, "num_experts": [4] * levels, "fanout": [fanout] * levels}
    tree = random_tree(gate="switch", aux_loss_coefficient=0.01, **shape)
    with torch.no_grad():
        for level in tree.router.levels:
            level.keys.zero_()
    assert aux_of(tree, rows(13, 6)).item() == pytest.approx(0.01 * fanout * levels, rel=1e-12)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_noisy_balance_losses_are_never_negative(seed: int, training: bool) -> None:
    tree = random_tree(seed=seed, gate="noisy_topk", **TWO).train(training)
    with AdapterContext() as context:
        update_of(tree, rows(13, 6, seed=seed))
    assert len(context.records) == 2
    assert all(record.loss(record.sums) >= 0 for record in context.records)


def test_a_dense_gate_has_no_balance_loss() -> None:
    tree = random_tree(gate="dense", **TWO)
    with AdapterContext() as context:
        update_of(tree, rows(13, 6))
    assert context.aux_loss().item() == 0


# 10. Structural flexibility.


def all_picks(s: int, f: int) -> list[Picks]:
    """Every two-level tree, one a row, with unit weights."""
    subsets = list(itertools.combinations(range(s), f))
    trees = [(top, *leaves) for top in subsets for leaves in itertools.product(subsets, repeat=f)]
    chosen = torch.tensor(trees).movedim(0, -1)  # (1 + f, f, trees)

    def unit(chosen: Tensor) -> Picks:
        nothing = torch.zeros(s, *chosen.shape[1:], dtype=torch.float64)
        return Picks(Choice(chosen), torch.ones(chosen.shape, dtype=torch.float64), nothing, nothing)

    return [unit(chosen[1:].transpose(0, 1)), unit(chosen[0])]


@pytest.mark.parametrize(
    ("position", "activation", "distinct"),
    [("all", "tanh", 216), ("child_v2", "tanh", 126), ("all", "identity", 114), ("child_v2", "identity", 114)],
)
def test_how_many_functions_the_trees_of_two_layers_are(position: str, activation: str, distinct: int) -> None:
    tree = random_tree(activation_position=position, activation=activation, **TWO)
    force_picks(tree, all_picks(4, 2))
    outputs = update_of(tree, rows(1, 6).expand(216, 6))
    assert len(outputs) == count_trees([4, 4], [2, 2]) == 216
    assert len(torch.unique((outputs * 1e7).round(), dim=0)) == distinct


@pytest.mark.parametrize(
    ("experts", "fanout", "trees"),
    [([4], [2], 6), ([4, 4], [2, 2], 216), ([4] * 3, [2] * 3, 279936), ([2, 2], [1, 1], 4), ([3, 5], [2, 1], 15)],
)
def test_count_trees_is_gamma(experts: list[int], fanout: list[int], trees: int) -> None:
    assert count_trees(experts, fanout) == trees


# 14. Shared pool.


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("training", [False, True])
def test_a_shared_pool_is_stored_once_and_its_gradient_is_the_sum_over_layers(gate: str, training: bool) -> None:
    shape: dict[str, Any] = {"rank": [2] * 3, "num_experts": [3] * 3, "fanout": [2, 1, 2]}
    config = SMoREConfig(**SMALL, **shape, gate=gate, shared_pool=True)
    tree, x = build(config).train(training), rows(4, 6)
    noise = FixedNoise(tree)
    pool = [name for name in tree.state_dict() if name[:2] in ("A.", "a.", "B.", "b.")]
    assert sorted(pool) == ["A.0", "B.0", "a.0", "b.0"]
    update_of(tree, x).square().sum().backward()

    untied = {name: p.detach().clone().requires_grad_() for name, p in tree.named_parameters()}
    for name, level in itertools.product(("A", "a", "B", "b"), (1, 2)):
        untied[f"{name}.{level}"] = untied[f"{name}.0"].detach().clone().requires_grad_()
    oracle = Oracle(config, untied)
    if training and gate == "noisy_topk":
        oracle.noise = lambda token, level, path: noise.drawn[level][token, oracle.paths(level).index(path)]
    oracle(x).square().sum().backward()
    for name in ("A", "a", "B", "b"):
        parts: list[Tensor] = [untied[f"{name}.{level}"].grad for level in range(3)]
        assert all(part.any() for part in parts)
        actual = getattr(tree, name)[0].grad
        torch.testing.assert_close(actual, parts[0] + parts[1] + parts[2], rtol=1e-10, atol=1e-11)
