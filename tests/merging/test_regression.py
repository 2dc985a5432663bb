"""The closed forms against numpy's least squares and plain sums over tokens, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from smore_cli.merging.regression import Moments, best_of_rank, fit, squared_error

N, D_IN, D_OUT = 200, 12, 9


def _data(seed: int = 0, n: int = N) -> tuple[Tensor, Tensor]:
    """Inputs of uneven directions, and targets that no matrix meets."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D_IN, generator=generator) * torch.logspace(0, -2, D_IN) + 0.3
    f = torch.tanh(x @ torch.randn(D_IN, D_OUT, generator=generator)) + 0.5
    return x, f


def _moments(x: Tensor, f: Tensor, chunks: int = 3) -> Moments:
    moments = Moments()
    for some, those in zip(x.chunk(chunks), f.chunk(chunks), strict=True):
        moments.add_inputs(some)
        moments.add_targets("map", some, those)
    return moments


def test_the_fit_is_numpys_least_squares() -> None:
    x, f = _data()
    expected = np.linalg.lstsq(x.double().numpy(), f.double().numpy(), rcond=None)[0].T
    found = fit(_moments(x, f), "map", ridge=0.0)
    np.testing.assert_allclose(found.D.numpy(), expected, rtol=2e-3, atol=2e-3)  # the sums are float32
    assert found.bias is None


def test_the_intercept_is_that_of_a_column_of_ones() -> None:
    x, f = _data()
    ones = torch.cat([x, torch.ones(N, 1)], 1).double().numpy()
    expected = np.linalg.lstsq(ones, f.double().numpy(), rcond=None)[0].T
    found = fit(_moments(x, f), "map", ridge=0.0, intercept=True)
    assert found.bias is not None
    np.testing.assert_allclose(found.D.numpy(), expected[:, :-1], rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(found.bias.numpy(), expected[:, -1], rtol=2e-3, atol=2e-3)


def test_ridge_and_prior_are_those_of_the_stacked_system() -> None:
    x, f = _data()
    ridge, prior = 0.05, torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(1)).double()
    wide = x.double()
    weight = ridge * float((wide.t() @ wide).diagonal().mean())
    rows = torch.cat([wide, weight**0.5 * torch.eye(D_IN).double()]).numpy()
    targets = torch.cat([f.double(), weight**0.5 * prior.t()]).numpy()
    expected = np.linalg.lstsq(rows, targets, rcond=None)[0].T
    found = fit(_moments(x, f), "map", ridge=ridge, prior=prior)
    np.testing.assert_allclose(found.D.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_directions_that_never_occur_keep_the_prior() -> None:
    x, f = _data()
    x[:, 3] = 0
    prior = torch.full((D_OUT, D_IN), 0.7)
    found = fit(_moments(x, f), "map", ridge=1e-3, prior=prior)
    torch.testing.assert_close(found.D[:, 3], prior[:, 3].double())
    nothing = fit(_moments(torch.zeros(4, D_IN), torch.zeros(4, D_OUT)), "map", ridge=1e-3, prior=prior)
    torch.testing.assert_close(nothing.D, prior.double())


def test_fewer_tokens_than_dimensions_give_the_smallest_exact_solution() -> None:
    x, f = _data(n=5)
    found = fit(_moments(x, f), "map", ridge=0.0).D
    expected = np.linalg.lstsq(x.double().numpy(), f.double().numpy(), rcond=None)[0].T
    np.testing.assert_allclose((x.double() @ found.t()).numpy(), f.numpy(), atol=0.02)
    assert float(found.norm()) < 1.1 * float(np.linalg.norm(expected))


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 1e-2, 1.0])
def test_what_is_missed_needs_no_second_pass(ridge: float, intercept: bool, prior: bool) -> None:
    x, f = _data()
    start = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(1)) if prior else None
    found = fit(_moments(x, f), "map", ridge=ridge, prior=start, intercept=intercept)
    given = x.double() @ found.D.t() + (0 if found.bias is None else found.bias)
    assert found.missed == pytest.approx(float((given - f.double()).square().sum()), rel=1e-4)


def test_nor_does_what_factors_miss() -> None:
    x, f = _data()
    moments = _moments(x, f)
    B, A = best_of_rank(fit(moments, "map", ridge=1e-2).D, moments.C, 3)
    expected = float((x.double() @ (B @ A).t() - f.double()).square().sum())
    assert squared_error(moments, "map", B, A) == pytest.approx(expected, rel=1e-4)


def test_what_was_split_into_chunks_is_one_sum() -> None:
    x, f = _data()
    one, many = _moments(x, f, chunks=1), _moments(x, f, chunks=7)
    torch.testing.assert_close(one.C, many.C)
    torch.testing.assert_close(one.G["map"], many.G["map"])
    assert one.n == many.n == N


def _cost(x: Tensor, D: Tensor, other: Tensor) -> float:
    return float((x.double() @ (D - other).t()).square().sum())


@pytest.mark.parametrize(("d_out", "d_in"), [(9, 12), (12, 9), (530, 514), (514, 530)])
def test_the_reduced_rank_is_best_where_inputs_occur_and_a_plain_svd_is_not(d_out: int, d_in: int) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4 * d_in, d_in, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, d_in)
    D = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    metric = x.t() @ x
    B, A = best_of_rank(D, metric, 3)
    assert B.shape == (d_out, 3) and A.shape == (3, d_in)
    values = torch.linalg.svdvals(x @ D.t())  # Eckart-Young: the cost of the best is what the other values hold
    assert _cost(x, D, B @ A) == pytest.approx(float(values[3:].square().sum()), rel=1e-6)
    U, S, Vt = torch.linalg.svd(D, full_matrices=False)
    assert _cost(x, D, B @ A) < 0.97 * _cost(x, D, U[:, :3] * S[:3] @ Vt[:3])


def test_full_rank_is_the_matrix_itself() -> None:
    D = torch.randn(4, 6, generator=torch.Generator().manual_seed(3)).double()
    B, A = best_of_rank(D, torch.eye(6), 4)
    torch.testing.assert_close(B @ A, D)
