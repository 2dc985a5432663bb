"""Every router's gates can be edited from outside, whatever its method, and an edit that says the same says nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from smore_cli.nn import AdapterContext, adapted_modules
from smore_cli.nn.gate_edit import GateEdit
from smore_cli.routing.causal import routers_of
from tests.contract.conftest import CASES
from tests.contract.models import VARIANTS, token_ids

if TYPE_CHECKING:
    from torch import Tensor, nn

    from smore_cli.nn.context import RoutingTrace

ROUTED = [
    name
    for name, case in CASES.items()
    if case.config.routed and (case.architecture == "llama" or name.removesuffix("-gpt2") in VARIANTS)
]
Traces = dict[tuple["nn.Module", int], "RoutingTrace"]


@torch.no_grad()
def _observed(model: Any, ids: Tensor, edit: GateEdit | None = None) -> tuple[Tensor, Traces]:
    """Returns the logits and what every router did."""
    seen: Traces = {}
    mask = torch.ones_like(ids)

    def observe(trace: RoutingTrace) -> None:
        seen[trace.owner, trace.level] = trace

    with AdapterContext(token_mask=mask, aux=False, prompt_mask=mask.bool(), observe=observe, edit=edit):
        return model(input_ids=ids, attention_mask=mask).logits, seen


@pytest.mark.parametrize("name", ROUTED)
def test_the_gates_that_are_applied_are_the_edited_ones(name: str) -> None:
    model = CASES[name].random()
    module = next(module for module in adapted_modules(model).values() if routers_of(module))
    owner, routers = module.adapter("default"), frozenset(routers_of(module))
    ids = token_ids(2, 9)
    logits, before = _observed(model, ids)
    levels = [(level, trace) for (of, level), trace in before.items() if of is owner]
    assert levels and len(routers) == 1
    for level, trace in levels:
        used = trace.gates.flatten(0, 1).ne(0).sum(0)  # (s,)
        expert = int(used.argmax())
        changed, after = _observed(model, ids, GateEdit("ablate", (expert,), routers, level))
        gates = after[owner, level].gates
        kept = torch.arange(len(used)) != expert
        assert not gates[..., expert].any() and gates[..., kept].equal(trace.gates[..., kept])
        assert float((changed - logits).abs().max()) > 1e-4
        changed, after = _observed(model, ids, GateEdit("force", (expert,), routers, level))
        gates = after[owner, level].gates
        assert not gates[..., kept].any()
        torch.testing.assert_close(gates[..., expert], trace.gates.sum(-1))
        assert float((changed - logits).abs().max()) > 1e-4 or not trace.gates[..., kept].any()


@pytest.mark.parametrize("name", ROUTED)
def test_an_edit_that_says_what_the_router_said_changes_nothing(name: str) -> None:
    """Of one token: experts that it did not take are ablated, and one that is all it took is forced."""
    model = CASES[name].random()
    module = next(module for module in adapted_modules(model).values() if routers_of(module))
    owner, routers = module.adapter("default"), frozenset(routers_of(module))
    ids = token_ids(1, 1)
    logits, before = _observed(model, ids)
    for (of, level), trace in before.items():
        if of is not owner:
            continue
        used = trace.gates.flatten(0, 1).ne(0).any(0)
        unused = tuple((~used).nonzero().flatten().tolist())
        assert _observed(model, ids, GateEdit("ablate", unused, routers, level))[0].equal(logits)
        if used.sum() == 1:
            forced = GateEdit("force", (int(used.nonzero()),), routers, level)
            assert _observed(model, ids, forced)[0].equal(logits)
