"""CoMoL against the method written out, and the parameter counts of its paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from smore_cli.methods import Site, config_from_dict
from smore_cli.methods.comol import CoMoLConfig
from smore_cli.methods.lora import LoRAConfig
from smore_cli.nn.low_rank import LowRank
from tests.methods.flat import counted, fresh_bank, random_bank, silent_parameters, update
from tests.nn.test_gradients import gradcheck
from tests.nn.trees import rows

SMALL: dict[str, Any] = {"num_experts": 4, "rank": 3}


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_the_update_equals_the_method_written_out(alpha: float | None) -> None:
    bank, x = random_bank(CoMoLConfig(**SMALL, alpha=alpha)), rows(12, 6)
    matrices, scale = bank.core.M, 1.0 if alpha is None else 2.0  # type: ignore[attr-defined]
    for t, out in enumerate(update(bank, x)):
        h = bank.A @ x[t]
        g = torch.softmax(bank.router.weight @ h, 0)
        mixed = sum(g[e] * matrices[e] for e in range(4))
        torch.testing.assert_close(out, scale * bank.B @ (mixed.T @ h), rtol=1e-12, atol=1e-12)


def test_gradients_equal_finite_differences() -> None:
    gradcheck(random_bank(CoMoLConfig(num_experts=3, rank=2), 4, 3), rows(3, 4))


def test_one_expert_with_the_identity_is_plain_lora() -> None:
    bank, lora, x = random_bank(CoMoLConfig(num_experts=1, rank=3)), LowRank(6, 4, rank=3, scale=1).double(), rows(7, 6)
    with torch.no_grad():
        bank.core.M.copy_(torch.eye(3)[None])  # type: ignore[attr-defined]
    lora.load_state_dict({"lora_A": bank.A, "lora_B": bank.B})
    torch.testing.assert_close(update(bank, x), lora(x, x.new_zeros(7, 4)), rtol=1e-12, atol=1e-12)


def test_a_fresh_adapter_is_silent_but_learns_through_b() -> None:
    bank = fresh_bank(CoMoLConfig(**SMALL))
    assert not update(bank, rows(7, 6)).any()
    assert silent_parameters(bank) == bank.silent_at_start() == {"A", "core.M", "router.weight"}


def test_the_papers_parameter_counts_for_qwen3_8b() -> None:
    """q, k, v, o and down_proj of 36 layers: LoRA 24.77 million, CoMoL 25.16, with routers on x 33.39 (table)."""
    shapes = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (12288, 4096)]
    sites = [Site("site", *shape) for shape in shapes]
    lora = 36 * sum(LoRAConfig(rank=16).num_parameters(site) for site in sites)
    comol = 36 * sum(CoMoLConfig().num_parameters(site) for site in sites)
    on_x = comol + 36 * sum(8 * (site.in_features - 16) for site in sites)
    assert [round(n / 1e6, 2) for n in (lora, comol)] == [24.77, 25.16]
    assert on_x / 1e6 == pytest.approx(33.39, abs=0.01)


@pytest.mark.parametrize("shape", [{}, {"num_experts": 1}, {"num_experts": 5, "rank": 3}])
def test_the_parameter_formula_counts_the_parameters(shape: dict[str, Any]) -> None:
    config = CoMoLConfig(**shape)
    assert config.num_parameters(Site("site", 11, 7)) == counted(config, 11, 7)


def test_bfloat16_gives_the_float64_update_up_to_rounding() -> None:
    config = CoMoLConfig(num_experts=4, rank=8)
    exact, half, x = random_bank(config, 64, 48), random_bank(config, 64, 48).float(), rows(50, 64)
    out = half(x.bfloat16(), torch.zeros(50, 48, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    error = (out.double() - update(exact, x)).norm(dim=-1) / update(exact, x).norm(dim=-1)
    assert error.median() < 0.02


@pytest.mark.parametrize("fields", [{"num_experts": 0}, {"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"top_k": 2}])
def test_settings_that_make_no_sense_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        CoMoLConfig(**fields)


def test_settings_survive_the_trip_through_a_dictionary() -> None:
    config = CoMoLConfig(num_experts=3, alpha=4.0)
    assert config_from_dict(config.model_dump()) == config
