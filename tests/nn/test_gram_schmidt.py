"""Gram-Schmidt in rank space against Gram-Schmidt on the vectors, one at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smore_cli.nn.gram_schmidt import NORM_FLOOR, gram_matrix, orthogonal_coefficients


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram_schmidt(vectors: Tensor) -> list[Tensor]:
    """The u of one token's v (s, d), with the projections subtracted one by one."""
    found: list[Tensor] = []
    for v in vectors:
        u = v.clone()
        for earlier in found:
            if earlier.norm() > 1e-7 * v.norm():
                u = u - (u @ earlier) / (earlier @ earlier) * earlier
        found.append(u)
    return found


def weighted_sum(vectors: Tensor, gates: Tensor, normalise: bool) -> Tensor:
    """Sum_e g_e u_e of every token, (N, d)."""
    total = torch.zeros_like(vectors[:, 0])
    for n in range(len(vectors)):
        for e, u in enumerate(gram_schmidt(vectors[n])):
            total[n] += gates[n, e] * (u / (u @ u + NORM_FLOOR**2).sqrt() if normalise else u)
    return total


def combined(vectors: Tensor, gates: Tensor, normalise: bool) -> Tensor:
    coefficients = orthogonal_coefficients(vectors @ vectors.mT, gates, normalise=normalise)
    return (coefficients[:, None] @ vectors).squeeze(1)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("s", [1, 2, 3, 5])
def test_the_coefficients_give_the_weighted_sum_of_orthogonal_vectors(s: int, normalise: bool) -> None:
    vectors, gates = random(9, s, 7), random(9, s, seed=1)
    torch.testing.assert_close(
        combined(vectors, gates, normalise), weighted_sum(vectors, gates, normalise), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("normalise", [False, True])
def test_a_vector_in_the_span_of_earlier_ones_leaves_nothing_and_projects_nothing_out(normalise: bool) -> None:
    vectors, gates = random(6, 4, 5), random(6, 4, seed=1)
    vectors[0, 0] = 0
    vectors[1, 1] = 3 * vectors[1, 0]
    vectors[2, 2] = vectors[2, 0] - vectors[2, 1]
    vectors[3, :] = vectors[3, :1]
    vectors[4] = 0
    # Rounding is all that is left of a dependent vector, so there is nothing to compare beyond it.
    expected = torch.zeros(6, 5, dtype=torch.float64)
    for n in range(6):
        for e, u in enumerate(gram_schmidt(vectors[n])):
            if u.norm() > 1e-7:
                expected[n] += gates[n, e] * (u / (u @ u + NORM_FLOOR**2).sqrt() if normalise else u)
    torch.testing.assert_close(combined(vectors, gates, normalise), expected, rtol=1e-8, atol=1e-8)


def test_orthogonal_vectors_are_left_alone() -> None:
    vectors = torch.linalg.qr(random(4, 6, 3)).Q.mT * torch.tensor([1.0, 5.0, 0.2])[:, None]
    gates = random(4, 3, seed=1)
    coefficients = orthogonal_coefficients(vectors @ vectors.mT, gates, normalise=False)
    torch.testing.assert_close(coefficients, gates, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalise", [False, True])
def test_where_all_vectors_are_zero_value_and_gradient_are_finite(normalise: bool) -> None:
    vectors, gates = torch.zeros(2, 3, 4, dtype=torch.float64, requires_grad=True), random(2, 3, seed=1)
    gates.requires_grad_()
    coefficients = orthogonal_coefficients(vectors @ vectors.mT, gates, normalise=normalise)
    torch.testing.assert_close(coefficients, gates / NORM_FLOOR if normalise else gates)
    (coefficients[:, None] @ vectors).sum().backward()
    assert vectors.grad is not None and vectors.grad.isfinite().all() and vectors.grad.any()
    assert gates.grad is not None and not gates.grad.any()


@pytest.mark.parametrize("normalise", [False, True])
def test_gradients_equal_finite_differences(normalise: bool) -> None:
    vectors, gates = random(2, 3, 4).requires_grad_(), random(2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda v, g: combined(v, g, normalise), (vectors, gates), fast_mode=True)


def test_the_gram_matrix_is_that_of_the_experts_outputs() -> None:
    latent, up = random(5, 6), random(7, 6, seed=1)  # 3 experts of rank 2
    outputs = torch.stack([latent[:, 2 * e : 2 * e + 2] @ up[:, 2 * e : 2 * e + 2].T for e in range(3)], 1)
    torch.testing.assert_close(gram_matrix(latent, up, 3), outputs @ outputs.mT, rtol=1e-12, atol=1e-12)
