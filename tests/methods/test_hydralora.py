"""HydraLoRA against its equation, and the identities that tie it to LoRA."""

from __future__ import annotations

import torch

from smore_cli.methods import Site
from smore_cli.methods.hydralora import HydraLoRAConfig
from smore_cli.nn.bank import Bank
from smore_cli.nn.low_rank import LowRank
from tests.nn.test_gradients import gradcheck
from tests.nn.trees import randomise_, rows


def hydra(d_in: int = 6, d_out: int = 5, *, heads: int = 3) -> Bank:
    adapter = HydraLoRAConfig(num_experts=heads, rank=2, alpha=8.0, dropout=0.0).build(Site("x", d_in, d_out)).double()
    assert isinstance(adapter, Bank)
    randomise_(adapter)
    return adapter


def test_the_update_is_a_mixture_of_heads_on_one_latent() -> None:
    adapter, x, y = hydra(), rows(7, 6), rows(7, 5, seed=2)
    out = y.clone()
    for t in range(7):
        latent, w = adapter.A @ x[t], torch.softmax(adapter.router.weight @ x[t], 0)
        for e in range(3):
            out[t] += 4.0 * w[e] * (adapter.B[:, 2 * e : 2 * e + 2] @ latent)
    torch.testing.assert_close(adapter(x, y), out, rtol=1e-12, atol=1e-12)


def test_gradients_equal_finite_differences() -> None:
    gradcheck(hydra(4, 3), rows(3, 4))


def test_equal_heads_are_plain_lora() -> None:
    adapter, x, y = hydra(), rows(7, 6), rows(7, 5, seed=2)
    lora = LowRank(6, 5, rank=2, scale=4.0).double()
    with torch.no_grad():
        adapter.B.copy_(adapter.B[:, :2].repeat(1, 3))
        lora.lora_A.copy_(adapter.A)
        lora.lora_B.copy_(adapter.B[:, :2])
    torch.testing.assert_close(adapter(x, y), lora(x, y), rtol=1e-12, atol=1e-12)


def test_the_fan_core_is_a_block_core_with_a_tied_latent() -> None:
    from smore_cli.nn.bank import block, fan

    latent, gates = rows(7, 2), rows(7, 3, seed=3)[:, None]
    assert torch.equal(fan(latent, gates), block(latent.repeat(1, 3), gates))


def test_parameters_of_the_published_setting() -> None:
    """One A and three B of rank 8 on gate, up and down of Llama-2-7B; the router adds three rows."""
    d, hidden = 4096, 11008
    sites = [Site("gate", d, hidden), Site("up", d, hidden), Site("down", hidden, d)]
    config = HydraLoRAConfig(num_experts=3, rank=8)
    expected = sum(8 * s.in_features + 3 * 8 * s.out_features + 3 * s.in_features for s in sites)
    assert sum(config.num_parameters(site) for site in sites) == expected
