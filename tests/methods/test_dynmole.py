"""DynMoLE against the method written out token by token, and what must hold of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from smore_cli.errors import AdapterError
from smore_cli.methods import Site, config_from_dict
from smore_cli.methods.dynmole import RELEASED, DynMoLEConfig
from smore_cli.methods.lora import LoRAConfig
from smore_cli.nn import AdapterContext, adapted_modules, attach
from smore_cli.nn.attach import find_targets, sites_of
from tests.methods.dynmole_oracle import losses_by_loops, update_by_loops
from tests.nn.models import adapter_gradients, add_random, llama, token_ids
from tests.nn.test_gradients import gradcheck
from tests.nn.trees import randomise_, rows

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from smore_cli.nn.bank import Bank

LLAMA2 = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
SMALL: dict[str, Any] = {"num_experts": 5, "rank": 2, "alpha": 3.0}
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 1, 1]])


def bank_of(d_in: int = 6, d_out: int = 4, *, seed: int = 0, **fields: Any) -> Bank:
    """Returns a float64 adapter in evaluation mode whose every parameter is random."""
    bank: Bank = DynMoLEConfig(**{**SMALL, **fields}).build(Site("site", d_in, d_out)).double().eval()  # type: ignore[assignment]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        randomise_(bank)
    return bank


def tokens(n: int = 12, d: int = 6) -> Tensor:
    """Of growing size, so that the first have unsure routers and the last sure ones."""
    return rows(n, d) * torch.linspace(0.1, 3, n, dtype=torch.float64)[:, None]


VARIANTS: list[dict[str, Any]] = [
    {},
    {"preset": "released"},
    {"threshold_on": "raw"},
    {"threshold_on": "raw", "threshold": 1.3},
    {"crossing": True},
    {"crossing": True, "renormalise": True},
    {"renormalise": True},
    {"balance_fractions": "hard"},
    {"balance": "pooled", "balance_fractions": "hard", "entropy_over_padding": True},
    {"entropy": "renyi"},
    {"q": 1.0, "threshold": 0.7},
    {"q": 0.5, "top_k": 3, "top_p": 0.2},
    {"q": 2.0, "eps": 0.0, "threshold": 0.8, "top_k": 1, "top_p": 0.5},
    {"threshold": 1.0},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_the_update_equals_the_method_written_out(fields: dict[str, Any]) -> None:
    config, bank, x = DynMoLEConfig(**{**SMALL, **fields}), bank_of(**fields), tokens()
    expected, picks = update_by_loops(bank, x, config)
    sizes = {len(picked) for picked in picks}
    assert min(sizes) < 5 and (5 in sizes) == (config.threshold < 1 or config.threshold_on == "raw")
    y = rows(12, 4, seed=9)
    torch.testing.assert_close(bank(x, y), y + expected, rtol=1e-12, atol=1e-13)
    single = bank.float()(x.float(), y.float())
    torch.testing.assert_close(single, (y + expected).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_the_auxiliary_loss_of_two_routers_equals_the_method_written_out(fields: dict[str, Any]) -> None:
    config, x = DynMoLEConfig(**{**SMALL, **fields}), tokens()
    banks = [bank_of(seed=seed, **fields) for seed in range(2)]
    with AdapterContext(token_mask=MASK) as context:
        for bank in banks:
            bank(x, x.new_zeros(12, 4))
    expected = losses_by_loops(banks, x, config, MASK)
    assert context.aux_loss().item() == pytest.approx(sum(expected), rel=1e-12)
    assert min(expected) > 1e-4


@pytest.mark.parametrize("fields", [v for v in VARIANTS if v.get("balance_fractions") != "hard"], ids=str)
def test_gradients_equal_finite_differences(fields: dict[str, Any]) -> None:
    large = {"entropy_loss_coefficient": 0.5, "aux_loss_coefficient": 0.5}
    bank = bank_of(4, 3, seed=1, **{**SMALL, "num_experts": 3, **fields, **large})
    gradcheck(bank, rows(3, 4))


# Settings.


def test_the_defaults_are_the_released_ones_except_that_padding_never_counts_and_routers_are_judged_singly() -> None:
    config = DynMoLEConfig()
    values = (config.threshold, config.q, config.eps, config.top_p, config.top_k, config.num_experts, config.rank)
    assert values == (0.9, 1.1, 1e-5, 0.75, 2, 6, 24)
    assert (config.alpha, config.dropout, config.entropy_loss_coefficient, config.aux_loss_coefficient) == (
        48,
        0.05,
        0.01,
        0.001,
    )
    assert config.target_modules == ["gate_proj", "up_proj", "down_proj"]
    other = {field for field, value in RELEASED.items() if getattr(config, field) != value}
    assert other == {"entropy_over_padding", "balance"}


def test_the_released_preset_fills_in_what_is_not_said_and_refuses_what_contradicts_it() -> None:
    config = DynMoLEConfig(preset="released", q=1.4)
    assert all(getattr(config, field) == value for field, value in RELEASED.items()) and config.q == 1.4
    assert DynMoLEConfig(preset="released", **RELEASED, q=1.4) == config
    assert config_from_dict(config.model_dump()) == config
    others = {
        "entropy": "renyi",
        "threshold_on": "raw",
        "crossing": True,
        "renormalise": True,
        "balance_fractions": "hard",
        "balance": "per_router",
        "entropy_over_padding": False,
    }
    assert others.keys() == RELEASED.keys()
    for field, value in others.items():
        with pytest.raises(ValidationError, match=f"{field}: the preset 'released' has "):
            DynMoLEConfig(preset="released", **{field: value})
        assert getattr(DynMoLEConfig(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 2, "top_k": 3}, "top_k: 3 experts cannot be picked from 2"),
        ({"num_experts": 1}, "top_k: 2 experts cannot be picked from 1"),
        ({"q": 1.0001}, "q: 1.0001 is so near 1 that eps = 1e-05 shifts the entropy by"),
        ({"q": 0}, "greater than 0"),
        ({"top_p": 1.5}, "less than or equal to 1"),
        ({"preset": "paper"}, "'released'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DynMoLEConfig(**fields)


def test_orders_next_to_one_are_fine_without_eps() -> None:
    x, y = tokens(), torch.zeros(12, 4, dtype=torch.float64)
    near, at = (bank_of(q=q, eps=0.0)(x, y) for q in (1 + 1e-9, 1.0))
    torch.testing.assert_close(near, at, rtol=1e-12, atol=0)


def test_settings_survive_the_trip_through_a_dictionary() -> None:
    config = DynMoLEConfig(rank=3, q=1.0, target_modules="all-linear", crossing=True)
    assert config_from_dict(config.model_dump()) == config


@pytest.mark.parametrize("s", [1, 4, 6])
def test_the_parameter_formula_counts_the_parameters(s: int) -> None:
    config, site = DynMoLEConfig(num_experts=s, top_k=1, rank=3), Site("site", 7, 11)
    assert config.num_parameters(site) == sum(p.numel() for p in config.build(site).parameters())


def test_on_llama_2_7b_it_has_as_many_parameters_as_the_released_configuration() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **LLAMA2))
    config = DynMoLEConfig()
    sites = sites_of(model, find_targets(model, config.target_modules)).values()
    assert len(sites) == 96 and sum(config.num_parameters(site) for site in sites) == 212_484_096


# What must hold of the adapter.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_a_single_expert_is_plain_lora_bit_for_bit(training: bool, dtype: torch.dtype) -> None:
    site = Site("site", 16, 12)
    ours: Any = DynMoLEConfig(num_experts=1, top_k=1, rank=4, alpha=12.0, dropout=0.3).build(site)
    lora: Any = LoRAConfig(rank=4, alpha=12.0, dropout=0.3).build(site)
    torch.manual_seed(0)
    randomise_(ours)
    with torch.no_grad():
        lora.lora_A.copy_(ours.A)
        lora.lora_B.copy_(ours.B)
    outputs, gradients = [], []
    for adapter, parameters in ((ours, (ours.A, ours.B)), (lora, (lora.lora_A, lora.lora_B))):
        adapter.to(torch.float64 if dtype == torch.float64 else torch.float32).train(training)
        x, y = (rows(9, d, seed).to(dtype) for d, seed in ((16, 1), (12, 2)))
        torch.manual_seed(1)  # dropout
        with AdapterContext() as context:
            out = adapter(x, y)
        outputs.append(out)
        gradients.append(torch.autograd.grad(out.float().square().sum(), parameters))
        assert context.aux_loss().item() == 0
    assert torch.equal(*outputs)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_fresh_adapter_changes_nothing_and_its_first_gradients_are_where_it_says() -> None:
    for fields in ({}, {"entropy_loss_coefficient": 0.0, "aux_loss_coefficient": 0.0}):
        torch.manual_seed(0)
        adapter = DynMoLEConfig(**SMALL, **fields).build(Site("site", 6, 4))
        x, y = rows(9, 6).float(), rows(9, 4).float()
        with AdapterContext() as context:
            out = adapter(x, y)
        assert torch.equal(out, y)
        (out.square().sum() + context.aux_loss()).backward()
        silent = {name for name, p in adapter.named_parameters() if p.grad is None or not p.grad.any()}
        assert silent == adapter.silent_at_start() == ({"A", "router.weight"} if fields else {"A"})


def test_a_fresh_router_is_unsure_so_training_starts_dense() -> None:
    torch.manual_seed(0)
    bank: Any = DynMoLEConfig().build(Site("site", 256, 8))
    with AdapterContext() as context:
        bank(torch.randn(2000, 256), torch.zeros(2000, 8))
    assert 5.0 < context.loads[0].load.sum() / 2000 < 5.5  # 5.22 experts a token for inputs of unit variance


def test_experts_that_are_all_the_same_make_routing_irrelevant_where_weights_sum_to_one() -> None:
    bank, x, y = bank_of(renormalise=True), tokens(), torch.zeros(12, 4, dtype=torch.float64)
    with torch.no_grad():
        bank.A.copy_(bank.A[:2].repeat(5, 1))
        bank.B.copy_(bank.B[:, :2].repeat(1, 5))
        expected = 1.5 * x @ bank.A[:2].T @ bank.B[:, :2].T
    torch.testing.assert_close(bank(x, y), expected, rtol=1e-12, atol=1e-13)


def test_permuting_the_experts_or_shifting_all_logits_changes_nothing() -> None:
    bank, x, y = bank_of(), tokens(), torch.zeros(12, 4, dtype=torch.float64)
    expected = bank(x, y)
    order = torch.tensor([3, 0, 4, 1, 2])
    columns = (2 * order[:, None] + torch.arange(2)).flatten()
    with torch.no_grad():
        bank.A.copy_(bank.A[columns])
        bank.B.copy_(bank.B[:, columns])
        bank.router.weight.copy_(bank.router.weight[order] + rows(1, 6, seed=3))  # each token's logits move as one
    torch.testing.assert_close(bank(x, y), expected, rtol=1e-11, atol=1e-12)


def test_two_evaluations_are_identical_and_dropout_acts_in_training_alone() -> None:
    bank, x, y = bank_of(dropout=0.5), tokens(), torch.zeros(12, 4, dtype=torch.float64)
    assert torch.equal(bank(x, y), bank(x, y))
    assert not torch.equal(bank.train()(x, y), bank(x, y))


@pytest.mark.parametrize("preset", [None, "released"])
def test_padding_counts_in_the_released_entropy_and_nowhere_else(preset: str | None) -> None:
    x, mask = tokens(), MASK.flatten()[:, None] == 1
    values = []
    for padded in (x, torch.where(mask, x, -2 * x)):
        bank = bank_of(preset=preset)
        with AdapterContext(token_mask=MASK) as context:
            bank(padded, x.new_zeros(12, 4))
        values.append([record.loss(record.sums[None]).item() for record in context.records])
    entropies, balances = zip(*values, strict=True)
    assert balances[0] == balances[1]
    assert (entropies[0] == entropies[1]) == (preset is None)


def test_pooled_balance_is_blind_to_routers_that_collapse_apart_and_the_default_is_not() -> None:
    values = {}
    for balance in ("pooled", "per_router"):
        with AdapterContext() as context:
            for pair in ((0, 1), (2, 3)):
                bank = bank_of(
                    6, 4, num_experts=4, balance=balance, entropy_loss_coefficient=0.0, aux_loss_coefficient=1.0
                )
                with torch.no_grad():
                    bank.router.weight.zero_()
                    bank.router.weight[list(pair), 0] = 20.0
                bank(torch.ones(16, 6, dtype=torch.float64), torch.zeros(16, 4, dtype=torch.float64))
        values[balance] = context.aux_loss().item()
    assert values == pytest.approx({"pooled": 1.0, "per_router": 2.0}, rel=1e-6)


# In a model.


def test_a_model_without_feed_forward_maps_of_these_names_is_refused_with_the_names_it_has() -> None:
    model = torch.nn.ModuleDict({"c_fc": torch.nn.Linear(3, 3)})
    with pytest.raises(AdapterError, match="target_modules: 'gate_proj' matches no linear map") as refused:
        attach(model, DynMoLEConfig())
    assert "c_fc" in str(refused.value.hint)


def accumulated(model: nn.Module, parts: int) -> tuple[list[float], dict[str, Tensor]]:
    ids = token_ids(8, 9)
    mask = torch.arange(9) < torch.tensor([9, 4, 7, 2, 9, 5, 3, 8])[:, None]
    passes = []
    for ids_part, mask_part in zip(ids.chunk(parts), mask.chunk(parts), strict=True):
        with AdapterContext(token_mask=mask_part) as context:
            logits = model(input_ids=ids_part, attention_mask=mask_part.long()).logits
        passes.append(((logits.logsumexp(-1) * mask_part).sum() / mask.sum(), context))
    totals = [torch.stack(sums).sum(0) for sums in zip(*(c.statistics() for _, c in passes), strict=True)]
    values = []
    for loss, context in passes:
        aux = context.aux_loss(totals)
        values.append(aux.item())
        (loss + aux).backward()
    return values, adapter_gradients(model)


@pytest.mark.parametrize("preset", [None, "released"])
def test_a_step_does_not_depend_on_its_split_into_micro_batches(tiny_llama: Path, preset: Any) -> None:
    config = DynMoLEConfig(**SMALL, preset=preset, entropy_loss_coefficient=1.0, aux_loss_coefficient=1.0)
    model = add_random(llama(tiny_llama).double(), config).double()
    assert len(adapted_modules(model)) == 6
    values, whole = accumulated(model, 1)
    for parts in (2, 8):
        split_values, split = accumulated(model, parts)
        assert split_values == pytest.approx(values * parts, rel=1e-10)
        assert split.keys() == whole.keys() and len(whole) == 18
        for name, gradient in whole.items():
            torch.testing.assert_close(split[name], gradient, rtol=1e-7, atol=1e-10)
