"""The matrix that comes nearest to an update for the inputs that occur, in closed form from second moments.

    minimise  sum_t |D x_t + b - f_t|^2 + lambda |D - D_0|^2          lambda = ridge * mean(diag C)

    C = sum x x^T,  G = sum f x^T          D = D_0 + (G - D_0 C) (C + lambda I)^-1
    with b: the same with C and G taken around the means, b = mean f - D mean x
    missed      sum |D x + b - f|^2 = sum |f|^2 - <D, G> - lambda <D - D_0, D>, as D C = G - lambda (D - D_0):
                from the moments alone, without a product of matrices
    rank r      D C^(1/2) has an SVD U S V^T; U_r U_r^T D is best among all of rank r where lengths are those of D x,
                which a plain SVD of D knows nothing of (reduced-rank regression)

Sums are float32, added up a few thousand tokens at a time; everything that is solved is float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Fit", "Moments", "best_of_rank", "fit", "squared_error"]


@dataclass
class Moments:
    """Sums over tokens of one input x, and of the targets of each map that reads it.

    Attributes:
        n: tokens seen.
        C: (d_in, d_in) sum of x x^T.
        x: (d_in,) sum of x.
        G: sum of f x^T, (d_out, d_in), for each map by its name.
        f: sum of f, (d_out,).
        square: sum of |f|^2.
    """

    n: int = 0
    C: Tensor = field(default_factory=lambda: torch.zeros(()))
    x: Tensor = field(default_factory=lambda: torch.zeros(()))
    G: dict[str, Tensor] = field(default_factory=dict)
    f: dict[str, Tensor] = field(default_factory=dict)
    square: dict[str, float] = field(default_factory=dict)

    def add_inputs(self, x: Tensor) -> None:
        """Adds inputs (N, d_in)."""
        x = x.float()
        self.n += len(x)
        self.C = self.C.to(x.device) + x.t() @ x
        self.x = self.x.to(x.device) + x.sum(0)

    def add_targets(self, name: str, x: Tensor, f: Tensor) -> None:
        """Adds what the map `name` should give for inputs (N, d_in) that were or will be added: f, (N, d_out)."""
        x, f = x.float(), f.float()
        zero = torch.zeros((), device=x.device)
        self.G[name] = self.G.get(name, zero) + f.t() @ x
        self.f[name] = self.f.get(name, zero) + f.sum(0)
        self.square[name] = self.square.get(name, 0.0) + float(f.square().sum())


@dataclass(frozen=True)
class Fit:
    """What was found for one map.

    Attributes:
        D: (d_out, d_in) float64.
        bias: (d_out,) float64; None: none was asked for.
        C: (d_in, d_in) float64, the metric: around the mean where there is a bias, ridge included.
        missed: sum |D x + bias - f|^2 over the tokens.
    """

    D: Tensor
    bias: Tensor | None
    C: Tensor
    missed: float


@torch.no_grad()
def fit(moments: Moments, name: str, *, ridge: float, prior: Tensor | None = None, intercept: bool = False) -> Fit:
    """Returns the best update of one map.

    Args:
        moments: of at least one token.
        name: the map's.
        ridge: of the mean of C's diagonal; it keeps directions that hardly occur at the prior.
        prior: (d_out, d_in) D_0; None: zero.
        intercept: whether a bias is fitted too.
    """
    C, G, square = moments.C.double(), moments.G[name].double(), moments.square[name]
    x, f = moments.x.double() / moments.n, moments.f[name].double() / moments.n
    if intercept:
        C = C - moments.n * torch.outer(x, x)
        G = G - moments.n * torch.outer(f, x)
        square -= moments.n * float(f.square().sum())
    prior = None if prior is None else prior.double()
    right = G if prior is None else G - prior @ C
    # An input that is zero everywhere tells nothing: then any lambda keeps D at the prior.
    weight = ridge * float(C.diagonal().mean()) or torch.finfo(torch.float32).tiny
    C.diagonal().add_(weight)  # in place, as C may be the largest thing there is
    change = _solve(C, right)  # D - D_0
    D = change if prior is None else change + prior
    missed = square - float((D * G).sum()) - weight * float((change * D).sum())
    return Fit(D, f - D @ x if intercept else None, C, missed)


def _solve(metric: Tensor, right: Tensor) -> Tensor:
    """Returns right metric^-1 for a symmetric positive (semi)definite metric."""
    factor, info = torch.linalg.cholesky_ex(metric)
    if int(info) == 0:
        solved: Tensor = torch.cholesky_solve(right.t(), factor)
        return solved.t()
    # Without a ridge and with fewer tokens than dimensions C is singular: the smallest D of the best is meant.
    values, vectors = torch.linalg.eigh(metric)
    keep = values > values[-1].clamp_min(0) * len(values) * torch.finfo(torch.float32).eps
    inverse = torch.where(keep, 1 / torch.where(keep, values, 1), 0)
    least: Tensor = ((right @ vectors) * inverse) @ vectors.t()
    return least


@torch.no_grad()
def squared_error(moments: Moments, name: str, B: Tensor, A: Tensor) -> float:
    """Returns sum |B A x - f|^2 over all tokens, from the moments; no matrix of B A's size is multiplied.

    Args:
        moments: of these tokens.
        name: the map's.
        B: (d_out, r).
        A: (r, d_in).
    """
    B, A = B.double(), A.double()
    given = (B.t() @ B) * (A @ moments.C.double() @ A.t())  # its sum: sum |B A x|^2
    along = (B.t() @ moments.G[name].double()) * A  # its sum: sum <B A x, f>
    return float(given.sum() - 2 * along.sum()) + moments.square[name]


@torch.no_grad()
def best_of_rank(D: Tensor, metric: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns B (d_out, r) and A (r, d_in), float64, with B A the best rank-r stand-in for D in a metric.

    Both have the same norm, which is what training them further needs.

    Args:
        D: (d_out, d_in).
        metric: (d_in, d_in) positive definite: |D x|^2 on average is tr(D metric D^T).
        rank: r, at most min(d_out, d_in).
    """
    D, metric = D.double(), metric.double()
    factor, info = torch.linalg.cholesky_ex(metric)
    if int(info) != 0:
        values, vectors = torch.linalg.eigh(metric)
        factor = vectors * values.clamp_min(0).sqrt()
    seen = D @ factor  # (d_out, d_in), D C^(1/2) up to a rotation of its input
    left = torch.linalg.svd(seen, full_matrices=False).U[:, :rank] if min(D.shape) <= 512 else _leading(seen, rank)
    right = left.t() @ D
    balance = (right.norm() / left.norm()).sqrt() if right.any() else 1.0
    return left * balance, right / balance


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """Returns the first left singular vectors (m, r) of a wide matrix, through the smaller of its two products."""
    m, n = matrix.shape
    if m <= n:
        left: Tensor = torch.linalg.eigh(matrix @ matrix.t()).eigenvectors[:, -rank:]
        return left.flip(1)
    right = torch.linalg.eigh(matrix.t() @ matrix).eigenvectors[:, -rank:].flip(1)
    basis: Tensor = torch.linalg.qr(matrix @ right).Q
    return basis
