"""Entropies against fifty-digit arithmetic, at every order and next to order 1, where the formulas are 0 / 0."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from smore_cli.nn.entropy import Entropy, EntropyLoss, renyi, tsallis
from smore_cli.nn.selection import All
from tests.nn.routings import random_logits, sums_of, value_of

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

ORDERS = [0.1, 0.5, 0.9, 0.999, 1 - 1e-6, 1 - 1e-12, 1.0, 1 + 1e-12, 1 + 1e-6, 1.001, 1.1, 1.4, 1.6, 2.0, 5.0, 20.0]
SOME = [0.5, 1.0, 1.1, 2.0]
DISTRIBUTIONS = [
    [0.25] * 4,
    [0.7, 0.2, 0.07, 0.03],
    [0.5, 0.5, 0.0, 0.0],
    [1.0, 0.0, 0.0],
    [1 - 2e-9, 1e-9, 1e-9],
    [0.4, 0.3, 0.1, 0.1, 0.05, 0.05],
]


def exact(p: list[float], q: float, kind: str, eps: float = 0.0) -> float:
    """The entropy straight from its definition; p is divided by its sum, exactly, to sum to 1."""
    with localcontext() as decimals:
        decimals.prec = 50
        mass = sum(Decimal(x) for x in p)
        shares = [Decimal(x) / mass + Decimal(eps) for x in p]
        if q == 1:
            return float(-sum(x * x.ln() for x in shares if x > 0))
        order = Decimal(q)
        powers = sum(x**order for x in shares if x > 0)
        return float((1 - powers) / (order - 1) if kind == "tsallis" else powers.ln() / (1 - order))


@pytest.mark.parametrize("q", ORDERS)
@pytest.mark.parametrize("p", DISTRIBUTIONS)
def test_entropies_are_accurate_to_the_last_digits(p: list[float], q: float) -> None:
    for kind, function in (("tsallis", tsallis), ("renyi", renyi)):
        expected = exact(p, q, kind)
        double = function(torch.tensor(p, dtype=torch.float64), q).item()
        assert double == pytest.approx(expected, rel=2e-14, abs=4e-16)  # p itself is rounded
        single = function(torch.tensor(p), q).item()
        assert single == pytest.approx(exact(torch.tensor(p).tolist(), q, kind), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("q", [0.5, 0.99, 1.0, 1.01, 1.1, 2.0, 5.0])
@pytest.mark.parametrize("p", DISTRIBUTIONS)
def test_eps_is_added_to_every_probability(p: list[float], q: float) -> None:
    for kind, function in (("tsallis", tsallis), ("renyi", renyi)):
        result = function(torch.tensor(p, dtype=torch.float64), q, eps=1e-5).item()
        assert result == pytest.approx(exact(p, q, kind, eps=1e-5), rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("q", [0.5, 1.0, 1.1, 1.4, 2.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_entropies_equal_the_reference_numbers(
    shared_golden: Path, q: float, dtype: torch.dtype, tolerance: float
) -> None:
    golden = np.load(shared_golden / "dynmole.npz")
    p = torch.softmax(torch.from_numpy(golden["z6"]).to(dtype), -1)
    kinds = {
        "": Entropy(q, normalised=False),
        "_norm": Entropy(q),
        "_norm_eps1e-5": Entropy(q, eps=1e-5),
    }
    for suffix, entropy in kinds.items():
        expected = torch.from_numpy(golden[f"S6_q{q}{suffix}"]).to(dtype)
        torch.testing.assert_close(entropy(p), expected, rtol=tolerance, atol=tolerance)
    assert Entropy(q).largest(6) == pytest.approx(golden[f"Smax6_q{q}"].item(), rel=1e-14)
    expected = torch.from_numpy(golden["renyi6_a1.1_norm"]).to(dtype)
    torch.testing.assert_close(Entropy(1.1, "renyi")(p), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["tsallis", "renyi"])
@pytest.mark.parametrize("q", ORDERS)
def test_a_normalised_entropy_is_one_for_a_uniform_router_alone_and_zero_for_a_certain_one_alone(
    kind: str, q: float
) -> None:
    entropy = Entropy(q, kind)  # type: ignore[arg-type]
    between = entropy(torch.softmax(random_logits(50, 6), -1))
    assert between.min() > 0 and between.max() < 1
    assert entropy(torch.full((6,), 1 / 6, dtype=torch.float64)).item() == pytest.approx(1, rel=1e-13)
    assert entropy(torch.eye(6, dtype=torch.float64)).tolist() == [0] * 6


def test_order_one_is_shannons_and_is_approached_smoothly() -> None:
    p = torch.softmax(random_logits(50, 6), -1)
    shannon = -(p * p.log()).sum(-1)
    torch.testing.assert_close(tsallis(p, 1.0), shannon, rtol=1e-14, atol=0)
    for distance in (1e-1, 1e-3, 1e-6, 1e-9):
        for q in (1 - distance, 1 + distance):
            assert (tsallis(p, q) - shannon).abs().max() < 4 * distance
            assert (renyi(p, q) - shannon).abs().max() < 4 * distance


def test_order_two_is_one_minus_the_sum_of_squares() -> None:
    p = torch.softmax(random_logits(50, 6), -1)
    torch.testing.assert_close(tsallis(p, 2.0), 1 - p.square().sum(-1), rtol=1e-14, atol=0)
    torch.testing.assert_close(renyi(p, 2.0), -p.square().sum(-1).log(), rtol=1e-13, atol=1e-15)


def test_a_single_expert_leaves_nothing_to_be_unsure_of() -> None:
    p = torch.ones(3, 1, requires_grad=True)
    for entropy in (Entropy(1.1, eps=1e-5), Entropy(1.0), Entropy(1.1, "renyi", 1e-5, normalised=False)):
        assert entropy(p).tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", ["tsallis", "renyi"])
@pytest.mark.parametrize("q", SOME)
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_gradients_of_entropies_equal_finite_differences(kind: str, q: float, eps: float) -> None:
    entropy = Entropy(q, kind, eps)  # type: ignore[arg-type]
    z = random_logits(4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: entropy(torch.softmax(z, -1)), (z,))


@pytest.mark.parametrize("kind", ["tsallis", "renyi"])
@pytest.mark.parametrize("q", [0.1, *SOME, 5.0])
def test_gradients_are_finite_even_where_probabilities_are_zero(kind: str, q: float) -> None:
    z = torch.tensor([[0.0, -60, -88, -95, -110, -1000], [300, 300, 0, 0, 0, 0]], requires_grad=True)  # also denormals
    entropy = Entropy(q, kind)(torch.softmax(z, -1))  # type: ignore[arg-type]
    entropy.sum().backward()
    assert entropy.isfinite().all() and z.grad is not None and z.grad.isfinite().all()
    assert z.grad[:, -1].tolist() == [0, 0]


@pytest.mark.parametrize("q", SOME)
def test_a_uniform_router_is_stationary_for_the_entropy(q: float) -> None:
    z = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    Entropy(q, eps=1e-5)(torch.softmax(z, -1)).sum().backward()
    assert z.grad is not None and z.grad.abs().max() < 1e-15


# The loss.


def test_the_loss_is_the_coefficient_times_the_mean_entropy_of_real_tokens() -> None:
    z, mask = random_logits(12, 5), torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 1, 1]])
    real = [i for i, m in enumerate(mask.flatten().tolist()) if m]
    entropies = [exact(torch.softmax(z[i], -1).tolist(), 1.1, "tsallis") / Entropy(1.1).largest(5) for i in range(12)]
    loss = EntropyLoss(0.3, Entropy(1.1))
    mean = 0.3 * sum(entropies[i] for i in real) / len(real)
    assert value_of(loss, z, All(), mask).item() == pytest.approx(mean, rel=1e-12)
    everything = 0.3 * sum(entropies) / 12
    assert value_of(loss, z, All()).item() == pytest.approx(everything, rel=1e-12)
    over_padding = EntropyLoss(0.3, Entropy(1.1), padding=True)
    assert value_of(over_padding, z, All(), mask).item() == pytest.approx(everything, rel=1e-12)


def test_the_gradient_of_the_loss_is_the_formulas() -> None:
    z, q, eps, tokens = random_logits(7, 6).requires_grad_(), 1.1, 1e-5, 7
    (gradient,) = torch.autograd.grad(value_of(EntropyLoss(1.0, Entropy(q, eps=eps)), z, All()), z)
    largest = (1 - 6 ** (1 - q)) / (q - 1)
    expected = torch.zeros_like(z)
    for t in range(tokens):
        p = [math.exp(x) for x in z[t].tolist()]
        p = [x / sum(p) for x in p]
        wrt_p = [-q * (x + eps) ** (q - 1) / ((q - 1) * largest * tokens) for x in p]
        mean = sum(a * b for a, b in zip(p, wrt_p, strict=True))
        for j in range(6):
            expected[t, j] = p[j] * (wrt_p[j] - mean)
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-9, atol=1e-12)


def test_padding_has_no_influence_on_the_loss() -> None:
    z, mask = random_logits(8, 4), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    other = torch.where(mask.flatten()[:, None] == 0, torch.full_like(z, 7.0) * torch.arange(4), z)
    loss = EntropyLoss(1.0, Entropy(1.1))
    assert torch.equal(value_of(loss, z, All(), mask), value_of(loss, other, All(), mask))
    assert value_of(loss, z, All(), torch.zeros(2, 4)).item() == 0


def test_sums_of_parts_add_up_to_the_sums_of_the_whole() -> None:
    z, loss = random_logits(9, 4), EntropyLoss(1.0, Entropy(1.1))
    parts: list[Tensor] = [sums_of(loss, part, All()) for part in z.split([1, 3, 5])]
    torch.testing.assert_close(torch.stack(parts).sum(0), sums_of(loss, z, All()), rtol=1e-14, atol=0)


def test_descending_the_loss_makes_a_router_surer() -> None:
    z = random_logits(5, 6, scale=0.5).requires_grad_()
    loss = value_of(EntropyLoss(1.0, Entropy(1.1, eps=1e-5)), z, All())
    (gradient,) = torch.autograd.grad(loss, z)
    stepped = torch.softmax(z.detach() - gradient, -1)
    assert (stepped.max(-1).values > torch.softmax(z.detach(), -1).max(-1).values).all()
