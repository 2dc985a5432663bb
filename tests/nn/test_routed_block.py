"""The routed block core as one node is the same function as its parts, in value and in every gradient."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch

from smore_cli.nn import AdapterContext, bank
from smore_cli.nn.bank import Bank, block, fan
from smore_cli.nn.entropy import Entropy, EntropyHybrid
from smore_cli.nn.gate_edit import GateEdit
from smore_cli.nn.routed_block import routed_block
from smore_cli.nn.router import Router
from smore_cli.nn.selection import All, TopK, TopP

if TYPE_CHECKING:
    from torch import Tensor

    from smore_cli.nn.selection import Selector

N, S, R = 7, 5, 3
SELECTORS: dict[str, Selector] = {
    "all": All(),
    "top-k": TopK(2),
    "top-k, not renormalised": TopK(2, renormalise=False),
    "top-p": TopP(0.6),
    "top-p, renormalised": TopP(0.6, renormalise=True),
    "hybrid": EntropyHybrid(TopP(0.6, renormalise=True), Entropy(), 0.8),
}


def rows(tied: bool) -> int:
    return R if tied else S * R


def latents(tied: bool) -> Tensor:
    made = torch.randn(N, rows(tied) + S, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return made.requires_grad_()


def by_parts(latent: Tensor, select: Selector, tied: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    probabilities = latent[:, rows(tied) :].softmax(-1)
    gates, picked = select(probabilities)
    return (fan if tied else block)(latent[:, : rows(tied)], gates[:, None]), probabilities, gates, picked


@pytest.mark.parametrize("tied", [False, True], ids=["block", "fan"])
@pytest.mark.parametrize("used", [c for n in (1, 2, 3) for c in itertools.combinations(range(3), n)], ids=str)
@pytest.mark.parametrize("name", SELECTORS)
def test_it_is_the_composition_of_its_parts(name: str, used: tuple[int, ...], tied: bool) -> None:
    """Whichever of the mixed latent, the probabilities and the gates the loss depends on."""
    latent, select = latents(tied), SELECTORS[name]
    found, expected = routed_block(latent, rows(tied), select, fan=tied), by_parts(latent, select, tied)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)
    weights = [torch.randn(expected[i].shape, dtype=torch.float64) for i in used]  # type: ignore[union-attr]
    slopes = [
        torch.autograd.grad(sum((out[i] * w).sum() for i, w in zip(used, weights, strict=True)), latent)[0]  # type: ignore[arg-type, operator]
        for out in (found, expected)
    ]
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tied", [False, True], ids=["block", "fan"])
@pytest.mark.parametrize("name", SELECTORS)
def test_gradients_are_those_of_finite_differences(name: str, tied: bool) -> None:
    select = SELECTORS[name]
    assert torch.autograd.gradcheck(
        lambda latent: routed_block(latent, rows(tied), select, fan=tied)[:3], latents(tied)
    )


@pytest.mark.parametrize("tied", [False, True], ids=["block", "fan"])
@pytest.mark.parametrize("name", SELECTORS)
def test_without_gradients_it_is_the_same_to_the_bit(name: str, tied: bool) -> None:
    latent, select = latents(tied), SELECTORS[name]
    found = routed_block(latent, rows(tied), select, fan=tied)
    with torch.no_grad():
        again = routed_block(latent, rows(tied), select, fan=tied)
    for a, b in zip(found, again, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)  # type: ignore[arg-type]


@pytest.mark.parametrize(("core", "down"), [(block, S * R), (fan, R)])
def test_a_bank_uses_it_unless_gates_are_edited(monkeypatch: pytest.MonkeyPatch, core: Any, down: int) -> None:
    module = Bank(6, 4, down=down, up=S * R, core=core, router=Router(6, S, select=TopK(2)))
    calls = []
    monkeypatch.setattr(bank, "routed_block", lambda *a, **b: calls.append(1) or routed_block(*a, **b))
    x = torch.randn(3, 6)
    module(x, torch.zeros(3, 4))
    assert len(calls) == 1
    with AdapterContext(edit=GateEdit("ablate", (0,), frozenset([module.router]))):
        module(x, torch.zeros(3, 4))
    assert len(calls) == 1
