"""MoR against the method written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from smore_cli.methods import Site, config_from_dict
from smore_cli.methods.mola import MoLAConfig
from smore_cli.methods.mor import MoRConfig
from smore_cli.nn import AdapterContext
from smore_cli.nn.low_rank import LowRank
from tests.methods.flat import counted, expert, fresh_bank, random_bank, silent_parameters, update
from tests.nn.test_gradients import gradcheck
from tests.nn.trees import rows

SMALL: dict[str, Any] = {"num_experts": 4, "rank": 2, "alpha": 3.0}


@pytest.mark.parametrize("top_k", [2, 4])
@pytest.mark.parametrize("routers", [2, 3])
def test_the_update_equals_the_method_written_out(routers: int, top_k: int) -> None:
    bank, x = random_bank(MoRConfig(**SMALL, num_routers=routers, top_k=top_k)), rows(12, 6)
    sub, main = bank.router.weight, bank.router.main.weight  # type: ignore[union-attr]
    expected = torch.zeros(12, 4, dtype=torch.float64)
    for t, row in enumerate(x):
        w = torch.softmax(main @ row, 0)  # type: ignore[operator]
        p = sum(w[j] * torch.softmax(sub[4 * j : 4 * j + 4] @ row, 0) for j in range(routers))
        best = sorted(range(4), key=lambda e: -p[e].item())[:top_k]
        for e in best:
            A, B = expert(bank, e)
            expected[t] += p[e] / sum(p[b] for b in best) * 3.0 / 2 * (B @ (A @ row))
    torch.testing.assert_close(update(bank, x), expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_update_and_balance_loss_equal_finite_differences() -> None:
    gradcheck(random_bank(MoRConfig(**{**SMALL, "rank": 1}, aux_loss_coefficient=0.3), 4, 3), rows(3, 4))


def test_one_router_is_plain_top_k_bit_for_bit() -> None:
    ours, theirs = random_bank(MoRConfig(**SMALL, num_routers=1)), random_bank(MoLAConfig(**SMALL))
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(update(ours, rows(12, 6)), update(theirs, rows(12, 6)))


def test_one_expert_is_plain_lora() -> None:
    bank = random_bank(MoRConfig(num_experts=1, num_routers=1, top_k=1, rank=3, alpha=6.0))
    lora, x = LowRank(6, 4, rank=3, scale=2).double(), rows(7, 6)
    lora.load_state_dict({"lora_A": bank.A, "lora_B": bank.B})
    torch.testing.assert_close(update(bank, x), lora(x, x.new_zeros(7, 4)), rtol=1e-12, atol=1e-12)


def test_the_balance_loss_is_switchs_of_the_mixed_distribution_over_real_tokens() -> None:
    bank, x = random_bank(MoRConfig(**SMALL, aux_loss_coefficient=0.5)), rows(6, 6)
    mask = torch.tensor([1, 1, 0, 1, 1, 0])
    values = []
    for padding in (x, torch.where(mask[:, None] == 1, x, 100.0)):
        with AdapterContext(token_mask=mask) as context:
            update(bank, padding)
        values.append(context.aux_loss())
    routing = bank.router(x[mask == 1])
    picks, p = routing.picked.double().mean(0).squeeze(), routing.probabilities.mean(0).squeeze()
    torch.testing.assert_close(values, [0.5 * 4 * (picks * p).sum()] * 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("fields", "silent"),
    [
        ({}, {"A"}),
        ({"aux_loss_coefficient": 0.0}, {"A", "router.weight", "router.main.weight"}),
        ({"top_k": 4}, {"A", "router.weight", "router.main.weight"}),
        ({"num_experts": 1, "num_routers": 1, "top_k": 1}, {"A", "router.weight"}),
    ],
)
def test_the_declared_silence_at_the_start_is_the_true_one(fields: dict[str, Any], silent: set[str]) -> None:
    bank = fresh_bank(MoRConfig(**{**SMALL, **fields}))
    assert not update(bank, rows(7, 6)).any()
    assert silent_parameters(bank) == bank.silent_at_start() == silent


@pytest.mark.parametrize("shape", [{}, {"num_routers": 1}, {"num_experts": 5, "rank": 3, "num_routers": 4}])
def test_the_parameter_formula_counts_the_parameters(shape: dict[str, Any]) -> None:
    config = MoRConfig(**shape)
    assert config.num_parameters(Site("site", 11, 7)) == counted(config, 11, 7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 9}, "top_k: 9 experts cannot be picked from 8"),
        ({"top_k": 1}, "top_k: a single pick"),
        ({"num_experts": 1, "top_k": 1}, "num_routers: 2 routers have nothing to choose"),
        ({"num_routers": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MoRConfig(**fields)


def test_settings_survive_the_trip_through_a_dictionary() -> None:
    config = MoRConfig(num_routers=3, top_k=3)
    assert config_from_dict(config.model_dump()) == config
