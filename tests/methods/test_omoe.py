"""OMoE against the method written out on the experts' whole outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from pydantic import ValidationError

from smore_cli.methods import Site, config_from_dict
from smore_cli.methods.mola import MoLAConfig
from smore_cli.methods.omoe import OMoEConfig
from smore_cli.nn.gram_schmidt import NORM_FLOOR
from smore_cli.nn.low_rank import LowRank
from tests.methods.flat import counted, expert, fresh_bank, random_bank, silent_parameters, update
from tests.nn.test_gradients import gradcheck
from tests.nn.trees import rows

if TYPE_CHECKING:
    from torch import Tensor

    from smore_cli.nn.bank import Bank

SMALL: dict[str, Any] = {"num_experts": 3, "rank": 2, "alpha": 3.0}
KINDS: list[dict[str, Any]] = [
    {},
    {"order": "gate"},
    {"normalise": True},
    {"top_k": 2},
    {"top_k": 2, "order": "gate"},
    {"top_k": 2, "order": "gate", "normalise": True},
]


def written_out(bank: Bank, x: Tensor, config: OMoEConfig) -> Tensor:
    """Scale sum_e g_e u_e, token by token: pick, put in order, subtract projections, weigh."""
    out = torch.zeros(len(x), len(bank.B), dtype=torch.float64)
    for t, row in enumerate(x):
        p = torch.softmax(bank.router.weight @ row, 0)
        k = config.top_k or config.num_experts
        picked = sorted(range(config.num_experts), key=lambda e: -p[e].item())[:k]
        gates = {e: p[e] / sum(p[f] for f in picked) for e in picked}
        found: list[Tensor] = []
        for e in picked if config.order == "gate" else sorted(picked):
            A, B = expert(bank, e)
            u = B @ (A @ row)
            for earlier in found:
                u = u - (u @ earlier) / (earlier @ earlier) * earlier
            found.append(u)
            out[t] += gates[e] * (u / (u @ u + NORM_FLOOR**2).sqrt() if config.normalise else u)
    return out * 3.0 / 2


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_update_equals_the_method_written_out(kind: dict[str, Any]) -> None:
    config = OMoEConfig(**SMALL, **kind)
    bank, x = random_bank(config, 6, 5), rows(12, 6)
    torch.testing.assert_close(update(bank, x), written_out(bank, x, config), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradients_equal_finite_differences(kind: dict[str, Any]) -> None:
    gradcheck(random_bank(OMoEConfig(**{**SMALL, "rank": 1}, **kind), 4, 3), rows(3, 4))


def test_experts_with_orthogonal_outputs_are_a_plain_mixture() -> None:
    ours = random_bank(OMoEConfig(**SMALL), 6, 7)
    plain = MoLAConfig(**SMALL, top_k=3)
    with torch.no_grad():
        ours.B.copy_(torch.linalg.qr(ours.B).Q)
    theirs = random_bank(plain, 6, 7)
    theirs.load_state_dict(ours.state_dict())
    x = rows(12, 6)
    torch.testing.assert_close(update(ours, x), update(theirs, x), rtol=1e-12, atol=1e-12)


def test_equal_experts_count_once() -> None:
    bank, x = random_bank(OMoEConfig(**SMALL)), rows(12, 6)
    with torch.no_grad():
        bank.A.copy_(bank.A[:2].repeat(3, 1))
        bank.B.copy_(bank.B[:, :2].repeat(1, 3))
        gates = torch.softmax(x @ bank.router.weight.T, -1)
    A, B = expert(bank, 0)
    torch.testing.assert_close(update(bank, x), 1.5 * gates[:, :1] * (x @ A.T @ B.T), rtol=1e-7, atol=1e-7)


def test_what_an_expert_that_is_not_picked_says_does_not_matter() -> None:
    bank, x = random_bank(OMoEConfig(**SMALL, top_k=2)), rows(12, 6)
    before, picked = update(bank, x), bank.router(x).picked.squeeze(1)
    with torch.no_grad():
        bank.B[:, :2].mul_(5)
    same = (update(bank, x) == before).all(-1)
    assert same.tolist() == (~picked[:, 0]).tolist() and 0 < same.sum() < 12


def test_one_expert_is_plain_lora() -> None:
    bank, lora, x = (
        random_bank(OMoEConfig(num_experts=1, rank=3)),
        LowRank(6, 4, rank=3, scale=32 / 3).double(),
        rows(7, 6),
    )
    lora.load_state_dict({"lora_A": bank.A, "lora_B": bank.B})
    torch.testing.assert_close(update(bank, x), lora(x, x.new_zeros(7, 4)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_fresh_adapter_is_silent_but_learns_through_b(kind: dict[str, Any]) -> None:
    bank = fresh_bank(OMoEConfig(**SMALL, **kind))
    assert not update(bank, rows(7, 6)).any()
    assert silent_parameters(bank) == bank.silent_at_start() == {"A", "router.weight"}


def test_bfloat16_gives_the_float64_update_up_to_rounding() -> None:
    config = OMoEConfig(num_experts=2, rank=4)
    exact, x = random_bank(config, 64, 48), rows(50, 64)
    half = random_bank(config, 64, 48).float()
    out = half(x.bfloat16(), torch.zeros(50, 48, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    error = (out.double() - update(exact, x)).norm(dim=-1) / update(exact, x).norm(dim=-1)
    assert error.median() < 0.02


@pytest.mark.parametrize("shape", [{}, {"num_experts": 1}, {"num_experts": 5, "rank": 3, "top_k": 2}])
def test_the_parameter_formula_counts_the_parameters(shape: dict[str, Any]) -> None:
    config = OMoEConfig(**shape)
    assert config.num_parameters(Site("site", 11, 7)) == counted(config, 11, 7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 3}, "top_k: 3 experts cannot be picked from 2"),
        ({"top_k": 1}, "top_k: a single expert has nothing to be orthogonal to"),
        ({"order": "size"}, "'index' or 'gate'"),
        ({"num_experts": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        OMoEConfig(**fields)


def test_settings_survive_the_trip_through_a_dictionary() -> None:
    config = OMoEConfig(top_k=2, order="gate", normalise=True)
    assert config_from_dict(config.model_dump()) == config
