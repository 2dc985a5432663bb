"""LoRAMoE's balance loss against loops, the reference numbers and finite differences."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from smore_cli.nn import AdapterContext
from smore_cli.nn.localised import LocalisedBalanceLoss
from smore_cli.nn.router import Routing
from tests.nn.trees import rows

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Literal

    from torch import Tensor

    Form = Literal["paper", "released"]

FORMS: list[Form] = ["paper", "released"]


def routing(gates: Tensor) -> Routing:
    """A dense routing with these gates (..., s)."""
    flat = gates.flatten(0, -2)[:, None]
    return Routing(flat, flat, flat)


def by_hand(
    gates: list[list[list[float]]], mask: list[list[int]], groups: list[int], loss: LocalisedBalanceLoss
) -> float:
    z = []
    for m, sample in enumerate(gates):
        if not any(mask[m]):
            continue
        s = len(sample[0])
        for n in range(s):
            q = sum(weights[n] for weights, real in zip(sample, mask[m], strict=True) if real)
            same = n * loss.num_groups // s == groups[m]
            z.append(q * (1 + loss.delta if same else 1 - loss.delta))
    mean = sum(z) / len(z)
    squares = sum((value - mean) ** 2 for value in z)
    if loss.form == "paper":
        return loss.coefficient * squares / len(z) / mean
    return loss.coefficient * squares / (len(z) - 1) / (mean**2 + 1e-10)


def sample(b: int = 5, length: int = 4, s: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    gates = torch.softmax(rows(b * length, s), -1).view(b, length, s)
    mask = torch.arange(length) < torch.tensor([4, 1, 3, 0, 2])[:b, None]
    return gates, mask, torch.tensor([1, 0, 2, 0, 1])[:b]


def loss_of(loss: LocalisedBalanceLoss, gates: Tensor, mask: Tensor | None, groups: Tensor | None) -> Tensor:
    with AdapterContext(token_mask=mask, groups=groups) as context:
        return loss(loss.sums(routing(gates), context))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("delta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("num_groups", [2, 3])
def test_the_loss_is_what_loops_over_samples_and_experts_give(form: Form, delta: float, num_groups: int) -> None:
    gates, mask, groups = sample()
    loss = LocalisedBalanceLoss(0.3, delta, num_groups, form)
    expected = by_hand(gates.tolist(), mask.int().tolist(), groups.tolist(), loss)
    assert loss_of(loss, gates, mask, groups).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("column", [0, 1], ids=FORMS)
def test_the_loss_equals_the_reference_numbers(shared_golden: Path, column: int) -> None:
    data = {key: torch.from_numpy(value) for key, value in np.load(shared_golden / "dynmole.npz").items()}
    groups = 1 - data["blc6_types"]  # the reference calls the group of the first experts 1
    gates = data["p6"].view(4, 8, 6)
    torch.testing.assert_close(gates.sum(1), data["blc6_Q"])  # without a mask
    for delta, expected in zip((0.0, 0.1, 0.3), data["blc6_paper_code"][:, column].tolist(), strict=True):
        loss = LocalisedBalanceLoss(1.0, delta, 2, FORMS[column])
        assert loss_of(loss, gates, None, groups).item() == pytest.approx(expected, rel=1e-10)
        indicator = loss._indicator(data["blc6_Q"], AdapterContext(groups=groups))
        if delta == 0.1:
            torch.testing.assert_close(indicator, data["blc6_I_d0.1"])


@pytest.mark.parametrize("form", FORMS)
def test_its_sums_add_up_over_any_split_into_passes(form: Form) -> None:
    gates, mask, groups = sample()
    gates.requires_grad_()
    loss = LocalisedBalanceLoss(0.3, 0.2, 3, form)
    whole = loss_of(loss, gates, mask, groups)
    (expected,) = torch.autograd.grad(whole, gates)
    for parts in (2, 5):
        cuts = [part.chunk(parts) for part in (gates, mask, groups)]
        with AdapterContext() as context:
            sums = [
                loss.sums(routing(g), replace(context, token_mask=m, groups=i)) for g, m, i in zip(*cuts, strict=True)
            ]
        total = torch.stack(sums).sum(0)
        torch.testing.assert_close(loss(total), whole)
        torch.testing.assert_close(torch.autograd.grad(loss(total), gates)[0], expected)
    assert (expected[~mask] == 0).all() and expected[mask].abs().max() > 0


@pytest.mark.parametrize("form", FORMS)
def test_its_gradient_equals_finite_differences(form: Form) -> None:
    logits, mask, groups = rows(12, 4).view(3, 4, 4).requires_grad_(), torch.ones(3, 4), torch.tensor([0, 1, 1])
    loss = LocalisedBalanceLoss(0.3, 0.2, 2, form)
    assert torch.autograd.gradcheck(lambda z: loss_of(loss, torch.softmax(z, -1), mask, groups), (logits,))


def test_it_is_least_where_experts_of_the_other_group_have_more_by_the_factor_of_their_indicators() -> None:
    groups, delta = torch.tensor([0, 1]), 0.2
    matched = (1 - delta) / 2  # of two experts, the weight of the one of the sample's group
    for weight in (matched, matched - 0.05, matched + 0.05):
        gates = torch.tensor([[weight, 1 - weight], [1 - weight, weight]]).double()[:, None]
        loss = loss_of(LocalisedBalanceLoss(1.0, delta), gates, None, groups).item()
        assert loss == pytest.approx(0, abs=1e-12) if weight == matched else loss > 1e-3


def test_uniform_weights_without_a_difference_of_groups_cost_nothing() -> None:
    gates = torch.full((3, 4, 6), 1 / 6).double()
    for form in FORMS:
        loss = LocalisedBalanceLoss(1.0, 0.0, form=form)
        assert loss_of(loss, gates, torch.ones(3, 4), None).item() == pytest.approx(0, abs=1e-12)
        assert loss_of(replace(loss, delta=0.1), gates, None, torch.tensor([0, 1, 0])).item() > 1e-4


def test_the_papers_form_grows_with_the_tokens_and_the_released_one_does_not() -> None:
    gates, _, groups = sample()
    for form, factor in zip(FORMS, (2, 1), strict=True):
        loss = LocalisedBalanceLoss(1.0, 0.1, 3, form)
        once, twice = (loss_of(loss, torch.cat([gates] * n, 1), None, groups).item() for n in (1, 2))
        assert twice == pytest.approx(factor * once, rel=1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_without_real_tokens_it_is_zero_with_finite_gradients(form: Form) -> None:
    gates, mask, groups = sample()
    gates.requires_grad_()
    loss = loss_of(LocalisedBalanceLoss(1.0, 0.1, 3, form), gates, torch.zeros_like(mask), groups)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, gates)[0].any()


def test_missing_groups_are_refused_unless_they_make_no_difference() -> None:
    gates, mask, _ = sample()
    with pytest.raises(ValueError, match="needs the group of every row"):
        loss_of(LocalisedBalanceLoss(1.0, 0.1), gates, mask, None)
    loss = LocalisedBalanceLoss(1.0, 0.0)
    expected = by_hand(gates.tolist(), mask.int().tolist(), [0] * 5, loss)
    assert loss_of(loss, gates, mask, None).item() == pytest.approx(expected)
