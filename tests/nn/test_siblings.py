"""Maps that read the same x: what waits for whom, and when each goes by itself."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from smore_cli.methods.lora import LoRAConfig
from smore_cli.methods.mola import MoLAConfig
from smore_cli.methods.smore import SMoREConfig
from smore_cli.nn import AdapterContext, adapted_modules, attach, detach, set_active, siblings
from smore_cli.nn.wide import down
from tests.nn.trees import randomise_, rows

if TYPE_CHECKING:
    from torch import Tensor

CONFIGS = {
    "mola": MoLAConfig(num_experts=4, rank=2, dropout=0.0, target_modules="all-linear"),
    "smore": SMoREConfig(rank=[2, 2], router_dim=3, key_dim=4, target_modules="all-linear"),
}


class Attention(nn.Module):
    """Three maps that read one input, or each its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(6, 8), nn.Linear(6, 4), nn.Linear(6, 4, bias=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([self.q_proj(q), self.k_proj(k), self.v_proj(v)], -1)


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    net = nn.ModuleDict({"attention": Attention()}).double()
    attach(net, CONFIGS[request.param])
    for module in adapted_modules(net).values():
        randomise_(module.adapters["default"].double())
    return net


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    found: list[int] = []

    def counted(x: Tensor, readers: Any) -> Any:
        found.append(len(readers))
        return down(x, readers)

    monkeypatch.setattr(siblings, "down", counted)
    return found


def gradients(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Returns those of the inputs and of all that trains, of the output and the balance loss."""
    with AdapterContext() as context:
        out = model["attention"](*inputs)  # type: ignore[index]
    wanted = [*dict.fromkeys(inputs), *(p for p in model.parameters() if p.requires_grad)]
    total = out.square().sum() + context.aux_loss()
    return list(torch.autograd.grad(total, wanted))


def input_(seed: int = 1) -> Tensor:
    return rows(5, 6, seed=seed).requires_grad_()


def test_one_input_is_read_once_and_gives_the_gradients_of_three_reads(model: nn.Module, calls: list[int]) -> None:
    x = input_()
    together = gradients(model, x, x, x)
    assert calls == [3]
    for module in adapted_modules(model).values():
        module.siblings = None
    alone = gradients(model, x, x, x)
    assert calls == [3]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_maps_with_inputs_of_their_own_get_their_own(model: nn.Module) -> None:
    inputs = [input_(seed) for seed in (1, 2, 3)]
    found = gradients(model, *inputs)
    for module in adapted_modules(model).values():
        module.siblings = None
    for a, b in zip(found, gradients(model, *inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_an_input_that_was_changed_in_place_is_read_anew(model: nn.Module, calls: list[int]) -> None:
    attention, x = model["attention"], rows(5, 6)  # type: ignore[index]
    attention.q_proj(x)
    x.add_(1)
    changed = attention.k_proj(x)
    assert calls == [3, 3]
    with torch.no_grad():
        torch.testing.assert_close(changed, attention.k_proj(x), rtol=1e-11, atol=1e-11)


def test_what_waited_is_taken_once(model: nn.Module, calls: list[int]) -> None:
    attention, x = model["attention"], input_()  # type: ignore[index]
    first, second = (attention.k_proj(x) for _ in range(2))
    assert calls == [3, 3]
    assert first.data_ptr() != second.data_ptr()  # each is added to in place


def test_the_bare_backbone_and_passes_without_gradients_share_nothing(model: nn.Module, calls: list[int]) -> None:
    x = input_()
    with torch.no_grad():
        model["attention"](x, x, x)  # type: ignore[index]
    set_active(model, None)
    model["attention"](x, x, x)  # type: ignore[index]
    assert calls == []


def test_a_copy_and_an_adapter_taken_off_leave_no_trace(model: nn.Module) -> None:
    x = input_()
    model["attention"].q_proj(x)  # type: ignore[index]  # two maps wait
    twin = copy.deepcopy(model)
    members = {id(member) for member in twin["attention"].q_proj.siblings.members}  # type: ignore[index]
    assert members == {id(module) for module in adapted_modules(twin).values()}
    for a, b in zip(gradients(model, x, x, x), gradients(twin, x, x, x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    detach(twin)
    assert type(twin["attention"].q_proj) is nn.Linear  # type: ignore[index]


def test_dropout_draws_for_each_map(calls: list[int]) -> None:
    net = nn.ModuleDict({"attention": Attention()})
    attach(net, CONFIGS["mola"].model_copy(update={"dropout": 0.5}))
    x = torch.randn(5, 6)
    net.train()["attention"](x, x, x)
    net.eval()["attention"](x, x, x)
    assert calls == [3]  # in evaluation there is none


def test_an_adapter_that_does_more_than_add_goes_by_itself(calls: list[int]) -> None:
    net = nn.ModuleDict({"attention": Attention()})
    attach(net, LoRAConfig(rank=2, use_dora=True, target_modules="all-linear"))
    x = torch.randn(5, 6)
    net["attention"](x, x, x)
    assert calls == []
