"""MoDE against the method written out, what it contains, and the parameter shares of its paper."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from pydantic import ValidationError

from smore_cli.methods import Site, config_from_dict
from smore_cli.methods.hydralora import HydraLoRAConfig
from smore_cli.methods.mode import MoDEConfig
from smore_cli.methods.mola import MoLAConfig
from smore_cli.nn.low_rank import LowRank
from tests.methods.flat import counted, fresh_bank, random_bank, silent_parameters, update
from tests.nn.test_gradients import gradcheck
from tests.nn.trees import rows

if TYPE_CHECKING:
    from smore_cli.nn.bank import Bank


def vector(bank: Bank, i: int, j: int) -> torch.Tensor:
    """b_ji, choice i of rank j."""
    return bank.B[:, i * len(bank.A) + j]


@pytest.mark.parametrize(("rank", "p"), [(4, 1), (4, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("m", [1, 3])
def test_the_update_equals_the_method_written_out(m: int, rank: int, p: int) -> None:
    bank, x = random_bank(MoDEConfig(num_experts=m, rank=rank, ranks_per_gate=p)), rows(12, 6)
    for t, out in enumerate(update(bank, x)):
        expected = torch.zeros(4, dtype=torch.float64)
        for j in range(rank):
            group = j // p
            g = torch.softmax(bank.router.weight[group * m : (group + 1) * m] @ x[t], 0)
            for i in range(m):
                expected += g[i] * (bank.A[j] @ x[t]) * vector(bank, i, j)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("p", [1, 2])
def test_gradients_equal_finite_differences(p: int) -> None:
    gradcheck(random_bank(MoDEConfig(num_experts=3, rank=2, ranks_per_gate=p), 4, 3), rows(3, 4))


@pytest.mark.parametrize("p", [1, 3])
def test_one_vector_a_rank_is_plain_lora(p: int) -> None:
    """The paper's 1 x r x r = LoRA."""
    bank, x = random_bank(MoDEConfig(num_experts=1, rank=3, ranks_per_gate=p, alpha=6.0)), rows(7, 6)
    lora = LowRank(6, 4, rank=3, scale=2).double()
    lora.load_state_dict({"lora_A": bank.A, "lora_B": bank.B})
    torch.testing.assert_close(update(bank, x), lora(x, x.new_zeros(7, 4)), rtol=1e-12, atol=1e-12)


def test_one_gate_for_all_ranks_is_a_mixture_with_a_shared_a() -> None:
    """The paper's m x r x r = LoRA experts with a shared down-projection, which is HydraLoRA."""
    ours = random_bank(MoDEConfig(num_experts=3, rank=4, ranks_per_gate=4))
    hydra = random_bank(HydraLoRAConfig(num_experts=3, rank=4, alpha=4.0))
    hydra.load_state_dict(ours.state_dict())
    x = rows(12, 6)
    torch.testing.assert_close(update(ours, x), update(hydra, x), rtol=1e-12, atol=1e-12)


def test_equal_routers_of_all_ranks_are_one_router() -> None:
    ours = random_bank(MoDEConfig(num_experts=3, rank=4))
    one = random_bank(MoDEConfig(num_experts=3, rank=4, ranks_per_gate=4))
    with torch.no_grad():
        ours.router.weight.copy_(one.router.weight.repeat(4, 1))
        ours.A.copy_(one.A)
        ours.B.copy_(one.B)
    torch.testing.assert_close(update(ours, rows(12, 6)), update(one, rows(12, 6)), rtol=1e-12, atol=1e-12)


def test_a_mixture_whose_experts_share_their_a_is_a_mixture_with_a_shared_a() -> None:
    """Block core with tied A = fan core."""
    hydra = random_bank(HydraLoRAConfig(num_experts=3, rank=2, alpha=4.0))
    block = random_bank(MoLAConfig(num_experts=3, rank=2, alpha=4.0, top_k=3))
    block.load_state_dict({**hydra.state_dict(), "A": hydra.A.repeat(3, 1)})
    torch.testing.assert_close(update(block, rows(12, 6)), update(hydra, rows(12, 6)), rtol=1e-12, atol=1e-12)


def test_the_formula_gives_the_papers_shares_of_gemma_2b() -> None:
    """LoRA and MoLoRA fix the summed widths of the adapted maps, in per cent; three rows of MoDE must follow."""
    lora_64, molora_16x4 = 6.31, 7.62  # 64 (P + Q), and 16 P more for the router
    p = (molora_16x4 - lora_64) / 16
    site = Site("site", round(1e6 * p), round(1e6 * (lora_64 / 64 - p)))
    for m, share in ((16, 6.64), (6, 2.69), (4, 1.90)):
        assert MoDEConfig(num_experts=m, rank=4).num_parameters(site) / 1e6 == pytest.approx(share, abs=0.01)


def test_a_fresh_adapter_is_silent_but_learns_through_b() -> None:
    bank = fresh_bank(MoDEConfig())
    assert not update(bank, rows(7, 6)).any()
    assert silent_parameters(bank) == bank.silent_at_start() == {"A", "router.weight"}


@pytest.mark.parametrize("shape", [{}, {"num_experts": 1}, {"num_experts": 3, "rank": 6, "ranks_per_gate": 2}])
def test_the_parameter_formula_counts_the_parameters(shape: dict[str, Any]) -> None:
    config = MoDEConfig(**shape)
    assert config.num_parameters(Site("site", 11, 7)) == counted(config, 11, 7)


def test_bfloat16_gives_the_float64_update_up_to_rounding() -> None:
    exact, half, x = random_bank(MoDEConfig(), 64, 48), random_bank(MoDEConfig(), 64, 48).float(), rows(50, 64)
    out = half(x.bfloat16(), torch.zeros(50, 48, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    error = (out.double() - update(exact, x)).norm(dim=-1) / update(exact, x).norm(dim=-1)
    assert error.median() < 0.02


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ranks_per_gate": 3}, "ranks_per_gate: 4 ranks cannot be split into groups of 3"),
        ({"ranks_per_gate": 8}, "ranks_per_gate: 4 ranks cannot be split into groups of 8"),
        ({"num_experts": 0}, "greater than or equal to 1"),
        ({"aux_loss_coefficient": 0.1}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MoDEConfig(**fields)


def test_settings_survive_the_trip_through_a_dictionary() -> None:
    config = MoDEConfig(num_experts=3, rank=6, ranks_per_gate=2, alpha=4.0)
    assert config_from_dict(config.model_dump()) == config
