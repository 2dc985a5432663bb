"""LoRA, one low-rank update, and DoRA, which gives every row of the updated weight a length of its own.

    LoRA    y = W x + b + s B A x                          A: (r, d_in)   B: (d_out, r)
    DoRA    y = rho (W x + s B A x) + b                    rho = m / ||W + s B A||, row by row, m: (d_out,)

The scale costs nothing: it is a factor of the product with B.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smore_cli.nn.adapted import add_projection, dense_weight
from smore_cli.nn.factored import Factored
from smore_cli.nn.wide import Down

if TYPE_CHECKING:
    from typing import NoReturn

__all__ = ["LowRank", "WeightDecomposed"]


class LowRank(Factored):
    """B A x scaled, zero at initialisation.

    Attributes:
        lora_A: (r, d_in) down-projection.
        lora_B: (d_out, r) up-projection.
        dropout: probability of dropping an element of x before A, while training.
    """

    up_projections = frozenset({"lora_B"})

    def __init__(self, d_in: int, d_out: int, *, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(rank, d_in))
        self.lora_B = nn.Parameter(torch.empty(d_out, rank))
        self.scale = scale
        self.dropout = dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A as `nn.Linear` initialises, B = 0 (LoRA, section 4.1)."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def silent_at_start(self) -> frozenset[str]:
        """While B = 0, A has no gradient."""
        return frozenset({"lora_A"})

    def down(self) -> Down:
        """A."""
        return Down((self.lora_A,), dropout=self.dropout if self.training else 0.0)

    def middle(self, latent: Tensor) -> Tensor:
        """Nothing stands between A and B."""
        return latent

    def up(self) -> tuple[Tensor, Tensor | None]:
        """B."""
        return self.lora_B, None

    @property
    def constant(self) -> bool:
        """Always: nothing is routed."""
        return True

    def dropped(self, x: Tensor) -> Tensor:
        """Returns x with elements dropped, while training."""
        return F.dropout(x, self.dropout) if self.training and self.dropout > 0 else x

    def latent(self, x: Tensor) -> Tensor:
        """Returns scale * A x, (N, r) for N rows of x, in its dtype."""
        return F.linear(x.reshape(-1, x.shape[-1]), self.lora_A.to(x.dtype)) * self.scale

    @torch.no_grad()
    def merged_weight(self, weight: Tensor) -> Tensor:
        """Returns the weight (d_out, d_in) in float64 of the one linear map that base and adapter are together."""
        return weight.double() + self.scale * (self.lora_B.double() @ self.lora_A.double())


class WeightDecomposed(LowRank):
    """DoRA: the direction W + s B A normalised row by row, times a learned magnitude; exactly the base at the start.

    Attributes:
        lora_magnitude_vector: (d_out,) m, the length of every row; starts as the length of W's.
        base_square: (d_out,) the squared length of W's rows, which are frozen; not saved.
    """

    base_square: Tensor

    def __init__(self, base: nn.Module, d_in: int, d_out: int, *, rank: int, scale: float, dropout: float) -> None:
        super().__init__(d_in, d_out, rank=rank, scale=scale, dropout=dropout)
        with torch.no_grad():
            weight = dense_weight(base)
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
            self.register_buffer("base_square", weight.square().sum(1), persistent=False)
        self.lora_magnitude_vector = nn.Parameter(self.base_square.sqrt())

    def forward(self, x: Tensor, y: Tensor) -> NoReturn:
        """DoRA rescales what the base gives, so it needs the base: see `adapted`.

        Raises:
            TypeError: always.
        """
        raise TypeError("DoRA adds nothing that depends on x and y alone; call adapted(x, base)")

    def adapted(self, x: Tensor, base: nn.Module) -> Tensor:
        """Returns rho (W x + s B A x) + b, as y + (rho - 1) (W x) + rho s B A x: at rho = 1 that is y to the last bit.

        The bias is not rescaled. While training with dropout, the two added terms see the dropped x, as in PEFT.

        Args:
            x: (..., d_in).
            base: the frozen linear map.
        """
        y = base(x)
        bias = cast("Tensor | None", base.bias)
        rho = self.magnitude_ratio(base)  # (d_out,), at least float32: rho - 1 is lost in bfloat16
        dropped = self.dropped(x)
        product = y if dropped is x else base(dropped)
        if bias is not None:
            product = product - bias
        y = torch.addcmul(y, product, (rho - 1).to(y.dtype))
        return add_projection(y, self.latent(dropped), rho[:, None] * self.lora_B)

    def magnitude_ratio(self, base: nn.Module) -> Tensor:
        """Returns rho = m / ||W + s B A||, (d_out,); the norm is a constant to the gradient (DoRA, section 4.3)."""
        with torch.no_grad(), torch.autocast(self.lora_B.device.type, enabled=False):
            # |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b^T for each row w of W, b of B: one product with W,
            # and no second matrix of its size.
            A, B = self.lora_A, self.lora_B
            cross = dense_weight(base).to(A.dtype) @ A.t()  # (d_out, r)
            square = self.base_square + self.scale * (B * (2 * cross + self.scale * (B @ (A @ A.t())))).sum(1)
            norm = square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()  # a row of zeros has no direction: it stays
        ratio: Tensor = self.lora_magnitude_vector / norm
        return ratio

    @torch.no_grad()
    def merged_weight(self, weight: Tensor) -> Tensor:
        """Returns m (W + s B A) / ||W + s B A|| in float64, (d_out, d_in)."""
        direction = super().merged_weight(weight)
        norm = direction.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
        rescaled: Tensor = (self.lora_magnitude_vector.double() / norm)[:, None] * direction
        return rescaled
