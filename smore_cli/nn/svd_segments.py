"""Experts that start from different parts of the base weight's spectrum (GOAT).

    W = sum_j S_j u_j v_j^T,  S descending       expert i gets the first r of the i-th of s equal stretches of j:
    B_i = U_i sqrt(S_i / (scale rho))            A_i = sqrt(S_i / (scale rho)) V_i^T
    y = W x + scale sum_i g_i B_i A_i x - (scale / s) sum_i B_i(0) A_i(0) x

The last term takes out of W what the experts start with, so that the model starts near the backbone. W itself is never
touched: the start A(0), B(0) is kept as frozen buffers, which are saved with the adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from smore_cli.nn.bank import BLOCK_EXPERTS, Bank

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from smore_cli.nn.router import Router, RouterLoss
    from smore_cli.nn.wide import Down

__all__ = ["SegmentBank", "svd_segments"]


class SegmentBank(Bank):
    """A block bank that starts from a weight's singular vectors and subtracts that start again.

    Attributes:
        A0: (s r, d_in) buffer, A at the start.
        B0: (d_out, s r) buffer, B at the start.
    """

    A0: Tensor
    B0: Tensor

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
        losses: Sequence[RouterLoss],
        weight: Tensor | None,
        rho: float,
    ) -> None:
        """Computes one full singular value decomposition, where `weight` lies.

        Args:
            d_in: width of x.
            d_out: width of y.
            num_experts: s.
            rank: r, of each expert.
            router: makes the gates.
            scale: multiplies the update.
            dropout: on the input of A; the subtracted term sees x without it.
            losses: auxiliary losses of the router.
            weight: (d_out, d_in) W; None or on the meta device: all zeros, for counting parameters.
            rho: the experts start this much smaller than their parts of W.
        """
        super().__init__(
            d_in,
            d_out,
            down=num_experts * rank,
            up=num_experts * rank,
            router=router,
            scale=scale,
            dropout=dropout,
            losses=losses,
            expert_axes=BLOCK_EXPERTS,
        )
        with torch.no_grad():
            self.A.zero_()
            if weight is not None and not weight.is_meta:
                up, values, down = svd_segments(weight, num_experts, rank)
                root = (values / (scale * rho)).sqrt()
                self.A.copy_(root[:, None] * down)
                self.B.copy_(up * root)
        self.register_buffer("A0", self.A.detach().clone())
        self.register_buffer("B0", self.B.detach().clone())

    def down(self) -> Down:
        """A, the router's rows, and A0, which sees x without dropout."""
        down = super().down()
        return down._replace(exact=(*down.exact, self.A0))

    def middle(self, latent: Tensor) -> Tensor:
        """Maps [A x | logits | A0 x] to [core(A x, gates) | -A0 x / s], (N, 2 s r)."""
        own, start = latent.split([latent.shape[1] - len(self.A0), len(self.A0)], 1)
        return torch.cat([super().middle(own), start / -self.router.num_experts], 1)

    def up(self) -> tuple[Tensor, Tensor | None]:
        """[B | B0]."""
        return torch.cat([self.B, self.B0], 1), None

    def silent_at_start(self) -> frozenset[str]:
        """Nothing, as A and B are not zero; but the gate of a single expert is always 1."""
        return self.without_choice()


def svd_segments(weight: Tensor, num_experts: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the first `rank` singular triplets of each of s equal stretches of a weight's spectrum.

    Args:
        weight: (d_out, d_in).
        num_experts: s.
        rank: r, at most min(d_in, d_out) // s.

    Returns:
        Left vectors (d_out, s r), values (s r,), right vectors (s r, d_in), expert by expert; float32 or wider.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    left, values, right = torch.linalg.svd(weight.detach().to(wide), full_matrices=False)
    stretch = len(values) // num_experts
    index = torch.cat([torch.arange(i * stretch, i * stretch + rank) for i in range(num_experts)]).to(values.device)
    return left[:, index], values[index], right[index]
