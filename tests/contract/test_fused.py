"""The wide products of an adapter, fused with those of its linear map: the numbers of plain autograd, at their cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from smore_cli.nn import adapted_modules, factored, siblings
from smore_cli.nn.factored import Factored
from smore_cli.nn.wide import down
from tests.contract.models import Case, adapters, assert_same, batch, gradients, loss_of

if TYPE_CHECKING:
    from torch import Tensor, nn


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss and the gradients of a pass whose random draws are always the same."""
    torch.manual_seed(0)
    loss = loss_of(model, batch())
    loss.backward()
    return loss.detach(), gradients(model)


def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets nothing be fused or shared."""
    monkeypatch.setattr(factored, "supports", lambda base: False)
    monkeypatch.setattr(siblings, "supports", lambda base: False)


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many maps each fused call was for."""
    found: list[int] = []

    def counted(x: Tensor, readers: Any) -> Any:
        found.append(len(readers))
        return down(x, readers)

    monkeypatch.setattr(factored, "down", counted)
    monkeypatch.setattr(siblings, "down", counted)
    return found


@pytest.mark.parametrize("dropout", [True, False], ids=["dropout", "no-dropout"])
def test_fused_and_plain_passes_have_the_same_loss_and_gradients(
    case: Case, dropout: bool, monkeypatch: pytest.MonkeyPatch, fused_calls: list[int]
) -> None:
    changes = {} if dropout else case.without_dropout
    if dropout and not case.without_dropout:
        pytest.skip("the method has no dropout")
    model = case.random(torch.float64, **changes).train()
    loss, found = step(model)
    parts = adapters(model).values()
    assert sum(fused_calls) == sum(isinstance(part, Factored) and not _rescales(part) for part in parts)
    plainly(monkeypatch)
    expected_loss, expected = step(model)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-11, atol=1e-11)
    assert_same(found, expected, 1e-9)


def _rescales(adapter: nn.Module) -> bool:
    """DoRA multiplies what the base gives, which no product is fused with."""
    return hasattr(adapter, "lora_magnitude_vector")


def test_maps_that_read_the_same_input_share_their_products(case: Case, fused_calls: list[int]) -> None:
    model = case.random(torch.float64, **case.without_dropout).train()
    step(model)
    groups = {id(m.siblings): m.siblings for m in adapted_modules(model).values() if m.siblings is not None}
    shared = [
        len(g.members)
        for g in groups.values()
        if all(isinstance(m.adapter("default"), Factored) and not _rescales(m.adapter("default")) for m in g.members)
    ]
    assert sorted(n for n in fused_calls if n > 1) == sorted(shared)


def test_without_gradients_nothing_is_kept_and_the_outputs_are_the_same(case: Case) -> None:
    model, data = case.random(torch.float64).eval(), batch()
    with torch.no_grad():
        quiet = loss_of(model, data)
    torch.testing.assert_close(quiet, loss_of(model, data).detach(), rtol=1e-11, atol=1e-11)
