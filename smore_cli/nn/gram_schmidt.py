"""Experts whose outputs are made orthogonal to each other, token by token, without ever being written out.

    v_e = B_e A_e x                                 u = GramSchmidt(v)         update = sum_e g_e u_e

With G = (<v_e, v_f>) = T D T^T, T unit lower triangular and D diagonal, Gram-Schmidt is v = T u and |u_e|^2 = D_e. So

    sum_e g_e u_e = sum_f c_f v_f                   c = T^-T g

and only the s coefficients of a token change, not the two-product form of the bank. G needs no wide vector either:
<v_e, v_f> = h_e^T (B_e^T B_f) h_f, and B^T B is computed once a forward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from smore_cli.nn.bank import BLOCK_EXPERTS, Bank, block

if TYPE_CHECKING:
    from torch import Tensor

    from smore_cli.nn.router import Router, Routing

__all__ = ["NORM_FLOOR", "OrthogonalBank", "gram_matrix", "orthogonal_coefficients"]

NORM_FLOOR = 1e-3
"""Normalised vectors are u / sqrt(|u|^2 + NORM_FLOOR^2): while B = 0 that is 0, with a gradient."""


class OrthogonalBank(Bank):
    """A block bank that adds up the orthogonalised outputs of the picked experts; still zero while B = 0.

    Attributes:
        rank: r, the rank of each expert.
        order: which vector Gram-Schmidt leaves as it is: that of the first expert, or of the one with the largest gate.
        normalise: whether every u_e is divided by its length.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        num_experts: int,
        rank: int,
        router: Router,
        scale: float,
        dropout: float,
        order: Literal["index", "gate"],
        normalise: bool,
    ) -> None:
        super().__init__(
            d_in,
            d_out,
            down=num_experts * rank,
            up=num_experts * rank,
            router=router,
            scale=scale,
            dropout=dropout,
            expert_axes=BLOCK_EXPERTS,
        )
        self.order, self.normalise = order, normalise

    def mix(self, latent: Tensor, routing: Routing) -> Tensor:
        """Returns [c_1 h_1; ...; c_s h_s], (N, s r); see `Bank.mix`."""
        gates = routing.gates.squeeze(1)  # (N, s)
        picked = None if routing.picked is None else routing.picked.squeeze(1)
        with torch.autocast(latent.device.type, enabled=False):
            wide = torch.promote_types(latent.dtype, torch.float32)  # differences of near-equal numbers
            gram = gram_matrix(latent.to(wide), self.B.to(wide), gates.shape[-1])
            if picked is not None:  # the others must not be projected out of the picked ones
                gram = gram * (picked[:, :, None] & picked[:, None, :])
            coefficients = self._coefficients(gram, gates.to(wide))
        return block(latent, coefficients[:, None].to(latent.dtype))

    def _coefficients(self, gram: Tensor, gates: Tensor) -> Tensor:
        if self.order == "index":
            return orthogonal_coefficients(gram, gates, normalise=self.normalise)
        order = gates.detach().argsort(dim=-1, descending=True, stable=True)  # (N, s)
        gram = gram.gather(1, order[:, :, None].expand_as(gram))
        gram = gram.gather(2, order[:, None, :].expand_as(gram))
        ordered = orthogonal_coefficients(gram, gates.gather(1, order), normalise=self.normalise)
        return ordered.gather(1, order.argsort(dim=-1))


def gram_matrix(latent: Tensor, up: Tensor, num_experts: int) -> Tensor:
    """Returns the inner products <v_e, v_f> of the experts' outputs, (N, s, s).

    Args:
        latent: (N, s r), expert by expert.
        up: (d_out, s r), the up-projections side by side.
        num_experts: s.
    """
    s = num_experts
    rows = latent.view(len(latent), s, -1)  # (N, s, r)
    products = (up.t() @ up).view(s, rows.shape[-1], -1)  # (s, r, s r), B_f^T [B_1 ... B_s]
    pulled = torch.einsum("nfq,fqx->nfx", rows, products).view(len(latent), s, s, -1)  # (N, f, e, r)
    return torch.einsum("nfer,ner->nef", pulled, rows)


def orthogonal_coefficients(gram: Tensor, gates: Tensor, *, normalise: bool) -> Tensor:
    """Returns c with sum_f c_f v_f = sum_e g_e u_e, u the vectors v after Gram-Schmidt in their order, (N, s).

    A vector that lies in the span of those before it (or is zero) projects nothing out of those after it.

    Args:
        gram: (N, s, s) inner products of the vectors v.
        gates: (N, s), g.
        normalise: whether u_e is divided by its length (floored, see `NORM_FLOOR`).
    """
    s = gram.shape[-1]
    tolerance = 8 * s * torch.finfo(gram.dtype).eps
    rest, columns = gram, []
    for f in range(s):  # T D T^T of a matrix that may be singular; s is small
        own, squared = gram[:, f, f], rest[:, f, f]  # |v_f|^2 and |u_f|^2
        spans = squared > tolerance * own
        column = rest[:, :, f] / torch.where(spans, squared, 1.0)[:, None]
        column = torch.where(spans[:, None], column, 0.0)  # T_ef for e > f
        if normalise:
            shrunk = gates[:, f] * (squared.clamp_min(0) + NORM_FLOOR**2).rsqrt()
            dependent = (own > 0) & ~spans  # what is left of it is rounding, which has no direction
            gates = torch.cat([gates[:, :f], torch.where(dependent, 0.0, shrunk)[:, None], gates[:, f + 1 :]], 1)
        rest = rest - column[:, :, None] * rest[:, None, f, :]
        columns.append(column)
    below = torch.stack(columns, -1).tril(-1)  # (N, e, f)
    unit = below + torch.eye(s, dtype=gram.dtype, device=gram.device)
    solved: Tensor = torch.linalg.solve_triangular(unit.mT, gates[..., None], upper=True, unitriangular=True)
    return solved.squeeze(-1)
