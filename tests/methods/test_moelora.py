"""MoELoRA: a plain mixture in the forward pass, two losses beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from smore_cli.methods import Site, config_from_dict
from smore_cli.methods.moelora import MoELoRAConfig
from smore_cli.nn import AdapterContext
from smore_cli.nn.low_rank import LowRank
from tests.methods.flat import counted, expert, fresh_bank, random_bank, silent_parameters, update
from tests.nn.test_gradients import gradcheck
from tests.nn.trees import rows

SMALL: dict[str, Any] = {"num_experts": 4, "rank": 2, "alpha": 3.0}


@pytest.mark.parametrize("top_k", [2, 3, 4])
def test_the_update_equals_the_method_written_out(top_k: int) -> None:
    bank, x = random_bank(MoELoRAConfig(**SMALL, top_k=top_k)), rows(12, 6)
    expected = torch.zeros(12, 4, dtype=torch.float64)
    for t, row in enumerate(x):
        p = torch.softmax(bank.router.weight @ row, 0)
        best = sorted(range(4), key=lambda e: -p[e].item())[:top_k]
        for e in best:
            A, B = expert(bank, e)
            expected[t] += p[e] / sum(p[b] for b in best) * 3.0 / 2 * (B @ (A @ row))
    torch.testing.assert_close(update(bank, x), expected, rtol=1e-12, atol=1e-12)


def aux(fields: dict[str, Any], x: torch.Tensor, mask: torch.Tensor) -> float:
    with AdapterContext(token_mask=mask) as context:
        update(random_bank(MoELoRAConfig(**SMALL, **fields)), x)
    return context.aux_loss().item()


def test_both_losses_have_coefficients_of_their_own() -> None:
    x, mask = rows(12, 6).view(2, 6, 6), torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    balance = aux({"aux_loss_coefficient": 1.0, "contrastive_coefficient": 0.0}, x, mask)
    contrast = aux({"aux_loss_coefficient": 0.0, "contrastive_coefficient": 1.0}, x, mask)
    both = aux({"aux_loss_coefficient": 0.3, "contrastive_coefficient": 0.2}, x, mask)
    assert balance > 0 and contrast > 0 and both == pytest.approx(0.3 * balance + 0.2 * contrast)
    assert aux({"aux_loss_coefficient": 0.0, "contrastive_coefficient": 0.0}, x, mask) == 0


def test_the_temperature_and_the_number_of_tokens_reach_the_contrast() -> None:
    x, mask = rows(24, 6).view(2, 12, 6), torch.ones(2, 12)
    only: dict[str, Any] = {"aux_loss_coefficient": 0.0, "contrastive_coefficient": 1.0}
    values = {aux({**only, **more}, x, mask) for more in ({}, {"temperature": 0.5}, {"contrast_tokens": 4})}
    assert len(values) == 3


def test_gradients_of_update_and_losses_equal_finite_differences() -> None:
    fields = {"aux_loss_coefficient": 0.3, "contrastive_coefficient": 0.4, "temperature": 0.5}
    gradcheck(random_bank(MoELoRAConfig(num_experts=3, rank=1, **fields), 4, 3), rows(3, 4))  # type: ignore[arg-type]


def test_one_expert_is_plain_lora() -> None:
    bank = random_bank(MoELoRAConfig(num_experts=1, top_k=1, rank=3, alpha=6.0))
    lora, x = LowRank(6, 4, rank=3, scale=2).double(), rows(7, 6)
    lora.load_state_dict({"lora_A": bank.A, "lora_B": bank.B})
    torch.testing.assert_close(update(bank, x), lora(x, x.new_zeros(7, 4)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("fields", "silent"),
    [
        ({}, {"A"}),
        ({"contrastive_coefficient": 0.0}, {"A"}),
        ({"aux_loss_coefficient": 0.0}, {"A", "router.weight"}),
        ({"top_k": 4}, {"A", "router.weight"}),
        ({"num_experts": 1, "top_k": 1}, {"A", "router.weight"}),
    ],
)
def test_the_declared_silence_at_the_start_is_the_true_one(fields: dict[str, Any], silent: set[str]) -> None:
    bank = fresh_bank(MoELoRAConfig(**{**SMALL, **fields}))
    assert not update(bank, rows(7, 6)).any()
    assert silent_parameters(bank, torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])) == bank.silent_at_start() == silent


@pytest.mark.parametrize("shape", [{}, {"num_experts": 1, "top_k": 1}, {"num_experts": 5, "rank": 3}])
def test_the_parameter_formula_counts_the_parameters(shape: dict[str, Any]) -> None:
    config = MoELoRAConfig(**shape)
    assert config.num_parameters(Site("site", 11, 7)) == counted(config, 11, 7)


def test_losses_and_gradients_are_finite_in_bfloat16() -> None:
    bank, mask = random_bank(MoELoRAConfig(), 64, 48).float(), torch.ones(2, 25)
    with AdapterContext(token_mask=mask) as context:
        out = update(bank, rows(50, 64).view(2, 25, 64).bfloat16())
    (out.float().square().sum() + context.aux_loss()).backward()
    assert out.dtype == torch.bfloat16 and all(record.sums.dtype == torch.float32 for record in context.records)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in bank.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 9}, "top_k: 9 experts cannot be picked from 8"),
        ({"top_k": 1}, "top_k: a single pick"),
        ({"temperature": 0.0}, "greater than or equal to 0.01"),
        ({"contrast_tokens": 1}, "greater than or equal to 2"),
        ({"contrastive_coefficient": -1.0}, "greater than or equal to 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MoELoRAConfig(**fields)


def test_settings_survive_the_trip_through_a_dictionary() -> None:
    config = MoELoRAConfig(temperature=0.2, contrast_tokens=10)
    assert config_from_dict(config.model_dump()) == config
