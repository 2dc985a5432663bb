"""Capacity, jitter, temperature and the z-loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from smore_cli.nn import AdapterContext
from smore_cli.nn.balance import SwitchBalanceLoss
from smore_cli.nn.router import Router, report
from smore_cli.nn.selection import TopK
from smore_cli.nn.switch import RouterZLoss, SwitchRouter, within_capacity
from tests.nn.trees import randomise_, rows

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from torch import Tensor

TOP_1 = TopK(1, renormalise=False)


def router(d: int = 3, s: int = 3, **options: Any) -> SwitchRouter:
    torch.manual_seed(0)
    module = SwitchRouter(d, s, select=TOP_1, **options).double()
    randomise_(module)
    return module


def given_logits(logits: Tensor, **options: Any) -> SwitchRouter:
    """A router whose logits are its input."""
    module = router(logits.shape[-1], logits.shape[-1], **options)
    module.weight.data = torch.eye(logits.shape[-1]).double()
    return module


def reference(folder: Path) -> dict[str, Tensor]:
    return {key: torch.from_numpy(value) for key, value in np.load(folder / "dynmole.npz").items()}


def test_the_capacity_equals_the_reference_numbers(shared_golden: Path) -> None:
    data = reference(shared_golden)
    z = data["z6"].view(4, 8, 6)
    routing = given_logits(z, capacity=2).train()(z)
    assert routing.picked is not None
    torch.testing.assert_close((routing.gates > 0).view(4, 8, 6).double(), data["switch6_onehot_cap2"])
    torch.testing.assert_close(routing.picked.view(4, 8, 6).long().argmax(-1), data["switch6_argmax"])
    kept = data["switch6_onehot_cap2"].sum(-1)
    torch.testing.assert_close(routing.gates.sum(-1).view(4, 8), data["switch6_prob"] * kept)


def test_the_losses_of_top_1_equal_the_reference_numbers(shared_golden: Path) -> None:
    data = reference(shared_golden)
    module = given_logits(data["z6"], capacity=1).train()
    for loss, name in ((SwitchBalanceLoss(1.0), "lb_switch6"), (RouterZLoss(1.0), "zloss6")):
        with AdapterContext() as context:
            report(module(data["z6"]), module, [loss])
        # The balance is of what was picked: a pick that found its expert full still counts.
        torch.testing.assert_close(context.aux_loss(), data[name], rtol=1e-12, atol=1e-12)


def test_a_queue_fills_in_order_of_arrival_by_real_tokens_of_its_own_sequence() -> None:
    choice = torch.tensor([[0, 0, 1, 0, 0, 1], [1, 1, 1, 0, 1, 0]])
    real = torch.tensor([[1, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]).bool()
    picked = torch.nn.functional.one_hot(choice, 2).bool().view(12, 1, 2)
    found = (within_capacity(picked, real.flatten(), length=6, capacity=2) & picked).any(-1).view(2, 6)
    for b in range(2):
        queues = {0: 0, 1: 0}
        for t in range(6):
            if not real[b, t]:
                continue
            queues[int(choice[b, t])] += 1
            assert bool(found[b, t]) == (queues[int(choice[b, t])] <= 2), (b, t)


def test_padding_takes_no_place_and_later_tokens_change_nothing_before_them() -> None:
    module, x = router(capacity=2).train(), rows(24, 3).view(2, 12, 3)
    mask = torch.ones(2, 12)
    mask[0, :5] = 0
    with AdapterContext(token_mask=mask):
        padded = module(x).gates.view(2, 12, 3)
    with AdapterContext(token_mask=torch.ones(1, 7)):
        alone = module(x[:1, 5:]).gates
    assert (alone.sum(-1) == 0).any()
    torch.testing.assert_close(padded[0, 5:], alone[:, 0])
    cut = module(x[:, :8]).gates.view(2, 8, 3)
    torch.testing.assert_close(module(x).gates.view(2, 12, 3)[:, :8], cut)


def test_in_evaluation_it_is_the_plain_router() -> None:
    module, x = router(capacity=1, jitter=0.3).eval(), rows(8, 3)
    plain = Router(3, 3, select=TOP_1).double()
    plain.load_state_dict(module.state_dict())
    found, expected = module(x), plain(x)
    assert torch.equal(found.gates, expected.gates) and torch.equal(found.logits, expected.logits)
    assert (module.train()(x).gates.sum(-1) == 0).any()


def test_jitter_is_relative_bounded_and_leaves_its_input_alone() -> None:
    x = torch.ones(2000, 3).double() * torch.tensor([1.0, -2.0, 0.0]).double()
    before, module = x.clone(), given_logits(x, jitter=0.1).train()
    noise = module(x).logits[:, 0, :2] / x[:, :2]
    assert torch.equal(x, before)
    assert 0.9 <= noise.min() < 0.91 and 1.09 < noise.max() <= 1.1
    assert noise.mean().item() == pytest.approx(1, abs=0.01)
    assert not torch.equal(module(x).logits, module(x).logits)
    assert torch.equal(module(x).logits[:, 0, 2], x[:, 2])


def test_a_temperature_divides_the_logits_so_that_probabilities_still_sum_to_one() -> None:
    x, hot = rows(5, 3), router(temperature=2.5)
    expected = torch.softmax(x @ hot.weight.T / 2.5, -1)
    torch.testing.assert_close(hot(x).probabilities[:, 0], expected)


def test_the_z_loss_is_the_mean_squared_logsumexp_of_real_tokens() -> None:
    module, x, mask = router(), rows(6, 3), torch.tensor([1, 0, 1, 1, 0, 1])
    with AdapterContext(token_mask=mask) as context:
        report(module(x), module, [RouterZLoss(0.5)])
    logits = (x @ module.weight.T)[mask != 0].tolist()
    expected = sum(np.log(sum(np.exp(z) for z in row)) ** 2 for row in logits) / 4
    assert context.aux_loss().item() == pytest.approx(0.5 * expected, rel=1e-12)
    with AdapterContext(token_mask=torch.zeros(6)) as context:
        report(module(x), module, [RouterZLoss(0.5)])
    assert context.aux_loss().item() == 0
