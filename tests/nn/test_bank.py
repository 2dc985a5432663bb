"""The flat bank and its router against the equation, written with a loop over tokens and experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from smore_cli.nn import AdapterContext
from smore_cli.nn.balance import SwitchBalanceLoss
from smore_cli.nn.bank import BLOCK_EXPERTS, Bank
from smore_cli.nn.low_rank import LowRank
from smore_cli.nn.router import Router
from smore_cli.nn.selection import All, TopK, TopP
from tests.nn.test_gradients import gradcheck
from tests.nn.trees import randomise_, rows

if TYPE_CHECKING:
    from torch import Tensor

    from smore_cli.nn.context import RoutingTrace
    from smore_cli.nn.selection import Selector

SELECTORS: list[Selector] = [All(), TopK(2), TopK(1, renormalise=False), TopP(0.6)]


def bank(select: Selector, *, s: int = 4, r: int = 2, d_in: int = 6, d_out: int = 5, **options: object) -> Bank:
    made = Bank(
        d_in, d_out, down=s * r, up=s * r, router=Router(d_in, s, select=select), scale=0.5,
        expert_axes=BLOCK_EXPERTS, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    randomise_(made.double())
    return made


def expected(module: Bank, x: Tensor, y: Tensor) -> Tensor:
    """Y + scale sum_e g_e B_e A_e x, expert by expert."""
    s = module.router.num_experts
    r = len(module.A) // s
    out = y.clone()
    for t in range(len(x)):
        p = torch.softmax(module.router.weight @ x[t], 0)
        gates, _ = module.router.select(p[None])
        for e in range(s):
            A, B = module.A[e * r : (e + 1) * r], module.B[:, e * r : (e + 1) * r]
            out[t] += 0.5 * gates[0, e] * (B @ (A @ x[t]))
    return out


@pytest.mark.parametrize("select", SELECTORS, ids=repr)
def test_a_bank_is_a_gated_sum_over_experts(select: Selector) -> None:
    module, x, y = bank(select), rows(7, 6), rows(7, 5, seed=2)
    torch.testing.assert_close(module(x, y), expected(module, x, y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("select", SELECTORS, ids=repr)
def test_gradients_of_a_bank_equal_finite_differences(select: Selector) -> None:
    gradcheck(bank(select, s=3, r=1, d_in=4, d_out=3, losses=[SwitchBalanceLoss(0.3)]), rows(3, 4))


def test_one_expert_is_plain_lora_bit_for_bit() -> None:
    module, lora, x, y = (
        bank(All(), s=1, r=3),
        LowRank(6, 5, rank=3, scale=0.5).double(),
        rows(7, 6),
        rows(7, 5, seed=2),
    )
    lora.load_state_dict({"lora_A": module.A, "lora_B": module.B})
    assert torch.equal(module(x, y), lora(x, y))


def test_equal_experts_with_normalised_gates_do_not_depend_on_the_router() -> None:
    module, x, y = bank(TopK(2)), rows(7, 6), rows(7, 5, seed=2)
    with torch.no_grad():
        module.A.copy_(module.A[:2].repeat(4, 1))
        module.B.copy_(module.B[:, :2].repeat(1, 4))
        before = module(x, y)
        module.router.weight.copy_(rows(4, 6, seed=9))
    torch.testing.assert_close(module(x, y), before, rtol=1e-12, atol=1e-12)


def test_permuting_the_experts_changes_nothing() -> None:
    module, x, y = bank(TopK(2)), rows(7, 6), rows(7, 5, seed=2)
    before, order = module(x, y), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        module.router.weight.copy_(module.router.weight[order])
        module.A.copy_(module.A.view(4, 2, 6)[order].view(8, 6))
        module.B.copy_(module.B.view(5, 4, 2)[:, order].reshape(5, 8))
    torch.testing.assert_close(module(x, y), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_routing_is_computed_in_float32_at_least(dtype: torch.dtype) -> None:
    routing = Router(6, 4).to(torch.float32)(rows(7, 6).to(dtype))
    assert {routing.logits.dtype, routing.probabilities.dtype, routing.gates.dtype} == {torch.float32}


def test_a_router_on_the_latent_sees_the_latent() -> None:
    module = Bank(6, 5, down=3, up=3, router=Router(3, 1), router_input="latent").double()
    randomise_(module)
    traces: list[RoutingTrace] = []
    with AdapterContext(observe=traces.append):
        module(rows(7, 6), rows(7, 5))
    assert traces[0].gates.shape == (7, 1, 1)
    assert module.router.weight.shape == (1, 3)


def test_loads_count_picks_of_real_tokens_and_gate_mass_of_dense_routers() -> None:
    mask = torch.tensor([1, 0, 1, 1])
    x, y = rows(4, 6), rows(4, 5)
    for select in (TopK(2), All()):
        module = bank(select)
        with AdapterContext(token_mask=mask) as context:
            module(x, y)
        gates = module.router(x).gates[mask.bool(), 0]
        wanted = (gates > 0).sum(0).double() if isinstance(select, TopK) else gates.sum(0)
        torch.testing.assert_close(context.loads[0].load, wanted.to(context.loads[0].load), rtol=1e-6, atol=1e-6)
        assert context.loads[0].owner is module and not context.loads[0].load.requires_grad


def test_the_declared_silence_at_the_start_is_the_true_one() -> None:
    for losses in ([], [SwitchBalanceLoss(0.1)]):
        module = Bank(6, 5, down=8, up=8, router=Router(6, 4, select=TopK(2)), losses=losses).double()
        with AdapterContext() as context:
            out = module(rows(7, 6), rows(7, 5))
        (out.square().sum() + context.aux_loss()).backward()
        silent = {n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()}
        assert silent == module.silent_at_start()
