"""A mixture of routers against the mixture written out."""

from __future__ import annotations

import pytest
import torch

from smore_cli.nn.mixture_router import MixtureRouter
from smore_cli.nn.router import Router
from smore_cli.nn.selection import All, TopK
from tests.nn.trees import randomise_, rows


def mixture(k: int, *, dense: bool = False) -> MixtureRouter:
    router = MixtureRouter(5, 4, num_routers=k, select=All() if dense else TopK(2)).double()
    torch.manual_seed(0)
    randomise_(router)
    return router


@pytest.mark.parametrize("k", [2, 3])
def test_the_distribution_is_the_weighted_sum_of_the_sub_routers(k: int) -> None:
    router, x = mixture(k, dense=True), rows(9, 5)
    routing = router(x)
    assert router.main is not None
    for t in range(9):
        weights = torch.softmax(router.main.weight @ x[t], 0)
        p = sum(weights[j] * torch.softmax(router.weight[4 * j : 4 * j + 4] @ x[t], 0) for j in range(k))
        torch.testing.assert_close(routing.probabilities[t, 0], p, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(routing.logits.softmax(-1), routing.probabilities, rtol=1e-12, atol=1e-12)
    assert routing.gates.shape == (9, 1, 4) and routing.picked is None


def test_one_sub_router_is_a_plain_router_bit_for_bit() -> None:
    router, plain, x = mixture(1), Router(5, 4, select=TopK(2)).double(), rows(9, 5)
    plain.load_state_dict(router.state_dict())
    ours, theirs = router(x), plain(x)
    assert torch.equal(ours.probabilities, theirs.probabilities) and torch.equal(ours.gates, theirs.gates)
    assert torch.equal(ours.picked, theirs.picked)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_routing_is_computed_in_float32_at_least(dtype: torch.dtype) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        routing = mixture(2).float()(rows(9, 5).to(dtype))
    assert {routing.logits.dtype, routing.probabilities.dtype, routing.gates.dtype} == {torch.float32}
