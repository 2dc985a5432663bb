"""Adapters that are two products with a core in rank space between them.

    y = base(x) + scale * B middle(V x + v) + b

    x --V--> latent (R) --middle--> mixed (R_b) --B--> + y

An adapter says what V, B and the middle are; both wide products are done for all of them by `wide.py`, fused with those
of the base where it is a frozen linear map, and beside it elsewhere.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from smore_cli.nn.adapted import Adapter
from smore_cli.nn.threads import one_thread
from smore_cli.nn.wide import Reader, add_up, down, plain_down, supports, without_autocast

if TYPE_CHECKING:
    from torch import Tensor, nn

    from smore_cli.nn.wide import Down

__all__ = ["Factored"]


class Factored(Adapter):
    """An adapter that is given by its three parts.

    Attributes:
        scale: multiplies what B adds; it costs nothing in the product.
    """

    scale: float = 1.0

    @abstractmethod
    def down(self) -> Down:
        """Returns V and v, (R, d_in) and (R,), part by part."""

    @abstractmethod
    def middle(self, latent: Tensor) -> Tensor:
        """Maps the latent (N, R), float32 or float64, to (N, R_b); reports to the current context what was routed."""

    @abstractmethod
    def up(self) -> tuple[Tensor, Tensor | None]:
        """Returns B, (d_out, R_b), and b, (d_out,) or None."""

    def check(self, x: Tensor) -> None:
        """Refuses an input (..., d_in) that the adapter cannot be right for."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns y + the update; see `Adapter.forward`."""
        latent = plain_down(x.reshape(-1, x.shape[-1]), self.down())
        return self.finish(x, y.reshape(-1, y.shape[-1]).clone(), latent)  # a copy, because it is added to in place

    def adapted(self, x: Tensor, base: nn.Module) -> Tensor:
        """Returns the base's output and the update; see `Adapter.adapted`."""
        if not supports(base):
            return super().adapted(x, base)
        [(y, latent)] = down(x, [Reader(base, self.down())])
        return self.finish(x, y, latent)

    def finish(self, x: Tensor, y: Tensor, latent: Tensor) -> Tensor:
        """Adds the update in place to what `wide.down` gave.

        Args:
            x: (..., d_in) N rows, the input.
            y: (N, d_out) the base's output.
            latent: (N, R).
        """
        self.check(x)
        with without_autocast(x.device):
            return self.added(x, y, latent).view(*x.shape[:-1], y.shape[1])

    def added(self, x: Tensor, y: Tensor, latent: Tensor) -> Tensor:
        """Returns y + scale * (B middle(latent) + b), (N, d_out), in place of y; x is not looked at again."""
        with one_thread(latent):
            mixed = self.middle(latent)
        return add_up(y, mixed, *self.up(), self.scale)
