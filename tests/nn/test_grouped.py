"""Picked experts computed by themselves: the stacked form's numbers, and nothing of what was not picked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from smore_cli.methods import Site
from smore_cli.methods.mola import MoLAConfig
from smore_cli.nn import AdaptedModule, AdapterContext
from smore_cli.nn.grouped import add_grouped, grouping_pays
from tests.nn.trees import randomise_, rows

if TYPE_CHECKING:
    from torch import Tensor

    from smore_cli.nn.bank import Bank

D_IN, D_OUT, N = 6, 5, 13


def bank_of(*, sparse: bool, top_k: int = 2, experts: int = 4, **fields: Any) -> Bank:
    config = MoLAConfig(num_experts=experts, rank=3, top_k=top_k, **{"dropout": 0.0, **fields})
    bank: Bank = config.build(Site("site", D_IN, D_OUT)).double()  # type: ignore[assignment]
    torch.manual_seed(0)
    randomise_(bank)
    bank.sparse = sparse
    return bank


def step(bank: Bank, x: Tensor, base: nn.Module | None = None) -> list[Tensor]:
    """Returns the output, the balance loss and all gradients, fused with a base or beside an output."""
    torch.manual_seed(1)
    with AdapterContext(token_mask=torch.arange(N) % 5 > 0) as context:
        out = bank(x, rows(N, D_OUT, seed=7)) if base is None else bank.adapted(x, base)
    wanted = [x, *bank.parameters()]
    gradients = torch.autograd.grad(out.square().sum() + context.aux_loss(), wanted)
    return [out, context.aux_loss(), context.loads[0].load, *gradients]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("top_k", [2, 3])
def test_the_grouped_form_has_the_numbers_of_the_stacked_one(top_k: int, dropout: float, fused: bool) -> None:
    torch.manual_seed(2)
    base = nn.Linear(D_IN, D_OUT, dtype=torch.float64).requires_grad_(False) if fused else None
    x = rows(N, D_IN).requires_grad_()
    found, expected = (step(bank_of(sparse=sparse, top_k=top_k, dropout=dropout), x, base) for sparse in (True, False))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_gradients_equal_finite_differences() -> None:
    ids = torch.tensor([[0, 2], [2, 1], [0, 1], [2, 0]])  # expert 3 is never picked
    inputs = [rows(4, D_OUT), rows(4, D_IN), rows(8, D_IN, seed=2), rows(D_OUT, 8, seed=3), rows(4, 2, seed=4)]

    def update(y: Tensor, *others: Tensor) -> Tensor:
        return add_grouped(y.clone(), *others, ids, num_experts=4, scale=0.7)  # type: ignore[misc]

    assert torch.autograd.gradcheck(update, [each.requires_grad_() for each in inputs])


def test_an_expert_without_tokens_has_a_gradient_of_zero() -> None:
    bank, x = bank_of(sparse=True), rows(N, D_IN)
    with torch.no_grad():
        bank.router.weight.zero_()  # the first two of equals are picked
    bank(x, rows(N, D_OUT)).square().sum().backward()
    assert bank.A.grad is not None and bank.A.grad[:6].any() and not bank.A.grad[6:].any()


def test_bfloat16_inputs_give_the_float32_update_up_to_rounding() -> None:
    bank, x = bank_of(sparse=True).float(), rows(N, D_IN).bfloat16()
    exact = bank(x.float(), torch.zeros(N, D_OUT))
    found = bank(x, torch.zeros(N, D_OUT, dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() < 0.02 * exact.norm()


def test_a_token_is_multiplied_with_its_own_experts_alone() -> None:
    bank = bank_of(sparse=True)
    with torch.no_grad():
        bank.router.weight.zero_()
        bank.A[6:].fill_(torch.nan)
    module = AdaptedModule(nn.Linear(D_IN, D_OUT, dtype=torch.float64).requires_grad_(False))
    module.adapters["default"], module.active = bank, "default"
    assert module(rows(N, D_IN)).isfinite().all()


def test_the_rule_looks_at_what_is_not_picked() -> None:
    assert not grouping_pays(8, 4, 2)  # the usual small experts
    assert grouping_pays(8, 64, 2)
    assert not grouping_pays(8, 64, 8)  # all are picked
    small, large = (MoLAConfig(rank=rank, num_experts=8).build(Site("s", 64, 64)) for rank in (4, 64))
    assert not small.sparse and large.sparse  # type: ignore[attr-defined]
