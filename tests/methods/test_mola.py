"""MoLA against the method written out token by token, its allocation over the depth, and what must hold of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from smore_cli.methods import Site, config_from_dict
from smore_cli.methods.lora import LoRAConfig
from smore_cli.methods.mola import MoLAConfig
from smore_cli.nn import AdapterContext, adapted_modules, attach
from smore_cli.nn.attach import find_targets, sites_of
from tests.nn.models import llama
from tests.nn.test_gradients import gradcheck
from tests.nn.trees import randomise_, rows

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from smore_cli.nn.bank import Bank

LLAMA2 = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 1, 1]])
SMALL: dict[str, Any] = {"num_experts": 5, "rank": 2, "alpha": 3.0}


def bank_of(d_in: int = 6, d_out: int = 4, *, seed: int = 0, **fields: Any) -> Bank:
    """Returns a float64 adapter in evaluation mode whose every parameter is random."""
    bank: Bank = MoLAConfig(**{**SMALL, **fields}).build(Site("site", d_in, d_out)).double().eval()  # type: ignore[assignment]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        randomise_(bank)
    return bank


def route_by_loops(bank: Bank, row: Tensor, k: int) -> tuple[list[float], list[float]]:
    """Returns one token's probabilities and weights."""
    logits = [torch.dot(weight, row).item() for weight in bank.router.weight]
    exponents = [math.exp(z) for z in logits]
    p = [e / sum(exponents) for e in exponents]
    best = sorted(range(len(p)), key=lambda e: -p[e])[:k]
    return p, [p[e] / sum(p[b] for b in best) if e in best else 0.0 for e in range(len(p))]


@pytest.mark.parametrize("k", [2, 3, 5])
def test_the_update_equals_the_method_written_out(k: int) -> None:
    bank, x, y = bank_of(top_k=k), rows(12, 6), rows(12, 4, seed=9)
    expected = y.clone()
    for t in range(12):
        for e, weight in enumerate(route_by_loops(bank, x[t], k)[1]):
            expected[t] += weight * 3.0 / 2 * (bank.B[:, 2 * e : 2 * e + 2] @ (bank.A[2 * e : 2 * e + 2] @ x[t]))
    torch.testing.assert_close(bank(x, y), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("k", [2, 3])
def test_the_balance_loss_is_of_each_router_and_their_losses_are_added_up(k: int) -> None:
    banks, x = [bank_of(top_k=k, num_experts=s, seed=s) for s in (5, 5, 4)], rows(12, 6)
    with AdapterContext(token_mask=MASK) as context:
        for bank in banks:
            bank(x, x.new_zeros(12, 4))
    real, expected = [t for t in range(12) if MASK.flatten()[t]], 0.0
    for bank in banks:
        routed = [route_by_loops(bank, x[t], k) for t in real]
        s = len(bank.router.weight)
        for e in range(s):
            share = sum(weights[e] > 0 for _, weights in routed) / (k * len(real))  # of all picks
            expected += 1e-3 * s * share * sum(p[e] for p, _ in routed) / len(real)
    assert context.aux_loss().item() == pytest.approx(expected, rel=1e-12)


def test_gradients_equal_finite_differences() -> None:
    gradcheck(bank_of(4, 3, num_experts=3, aux_loss_coefficient=0.5), rows(3, 4))


# Allocation.


@pytest.mark.parametrize(
    ("allocation", "total"),
    [
        (5, 105_635_840),
        ([5, 5, 5, 5], 105_635_840),
        ([2, 4, 6, 8], 105_635_840),
        ([8, 2, 2, 8], 105_635_840),
        (8, 169_017_344),
        ([2, 3, 5, 6], 84_508_672),
    ],
    ids=str,
)
def test_on_llama_2_7b_the_parameter_counts_are_the_papers(allocation: Any, total: int) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **LLAMA2))
    config = MoLAConfig(num_experts=allocation)
    sites = sites_of(model, find_targets(model, config.target_modules))
    assert len(sites) == 224 and sum(config.num_parameters(site) for site in sites.values()) == total


def test_a_list_is_spread_over_the_depth() -> None:
    def counts(allocation: Any, layers: int) -> list[int]:
        config = MoLAConfig(num_experts=allocation, rank=1)
        sites = [Site("site", 3, 3, layer=layer, num_layers=layers) for layer in range(layers)]
        built: list[Any] = [config.build(site) for site in sites]
        assert [sum(p.numel() for p in bank.parameters()) for bank in built] == [
            config.num_parameters(s) for s in sites
        ]
        return [len(bank.router.weight) for bank in built]

    assert counts([2, 4, 6, 8], 8) == [2, 2, 4, 4, 6, 6, 8, 8]
    assert counts([2, 4, 6, 8], 6) == [2, 2, 4, 6, 6, 8]
    assert counts([8, 3], 2) == [8, 3]
    assert counts(5, 3) == [5, 5, 5]


def test_layers_of_a_model_get_their_entry(tiny_llama: Path) -> None:
    model = llama(tiny_llama)
    attach(model, MoLAConfig(num_experts=[2, 5], rank=2))
    for path, module in adapted_modules(model).items():
        bank: Any = module.adapters["default"]
        assert len(bank.router.weight) == (2 if ".layers.0." in path else 5)


# Settings.


def test_the_defaults_are_the_papers() -> None:
    config = MoLAConfig()
    assert (config.num_experts, config.top_k, config.rank, config.alpha) == ([2, 4, 6, 8], 2, 8, 16)
    assert (config.dropout, config.aux_loss_coefficient, config.target_modules) == (0.05, 1e-3, "all-linear")
    assert config_from_dict(config.model_dump()) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 4, "top_k": 5}, "top_k: 5 experts cannot be picked from 4"),
        ({"num_experts": [8, 3, 8], "top_k": 4}, "top_k: 4 experts cannot be picked from 3"),
        ({"num_experts": 4, "top_k": 1}, "top_k: a single pick, divided by its own sum, has weight 1"),
        ({"num_experts": []}, "at least 1 item"),
        ({"num_experts": [4, 0]}, "greater than or equal to 1"),
        ({"num_experts": 0, "top_k": 1}, "greater than or equal to 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MoLAConfig(**fields)


# What must hold of the adapter.


@pytest.mark.parametrize("training", [False, True])
def test_a_single_expert_is_plain_lora_bit_for_bit(training: bool) -> None:
    site = Site("site", 16, 12)
    ours: Any = MoLAConfig(num_experts=1, top_k=1, rank=4, alpha=12.0, dropout=0.3).build(site)
    lora: Any = LoRAConfig(rank=4, alpha=12.0, dropout=0.3).build(site)
    torch.manual_seed(0)
    randomise_(ours)
    with torch.no_grad():
        lora.lora_A.copy_(ours.A)
        lora.lora_B.copy_(ours.B)
    x, y, outputs = rows(9, 16).float(), rows(9, 12, seed=2).float(), []
    for adapter in (ours, lora):
        torch.manual_seed(1)  # dropout
        with AdapterContext() as context:
            outputs.append(adapter.train(training)(x, y))
        assert context.aux_loss().item() == 0
    assert torch.equal(*outputs)


def test_a_fresh_adapter_changes_nothing_and_its_first_gradients_are_where_it_says() -> None:
    for coefficient in (1e-3, 0.0):
        torch.manual_seed(0)
        adapter = MoLAConfig(**SMALL, aux_loss_coefficient=coefficient).build(Site("site", 6, 4))
        x, y = rows(9, 6).float(), rows(9, 4).float()
        with AdapterContext() as context:
            out = adapter(x, y)
        assert torch.equal(out, y)
        (out.square().sum() + context.aux_loss()).backward()
        silent = {name for name, p in adapter.named_parameters() if p.grad is None or not p.grad.any()}
        assert silent == adapter.silent_at_start() == ({"A"} if coefficient else {"A", "router.weight"})


def test_experts_that_are_all_the_same_make_routing_irrelevant() -> None:
    bank, x = bank_of(), rows(12, 6)
    with torch.no_grad():
        bank.A.copy_(bank.A[:2].repeat(5, 1))
        bank.B.copy_(bank.B[:, :2].repeat(1, 5))
        expected = 1.5 * x @ bank.A[:2].T @ bank.B[:, :2].T
    torch.testing.assert_close(bank(x, x.new_zeros(12, 4)), expected, rtol=1e-12, atol=1e-13)


def test_padding_does_not_change_the_balance_loss() -> None:
    bank, x, values = bank_of(), rows(12, 6), []
    for padded in (x, torch.where(MASK.flatten()[:, None] == 1, x, -2 * x)):
        with AdapterContext(token_mask=MASK) as context:
            bank(padded, x.new_zeros(12, 4))
        values.append(context.aux_loss().item())
    assert values[0] == values[1] > 0


def test_every_token_goes_to_exactly_top_k_experts_and_its_weights_sum_to_one() -> None:
    bank, x, traces = bank_of(top_k=3), rows(40, 6), []
    with AdapterContext(observe=traces.append) as context:
        bank(x, x.new_zeros(40, 4))
    assert ((traces[0].gates > 0).sum(-1) == 3).all() and context.loads[0].load.sum() == 120
    torch.testing.assert_close(traces[0].gates.sum(-1), torch.ones(40, 1).double())
