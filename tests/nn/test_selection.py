"""Which experts are picked: against loops over sorted lists, the reference numbers, and what must hold of all."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from smore_cli.nn.entropy import Entropy, EntropyHybrid
from smore_cli.nn.selection import All, TopK, TopP
from tests.nn.routings import random_logits

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from smore_cli.nn.selection import Selector

RELEASED = EntropyHybrid(TopP(0.75, 2, crossing=False), Entropy(1.1, eps=1e-5), 0.9)


def probabilities(n: int = 60, s: int = 6, seed: int = 0) -> Tensor:
    """Of growing certainty, from nearly uniform to nearly one-hot."""
    scale = torch.linspace(0.05, 5, n, dtype=torch.float64)[:, None]
    return torch.softmax(random_logits(n, s, seed, 1.0) * scale, -1)


def picked_by(select: Selector, p: Tensor) -> Tensor:
    picked = select(p)[1]
    assert picked is not None
    return picked


def shortest_prefix(p: list[float], mass: float, at_least: int, crossing: bool) -> set[int]:
    """The experts of the shortest list whose mass exceeds `mass` (crossing), or of the longest whose mass does not."""
    order = sorted(range(len(p)), key=lambda i: -p[i])
    kept: list[int] = []
    total = 0.0
    for expert in order:
        if crossing and total > mass:
            break
        if not crossing and total + p[expert] > mass:
            break
        kept.append(expert)
        total += p[expert]
    return set(order[: max(at_least, len(kept))])


def gates_of(p: list[float], kept: set[int], renormalise: bool) -> list[float]:
    total = sum(p[i] for i in kept) if renormalise else 1.0
    return [p[i] / total if i in kept else 0.0 for i in range(len(p))]


def assert_equals_loops(select: Selector, p: Tensor, keep: list[set[int]], renormalise: bool) -> None:
    gates, picked = select(p)
    for row, chosen, weights, kept in zip(p.tolist(), picked, gates, keep, strict=True):
        assert {i for i, on in enumerate(chosen.tolist()) if on} == kept
        torch.testing.assert_close(weights, torch.tensor(gates_of(row, kept, renormalise)).double())


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_equals_a_loop(k: int, renormalise: bool) -> None:
    p = probabilities()
    keep = [set(sorted(range(6), key=lambda i: -row[i])[:k]) for row in p.tolist()]
    assert_equals_loops(TopK(k, renormalise), p, keep, renormalise)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("crossing", [False, True])
@pytest.mark.parametrize(("mass", "min_k"), [(0.0, 1), (0.5, 1), (0.75, 2), (0.8, 1), (0.95, 4)])
def test_top_p_equals_a_loop(mass: float, min_k: int, crossing: bool, renormalise: bool) -> None:
    p = probabilities()
    keep = [shortest_prefix(row, mass, min_k, crossing) for row in p.tolist()]
    assert_equals_loops(TopP(mass, min_k, crossing, renormalise), p, keep, renormalise)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("crossing", [False, True])
@pytest.mark.parametrize(("normalised", "q", "threshold"), [(True, 1.1, 0.9), (True, 1.0, 0.6), (False, 1.1, 0.9)])
def test_the_hybrid_equals_a_loop(
    normalised: bool, q: float, threshold: float, crossing: bool, renormalise: bool
) -> None:
    p, keep = probabilities(), []
    for row in p.tolist():
        if q == 1:
            entropy, largest = -sum(x * np.log(x) for x in row), np.log(6)
        else:
            entropy, largest = (1 - sum(x**q for x in row)) / (q - 1), (1 - 6 ** (1 - q)) / (q - 1)
        unsure = entropy / (largest if normalised else 1) > threshold
        keep.append(set(range(6)) if unsure else shortest_prefix(row, 0.75, 2, crossing))
    assert 5 < sum(len(kept) == 6 for kept in keep) < 55
    hybrid = EntropyHybrid(TopP(0.75, 2, crossing, renormalise), Entropy(q, normalised=normalised), threshold)
    assert_equals_loops(hybrid, p, keep, renormalise)


# The reference numbers. Row 26 is exactly uniform: there, too, the first of equal experts goes first.

HYBRIDS = {
    "code": RELEASED,
    "renorm": EntropyHybrid(TopP(0.75, 2, False, True), Entropy(1.1, eps=1e-5), 0.9),
    "incl": EntropyHybrid(TopP(0.75, 2, True), Entropy(1.1, eps=1e-5), 0.9),
    "incl_renorm": EntropyHybrid(TopP(0.75, 2, True, True), Entropy(1.1, eps=1e-5), 0.9),
    "thr0.5": EntropyHybrid(TopP(0.75, 2, False), Entropy(1.1, eps=1e-5), 0.5),
    "thr0": EntropyHybrid(TopP(0.75, 2, False), Entropy(1.1), 0.0),
    "thr1": EntropyHybrid(TopP(0.75, 2, False), Entropy(1.1, eps=1e-5), 1.0),
    "q2_thr0.8_p0.5_k1": EntropyHybrid(TopP(0.5, 1, False), Entropy(2.0, eps=1e-5), 0.8),
}
SELECTORS: dict[str, Selector] = {
    "topk6": TopK(2),
    "topp6_p0.8_incl": TopP(0.8),
    "topp6_p0.75_excl_min2": TopP(0.75, 2, crossing=False),
    **{f"dyn6_{tag}": hybrid for tag, hybrid in HYBRIDS.items()},
}


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-6)])
def test_selectors_equal_the_reference_numbers(
    shared_golden: Path, name: str, dtype: torch.dtype, tolerance: float
) -> None:
    golden = np.load(shared_golden / "dynmole.npz")
    p = torch.softmax(torch.from_numpy(golden["z6"]).to(dtype), -1)
    gates, picked = SELECTORS[name](p)
    assert picked is not None
    weights, active = torch.from_numpy(golden[f"{name}_w"]).to(dtype), torch.from_numpy(golden[f"{name}_a"])
    rows = torch.ones(len(p), dtype=torch.bool)
    if name == "dyn6_thr0":  # the reference rounds the entropy of row 28, about 1e-25, to 0, which is not above 0
        rows[28] = False
    assert torch.equal(picked[rows], active[rows])
    torch.testing.assert_close(gates, weights, rtol=tolerance, atol=tolerance)
    if name.startswith("dyn6_"):
        hybrid = HYBRIDS[name.removeprefix("dyn6_")]
        expected = torch.from_numpy(golden[f"{name}_H"]).to(dtype)
        torch.testing.assert_close(hybrid.entropy(p), expected, rtol=10 * tolerance, atol=10 * tolerance)


def test_a_renormalised_nucleus_equals_the_reference_numbers(shared_golden: Path) -> None:
    golden = np.load(shared_golden / "dynmole.npz")
    gates, _ = TopP(0.8, renormalise=True)(torch.from_numpy(golden["p6"]))
    torch.testing.assert_close(gates, torch.from_numpy(golden["topp6_p0.8_incl_renorm_w"]), rtol=1e-10, atol=1e-12)


# What must hold of any selector.


def test_a_token_exactly_at_the_threshold_stays_sparse() -> None:
    p = probabilities(1)
    entropy = Entropy(1.1)(p).item()
    sparse = TopP(0.3, 1, crossing=False)
    assert picked_by(EntropyHybrid(sparse, Entropy(1.1), entropy), p).sum() == 1
    assert picked_by(EntropyHybrid(sparse, Entropy(1.1), entropy * (1 - 1e-12)), p).all()


def test_at_threshold_zero_every_token_goes_to_every_expert_with_its_probability() -> None:
    p = probabilities()
    gates, picked = EntropyHybrid(TopP(0.5, 1), Entropy(1.1), 0.0)(p)
    assert picked.all() and torch.equal(gates, p) and torch.equal(All()(p)[0], p)


@pytest.mark.parametrize("q", [0.5, 1.0, 1.1])
@pytest.mark.parametrize("normalised", [False, True])
def test_at_the_largest_entropy_the_threshold_leaves_plain_top_p_even_where_eps_exceeds_it(
    q: float, normalised: bool
) -> None:
    p = torch.cat([probabilities(), torch.full((1, 6), 1 / 6, dtype=torch.float64)])
    entropy = Entropy(q, eps=1e-5, normalised=normalised)
    largest = 1.0 if normalised else entropy.largest(6)
    if q == 0.5:
        assert entropy(p)[-1] > largest
    sparse = TopP(0.75, 2, crossing=False)
    for threshold in (largest, 1.5 * largest):
        assert torch.equal(picked_by(EntropyHybrid(sparse, entropy, threshold), p), picked_by(sparse, p))
    if not normalised:  # a raw entropy reaches above 1, so a threshold of 1 is one like any other
        assert (picked_by(EntropyHybrid(sparse, entropy, 1.0), p) != picked_by(sparse, p)).any()


def test_without_mass_top_p_is_top_k() -> None:
    p = probabilities()
    for crossing in (False, True):
        assert torch.equal(picked_by(TopP(0.0, 2, crossing), p), picked_by(TopK(2), p))


@pytest.mark.parametrize("crossing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_whole_mass_leaves_no_expert_out_whatever_rounding_does(dtype: torch.dtype, crossing: bool) -> None:
    p = torch.softmax(random_logits(2000, 8).to(dtype), -1)
    assert (p.sort(descending=True).values.cumsum(-1)[:, -1] > 1).any()  # rounding does
    assert picked_by(TopP(1.0, 1, crossing), p).all()


@pytest.mark.parametrize("mass", [0.1, 0.5, 0.75, 0.95])
def test_the_crossing_expert_is_exactly_one_more(mass: float) -> None:
    p = probabilities(200)
    with_it, without = (picked_by(TopP(mass, 0, crossing), p) for crossing in (True, False))
    assert (without <= with_it).all() and ((with_it.sum(-1) - without.sum(-1)) == 1).all()


def test_mass_that_is_reached_exactly_is_not_yet_exceeded() -> None:
    p = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    assert picked_by(TopP(0.75, 1, crossing=False), p).sum() == 2
    assert picked_by(TopP(0.75, 1, crossing=True), p).sum() == 3


def test_more_mass_picks_more_and_a_higher_threshold_fewer() -> None:
    p = probabilities(200)
    by_mass = [picked_by(TopP(mass, 2, crossing=False), p) for mass in (0.0, 0.3, 0.6, 0.75, 0.9, 1.0)]
    sparse = TopP(0.75, 2, crossing=False)
    by_threshold = [picked_by(EntropyHybrid(sparse, Entropy(1.1), t), p) for t in (1.0, 0.9, 0.7, 0.4, 0.0)]
    for masks in (by_mass, by_threshold):
        assert all((few <= many).all() for few, many in itertools.pairwise(masks))
        assert (masks[0] >= picked_by(TopK(2), p)).all() and masks[-1].all() and not masks[0].all()


@pytest.mark.parametrize("select", [TopK(2), TopP(0.8), RELEASED], ids=repr)
def test_permuting_the_experts_permutes_the_gates(select: Selector) -> None:
    p = probabilities()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(select(p[:, order])[0], select(p)[0][:, order], rtol=1e-14, atol=0)


@pytest.mark.parametrize("select", [TopK(2), TopP(0.8), RELEASED], ids=repr)
def test_tokens_are_routed_one_by_one(select: Selector) -> None:
    p = probabilities(30)
    p[7] = 1 / 6  # ties, too
    gates = select(p)[0]
    for i in range(30):
        assert torch.equal(select(p[i : i + 1])[0], gates[i : i + 1])
    assert torch.equal(select(p.view(3, 10, 6))[0], gates.view(3, 10, 6))


def test_weights_sum_to_one_on_unsure_tokens_and_on_sparse_ones_where_they_are_renormalised() -> None:
    p = probabilities(200)
    gates, picked = RELEASED(p)
    unsure = picked.all(-1)
    assert 20 < unsure.sum() < 180
    torch.testing.assert_close(gates[unsure].sum(-1), torch.ones(int(unsure.sum())).double())
    assert (gates[~unsure].sum(-1) < 1).all()
    renormalised, _ = EntropyHybrid(TopP(0.75, 2, False, True), RELEASED.entropy, 0.9)(p)
    torch.testing.assert_close(renormalised.sum(-1), torch.ones(200).double())


def test_a_gradient_reaches_what_was_picked_and_nothing_else() -> None:
    p = probabilities().requires_grad_()
    gates, picked = RELEASED(p)
    gates.sum().backward()
    assert p.grad is not None and torch.equal(p.grad != 0, picked) and not picked.all()


@pytest.mark.parametrize("select", [TopK(2), TopP(0.8, renormalise=True), RELEASED], ids=repr)
def test_gradients_of_gates_equal_finite_differences(select: Selector) -> None:
    z = random_logits(5, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: select(torch.softmax(z, -1))[0], (z,))


@pytest.mark.parametrize("select", [TopK(3), TopP(0.0, 3), TopP(0.04, 1, crossing=False)], ids=repr)
def test_of_equal_experts_the_first_are_picked(select: Selector) -> None:
    picked = picked_by(select, torch.full((500, 64), 1 / 64))
    assert picked[0].nonzero().flatten().tolist() == list(range(int(picked[0].sum()))) and (picked == picked[0]).all()
