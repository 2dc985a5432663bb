"""LoRAMoE: the layer, its settings, its loss in a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from smore_cli.methods import Site, config_from_dict
from smore_cli.methods.loramoe import LoRAMoEConfig
from smore_cli.nn import AdapterContext
from tests.nn.models import add_random, llama, token_ids
from tests.nn.trees import randomise_, rows

if TYPE_CHECKING:
    from pathlib import Path

    from smore_cli.nn.bank import Bank


def bank(d_in: int = 6, d_out: int = 5, **fields: Any) -> Bank:
    torch.manual_seed(0)
    config = LoRAMoEConfig(**{"num_experts": 4, "rank": 2, "alpha": 3.0, **fields})
    module = config.build(Site("site", d_in, d_out)).double().eval()
    randomise_(module)
    return module  # type: ignore[return-value]


def test_the_layer_is_what_a_loop_over_tokens_and_experts_gives() -> None:
    module, x, y = bank(), rows(7, 6), rows(7, 5, seed=2)
    for t, found in enumerate(module(x, y)):
        weights = torch.softmax(module.router.weight @ x[t], 0)
        expected = y[t].clone()
        for e in range(4):
            block = slice(2 * e, 2 * e + 2)
            expected += weights[e] * 1.5 * module.B[:, block] @ (module.A[block] @ x[t])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_layer_equals_the_reference_numbers(shared_golden: Path) -> None:
    data = {key: torch.from_numpy(value) for key, value in np.load(shared_golden / "dynmole.npz").items()}
    module = bank(10, 9, num_experts=6, rank=3, alpha=3 * float(data["L_scale"]))
    module.A.data = data["L_A"].flatten(0, 1)
    module.B.data = data["L_B"].permute(1, 0, 2).flatten(1)
    module.router.weight.data = data["L_Wg"]
    found = module(data["L_x"], data["L_x"] @ data["L_W"].T)
    torch.testing.assert_close(found, data["L_y_soft"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("experts", "rank"), [(6, 4), (1, 3)])
def test_the_parameter_formula_counts_the_parameters(experts: int, rank: int) -> None:
    config, site = LoRAMoEConfig(num_experts=experts, rank=rank, delta=0.0), Site("site", 40, 24)
    assert config.num_parameters(site) == sum(p.numel() for p in config.build(site).parameters())


def test_the_published_shape_has_the_published_number_of_parameters() -> None:
    """Six experts of rank 24 on the feed-forward maps of Llama-2-7B."""
    config = LoRAMoEConfig(rank=24)
    sites = [Site("gate", 4096, 11008), Site("up", 4096, 11008), Site("down", 11008, 4096)]
    assert 32 * sum(config.num_parameters(site) for site in sites) == 212_484_096


def test_experts_that_cannot_be_dealt_evenly_are_refused() -> None:
    with pytest.raises(ValidationError, match="num_experts: 6 experts cannot be dealt evenly to 4 groups"):
        LoRAMoEConfig(num_groups=4)
    for allowed in ({"delta": 0.0}, {"aux_loss_coefficient": 0.0}, {"num_experts": 8}):
        config = LoRAMoEConfig(**{"num_groups": 4, **allowed})
        assert config.row_groups == (4 if "num_experts" in allowed else None)
        assert config_from_dict(config.model_dump()) == config


def test_without_a_loss_the_router_waits_for_b() -> None:
    site = Site("site", 6, 5)
    assert "router.weight" not in LoRAMoEConfig().build(site).silent_at_start()
    assert "router.weight" in LoRAMoEConfig(aux_loss_coefficient=0.0).build(site).silent_at_start()


def test_every_router_has_the_loss_of_its_own_rows(tiny_llama: Path) -> None:
    config = LoRAMoEConfig(num_experts=4, rank=2, dropout=0.0, target_modules=["up_proj"])
    model, ids = add_random(llama(tiny_llama), config), token_ids(3, 5)
    mask, groups = torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1] * 4 + [0]]), torch.tensor([1, 0, 1])
    traces: list[Any] = []
    with AdapterContext(token_mask=mask, groups=groups, observe=traces.append) as context:
        model(input_ids=ids, attention_mask=mask)
    expected = 0.0
    for trace in traces:
        gates = trace.gates.view(3, 5, 4).double() * mask[..., None]
        z = torch.stack([gates[m].sum(0) * torch.where(torch.arange(4) // 2 == groups[m], 1.1, 0.9) for m in range(3)])
        expected += 0.1 * float(z.var(correction=0) / z.mean())
    assert len(traces) == 2 and context.aux_loss().item() == pytest.approx(expected, rel=1e-5)
