"""Flat adapters with random weights, and what is asked of every one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from smore_cli.methods import Site
from smore_cli.nn import AdapterContext
from tests.nn.trees import randomise_, rows

if TYPE_CHECKING:
    from torch import Tensor, nn

    from smore_cli.methods import MethodConfig
    from smore_cli.nn.bank import Bank


def random_bank(config: MethodConfig, d_in: int = 6, d_out: int = 4, *, seed: int = 0) -> Bank:
    """Returns a float64 adapter in evaluation mode whose every parameter is random."""
    bank: Bank = config.build(Site("site", d_in, d_out)).double().eval()  # type: ignore[assignment]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        randomise_(bank)
    return bank


def fresh_bank(config: MethodConfig, d_in: int = 6, d_out: int = 4, base: nn.Module | None = None) -> Bank:
    """Returns a float64 adapter as it starts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return config.build(Site("site", d_in, d_out, base=base)).double().eval()  # type: ignore[return-value]


def expert(bank: Bank, e: int) -> tuple[Tensor, Tensor]:
    """Returns A_e and B_e of a block bank."""
    r = len(bank.A) // bank.router.num_experts
    return bank.A[e * r : (e + 1) * r], bank.B[:, e * r : (e + 1) * r]


def update(bank: Bank, x: Tensor) -> Tensor:
    return bank(x, x.new_zeros(*x.shape[:-1], len(bank.B)))  # type: ignore[no-any-return]


def silent_parameters(bank: Bank, mask: Tensor | None = None) -> set[str]:
    """Returns the parameters whose gradient is exactly zero, of a task loss and the adapter's own."""
    n = 12 if mask is None else mask.numel()
    x, y = rows(n, bank.A.shape[1]), rows(n, len(bank.B), seed=5)
    with AdapterContext(token_mask=mask) as context:
        out = bank(x, y)
    (out.square().sum() + context.aux_loss()).backward()
    gradients = {name: p.grad for name, p in bank.named_parameters()}
    assert all(g is None or g.isfinite().all() for g in gradients.values())
    return {name for name, g in gradients.items() if g is None or not g.any()}


def counted(config: MethodConfig, d_in: int, d_out: int) -> int:
    """Returns how many numbers of the built adapter train."""
    return sum(p.numel() for p in config.build(Site("site", d_in, d_out)).parameters())
