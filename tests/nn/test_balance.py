"""Balance losses against loops over tokens, the reference numbers, and how the losses of several routers combine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pytest
import torch
from torch import nn

from smore_cli.nn import AdapterContext, RoutingRecord
from smore_cli.nn.balance import AcrossRouters, SwitchBalanceLoss
from smore_cli.nn.entropy import Entropy, EntropyHybrid, EntropyLoss
from smore_cli.nn.selection import All, TopK, TopP
from tests.nn.routings import random_logits, routing_of, sums_of, value_of

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from smore_cli.nn.router import RouterLoss
    from smore_cli.nn.selection import Selector

Fractions = Literal["per_decision", "per_pick", "gate_mass"]
HYBRID = EntropyHybrid(TopP(0.75, 2, crossing=False), Entropy(1.1, eps=1e-5), 0.9)
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 1, 1]])


def balance_by_loops(z: Tensor, select: Selector, fractions: str, mask: Tensor | None, top_k: int | None) -> float:
    n, s = z.shape
    p = torch.softmax(z, -1)
    gates, picked = select(p)
    real = [t for t in range(n) if mask is None or mask.flatten()[t]]
    total = 0.0
    for e in range(s):
        mass = count = 0.0
        all_picks = 0.0
        for t in real:
            rank = sum(1 for x in p[t].tolist() if x > p[t, e].item())
            is_picked = picked is None or bool(picked[t, e]) if top_k is None else rank < top_k
            count += gates[t, e].item() if fractions == "gate_mass" else is_picked
            all_picks += (s if picked is None else int(picked[t].sum())) if top_k is None else top_k
            mass += p[t, e].item()
        total += count / (all_picks if fractions == "per_pick" else len(real)) * mass / len(real)
    return s * total


@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])
@pytest.mark.parametrize("fractions", ["per_decision", "per_pick", "gate_mass"])
@pytest.mark.parametrize("select", [All(), TopK(2), TopP(0.8), HYBRID], ids=repr)
def test_the_balance_loss_equals_loops(select: Selector, fractions: Fractions, mask: Tensor | None) -> None:
    z = random_logits(12, 5)
    value = value_of(SwitchBalanceLoss(0.25, fractions), z, select, mask).item()
    assert value == pytest.approx(0.25 * balance_by_loops(z, select, fractions, mask, None), rel=1e-12)


@pytest.mark.parametrize("fractions", ["per_decision", "per_pick"])
def test_counts_may_be_of_the_most_probable_experts_whatever_was_picked(fractions: Fractions) -> None:
    z = random_logits(12, 5)
    for select in (All(), HYBRID):
        value = value_of(SwitchBalanceLoss(1.0, fractions, top_k=2), z, select, MASK).item()
        assert value == pytest.approx(balance_by_loops(z, select, fractions, MASK, 2), rel=1e-12)


def test_a_balanced_router_has_the_value_one_or_the_number_of_picks_and_a_collapsed_one_the_number_of_experts() -> None:
    balanced, collapsed = torch.zeros(6, 6).double(), torch.zeros(6, 6).double()
    balanced[torch.arange(6), torch.arange(6)] = 1e-9  # every expert is the first pick of one token
    balanced[torch.arange(6), (torch.arange(6) + 1) % 6] = 5e-10
    collapsed[:, 2] = 60
    expected = {"per_decision": (2, 6), "per_pick": (1, 3), "gate_mass": (1 / 3, 6)}
    for fractions, (even, one) in expected.items():
        loss = SwitchBalanceLoss(1.0, fractions)  # type: ignore[arg-type]
        assert value_of(loss, balanced, TopK(2, renormalise=False)).item() == pytest.approx(even)
        assert value_of(loss, collapsed, TopK(2, renormalise=False)).item() == pytest.approx(one)
    assert value_of(SwitchBalanceLoss(1.0, "gate_mass"), balanced, All()).item() == pytest.approx(1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_balance_losses_equal_the_reference_numbers(shared_golden: Path, dtype: torch.dtype, tolerance: float) -> None:
    golden = np.load(shared_golden / "dynmole.npz")
    z, mask = torch.from_numpy(golden["z6"]).to(dtype), torch.from_numpy(golden["mask"]).view(4, 8)

    def values(select: Selector, *losses: RouterLoss) -> list[float]:
        return [value_of(loss, z, select, m).item() for loss in losses for m in (None, mask)]

    decisions, picks = SwitchBalanceLoss(1.0), SwitchBalanceLoss(1.0, "per_pick")
    assert values(TopK(2), decisions, picks) == pytest.approx(golden["lb_topk6"].tolist(), rel=tolerance)
    assert values(TopP(0.8), decisions) == pytest.approx(golden["lb_topp6_p0.8"].tolist(), rel=tolerance)
    assert values(TopK(1), decisions)[0] == pytest.approx(golden["lb_switch6"].item(), rel=tolerance)


def test_the_gradient_of_the_balance_loss_equals_the_reference_numbers(shared_golden: Path) -> None:
    golden = np.load(shared_golden / "dynmole.npz")
    z, mask = torch.from_numpy(golden["z6"]).requires_grad_(), torch.from_numpy(golden["mask"]).view(4, 8)
    value_of(SwitchBalanceLoss(1.0), z, TopK(2), mask).backward()
    torch.testing.assert_close(z.grad, torch.from_numpy(golden["lb_topk6_grad_mask"]), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("fractions", ["per_decision", "per_pick", "gate_mass"])
def test_gradients_equal_finite_differences(fractions: Fractions) -> None:
    z = random_logits(12, 5).requires_grad_()
    for loss in (SwitchBalanceLoss(0.5, fractions), AcrossRouters(SwitchBalanceLoss(0.5, fractions), "pooled")):
        assert torch.autograd.gradcheck(lambda z, loss=loss: value_of(loss, z, HYBRID, MASK), (z,))


def test_padding_does_not_change_the_balance_loss() -> None:
    z = random_logits(12, 5)
    other = torch.where(MASK.flatten()[:, None] == 0, -3 * z, z)
    for fractions in ("per_decision", "per_pick", "gate_mass"):
        for loss in (SwitchBalanceLoss(1.0, fractions), SwitchBalanceLoss(1.0, fractions, top_k=2)):
            assert torch.equal(value_of(loss, z, HYBRID, MASK), value_of(loss, other, HYBRID, MASK))
            assert not torch.equal(value_of(loss, z, HYBRID), value_of(loss, other, HYBRID))


# Several routers.


def aux_of(logits: list[Tensor], select: Selector, *losses: RouterLoss, mask: Tensor | None = None) -> AdapterContext:
    """A context that has recorded one forward pass through routers with these logits."""
    context = AdapterContext(token_mask=mask)
    for z in logits:
        for loss in losses:
            context.records.append(RoutingRecord(nn.Identity(), 0, loss.sums(routing_of(z, select), context), loss))
    return context


def test_routers_add_up_are_averaged_or_pooled() -> None:
    zs, loss = [random_logits(12, 5, seed) for seed in range(3)], SwitchBalanceLoss(0.1)
    single = [value_of(loss, z, TopK(2), MASK).item() for z in zs]
    assert aux_of(zs, TopK(2), loss, mask=MASK).aux_loss().item() == pytest.approx(sum(single))
    mean = aux_of(zs, TopK(2), AcrossRouters(loss, "mean"), mask=MASK).aux_loss().item()
    assert mean == pytest.approx(sum(single) / 3)
    pooled = aux_of(zs, TopK(2), AcrossRouters(loss, "pooled"), mask=MASK).aux_loss().item()
    rows = value_of(loss, torch.cat(zs), TopK(2), MASK.repeat(3, 1)).item()
    assert pooled == pytest.approx(rows) and pooled != pytest.approx(mean, rel=1e-3)


def test_routers_with_different_numbers_of_experts_are_not_mixed() -> None:
    zs, loss = [random_logits(12, s) for s in (4, 6)], AcrossRouters(SwitchBalanceLoss(1.0), "pooled")
    expected = sum(value_of(loss, z, TopK(2)).item() for z in zs)
    assert aux_of(zs, TopK(2), loss).aux_loss().item() == pytest.approx(expected)


def test_pooled_balance_hides_two_collapsed_routers_that_each_router_by_itself_shows(shared_golden: Path) -> None:
    golden = np.load(shared_golden / "dynmole.npz")
    zs, loss = list(torch.from_numpy(golden["pool_z"])), SwitchBalanceLoss(1.0)
    pooled = aux_of(zs, TopK(2), AcrossRouters(loss, "pooled")).aux_loss().item()
    assert pooled == pytest.approx(golden["pool_pooled"].item(), rel=1e-10) == pytest.approx(2.0)
    single = [aux_of([z], TopK(2), loss).aux_loss().item() for z in zs]
    assert single == pytest.approx(golden["pool_per_layer"].tolist(), rel=1e-10)
    mean = aux_of(zs, TopK(2), AcrossRouters(loss, "mean")).aux_loss().item()
    assert mean == pytest.approx(3.8957, abs=1e-4)


LOSSES: list[RouterLoss] = [
    SwitchBalanceLoss(1.0, "gate_mass"),
    AcrossRouters(SwitchBalanceLoss(1.0, "per_pick"), "mean"),
    AcrossRouters(SwitchBalanceLoss(1.0, "gate_mass"), "pooled"),
    AcrossRouters(EntropyLoss(1.0, Entropy(1.1, eps=1e-5)), "mean"),
    AcrossRouters(EntropyLoss(1.0, Entropy(1.1, eps=1e-5), padding=True), "pooled"),
]


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_a_step_split_into_passes_has_the_loss_and_the_gradient_of_the_whole_step(loss: RouterLoss) -> None:
    routers = [random_logits(12, 5, seed).requires_grad_() for seed in range(2)]
    mask = MASK.flatten()
    whole = aux_of(routers, HYBRID, loss, mask=mask).aux_loss()
    expected = torch.autograd.grad(whole, routers)
    passes = [
        aux_of([z[rows] for z in routers], HYBRID, loss, mask=mask[rows])
        for rows in (slice(0, 1), slice(1, 5), slice(5, 12))
    ]
    totals = [torch.stack(sums).sum(0) for sums in zip(*(c.statistics() for c in passes), strict=True)]
    values = [context.aux_loss(totals) for context in passes]
    for value in values:
        torch.testing.assert_close(value, whole, rtol=1e-12, atol=0)
    for gradient, reference in zip(torch.autograd.grad(torch.stack(values).sum(), routers), expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-14)


def test_sums_of_a_wrapped_loss_are_those_of_the_loss() -> None:
    z, loss = random_logits(12, 5), SwitchBalanceLoss(1.0)
    assert torch.equal(sums_of(AcrossRouters(loss), z, TopK(2), MASK), sums_of(loss, z, TopK(2), MASK))
